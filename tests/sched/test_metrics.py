"""Statistics of requests against sums and percentiles worked out by hand and by numpy, and what counts as attained."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from sched.metrics import Record, Slo, attained, jain, summarize, table

SLOS = {"a": Slo(1.0, 0.1), "b": Slo(0.5, 0.02, ttft_per_token_s=0.01)}


def record(**keys: Any) -> Record:
    """In time to the last bit: first token after 0.5 s, then 0.05 s a token."""
    given = {"rid": 0, "model": "a", "arrival_s": 1.0, "first_s": 1.5, "end_s": 2.0}
    given |= {"prompt_tokens": 10, "output_tokens": 11, "wanted_tokens": 11}
    return Record(**(given | keys))


@pytest.mark.parametrize(
    ("keys", "good"),
    [
        ({}, True),
        ({"first_s": 2.0, "end_s": 2.5}, True),
        ({"first_s": 2.1, "end_s": 2.5}, False),
        ({"end_s": 2.5}, True),
        ({"end_s": 2.51}, False),
        ({"error": "shed: late"}, False),
        ({"error": "aborted"}, False),
        ({"end_s": None}, False),
        ({"output_tokens": 10}, False),
        ({"first_s": None, "end_s": None, "output_tokens": 0}, False),
        # its own SLO goes before its model's, in both directions
        ({"ttft_slo_s": 0.4}, False),
        ({"first_s": 2.4, "end_s": 2.5, "ttft_slo_s": 1.5}, True),
        ({"tpot_slo_s": 0.04}, False),
        # an answer of one token has none to wait for
        ({"output_tokens": 1, "wanted_tokens": 1, "end_s": 1.5, "tpot_slo_s": 0.0}, True),
        # b: 0.5 s and 0.01 s a token of its prompt
        ({"model": "b", "first_s": 1.59, "end_s": 1.79}, True),
        ({"model": "b", "first_s": 1.61, "end_s": 1.8}, False),
        # nobody set one: it must only end
        ({"model": "c", "first_s": 90.0, "end_s": 900.0}, True),
        ({"model": "c", "end_s": None}, False),
    ],
)
def test_attained(keys: dict[str, Any], good: bool) -> None:
    assert attained(record(**keys), SLOS) is good


def test_a_scaled_slo_is_so_many_times_what_a_request_takes_alone() -> None:
    slo = Slo(0.02, 0.01, 0.001).scaled(5, 10)
    assert slo.first_s(100) == pytest.approx(5 * (0.02 + 0.1))
    assert slo.tpot_s == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"tpot_s must be seconds >= 0, got -1"):
        Slo(1, -1)


def random_records(seed: int, n: int) -> list[Record]:
    rng = np.random.default_rng(seed)
    found = []
    for rid in range(n):
        arrival, tokens = float(rng.uniform(0, 50)), int(rng.integers(1, 40))
        first = arrival + float(rng.exponential(0.6))
        gaps = rng.exponential(0.02, tokens - 1)
        r = record(
            rid=rid, model="abc"[rng.integers(3)], arrival_s=arrival, first_s=first, end_s=first + float(gaps.sum()),
            prompt_tokens=int(rng.integers(1, 99)), output_tokens=tokens, wanted_tokens=tokens, itl_s=tuple(gaps), cached_tokens=3,
        )  # fmt: skip
        fate = rng.integers(10)
        if fate == 0:
            r = dataclasses.replace(
                r, first_s=None, end_s=r.arrival_s, output_tokens=0, error="shed: hopeless"
            )
        elif fate == 1:
            r = dataclasses.replace(r, end_s=None, output_tokens=tokens - 1)
        elif fate == 2:
            r = dataclasses.replace(r, error="503")
        found.append(r)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_against_numpy(seed: int) -> None:
    records = random_records(seed, 300)
    found = summarize(records, SLOS, duration_s=60.0)
    for name, group in [*found["models"].items(), (None, found)]:
        mine = [r for r in records if name in (None, r.model)]
        done = [r for r in mine if r.error is None and r.end_s is not None]
        assert (group["requests"], group["completed"]) == (len(mine), len(done))
        assert group["failed"] == group["shed"] + group["unfinished"] + group["errors"].get("503", 0)
        assert group["shed"] == sum(r.error == "shed: hopeless" for r in mine) > 0
        assert group["output_throughput"] == pytest.approx(sum(r.output_tokens for r in done) / 60)
        assert group["request_throughput"] == pytest.approx(len(done) / 60)
        good = [r for r in mine if attained(r, SLOS)]
        assert group["slo_attainment"] == len(good) / len(mine)
        assert group["request_goodput"] == pytest.approx(len(good) / 60)
        assert group["attained_output_throughput"] == pytest.approx(sum(r.output_tokens for r in good) / 60)
        assert group["slo_attainment"] <= min(group["ttft_attainment"], group["tpot_attainment"])
        ms = {
            "ttft": [1e3 * (r.first_s - r.arrival_s) for r in done if r.first_s],
            "tpot": [1e3 * np.mean(r.itl_s) for r in done if r.itl_s],
            "itl": [1e3 * g for r in done for g in r.itl_s],
            "e2el": [1e3 * (r.end_s - r.arrival_s) for r in done if r.end_s],
        }
        for key, values in ms.items():
            assert group[f"mean_{key}_ms"] == pytest.approx(np.mean(values))
            assert group[f"median_{key}_ms"] == pytest.approx(np.median(values))
            for p in (50, 90, 95, 99):
                assert group[f"p{p}_{key}_ms"] == pytest.approx(np.percentile(values, p))
        ended = [r for r in mine if r.end_s is not None]
        inside = [sum(o.arrival_s <= r.arrival_s < o.end_s for o in ended if o.end_s) for r in ended]
        assert group["max_concurrency"] == max(inside)
    assert found["slo_attainment_worst_model"] == min(m["slo_attainment"] for m in found["models"].values())
    json.dumps(found, allow_nan=False)
    assert len(table(found).splitlines()) == 5


def test_warm_up_is_left_out_with_its_time() -> None:
    records = [record(arrival_s=at, first_s=at + 0.5, end_s=at + 1) for at in (0.0, 4.0, 9.0)]
    found = summarize(records, SLOS, warmup_s=4.0)
    assert (found["requests"], found["duration"]) == (2, 6.0)
    assert found["request_throughput"] == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match=r"longer than warmup_s=4.0, got 3"):
        summarize(records, SLOS, warmup_s=4.0, duration_s=3)
    with pytest.raises(ValueError, match="warmup_s must be seconds >= 0, got nan"):
        summarize(records, warmup_s=float("nan"))


def test_nothing_at_all_is_no_number() -> None:
    found = summarize([])
    assert (found["requests"], found["p99_ttft_ms"], found["slo_attainment"]) == (0, None, None)
    assert "-" in table(found)


def test_jain() -> None:
    assert jain([0.5, 0.5]) == 1.0
    assert jain([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain([0.0]) is None
