"""The headline of FineServe's paper against its own baselines: seven models on four simulated H100s.

    python -m bench.headline --costs COSTS.csv --conv CONV.csv       # --quick: under a minute

All arms have the same GPUs, costs of steps, requests and Batcher.  *ours*: our placement and policy (hopeless requests shed).
*prism*: KVPR and deadline rule (Prism*).  *static*: our placement, FCFS, memory split by rate x bytes (Static*).  *fineserve*:
slab-aware placement, saab.  All but static share slabs.  Fixed in advance are the rate at which ours attains 90 % and rate scale
8, at SLO scale 20 over a prompt of P95 length: of TTFT alone as there; joint: TPOT too.  Plans, and at these points every arm's
tokens of a step, are chosen for other seeds than those judged.  At most 256 of a model run as in FineServe's example, beside it
1,024.  Prompts over 512 tokens and batches over 32 are extrapolated.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.fleet import GB, SHAPES, Arm, Outcome, alone_s, costs_of, interval, model_of, run
from bench.plots import draw_headline
from bench.recorded import add_sources, parser_of, show
from bench.scheduling import rows_of
from bench.scheduling_tables import headline_table
from sched.placement import Gpu, Plan, Problem
from sched.placement_arms import baseline
from sched.placement_search import solve
from sched.simulated_replica import Arrival
from sched.synthetic import Laws, Lengths, synthetic
from sched.synthetic import Model as Asked

# requests a second at scale 1: a mix with every model of FineServe's figures, all its TP degrees, and rates of its example
MIX = {"70b-awq": 1.0, "8b": 4.0, "8b-fp8": 4.0, "8b-awq": 4.0, "8b-qoq": 2.0, "32b": 2.0, "32b-fp8": 2.0}
RATE_SCALE, SLO_SCALE, SCALES = 8.0, 20.0, (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MAX_LEN, P95_PROMPT = 4096, 903
# ShareGPT by MuxServe's means (161 in, 337 out), lognormal, and Azure's conversations of 2023
SHAREGPT = Lengths(prompt_mean=161, prompt_median=60, output_mean=337, output_median=250, max_len=MAX_LEN)
CONV = Lengths(prompt_mean=1155, output_mean=211, max_len=MAX_LEN)
POLICY = {
    "ours": Arm(name="ours", policy="slack", options=(("shed", "hopeless"),)),
    "prism": Arm(name="prism", policy="prism"),
    "static": Arm(name="static", policy="fcfs"),
    "fineserve": Arm(name="fineserve", policy="saab"),
}
# what is to be reached over each: attainment (goodput for fineserve) and tokens of answers that attained; those of all that
# ended are shown too, but what comes after the last arrival, late as it is, counts in them
AIMS = {"prism": (2.2, 1.8), "static": (1.3, 1.5), "fineserve": (1.1, None)}
LAST_S = 90.0  # after the last arrival: the longest answers of the largest model take over half a minute
PLACED_S, JUDGED, REFINED = 40.0, 12, 30
STEPS, TUNING = (512, 2048, 8192), 1_000_003
RUNNING, MORE_RUNNING = 256, 1024  # `max_num_seqs` of FineServe's example, and what vLLM has on a large GPU


class Load(NamedTuple):
    name: str
    lengths: Lengths


class Case(NamedTuple):
    """A load at a rate scale, SLOs of both kinds or of TTFT alone, and how many requests of a model run at once."""

    load: Load
    scale: float
    joint: bool
    running: int = RUNNING

    @property
    def key(self) -> str:
        return f"{self.load.name} {self.scale:.3g} {'joint' if self.joint else 'TTFT'} {self.running}"


def problem_of(case: Case, costs: dict[str, Any]) -> Problem:
    load, scale, joint = case.load, case.scale, case.joint
    mean = load.lengths.draw(np.random.default_rng(0), 4000)
    lengths = (float(np.mean(mean[0])), float(np.mean(mean[1])))
    models = []
    for name, rate in MIX.items():
        m = model_of(
            name, SHAPES[name], costs[name], rate * scale, lengths,
            scales=(SLO_SCALE, SLO_SCALE if joint else 1e3), max_len=MAX_LEN,
        )  # fmt: skip
        base = costs[name][min(costs[name], key=lambda c: (c[0], -c[1]))]
        first_s, token_s, _ = alone_s(base)
        # one SLO a model, as there
        m = replace(m, ttft_s=SLO_SCALE * (first_s + token_s * P95_PROMPT), ttft_per_token_s=0.0)
        cv = [float(np.std(x) / np.mean(x)) for x in mean]
        models.append(replace(m, prompt_cv=cv[0], output_cv=cv[1], max_running=case.running))
    gpus = tuple(Gpu(f"gpu{i}", 76 * GB) for i in range(4))
    return Problem(tuple(models), gpus)


def arrivals(problem: Problem, load: Load, seconds: float, seed: int) -> list[Arrival]:
    asked = [Asked(m.name, m.rate, load.lengths) for m in problem.models]
    made = synthetic(asked, Laws(), seconds=seconds, seed=seed)
    by = {m.name: m for m in problem.models}
    return [
        Arrival(r.arrival_s, i, r.model, r.prompt_tokens, r.output_tokens, by[r.model].due_s(r.prompt_tokens), by[r.model].tpot_s)
        for i, r in enumerate(made.requests)
    ]  # fmt: skip


def most_attained(problem: Problem) -> float:
    """The share of requests that the GPUs have time for in the long run, the cheapest first, whatever a scheduler does.

    A request takes the seconds of its prompt and its part of a step for each of its tokens, in the batch and with the ranks
    that make that least; memory and waiting are not counted.  A short run may attain more: it ends before the last answers.
    """
    each = []
    for m in problem.models:
        costs = [
            tp * (m.output_tokens * c.decode_s(n, int(n * (m.prompt_tokens + m.output_tokens / 2))) / n + c.chunk_s(0, int(m.prompt_tokens)))
            for (tp, _), c in m.costs["h100"].items()
            for n in (m.max_running >> k for k in range(m.max_running.bit_length()))
        ]  # fmt: skip
        each.append((min(costs), m.rate))
    left, served = float(len(problem.gpus)), 0.0
    for seconds, rate in sorted(each):
        part = min(rate, left / seconds)
        left -= part * seconds
        served += part
    return served / sum(m.rate for m in problem.models)


def judged(
    problem: Problem, case: Case, plan: Plan, name: str, asked: Sequence[Arrival], seconds: float
) -> Outcome:
    """What an arm makes of all that was asked; a model without a place has missed all its requests."""
    served = {problem.models[r.model].name for r in plan}
    possible = [a for a in asked if a.model in served]
    outcome = run(problem, plan, possible, POLICY[name], seconds, static=name == "static", drain_s=LAST_S)
    share = outcome.attained if case.joint else outcome.ttft
    return outcome._replace(attained=share * len(possible) / len(asked))


def plans_of(problem: Problem, case: Case, seed: int, budget: int, refine: int) -> dict[str, Plan]:
    """Ours climbs from its own greedy plans and from those of its peers, judged with requests of another seed than any that
    is judged here."""
    tuning = arrivals(problem, case.load, PLACED_S, seed + TUNING)
    peers = {name: baseline(name, problem) for name in ("prism", "fineserve", "alpaserve", "muxserve")}
    starts = list(peers.values())

    def score(plan: Plan) -> float:
        return judged(problem, case, plan, "ours", tuning, PLACED_S).attained

    own = solve(
        problem, seed=seed, budget=budget, score=score, keep=JUDGED, refine=refine, starts=starts
    ).plan
    return {"ours": own, "static": own, "prism": peers["prism"], "fineserve": peers["fineserve"]}


def with_steps(problem: Problem, tokens: int) -> Problem:
    return replace(problem, models=tuple(replace(m, max_step_tokens=tokens) for m in problem.models))


def tuned(problem: Problem, case: Case, plans: dict[str, Plan], seed: int) -> dict[str, int]:
    """The tokens of a step with which each arm does best, on the requests that ours was placed for."""
    tuning = arrivals(problem, case.load, PLACED_S, seed + TUNING)

    def share(name: str, tokens: int) -> float:
        return judged(with_steps(problem, tokens), case, plans[name], name, tuning, PLACED_S).attained

    choices = [n for n in STEPS if n >= case.running]
    return {name: max(choices, key=lambda n: share(name, n)) for name in POLICY}


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.costs = {name: costs_of(SHAPES[name], args.costs) for name in MIX}
        rows = rows_of(args.conv)
        conv = CONV if rows is None else Lengths(rows=rows, max_len=MAX_LEN)
        self.loads = [Load("sharegpt", SHAREGPT), Load("azure", conv)]
        self.plans: dict[str, dict[str, Plan]] = {}
        self.steps: dict[str, dict[str, int]] = {}

    def outcomes(self, case: Case, seeds: Sequence[int], refine: int) -> dict[str, list[Outcome]]:
        """`refine`: of a point fixed in advance, for which the arms are tuned too."""
        problem = problem_of(case, self.costs)
        if case.key not in self.plans:
            plans = self.plans[case.key] = plans_of(problem, case, self.args.seed, self.args.budget, refine)
            self.steps[case.key] = tuned(problem, case, plans, self.args.seed) if refine else {}
        steps = self.steps[case.key]
        found: dict[str, list[Outcome]] = {name: [] for name in POLICY}
        for seed in seeds:
            asked = arrivals(problem, case.load, self.args.seconds, seed)
            for name in POLICY:
                own = with_steps(problem, steps[name]) if name in steps else problem
                plan = self.plans[case.key][name]
                found[name].append(judged(own, case, plan, name, asked, self.args.seconds))
        return found

    def knee(self, load: Load, joint: bool) -> float:
        """The rate scale at which ours attains 90 %, on seeds of its own."""
        low, high = 0.25, 16.0
        while high > low * 1.04:
            middle = (low * high) ** 0.5
            case = Case(load, middle, joint)
            problem = problem_of(case, self.costs)
            plan = plans_of(problem, case, self.args.seed, max(500, self.args.budget // 4), 0)["ours"]
            asked = arrivals(problem, load, self.args.seconds, self.args.seed + 500_009)
            good = judged(problem, case, plan, "ours", asked, self.args.seconds).attained >= 0.9
            low, high = (middle, high) if good else (low, middle)
        return low


def compared(found: dict[str, list[Outcome]]) -> dict[str, Any]:
    """Ours over each baseline, seed by seed, with 95 % intervals."""
    rows = {}
    for name, (share, tokens) in AIMS.items():
        pairs = list(zip(found["ours"], found[name], strict=True))
        attained = interval([a.attained / max(b.attained, 1e-3) for a, b in pairs])
        ended = interval([a.ended_tokens_s / max(b.ended_tokens_s, 1.0) for a, b in pairs])
        good = interval([a.tokens_s / max(b.tokens_s, 1.0) for a, b in pairs])
        rows[name] = {
            "attained": attained, "ended_tokens": ended, "attained_tokens": good, "aim": [share, tokens],
            "reached": bool(attained[0] >= share and (tokens is None or good[0] >= tokens)),
        }  # fmt: skip
    return rows


def measure(bench: Bench, quick: bool) -> list[dict[str, Any]]:
    args, rows = bench.args, []
    judged = range(args.seed, args.seed + args.seeds)
    for load in bench.loads[: 1 if quick else 2]:
        for joint in (False,) if quick else (False, True):
            points = {"scale 8": Case(load, RATE_SCALE, joint)}
            if not quick:
                points["knee"] = Case(load, bench.knee(load, joint), joint)
            if not quick and not joint:
                points["scale 8, 1024 run"] = Case(load, RATE_SCALE, joint, MORE_RUNNING)
            curve = {} if quick else {f"x{s:g}": Case(load, s, joint) for s in SCALES}
            for point, case in (points | curve).items():
                seeds = judged if point in points else judged[: max(1, args.seeds // 3)]
                rows.append(row_of(bench, case, point, seeds, judge=point in points))
    return rows


def row_of(bench: Bench, case: Case, point: str, seeds: Sequence[int], *, judge: bool) -> dict[str, Any]:
    """`judge`: a point fixed in advance, for which plans are climbed by the simulator too."""
    found = bench.outcomes(case, seeds, REFINED if judge else 0)
    row: dict[str, Any] = {
        "tag": "simulated", "load": case.load.name, "joint": case.joint, "point": point, "scale": case.scale,
        "running": case.running, "step_tokens": bench.steps[case.key], "most_attained": most_attained(problem_of(case, bench.costs)),
    }  # fmt: skip
    row["arms"] = {
        name: {
            "attained": float(np.mean([o.attained for o in of])), "worst": float(np.mean([o.worst for o in of])),
            "tokens_s": float(np.mean([o.ended_tokens_s for o in of])),
            "attained_tokens_s": float(np.mean([o.tokens_s for o in of])),
            "shed": float(np.mean([o.shed for o in of])),
        }
        for name, of in found.items()
    }  # fmt: skip
    if judge:
        row["over"] = compared(found)
    shares = ", ".join(f"{n} {a['attained']:.1%}" for n, a in row["arms"].items())
    slo = "joint" if case.joint else "TTFT"
    sys.stderr.write(f"{case.load.name} {slo} {point} ({case.scale:.2f}): {shares}\n")
    return row


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("headline", __doc__, "one load, one point, three seeds")
    parser.add_argument(
        "--seeds", type=int, help="judged at the fixed points, 10 by default; a third of them for curves"
    )
    parser.add_argument("--seconds", type=float, help="of arrivals in a run, 120 by default")
    parser.add_argument("--budget", type=int, help="plans our placement looks at, 6000 by default")
    add_sources(parser, "conv")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (3 if args.quick else 10)
    args.seconds = args.seconds or (30.0 if args.quick else 120.0)
    args.budget = args.budget or (1000 if args.quick else 6000)
    if args.seed < 0 or args.seeds < 1 or not 10 <= args.seconds < 1e5 or args.budget < 1:
        parser.error("--seed must be >= 0, --seeds and --budget >= 1, --seconds in [10, 100000)")
    return args


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic()
    bench = Bench(args)
    rows = measure(bench, args.quick)
    plans = {
        key: {name: [[list(MIX)[r.model], list(r.gpus)] for r in plan] for name, plan in of.items()}
        for key, of in bench.plans.items()
    }
    return {
        "bench": "headline", "seed": args.seed, "seeds": args.seeds, "seconds": args.seconds, "slo_scale": SLO_SCALE,
        "mix": MIX, "costs": Path(args.costs).name if args.costs else "rooflines", "lengths": {load.name: load.lengths.law() for load in bench.loads},
        "wall_s": time.monotonic() - start, "rows": rows, "plans": plans,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = read_arguments(argv)
    return show("headline", args, lambda: run_all(args), headline_table, draw_headline)


if __name__ == "__main__":
    sys.exit(main())
