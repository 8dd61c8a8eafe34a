"""E3's instances and arms: random models on equal GPUs at the load that the best placements just serve.

Shapes of 1.5B to 14B in FP16, W8A8 with KV8 and W4A8 with KV4 (scales in the blocks); steps cost a roofline of an H100;
requests have Azure's conversation lengths; rates are k^-alpha over a shuffled order.  SLOs are 5 or 10 times what a
request takes alone in its own precision.  14B may have two ranks.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from sched.latency import StepCost
from sched.placement import Gpu, Model, Plan, Problem
from sched.placement_arms import attained_by_estimate, baseline, completed
from sched.placement_estimate import Estimator
from sched.placement_exhaustive import exhaustive, plans
from sched.placement_search import solve
from sched.placement_simulate import Scorer, requests
from sched.step_time import DEVICES, Work, roofline

GB = 1e9
# parameters, layers, KV heads; heads of 128
SHAPES = {"1.5b": (1.54e9, 28, 2), "3b": (3.2e9, 28, 8), "8b": (8.03e9, 32, 8), "14b": (14.8e9, 48, 8)}
# bits of weights, activations, keys and values; parts that scales add to the latter
PRECISIONS = {"fp16": (16, 16, 16, 0.0), "w8a8": (8, 8, 8, 0.016), "w4a8": (4, 8, 4, 0.063)}
ALPHAS, SCALES = (0.7, 1.3, 2.1), (5.0, 10.0)
MEMORY_GB, WORK_GB = 72.0, 2.0
TWO_RANKS_S = 0.5e-3  # of a step that has to be summed up over two
KNEE = 0.93  # of requests, by the estimate of a short search
TRAIN, HELD_OUT = 1000, 5000


def costs_of(shape: str, precision: str, degrees: Sequence[int]) -> dict[tuple[int, int], StepCost]:
    parameters, layers, heads = SHAPES[shape]
    weights, activations, kv, scales = PRECISIONS[precision]
    found = {}
    for tp in degrees:
        token = 2 * layers * heads * 128 * kv / 8 * (1 + scales) / tp
        work = Work(
            weight_bytes=parameters * weights / 8 / tp,
            parameters=parameters / tp,
            kv_token_bytes=token,
            bits=8 if activations < 16 else 16,
        )
        cost = roofline(work, DEVICES["h100"])
        found[tp, 100] = dataclasses.replace(cost, base_s=cost.base_s + (TWO_RANKS_S if tp > 1 else 0.0))
    return found


def model(name: str, shape: str, precision: str, rate: float, scale: float) -> Model:
    parameters, layers, heads = SHAPES[shape]
    weights, _, kv, scales = PRECISIONS[precision]
    costs = costs_of(shape, precision, (1, 2) if shape == "14b" else (1,))
    alone = costs[1, 100]
    step = alone.decode_s(1, 1155)
    return Model(
        name=name, weight_bytes=parameters * weights / 8, kv_token_bytes=2 * layers * heads * 128 * kv / 8 * (1 + scales),
        costs={"h100": costs}, rate=rate, prompt_tokens=1155.0, output_tokens=211.0, ttft_s=scale * step,
        ttft_per_token_s=scale * alone.per_prefill_token_s, tpot_s=scale * step, work_bytes=WORK_GB * GB, kv_heads=heads,
        layers=layers, max_len=8192, reserve_tokens=2048,
    )  # fmt: skip


def instance(seed: int, models: int, gpus: int, *, max_replicas: int = 1) -> Problem:
    """At the load where a short search predicts that KNEE of the requests attain."""
    rng = random.Random(seed * 1009 + models * 31 + gpus)
    unit = drawn(rng, models, gpus, max_replicas)
    # drawn anew where memory does not hold a replica of each
    while solve(loaded(unit, 1e-3), budget=0).missing:
        unit = drawn(rng, models, gpus, max_replicas)
    low, high = 0.0, 400.0 * gpus
    for _ in range(9):
        rate = (low + high) / 2
        found = solve(loaded(unit, rate), seed=seed, budget=40 * models)
        low, high = (rate, high) if found.estimate.joint >= KNEE else (low, rate)
    return loaded(unit, low)


def drawn(rng: random.Random, models: int, gpus: int, max_replicas: int) -> Problem:
    """With one request a second in all."""
    kinds = [(rng.choice(list(SHAPES)), rng.choice(list(PRECISIONS))) for _ in range(models)]
    alpha, scale = rng.choice(ALPHAS), rng.choice(SCALES)
    weights = [(k + 1) ** -alpha for k in range(models)]
    rng.shuffle(weights)
    total = sum(weights)
    parts = [
        model(f"m{i}-{s}-{p}", s, p, w / total, scale)
        for i, ((s, p), w) in enumerate(zip(kinds, weights, strict=True))
    ]
    places = tuple(Gpu(f"gpu{g}", MEMORY_GB * GB, "h100", f"node{g // 8}") for g in range(gpus))
    return Problem(tuple(parts), places, max_replicas=max_replicas)


def loaded(unit: Problem, rate: float) -> Problem:
    return unit.with_rates({m.name: m.rate * rate for m in unit.models})


def misjudged(problem: Problem, seed: int, part: float = 0.3) -> Problem:
    """What a planner believes whose rates are wrong by up to that part."""
    rng = random.Random(seed)
    return problem.with_rates({m.name: m.rate * rng.uniform(1 - part, 1 + part) for m in problem.models})


def plain(problem: Problem) -> Problem:
    """What a planner believes that knows of no precision: all have 16 bits; SLOs are what they are."""
    models = []
    for m in problem.models:
        shape = m.name.split("-")[1]
        parameters, layers, heads = SHAPES[shape]
        costs = {"h100": costs_of(shape, "fp16", m.degrees("h100"))}
        token = 2.0 * layers * heads * 128 * 2
        models.append(dataclasses.replace(m, weight_bytes=parameters * 2, kv_token_bytes=token, costs=costs))
    return dataclasses.replace(problem, models=tuple(models))


Train = Scorer | Estimator
Arm = Callable[[Problem, int, Train], Plan]
OURS, ONE_EACH, OPTIMUM = "ours", "ours, one replica each", "exhaustive, by the estimate"
SEARCHED = "ours, by the estimate alone"


def ours(problem: Problem, seed: int, train: Train, **given: Any) -> Plan:
    return solve(problem, seed=seed, score=lambda plan: train(plan).value, **given).plan


def wide(problem: Problem) -> Problem:
    return dataclasses.replace(problem, max_replicas=3)


def by_simulator(name: str) -> Arm:
    return lambda p, seed, train: baseline(
        name, wide(p), seed=seed, simulate=lambda plan: train(plan).attained
    )


def named(name: str) -> Arm:
    return lambda p, seed, train: baseline(name, p, seed=seed)


SMALL = 4000  # plans that ours may look at
SOME, ENUMERATED = 16, 8  # plans that are simulated where not all are; models up to which all are listed
ARMS: dict[str, Arm] = {
    OPTIMUM: lambda p, seed, train: exhaustive(p, bounded=True).plan,
    OURS: lambda p, seed, train: ours(wide(p), seed, train, budget=SMALL),
    ONE_EACH: lambda p, seed, train: ours(p, seed, train, budget=SMALL),
    SEARCHED: lambda p, seed, train: solve(p, seed=seed, budget=SMALL).plan,
    "ours, without local search": lambda p, seed, train: ours(p, seed, train, budget=0),
    "ours, without precision": lambda p, seed, train: completed(
        p, solve(plain(p), seed=seed, budget=SMALL).plan
    ),
    "AlpaServe (simulate, greedy)": by_simulator("alpaserve"),
    "MuxServe (paper)": named("muxserve"),
    "MuxServe (released)": named("muxserve-released"),
    "Prism (KVPR, greedy)": named("prism"),
    "FineServe (slab-aware)": named("fineserve"),
    "round robin": named("round-robin"),
    "memory balanced": named("memory-balanced"),
    "random (median of 200)": named("random"),
}


def run_instance(seed: int, models: int, gpus: int, simulated_s: float, near: int) -> dict[str, Any]:
    """Every arm's plan, its value by the estimate, and with `simulated_s` > 0 by the simulator on other requests; without,
    the estimate is also what arms that simulate do that with.

    The best known to the simulator is the best of all arms, and of all plans where they are at most `near`; else of so many
    that the search ends at.
    """
    problem = instance(seed, models, gpus)
    train: Train = Estimator(problem)
    if simulated_s:
        train = Scorer(problem, requests(problem, simulated_s, seed + TRAIN))
    judge = Scorer(problem, requests(problem, simulated_s, seed + HELD_OUT)) if simulated_s else None
    estimator = Estimator(problem)
    found: dict[str, Any] = {"seed": seed, "models": models, "gpus": gpus, "arms": {}}
    for name, arm in ARMS.items():
        began = time.perf_counter()
        plan = arm(problem, seed, train)
        seconds = time.perf_counter() - began
        e = estimator(plan)
        row = {"value": e.value, "joint": e.joint, "worst": e.worst, "seconds": round(seconds, 4)}
        if judge is not None:
            s = judge(plan)
            row |= {"sim_value": s.value, "sim_joint": s.joint, "sim_worst": s.worst}
        found["arms"][name] = {k: round(v, 5) for k, v in row.items()}
    if judge is not None:
        every = list(islice(plans(problem, estimator), near + 1)) if models <= ENUMERATED else []
        whole = 0 < len(every) <= near
        if not whole:
            every = [
                plan
                for plan, _ in solve(
                    problem, seed=seed, budget=SMALL, score=lambda p: judge(p).value, keep=SOME
                ).best
            ]
        best = max(judge(plan).value for plan in every)
        found["best_simulated"] = round(max([best, *(r["sim_value"] for r in found["arms"].values())]), 5)
        found["best_of_all_plans"] = whole
    found["rate"] = round(sum(m.rate for m in problem.models), 3)
    return found


def run_misjudged(seed: int, models: int, gpus: int) -> dict[str, float]:
    """By arm the value with rates up to 30 % wrong, over that of the best plan that knows them; by the estimate."""
    problem = instance(seed, models, gpus)
    believed = misjudged(problem, seed)
    estimator = Estimator(problem)
    best = exhaustive(problem, bounded=True).estimate.value
    found = {}
    for name in ("prism", "fineserve", "muxserve", "round-robin", "memory-balanced"):
        found[name] = estimator(baseline(name, believed, seed=seed)).value / best
    alpaserve = baseline("alpaserve", believed, seed=seed, simulate=attained_by_estimate(believed))
    found["alpaserve"] = estimator(alpaserve).value / best
    found[ONE_EACH] = estimator(solve(believed, seed=seed, budget=SMALL).plan).value / best
    return found


def run_large(seed: int, models: int = 48, gpus: int = 16, budget: int = 20_000) -> dict[str, Any]:
    """A large instance: seconds of ours on this core, and what it and the others are worth by the estimate."""
    problem = instance(seed, models, gpus)
    estimator = Estimator(problem)
    began = time.perf_counter()
    plan = solve(wide(problem), seed=seed, budget=budget).plan
    seconds = time.perf_counter() - began
    values = {OURS: estimator(plan)}
    for name in ("prism", "fineserve", "round-robin", "memory-balanced", "muxserve"):
        values[name] = estimator(baseline(name, problem, seed=seed))
    return {
        "models": models, "gpus": gpus, "budget": budget, "seconds": round(seconds, 2),
        "values": {n: {"value": round(e.value, 4), "joint": round(e.joint, 4), "worst": round(e.worst, 4)} for n, e in values.items()},
    }  # fmt: skip
