"""What the scheduling benches reckon with: rates by bisection, pairs by seed, the same requests for every arm."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import recorded, scheduling
from bench.fleet import SHAPES, Arm, alone_s, costs_of, interval, model_of, one_gpu, run, scaled
from bench.headline import MIX, compared, most_attained
from bench.scheduling import DEFAULT, HIGH, LOW, OURS, highest, judged
from bench.scheduling_tables import scheduling_table
from sched.latency import StepCost
from sched.placement import Replica
from sched.placement_simulate import requests

GiB = 1 << 30


@pytest.mark.parametrize("guess", [0.06, 1.0, 7.0, 50.0])
@pytest.mark.parametrize("truth", [0.05, 0.3, 6.9, 59.0])
def test_the_highest_good_rate_is_found_from_any_guess(truth: float, guess: float) -> None:
    found = highest(lambda rate: rate <= truth, guess)
    assert truth / 1.04 <= found <= truth or (truth == LOW and found in (0.0, LOW))


def test_rates_that_are_always_or_never_good() -> None:
    assert highest(lambda _: True, 4.0) == HIGH
    assert highest(lambda _: False, 4.0) == 0.0


def test_what_a_request_takes_alone_is_what_its_steps_cost() -> None:
    cost = StepCost(base_s=0.01, per_decode_s=0.001, per_prefill_token_s=1e-5, per_context_token_s=1e-7)
    first_s, token_s, tpot_s = alone_s(cost)
    assert first_s + 1000 * token_s == pytest.approx(0.01 + 1000 * 1.01e-5)
    assert tpot_s == pytest.approx(0.011 + 1024e-7)


def test_arms_are_compared_seed_by_seed() -> None:
    rows = [
        {"cell": "c", "arm": name, "goodput": rates, "mean": sum(rates) / 2, "worst_model": 0.95,
         "goodput_each": rates[::-1], "mean_each": sum(rates) / 2}
        for name, rates in ((OURS, [2.0, 6.0]), (DEFAULT, [1.0, 2.0]), ("fixed 8", [2.0, 1.0]), ("saab", [4.0, 4.2]))
    ]  # fmt: skip
    (verdict,) = judged(rows)
    assert verdict["over_default"][0] == pytest.approx((2 / 1 + 6 / 2) / 2)
    assert verdict["over_best_fixed"][0] == pytest.approx((2 / 2 + 6 / 2) / 2), "the best of each seed"
    assert (verdict["best_other"], verdict["over_best_other"]) == ("saab", pytest.approx(4 / 4.1))
    verdict["each"] = verdict["each"] | {"goodput": 3.5, "over_best_fixed": (0.96, 0.9, 1.0)}
    result = {
        "rows": [r | {"tag": "simulated"} for r in rows], "cells": [verdict], "seeds": 2, "seed": 0, "seconds": 1.0,
        "pool_gib": 1.0, "alpha": 1.0, "costs": "rooflines", "lengths": ["a", "b"],
    }  # fmt: skip
    table = scheduling_table(result)
    assert "| c | 2 | 2.50 (2.00 to 3.00) | 2.00 (1.00 to 3.00) | 0.98 (saab) | 95.0% |" in table
    assert "| c | 3.50 | 2 | 2.50 (2.00 to 3.00) | 0.96 (0.90 to 1.00) | 0.98 (saab) |" in table
    assert "never below 0.97 of the best fixed batch (1 cells): met" in table
    assert "never below 0.97 of the best fixed batch, by each model (1 cells): MISSED" in table
    result["cells"] = [verdict | {"cell": "M2 W2 5x", "over_default": (1.29, 1.0, 2.0), "worst_model": 0.89}]
    table = scheduling_table(result)
    assert "at CV 4 at least 1.3 times fixed 64 (1 cells): MISSED" in table
    assert "worst model at least 90 % at the goodput of all (0 of 1 cells): MISSED" in table


def test_an_interval_holds_its_mean() -> None:
    mean, low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert low < mean == 2.5 < high
    assert interval([2.0, 2.0]) == (2.0, 2.0, 2.0)


def test_shares_of_an_overloaded_gpu_by_policy() -> None:
    costs = costs_of(SHAPES["8b"], None)
    models = [model_of("8b", SHAPES["8b"], costs, 60.0, (600.0, 100.0), scales=(5.0, 5.0))]
    problem, plan = one_gpu(models, 24 * GiB), (Replica(0, (0,)),)
    asked = requests(problem, 10.0, 1)
    ours = run(problem, plan, asked, Arm(name="ours", policy="slack", options=(("shed", "hopeless"),)), 10.0)
    fcfs = run(problem, plan, asked, Arm(name="fcfs", policy="fcfs"), 10.0)
    assert fcfs.shed == 0 < ours.shed
    assert ours.attained > 1.5 * fcfs.attained
    assert ours.worst == ours.models["8b"] == ours.attained
    # a shared pool of one model is that model's
    alone = run(problem, plan, asked, Arm(name="fcfs", policy="fcfs"), 10.0, static=True)
    assert alone.attained == pytest.approx(fcfs.attained, abs=0.02)
    over = compared(
        {"ours": [ours], "prism": [fcfs], "static": [fcfs], "fineserve": [replace_attained(ours, 0.5)]}
    )
    assert over["static"]["attained"][0] == pytest.approx(ours.attained / fcfs.attained)
    assert over["fineserve"]["reached"] == (ours.attained / 0.5 >= 1.1)


def replace_attained(outcome, share: float):  # type: ignore[no-untyped-def]
    return outcome._replace(attained=share)


def test_every_model_of_the_headline_has_a_shape() -> None:
    assert MIX.keys() <= SHAPES.keys()
    problem = one_gpu(
        [model_of("8b", SHAPES["8b"], costs_of(SHAPES["8b"], None), 1.0, (9.0, 9.0), scales=(2.0, 3.0))], GiB
    )
    tight = replace(problem.models[0], ttft_s=1.0)
    assert tight.due_s(100) > 1.0, "an SLO of TTFT that grows with the prompt"


def test_what_gpus_have_time_for_goes_to_the_cheapest() -> None:
    cost = StepCost(base_s=0.01, per_decode_s=0.001, per_prefill_token_s=1e-5)
    m = model_of(
        "8b", SHAPES["8b"], {(1, 100): cost, (2, 100): cost}, 30.0, (1000.0, 100.0), scales=(2.0, 3.0)
    )
    # eight at once: 100 tokens x 18 ms / 8, and 10 ms of prompt
    m = replace(m, max_running=8)
    one = one_gpu([m], GiB)
    assert most_attained(one) == pytest.approx(1 / (100 * 0.018 / 8 + 0.01) / 30)
    # another, that costs four times as much a token, gets what is left: nothing, or all if the first asks for little
    slow = replace(m, name="slow", costs={"h100": {(1, 100): scaled(cost, 4.0)}}, rate=0.1)
    first = most_attained(one) * 30
    assert most_attained(one_gpu([m, slow], GiB)) == pytest.approx(first / 30.1)
    assert most_attained(one_gpu([replace(m, rate=1.0), slow], GiB)) == pytest.approx(1.0)


def small_result() -> dict[str, Any]:
    rows = [
        {"tag": "simulated", "cell": cell, "arm": arm, "goodput": [rate], "mean": rate, "worst_model": 0.9,
         "goodput_each": [rate / 2], "mean_each": rate / 2}
        for cell in ("c1", "c2")
        for arm, rate in ((OURS, 3.0), (DEFAULT, 2.0))
    ]  # fmt: skip
    return {"bench": "scheduling", "seed": 1, "seeds": 1, "seconds": 40.0, "least_requests": 400, "pool_gib": 24.0, "alpha": 1.3,
            "costs": "rooflines", "lengths": ["lognormal", "lognormal"], "rows": rows, "cells": judged(rows)}  # fmt: skip


def test_a_recorded_result_is_shown_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recorded, "RESULTS", tmp_path)
    monkeypatch.setattr(scheduling, "run_all", lambda args: small_result())
    assert scheduling.main(["--record"]) == 0
    table = scheduling_table(small_result())
    assert capsys.readouterr().out == f"{table}\n{json.dumps(small_result())}\n"

    def never(args: object) -> dict[str, Any]:
        raise AssertionError("it ran")

    monkeypatch.setattr(scheduling, "run_all", never)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert scheduling.main(["--recorded", "--plots", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out == f"{table}\nno plot: matplotlib is not installed\n{json.dumps(small_result())}\n"
    (tmp_path / "scheduling.json").unlink()
    assert scheduling.main(["--recorded"]) == 2
    assert "scheduling.json" in capsys.readouterr().err


def test_a_table_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert scheduling.main(["--quick", "--costs", "no-such.csv"]) == 2
    assert "no-such.csv" in capsys.readouterr().err
