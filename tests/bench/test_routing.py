"""The bench of routers reports every arm of every cell, the lost ones too, and the same for the same seeds."""

import json
from typing import Any

import pytest

from bench import routing
from sched.router import ROUTERS, TIER_POLICIES


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "LOADS", ((20.0, 0.3),))
    monkeypatch.setattr(routing, "TIER_LOADS", ((15.0, 0.5),))
    monkeypatch.setattr(routing, "PROMPTS", (20,))
    monkeypatch.setattr(routing, "FLEETS", {"two": (1.0, 0.5)})


def test_every_cell_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Any] = []
    for _ in range(2):
        assert routing.main(["--quick", "--seed", "7"]) == 0
        lines = capsys.readouterr().out.splitlines()
        found.append(json.loads(lines[-1]) | {"choice_us": None})
    first = found[0]
    assert first == found[1]
    assert [(c["fleet"], c["arm"]) for c in first["replicas"]] == [
        (fleet, arm) for fleet in routing.FLEETS for arm in ROUTERS
    ]
    assert [c["arm"] for c in first["tiers"]] == list(TIER_POLICIES)
    assert all(len(c["attained"]) == 2 for c in first["replicas"] + first["tiers"])
    assert all(sum(c["by"].values()) == pytest.approx(1) for c in first["tiers"])
