"""The baselines by name, all on one problem and one memory model; for `minserve.place --baseline` and for the bench.

Models that a rule finds no room for are put where most memory is left, so that none of them loses by that alone.
"""

from collections.abc import Callable
from statistics import median_low

from sched.placement import Plan, Problem, Replica, pool_bytes
from sched.placement_baselines import (
    Simulate,
    alpaserve,
    base_degree,
    chance,
    joined,
    memory_balanced,
    prism,
    round_robin,
)
from sched.placement_estimate import Estimator
from sched.placement_exhaustive import exhaustive
from sched.placement_fineserve import Llm, Row, slab_aware
from sched.placement_muxserve import decode_s, muxserve, prefill_s
from sched.placement_search import groups_of, options

BATCHES = (1, 2, 4, 8, 16, 32)
DRAWS = 200  # placements by chance, of which the median is taken
GB = 1e9


def completed(problem: Problem, plan: Plan) -> Plan:
    """With a replica of each model that has none, where memory holds one."""
    placed = {r.model for r in plan}
    for i in sorted(set(range(len(problem.models))) - placed, key=lambda i: -problem.models[i].weight_bytes):
        fitting = [p for new in options(problem, i) if (p := joined(problem, plan, new)) is not None]
        if fitting:
            plan = max(fitting, key=lambda p: _least_left(problem, p))
    return plan


def _least_left(problem: Problem, plan: Plan) -> float:
    return min(
        pool_bytes(problem, g, [r for r in plan if g in r.gpus]) / gpu.memory_bytes
        for g, gpu in enumerate(problem.gpus)
    )


def llm_of(problem: Problem, model: int) -> Llm:
    """What FineServe's rule is told of a model: its bytes, and a profile made of the costs that all arms have."""
    m = problem.models[model]
    kind = problem.gpus[0].kind
    profile = {tp: _rows(problem, model, tp) for tp in m.degrees(kind)}
    return Llm(
        name=m.name, billions=m.weight_bytes / GB, bits=(8, 16, 8), layers=m.layers, kv_heads=m.kv_heads,
        head_dim=max(1, round(m.kv_token_bytes / (2 * m.layers * m.kv_heads))), rate=m.rate, profile=profile,
        base_tp=base_degree(problem, model), slo_s=m.due_s(m.prompt_tokens), prompt=m.prompt_tokens, answer=m.output_tokens,
    )  # fmt: skip


def _rows(problem: Problem, model: int, tp: int) -> list[Row]:
    m = problem.models[model]
    r = Replica(model, groups_of(problem, tp)[0]) if groups_of(problem, tp) else None
    if r is None:
        return []
    return [
        Row(b, round(m.prompt_tokens), round(m.output_tokens), prefill_s(problem, r, b), m.output_tokens * decode_s(problem, r, b))
        for b in BATCHES
    ]  # fmt: skip


def fineserve(problem: Problem) -> Plan:
    nodes = list(problem.nodes.values())
    gpu_gb = min(g.memory_bytes for g in problem.gpus) / GB
    plan: Plan = ()
    for placed in slab_aware([llm_of(problem, i) for i in range(len(problem.models))], nodes, gpu_gb=gpu_gb):
        longer = joined(problem, plan, Replica(placed.model, placed.gpus)) if placed.gpus else None
        plan = plan if longer is None else longer
    return plan


def median_of_chance(problem: Problem, seed: int) -> Plan:
    """The placement in the middle of DRAWS, by the estimate."""
    estimator = Estimator(problem)
    plans = {completed(problem, chance(problem, seed * DRAWS + k)) for k in range(DRAWS)}
    values = {plan: estimator(plan).value for plan in plans}
    return min(plans, key=lambda p: (abs(values[p] - median_low(values.values())), p))


def attained_by_estimate(problem: Problem) -> Simulate:
    estimator = Estimator(problem)
    return lambda plan: estimator(plan).attained


Rule = Callable[[Problem, int, Simulate], Plan]
BASELINES: dict[str, Rule] = {
    "round-robin": lambda p, seed, simulate: round_robin(p),
    "memory-balanced": lambda p, seed, simulate: memory_balanced(p),
    "random": lambda p, seed, simulate: median_of_chance(p, seed),
    "prism": lambda p, seed, simulate: prism(p),
    "fineserve": lambda p, seed, simulate: fineserve(p),
    "muxserve": lambda p, seed, simulate: muxserve(p),
    "muxserve-released": lambda p, seed, simulate: muxserve(p, released=True),
    "alpaserve": lambda p, seed, simulate: alpaserve(p, simulate),
    "exhaustive": lambda p, seed, simulate: exhaustive(p, bounded=True).plan,
}


def baseline(name: str, problem: Problem, *, seed: int = 0, simulate: Simulate | None = None) -> Plan:
    """The plan of a baseline; ValueError for a name that is none.  `simulate`: by default the estimate."""
    if name not in BASELINES:
        raise ValueError(f"a baseline must be one of {', '.join(BASELINES)}, got {name!r}")
    return completed(problem, BASELINES[name](problem, seed, simulate or attained_by_estimate(problem)))
