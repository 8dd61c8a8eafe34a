"""Models, costs and runs that the scheduling benches share: what a policy makes of a load on simulated GPUs.

Costs of steps come from a table in FineServe's form (`--costs`), whose prompts are 256 and 512 tokens and whose batches
end at 32: longer and larger ones are extrapolated.  Without a table they are rooflines of the models' bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minserve.step_profile import read_costs
from sched.latency import StepCost
from sched.limits import Limits
from sched.metrics import SHED
from sched.placement import Gpu, Model, Plan, Problem
from sched.placement_simulate import attained, replicas_of
from sched.policies import make_policy
from sched.policy import Policy
from sched.simulated_replica import Arrival
from sched.simulator import Simulation
from sched.step_time import DEVICES, Work, roofline

GB, GiB = 1e9, 1 << 30
DRAIN_S, WARM_UP = 20.0, 0.1
KV16_8B = 2 * 32 * 8 * 128 * 2  # bytes of a token


class Shape(NamedTuple):
    """A model of the table: `key` is its model/format there; bytes; billions of parameters; layers."""

    key: str
    weight_bytes: float
    kv_token_bytes: float
    parameters: float
    bits: int
    layers: int = 32


SHAPES = {
    "8b": Shape("llama-3.1-8b/org", 16.1 * GB, KV16_8B, 8.03e9, 16),
    "8b-fp8": Shape("llama-3.1-8b/fp8_kv8", 9.1 * GB, KV16_8B / 2, 8.03e9, 8),
    "8b-awq": Shape("llama-3.1-8b/awq", 5.7 * GB, KV16_8B, 8.03e9, 16),
    # int4 with scale and zero of each token and head, in blocks of 64
    "8b-qoq": Shape("llama-3-8b/qoq", 5.3 * GB, KV16_8B / 4 + 2 * 32 * 8 * 4, 8.03e9, 8),
    "32b": Shape("qwen-3-32b/org", 65.5 * GB, 2 * 64 * 8 * 128 * 2, 32.8e9, 16, 64),
    "32b-fp8": Shape("qwen-3-32b/fp8_kv8", 33.5 * GB, 2 * 64 * 8 * 128, 32.8e9, 8, 64),
    "70b": Shape("llama-3.1-70b/org", 141.0 * GB, 2 * 80 * 8 * 128 * 2, 70.6e9, 16, 80),
    "70b-fp8": Shape("llama-3.1-70b/fp8_kv8", 72.6 * GB, 2 * 80 * 8 * 128, 70.6e9, 8, 80),
    "70b-awq": Shape("llama-3.1-70b/awq", 39.8 * GB, 2 * 80 * 8 * 128 * 2, 70.6e9, 16, 80),
}


def costs_of(shape: Shape, table: str | None) -> dict[tuple[int, int], StepCost]:
    """By (tensor parallelism, per cent of the multiprocessors)."""
    if table is None:
        found = {}
        for tp in (1, 2, 4):
            work = Work(
                weight_bytes=shape.weight_bytes / tp,
                parameters=shape.parameters / tp,
                kv_token_bytes=shape.kv_token_bytes / tp,
                bits=shape.bits,
            )
            found[tp, 100] = roofline(work, DEVICES["h100"])
        return found
    costs = {}
    for key, fitted in read_costs(table).items():
        name, tp, share = key.rsplit("/", 2)
        # of models that run beside each other on parts of the multiprocessors, nothing was measured
        if name == shape.key and share == "100":
            costs[int(tp), 100] = fitted.cost
    if not costs:
        raise ValueError(f"--costs {table!r} has no rows of {shape.key}")
    return costs


def alone_s(cost: StepCost) -> tuple[float, float, float]:
    """What a request takes that has the device to itself: TTFT = first + second x prompt tokens, and TPOT, seconds."""
    short, long = cost.step_s(0, 0, []) + cost.chunk_s(0, 256), cost.step_s(0, 0, []) + cost.chunk_s(0, 2048)
    per_token = (long - short) / (2048 - 256)
    return short - 256 * per_token, per_token, cost.decode_s(1, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A policy with its options, and what it is told of the cost of steps, as a factor of the truth."""

    name: str
    policy: str
    options: tuple[tuple[str, object], ...] = ()
    step_tokens: int = 2048
    believed: float = 1.0


def policy_of(arm: Arm) -> Callable[[Limits, StepCost | None], Policy]:
    def make(limits: Limits, cost: StepCost | None) -> Policy:
        return make_policy(arm.policy, limits, cost, dict(arm.options))

    return make


class Outcome(NamedTuple):
    """Of a run: shares of the requests after the warm-up; output tokens a second of those that attained, and of all that
    ended; by model the share."""

    attained: float
    worst: float
    ttft: float
    tokens_s: float
    ended_tokens_s: float
    shed: float
    models: dict[str, float]


def run(
    problem: Problem,
    plan: Plan,
    arrivals: Sequence[Arrival],
    arm: Arm,
    seconds: float,
    *,
    static: bool = False,
    drain_s: float = DRAIN_S,
) -> Outcome:
    """What an arm makes of the arrivals of `seconds`.  What is unfinished `drain_s` later has missed."""
    replicas = replicas_of(problem, plan, policy_of(arm), static=static)
    for replica in replicas:
        if arm.believed != 1.0:
            replica.batcher.recost(scaled(replica.cost, arm.believed))
    simulation = Simulation(replicas, arrivals)
    simulation.run(until_s=seconds + drain_s)
    warm_s = WARM_UP * seconds
    kept = [r for r in simulation.records.values() if r.arrival.at_s >= warm_s]
    good = [r for r in kept if attained(r)]
    by_model: dict[str, list[bool]] = {}
    for r in kept:
        by_model.setdefault(r.arrival.model, []).append(attained(r))
    models = {name: float(np.mean(of)) for name, of in sorted(by_model.items())}
    first = sum(r.first_s is not None and r.first_s <= r.arrival.at_s + r.arrival.ttft_s for r in kept)
    return Outcome(
        len(good) / max(1, len(kept)),
        min(models.values(), default=0.0),
        first / max(1, len(kept)),
        sum(r.arrival.output_tokens for r in good) / (seconds - warm_s),
        sum(r.arrival.output_tokens for r in kept if r.end_s is not None) / (seconds - warm_s),
        sum((r.error or "").startswith(SHED) for r in kept) / max(1, len(kept)),
        models,
    )


def scaled(cost: StepCost, factor: float) -> StepCost:
    return StepCost(
        base_s=cost.base_s * factor,
        per_decode_s=cost.per_decode_s * factor,
        per_prefill_token_s=cost.per_prefill_token_s * factor,
        per_context_token_s=cost.per_context_token_s * factor,
        per_pair_s=cost.per_pair_s * factor,
        rows=tuple((rows, seconds * factor) for rows, seconds in cost.rows),
    )


def interval(values: Sequence[float], seed: int = 0, n: int = 2000) -> tuple[float, float, float]:
    """Mean with the ends of its 95 % bootstrap interval."""
    v = np.asarray(values, float)
    rng = np.random.default_rng(seed)
    means = v[rng.integers(len(v), size=(n, len(v)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(v.mean()), float(low), float(high)


def model_of(
    name: str,
    shape: Shape,
    costs: dict[tuple[int, int], StepCost],
    rate: float,
    lengths: tuple[float, float],
    *,
    scales: tuple[float, float],
    max_len: int = 8192,
) -> Model:
    """SLOs are `scales`, of TTFT and TPOT, times what a request alone takes at the least degree the model runs with."""
    base = min(costs, key=lambda c: (c[0], -c[1]))
    first_s, token_s, tpot_s = alone_s(costs[base])
    return Model(
        name=name,
        weight_bytes=shape.weight_bytes,
        kv_token_bytes=shape.kv_token_bytes,
        costs={"h100": costs},
        rate=rate,
        prompt_tokens=lengths[0],
        output_tokens=lengths[1],
        ttft_s=scales[0] * first_s,
        ttft_per_token_s=scales[0] * token_s,
        tpot_s=scales[1] * tpot_s,
        layers=shape.layers,
        max_len=max_len,
    )


def one_gpu(models: Sequence[Model], pool_bytes: float) -> Problem:
    """All of them on one device, with so much for keys and values."""
    used = sum(m.fixed_bytes(1) for m in models)
    return Problem(tuple(models), (Gpu("gpu0", used + pool_bytes),))
