"""The public instances of Prism's placement problem: how far rules and our search end above the lower bound.

The figures that the rules must give come from a run by other code on the same instances (round robin 1.77, balanced
memory 1.62, Prism's greedy 1.34 times the bound, in the mean of fifty); they say that the rules are those.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from sched.placement import check
from sched.placement_baselines import memory_balanced, prism, round_robin
from sched.placement_kvpr import Pressure, bound, problem_of, ratios
from sched.placement_search import solve

WANTED = {"round robin": 1.77, "memory balanced": 1.62, "prism greedy": 1.34}
WITHIN, OURS_AT_MOST = 0.01, 1.13
BUDGET = 8000
FIFTY = 50  # instances that the figures are the mean of


def run_kvpr(path: str, seed: int) -> dict[str, Any]:
    """Prints the table; ValueError for a file that is not one."""
    try:
        cases = json.loads(Path(path).read_text())["cases"]
        problems = [problem_of(case) for case in cases]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path!r} must hold JSON with cases of gpus, gpu_memory_gb and models: {error!r}"
        ) from None
    over: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for i, p in enumerate(problems):
        rules = {
            "round robin": round_robin,
            "memory balanced": memory_balanced,
            "prism greedy": prism,
            "ours": lambda p, i=i: solve(p, seed=seed + i, budget=BUDGET, estimator=Pressure(p)).plan,
        }
        for name, rule in rules.items():
            began = time.perf_counter()
            plan = rule(p)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
            check(p, plan)
            over.setdefault(name, []).append(max(ratios(p, plan)) / bound(p))
    print(
        f"{len(problems)} instances: the largest KV pressure ratio over the lower bound (sum of rate / SLO over all free memory)"
    )
    rows = []
    for name, of in over.items():
        mean = float(np.mean(of))
        rows.append({"tag": "simulated", "arm": name, "mean": round(mean, 4), "worst": round(max(of), 4), "seconds": round(seconds[name], 3)})  # fmt: skip
        print(
            f"  {name:<16} mean {mean:.3f}, worst {max(of):.3f}, {seconds[name] / len(of):.3f} s an instance"
        )
    means = {r["arm"]: r["mean"] for r in rows}
    targets = {}
    if len(problems) == FIFTY:
        targets = {f"{n}: {x} within 1 %": abs(means[n] / x - 1) <= WITHIN for n, x in WANTED.items()}
        targets[f"ours <= {OURS_AT_MOST} x the bound"] = means["ours"] <= OURS_AT_MOST
    return {"targets": targets, "instances": len(problems), "seed": seed, "rows": rows}
