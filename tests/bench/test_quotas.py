"""The comparison of quota policies: the same every time, and its order at a load where memory is short."""

import json

import pytest

from bench import quotas
from sched.quota import POLICIES


def test_marginal_value_serves_most_in_time_under_bursts() -> None:
    rows = {r.policy: r for r in quotas.measure([3.0], [0], quotas.PERIOD_S)}
    assert rows.keys() == POLICIES.keys()
    best = rows.pop("marginal")
    for other in rows.values():
        assert best.in_time > 1.1 * other.in_time, (best, other)
        assert best.tokens_per_s > other.tokens_per_s, (best, other)
        assert best.worst_model >= other.worst_model, (best, other)
    assert all(0 < r.in_time < 1 for r in rows.values()), "nobody was short"


def test_where_memory_is_plenty_quotas_stop_nobody() -> None:
    found = {policy: quotas.run(policy, 0.5, 1, 20.0) for policy in ("marginal", "first-come")}
    assert found["marginal"] == found["first-come"]
    assert found["marginal"]["in_time"] == 1


def test_a_run_depends_on_its_seed_alone() -> None:
    assert quotas.run("marginal", 3.0, 5, 10.0) == quotas.run("marginal", 3.0, 5, 10.0)
    assert quotas.arrivals(1, 3.0, 30.0) != quotas.arrivals(2, 3.0, 30.0)


def test_the_last_line_is_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quotas, "LOADS", (1.0,))
    monkeypatch.setattr(quotas, "PERIOD_S", 4.0)
    assert quotas.main(["--quick", "--seed", "3"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(POLICIES)
    assert {row["policy"] for row in json.loads(last)["rows"]} == set(POLICIES)
