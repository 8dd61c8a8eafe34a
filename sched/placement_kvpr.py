"""Placement by the KV pressure ratio of Prism (arXiv 2505.04021): of a GPU, the sum of rate / SLO over what the weights leave.

The largest ratio is to be small.  Prism's rule is greedy, by falling rate / SLO, each model where its ratio ends least.
Round robin in the order given and balanced weights (heaviest first) are the usual others.  No placement is below the
bound: all of rate / SLO over all memory that any weights leave, as if loads and memory could be cut.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from sched.latency import StepCost
from sched.placement import Gpu, Model, Plan, Problem, Replica, pool_bytes, residents
from sched.placement_estimate import Estimate

POWER = 32  # of the norm of ratios that the search minimises: near the largest, and the others still count
GB = 1e9
NO_COST = {"any": {(1, 100): StepCost(base_s=1e-3)}}


def problem_of(case: Mapping[str, Any]) -> Problem:
    """From one of the public instances: `gpus`, `gpu_memory_gb`, and `models` with weights_gb, rate and slo."""
    models = tuple(
        Model(
            name=f"m{i}", weight_bytes=m["weights_gb"] * GB, kv_token_bytes=0.0, costs=NO_COST, rate=m["rate"],
            prompt_tokens=1, output_tokens=1, ttft_s=m["slo"], tpot_s=1.0, replicas=1, reserve_tokens=0,
        )
        for i, m in enumerate(case["models"])
    )  # fmt: skip
    return Problem(
        models, tuple(Gpu(f"gpu{i}", case["gpu_memory_gb"] * GB, "any") for i in range(case["gpus"]))
    )


def urgency(model: Model) -> float:
    """Rate over SLO, the TTFT of a mean prompt."""
    return model.rate / model.due_s(model.prompt_tokens)


def ratio(problem: Problem, gpu: int, on: Sequence[Replica]) -> float:
    """KVPR of a GPU, per GB; inf where weights leave nothing."""
    left = pool_bytes(problem, gpu, on) / GB
    load = sum(urgency(problem.models[r.model]) / r.tp for r in on)
    return load / left if left > 0 else (inf if on else 0.0)


def ratios(problem: Problem, plan: Plan) -> list[float]:
    return [ratio(problem, g, on) for g, on in enumerate(residents(problem, plan))]


def bound(problem: Problem) -> float:
    left = sum(g.memory_bytes for g in problem.gpus) - sum(m.fixed_bytes(1) for m in problem.models)
    return sum(map(urgency, problem.models)) / (left / GB)


class Pressure:
    """In place of an Estimator: the solver then looks for the least KVPR.  `attained` is minus the ratio of the GPU."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._fits: dict[object, float] = {}

    def fits(self, plan: Plan) -> bool:
        return max(ratios(self.problem, plan)) < inf

    def fits_on(self, gpu: int, on: Sequence[Replica]) -> bool:
        return self._ratio(gpu, on) < inf

    def _ratio(self, gpu: int, on: Sequence[Replica]) -> float:
        key = (gpu, tuple((r.model, r.tp) for r in on))
        if key not in self._fits:
            self._fits[key] = ratio(self.problem, gpu, on)
        return self._fits[key]

    def __call__(self, plan: Plan) -> Estimate:
        of = [self._ratio(g, on) for g, on in enumerate(residents(self.problem, plan))]
        worst, n = max(of), len(self.problem.models)
        attained = [0.0] * n
        for r in plan:
            attained[r.model] = -max(of[g] for g in r.gpus)
        spread = (
            worst * (sum((x / worst) ** POWER for x in of) / len(of)) ** (1 / POWER) if worst > 0 else 0.0
        )
        placed = sum(1 for _ in {r.model for r in plan})
        value = placed - n - spread if worst < inf else -inf
        return Estimate(value, -worst, -worst, tuple(attained), (0.0,) * n)
