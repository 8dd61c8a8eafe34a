"""E2, the local scheduler: goodput of each policy at joint TTFT and TPOT SLOs, on simulated H100s.

    python -m bench.scheduling --costs COSTS.csv --conv CONV.csv --code CODE.csv     # --quick: under a minute

Goodput is the highest rate, of a mix whose shares are fixed, at which 90 % of the requests attain their SLO: first token
within scale x what the request takes alone, and the mean of the others too, at the model's own precision.  Bisected to 3 %
for each seed; all arms see the same requests.  A second one is the rate at which each model has 90 %.  Shed, refused and unfinished
requests have missed.  Models on one device cut its time between them.  Fixed batches are judged against the best in hindsight.
"""

import argparse
import concurrent.futures
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.fleet import SHAPES, Arm, GiB, Outcome, costs_of, interval, model_of, one_gpu, run
from bench.plots import draw_scheduling
from bench.recorded import add_sources, parser_of, show
from bench.scheduling_tables import scheduling_table
from minserve.workload_tables import read_azure
from sched.arrivals import Rows
from sched.placement import Plan, Problem, Replica
from sched.policies import POLICIES
from sched.simulated_replica import Arrival
from sched.synthetic import Laws, Lengths, Model, power_law, synthetic

TARGET, PRECISION = 0.9, 1.03
LOW, HIGH = 0.05, 60.0  # requests a second
LEAST_REQUESTS, LONGEST_S = 400, 2000.0
MIXES = {"M2": ("8b", "8b-qoq"), "M4": ("8b", "8b-fp8", "8b-qoq", "8b-awq")}
MAX_LEN = 8192
# mean prompt and answer of Azure's traces of 2023, for lognormal lengths where the traces are not given
CONV, CODE = (1155.0, 211.0), (2048.0, 28.0)
FIXED = (8, 16, 32, 64, 128, 256)
ARMS = [
    *(Arm(name=f"fixed {b}", policy="fixed", options=(("batch", b),)) for b in FIXED),
    *(Arm(name=f"fcfs {n}", policy="fcfs", step_tokens=n) for n in (512, 2048, 8192)),
    Arm(name="sarathi 512", policy="sarathi", options=(("chunk", 512),)),
    *(Arm(name=name, policy=name) for name in POLICIES if name not in ("fixed", "fcfs", "sarathi", "slack")),
    Arm(name="slack", policy="slack"),
    Arm(name="slack, shed", policy="slack", options=(("shed", "hopeless"),)),
    Arm(name="slack, shed, alone", policy="slack", options=(("shed", "hopeless"), ("follow", False))),
    Arm(name="slack, shed, +20 %", policy="slack", options=(("shed", "hopeless"),), believed=1.2),
    Arm(name="slack, shed, -20 %", policy="slack", options=(("shed", "hopeless"),), believed=0.8),
]
OURS, DEFAULT = "slack, shed", "fixed 64"
QUICK_ARMS = (OURS, "slack", "saab", "prism", "sarathi 512", "fixed 16", "fixed 64", "fixed 256")


class Law(NamedTuple):
    """How requests come: Gamma gaps of that CV, in bursts of groups of models or not, with those lengths."""

    cv: float
    groups: int
    lengths: str


WORKLOADS = {"W1": Law(1.0, 1, "conv"), "W2": Law(4.0, 2, "conv"), "W3": Law(13.0, 1, "code")}


@dataclass(frozen=True, slots=True)
class Cell:
    """`ttft_only`: of the scale, with no TPOT."""

    mix: str
    workload: str
    scale: float
    ttft_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.mix} {self.workload} {self.scale:g}x{' TTFT' if self.ttft_only else ''}"


def cells(quick: bool) -> list[Cell]:
    if quick:
        return [Cell("M2", "W1", 5.0), Cell("M2", "W2", 5.0)]
    found = [Cell("M2", w, s) for w in WORKLOADS for s in (2.5, 5.0, 10.0)]
    found += [Cell("M4", w, s) for w in WORKLOADS for s in (5.0, 10.0)]
    return [*found, Cell("M2", "W1", 40.0, True), Cell("M2", "W2", 40.0, True)]


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows = {"conv": rows_of(args.conv), "code": rows_of(args.code)}
        self.runs = 0
        shapes = {name for mix in MIXES.values() for name in mix}
        self.costs = {name: costs_of(SHAPES[name], args.costs) for name in sorted(shapes)}

    def lengths(self, kind: str) -> Lengths:
        if self.rows[kind] is not None:
            return Lengths(rows=self.rows[kind], max_len=MAX_LEN)
        mean = CONV if kind == "conv" else CODE
        return Lengths(prompt_mean=mean[0], output_mean=mean[1], max_len=MAX_LEN)

    def problem(self, cell: Cell) -> tuple[Problem, Plan]:
        scales = (cell.scale, 1e3 if cell.ttft_only else cell.scale)
        models = [
            model_of(name, SHAPES[name], self.costs[name], 1.0, CONV, scales=scales, max_len=MAX_LEN)
            for name in MIXES[cell.mix]
        ]
        plan = tuple(Replica(i, (0,)) for i in range(len(models)))
        return one_gpu(models, self.args.pool_gib * GiB), plan

    def seconds(self, rate: float) -> float:
        """As long as it takes for a share of 90 % to mean something."""
        return min(max(self.args.seconds, LEAST_REQUESTS / rate), LONGEST_S)

    def arrivals(self, cell: Cell, problem: Problem, rate: float, seed: int) -> list[Arrival]:
        law = WORKLOADS[cell.workload]
        rates = power_law([m.name for m in problem.models], rate, self.args.alpha, seed)
        asked = [Model(m.name, rates[m.name], self.lengths(law.lengths)) for m in problem.models]
        groups = law.groups if len(asked) > 1 else 1
        load = synthetic(
            asked,
            Laws(cv=law.cv, groups=groups, on_s=min(30.0, self.args.seconds / 4)),
            seconds=self.seconds(rate),
            seed=seed,
        )
        by_name = {m.name: m for m in problem.models}
        return [
            Arrival(r.arrival_s, i, r.model, r.prompt_tokens, r.output_tokens, by_name[r.model].due_s(r.prompt_tokens), by_name[r.model].tpot_s)
            for i, r in enumerate(load.requests)
        ]  # fmt: skip

    def outcome(self, cell: Cell, arm: Arm, rate: float, seed: int) -> Outcome:
        self.runs += 1
        problem, plan = self.problem(cell)
        models = tuple(
            replace(m, max_step_tokens=max(arm.step_tokens, m.max_running)) for m in problem.models
        )
        problem = replace(problem, models=models)
        asked = self.arrivals(cell, problem, rate, seed)
        return run(problem, plan, asked, arm, self.seconds(rate))

    def goodput(self, cell: Cell, arm: Arm, seed: int, guess: float) -> tuple[float, float, Outcome]:
        """The highest rates with TARGET attained by all requests together, and by those of each model, 0 where not even the
        lowest has it; and what the first gives."""
        found: dict[float, Outcome] = {}

        def at(rate: float) -> Outcome:
            if rate not in found:
                found[rate] = self.outcome(cell, arm, rate, seed)
            return found[rate]

        rate = highest(lambda r: at(r).attained >= TARGET, guess)
        each = highest(lambda r: at(r).worst >= TARGET, rate / 1.1) if rate else 0.0
        return rate, each, at(rate or LOW)


def highest(good: Callable[[float], bool], guess: float) -> float:
    """The highest rate that is good, to within PRECISION, looked for from a guess on; 0 where none is."""
    low = high = guess
    if good(guess):
        while high < HIGH:
            low, high = high, min(HIGH, high * 1.3)
            if not good(high):
                break
        else:
            return high
    else:
        while low > LOW:
            low, high = max(LOW, low / 1.3), low
            if good(low):
                break
        else:
            return 0.0
    while high > low * PRECISION:
        middle = (low * high) ** 0.5
        if good(middle):
            low = middle
        else:
            high = middle
    return low


def rows_of(path: str | None) -> Rows | None:
    return None if path is None else read_azure(Path(path))


def ratios(
    rows: Sequence[dict[str, Any]], key: str, over: Callable[[dict[str, float]], float]
) -> list[float]:
    """Ours over another's goodput of that key, in a cell, of the seeds for which the other has any."""
    by_seed: dict[int, dict[str, float]] = {}
    for row in rows:
        for seed, rate in enumerate(row[key]):
            by_seed.setdefault(seed, {})[row["arm"]] = rate
    return [arms[OURS] / over(arms) for arms in by_seed.values() if over(arms) > 0]


def measure(args: argparse.Namespace, cell: Cell) -> tuple[list[dict[str, Any]], int]:
    """A row an arm, and the number of runs."""
    bench, rows = Bench(args), []
    guess = dict.fromkeys(range(args.seeds), 4.0)
    for arm in reversed([a for a in ARMS if not args.quick or a.name in QUICK_ARMS]):
        found = []
        for s in range(args.seeds):
            found.append(bench.goodput(cell, arm, args.seed + s, guess[s]))
            guess[s] = max(LOW, found[-1][0] or guess[s])
        rates, each, outcomes = map(list, zip(*found, strict=True))
        row = {
            "tag": "simulated", "cell": cell.name, "arm": arm.name, "goodput": rates, "mean": float(np.mean(rates)),
            "goodput_each": each, "mean_each": float(np.mean(each)),
        }  # fmt: skip
        row["worst_model"] = float(np.mean([o.worst for o in outcomes]))
        row["tokens_s"] = float(np.mean([o.tokens_s for o in outcomes]))
        row["shed"] = float(np.mean([o.shed for o in outcomes]))
        rows.append(row)
        sys.stderr.write(f"{cell.name}: {arm.name} {row['mean']:.2f} {row['mean_each']:.2f}\n")
    return rows, bench.runs


def measure_all(args: argparse.Namespace) -> list[tuple[list[dict[str, Any]], int]]:
    """Of each cell: they know nothing of each other."""
    work, asked = partial(measure, args), cells(args.quick)
    if args.workers == 1:
        return list(map(work, asked))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        return list(pool.map(work, asked))


def judged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By cell: ours over the default batch and over the best fixed one in hindsight, with intervals over the seeds."""
    found = []
    for cell in dict.fromkeys(r["cell"] for r in rows):
        of = [r for r in rows if r["cell"] == cell]
        ours = next(r for r in of if r["arm"] == OURS)
        found.append({
            "cell": cell, "worst_model": ours["worst_model"], **compared(of, "goodput", "mean"),
            "each": compared(of, "goodput_each", "mean_each"),
        })  # fmt: skip
    return found


def compared(rows: Sequence[dict[str, Any]], key: str, mean: str) -> dict[str, Any]:
    """Ours with the others of a cell, by the goodput of that key."""
    fixed = [r["arm"] for r in rows if r["arm"].startswith("fixed")]
    best = ratios(rows, key, lambda arms: max(arms[f] for f in fixed))
    default = ratios(rows, key, lambda arms: arms[DEFAULT])
    others = {r["arm"]: r[mean] for r in rows if not r["arm"].startswith("slack")}
    peer = max(others, key=lambda name: others[name])
    ours = next(r[mean] for r in rows if r["arm"] == OURS)
    return {
        "over_default": interval(default) if default else None, "over_best_fixed": interval(best) if best else None,
        "seeds": len(best), "goodput": ours, "best_other": peer,
        "over_best_other": ours / others[peer] if others[peer] else None,
    }  # fmt: skip


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("scheduling", __doc__, "two cells, eight arms, one seed")
    parser.add_argument("--seeds", type=int, help="runs of each cell and arm, 3 by default")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time; the result is the same")
    parser.add_argument("--seconds", type=float, help="of arrivals in a run, at least, 120 by default")
    parser.add_argument("--pool-gib", type=float, default=24.0, help="for keys and values")
    parser.add_argument("--alpha", type=float, default=1.3, help="of the models' popularity, k^-alpha")
    add_sources(parser, "conv", "code")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.seconds = args.seconds or (40.0 if args.quick else 120.0)
    if (
        min(args.seed, args.seeds - 1, args.workers - 1) < 0
        or not 10 <= args.seconds < 1e5
        or not args.pool_gib > 0
    ):
        parser.error(
            "--seed must be >= 0, --seeds and --workers >= 1, --seconds in [10, 100000), --pool-gib above 0"
        )
    return args


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic()
    found = measure_all(args)
    rows = [row for of, _ in found for row in of]
    return {
        "bench": "scheduling", "seed": args.seed, "seeds": args.seeds, "seconds": args.seconds,
        "least_requests": LEAST_REQUESTS, "pool_gib": args.pool_gib, "alpha": args.alpha,
        "costs": Path(args.costs).name if args.costs else "rooflines",
        "lengths": [Path(p).name if p else "lognormal" for p in (args.conv, args.code)],
        "runs": sum(runs for _, runs in found), "wall_s": time.monotonic() - start, "rows": rows, "cells": judged(rows),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = read_arguments(argv)
    return show("scheduling", args, lambda: run_all(args), scheduling_table, draw_scheduling)


if __name__ == "__main__":
    sys.exit(main())
