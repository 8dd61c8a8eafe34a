"""Who should take a request: the router of sched/router.py beside simpler ones, and tiers of precision beside one precision.

    python -m bench.routing            # 12 seeds, a few minutes; --quick: 2 seeds, under a minute

Simulated: Batchers, policies and routers are those that serve, a step takes what a linear cost says (a replica of 8B on
an H100, roughly; w8 and w4 faster by assumed factors), and each replica has a device of its own.  Requests come in bursts
of 2 s, four times the mean rate, and a quarter of it for 6 s; prompts are lognormal.  All arms of a seed have the same
arrivals.  Attained: the first token within the TTFT and the others within the TPOT in the mean.  Of tiers also who
answered.  Every cell is printed; then the difference to ours with its 95 % bootstrap interval over seeds, and what a
choice takes on this machine.
"""

import argparse
import json
import random
import sys
import timeit
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.fleet import interval
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.metrics import aligned
from sched.observed import Observed
from sched.placement_simulate import attained
from sched.router import (
    ROUTERS,
    TIER_POLICIES,
    Recent,
    Router,
    RouteRequest,
    Tiers,
    marks_of,
    named,
    with_pace,
)
from sched.simulated_replica import Arrival, Replica
from sched.simulated_routes import Routes
from sched.simulator import Simulation

RESULT = Path(__file__).parent / "results" / "routing.json"
LIMITS = Limits(
    max_running=64, max_step_tokens=2048, max_chunk_tokens=2048, max_model_len=4096, max_waiting=10**6
)
COST = StepCost(base_s=8e-3, per_decode_s=5e-5, per_prefill_token_s=4e-5, per_context_token_s=1.6e-8)
FLEETS = {"alike": (1.0, 1.0, 1.0, 1.0), "two slow": (1.0, 1.0, 0.5, 0.5), "mixed": (2.0, 1.0, 1.0, 0.25)}
SPEED = {"fp16": 1.0, "w8": 1.6, "w4": 2.2}
TPOT_S, OURS = 0.05, "least-ttft"
# requests a second of the whole fleet, and the TTFT
LOADS = ((16.0, 0.3), (22.0, 0.3), (30.0, 0.3), (30.0, 1.0))
TIER_LOADS = ((4.0, 0.5), (12.0, 0.5), (20.0, 0.5), (28.0, 0.5))
TIER_ARMS = {name: partial(Tiers, name) for name in TIER_POLICIES}
MARGINS = (0.9, 0.8, 0.7, 0.6, 0.5)
PROMPTS = (20, 500, 1000, 8000)
BURST_S, PERIOD_S, BUSY, QUIET = 2.0, 8.0, 4.0, 0.25
Cell = dict[str, Any]


class Sets:
    """Memory of one replica, counted only."""

    def __init__(self, n: int) -> None:
        self._free = list(range(n))

    def lease(self, *, urgent: bool = False) -> int | None:
        return self._free.pop() if self._free else None

    def give_back(self, set_id: int) -> None:
        self._free.append(set_id)


def replica(name: str, model: str, device: str, speed: float) -> Replica:
    """What is computed is `speed` times as fast; keys and values are read as fast as ever."""
    cost = StepCost(
        base_s=COST.base_s / speed,
        per_decode_s=COST.per_decode_s / speed,
        per_prefill_token_s=COST.per_prefill_token_s / speed,
        per_context_token_s=COST.per_context_token_s,
    )
    return Replica(name, model, (device,), Batcher(BlockPool(Sets(600), 16, 32), LIMITS, cost))


def arrivals(seed: int, n: int, rate: float, model: str, ttft_s: float) -> list[Arrival]:
    rng, at_s, found = random.Random(seed), 0.0, []
    for rid in range(n):
        at_s += rng.expovariate(rate * (BUSY if at_s % PERIOD_S < BURST_S else QUIET))
        prompt = min(max(int(rng.lognormvariate(6.0, 1.0)), 20), 3000)
        found.append(Arrival(at_s, rid, model, prompt, rng.randint(5, 200), ttft_s, TPOT_S))
    return found


def run(replicas: list[Replica], asked: list[Arrival], routes: Routes) -> tuple[float, Simulation]:
    simulation = Simulation(replicas, asked, route=routes, groups={"any": list(SPEED)})
    simulation.run()
    simulation.check()
    good = sum(map(attained, simulation.records.values()))
    return good / len(simulation.records), simulation


def replica_cells(seeds: Sequence[int], requests: int) -> list[Cell]:
    cells = []
    for fleet, speeds in FLEETS.items():
        for rate, ttft_s in LOADS:
            for arm in ROUTERS:
                shares = []
                for seed in seeds:

                    def make(_: str, arm: str = arm, seed: int = seed) -> Router:
                        return named(arm, seed)

                    replicas = [replica(f"m{i}", "m", f"gpu{i}", s) for i, s in enumerate(speeds)]
                    asked = arrivals(seed, requests, rate, "m", ttft_s)
                    shares.append(run(replicas, asked, Routes(make))[0])
                cells.append({"fleet": fleet, "rate": rate, "ttft_s": ttft_s, "arm": arm, "attained": shares})
    return cells


def tier_cells(seeds: Sequence[int], requests: int, arms: Mapping[str, Callable[[], Router]]) -> list[Cell]:
    cells = []
    for rate, ttft_s in TIER_LOADS:
        for arm, made in arms.items():
            shares, by = [], dict.fromkeys(SPEED, 0)
            for seed in seeds:
                replicas = [replica(m, m, f"gpu{i}", speed) for i, (m, speed) in enumerate(SPEED.items())]

                def make(_: str, made: Callable[[], Router] = made) -> Router:
                    return made()

                routes = Routes(make, {m: i for i, m in enumerate(SPEED)})
                shares.append(run(replicas, arrivals(seed, requests, rate, "any", ttft_s), routes)[0])
                for m, n in routes.chosen["any"].items():
                    by[m] += n
            total = sum(by.values())
            part = {m: n / total for m, n in by.items()}
            cells.append({"rate": rate, "ttft_s": ttft_s, "arm": arm, "attained": shares, "by": part})
    return cells


def choice_us(tokens: int, n: int = 2000) -> float:
    """Microseconds of a choice among three tiers as the front end makes it: marks of the prompt, three states, the router,
    and marks to remember.  The best of five."""
    seen = {name: (Observed(), Recent()) for name in SPEED}
    for i in range(60):
        for observed, _ in seen.values():
            observed.came(100 + i, i)
            observed.first(100 + i, i + 0.1)
            observed.stepped(i + 0.2)
            observed.ended(i + 0.3)
    route, prompt = Tiers(), list(range(tokens))

    def choose() -> None:
        marks = marks_of(prompt)
        ask = RouteRequest(tokens, 0.5, TPOT_S, marks)
        states = with_pace(
            [
                o.state(name, i, 60.0, open_=8, most_running=64, recent=recent, memory=(10_000, 10_000))
                for i, (name, (o, recent)) in enumerate(seen.items())
            ]
        )
        found = route(ask, states)
        assert found is not None, "all of them take it"
        seen[found.name][1].add(marks)

    return 1e6 * min(timeit.repeat(choose, number=n, repeat=5)) / n


def against(cells: list[Cell], ours: str, keys: Sequence[str]) -> list[Cell]:
    """Of each other arm in each cell, how much more ours attains, seed by seed."""
    found = []
    for cell in cells:
        if cell["arm"] != ours:
            mine = next(
                c
                for c in cells
                if c["arm"] == ours and all(c[k] == cell[k] for k in (*keys, "rate", "ttft_s"))
            )
            gain = [a - b for a, b in zip(mine["attained"], cell["attained"], strict=True)]
            found.append(cell | {"gain": interval(gain)})
    return found


def grid(cells: list[Cell], row_of: str, arms: Sequence[str]) -> list[list[str]]:
    rows = [[row_of, "req/s", "TTFT", *arms]]
    places = dict.fromkeys((c.get(row_of, "fp16, w8, w4"), c["rate"], c["ttft_s"]) for c in cells)
    for place in places:
        here = {
            c["arm"]: float(np.mean(c["attained"]))
            for c in cells
            if (c.get(row_of, place[0]), c["rate"], c["ttft_s"]) == place
        }
        best = max(here.values())
        marked = (f"{here[a]:.1%}{'*' if here[a] == best else ' '}" for a in arms)
        rows.append([str(place[0]), f"{place[1]:g}", f"{place[2]:g}", *marked])
    return rows


def pooled(gains: list[Cell], key: str) -> list[list[str]]:
    """By `key` and arm, over all loads: a seed counts once."""
    rows = [[key, "against", "ours attains more by, in points"]]
    for where in dict.fromkeys(g.get(key, "all") for g in gains):
        for arm in dict.fromkeys(g["arm"] for g in gains):
            means = [g["gain"] for g in gains if g.get(key, "all") == where and g["arm"] == arm]
            mean, low, high = (100 * float(np.mean([m[i] for m in means])) for i in range(3))
            rows.append([str(where), arm, f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"])
    return rows


def compare_margins(seeds: Sequence[int], requests: int) -> int:
    arms = {f"{margin:g}": partial(Tiers, "slo", margin) for margin in MARGINS}
    cells = tier_cells(seeds, requests, arms)
    rows = [["margin", "req/s", "attained", *(f"by {m}" for m in SPEED)]]
    for c in cells:
        rows.append(
            [
                c["arm"],
                f"{c['rate']:g}",
                f"{np.mean(c['attained']):.1%}",
                *(f"{v:.1%}" for v in c["by"].values()),
            ]
        )
    sys.stdout.write(aligned(rows) + "\n")
    sys.stdout.write(json.dumps({"bench": "routing", "seeds": [*seeds], "margins": cells}) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.routing", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds of 200 requests")
    parser.add_argument("--seed", type=int, default=0, help="the first of them")
    parser.add_argument("--margins", action="store_true", help="nothing but tiers with other margins")
    parser.add_argument("--record", action="store_true", help="write bench/results/routing.json")
    args = parser.parse_args(argv)
    number, requests = (2, 200) if args.quick else (12, 400)
    seeds = range(args.seed, args.seed + number)
    if args.margins:
        return compare_margins(seeds, requests)
    replicas, tiers = replica_cells(seeds, requests), tier_cells(seeds, requests, TIER_ARMS)
    gains, tier_gains = against(replicas, OURS, ("fleet",)), against(tiers, "slo", ())
    times = {n: choice_us(n) for n in PROMPTS}
    parts = [
        ["tiers", "req/s", *(f"by {m}" for m in SPEED)],
        *([c["arm"], f"{c['rate']:g}", *(f"{c['by'][m]:.1%}" for m in SPEED)] for c in tiers),
    ]
    for rows in (
        grid(replicas, "fleet", list(ROUTERS)),
        pooled(gains, "fleet"),
        grid(tiers, "tiers", TIER_POLICIES),
        pooled(tier_gains, "tiers"),
        parts,
        [["choice among three, prompt of", "us"], *([f"{n} tokens", f"{us:.1f}"] for n, us in times.items())],
    ):
        sys.stdout.write(aligned(rows) + "\n\n")
    result = {"bench": "routing", "seeds": [*seeds], "requests": requests, "tag": "simulated"}
    line = json.dumps(result | {"replicas": replicas, "tiers": tiers, "choice_us": times})
    if args.record:
        RESULT.write_text(line + "\n")
    sys.stdout.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
