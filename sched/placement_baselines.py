"""Simple placements to compare with: round robin, balanced memory, chance, Prism's KVPR, and AlpaServe's simulate-greedy.

All have the same memory model and the same costs of a step as ours; each follows its own aim.  They return plans that
fit; a model that its rule finds no room for is left out, as its authors' code does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations_with_replacement
from math import inf
from random import Random

from sched.placement import Plan, Problem, Replica, fits, pool_bytes
from sched.placement_kvpr import urgency
from sched.placement_search import groups_of

# AlpaServe's simulator hands back each model's share of requests in time
Simulate = Callable[[Plan], Sequence[float | None]]


def base_degree(problem: Problem, model: int) -> int:
    """The least degree of tensor parallelism at which the model fits an empty GPU; of those with costs."""
    m = problem.models[model]
    degrees = sorted({tp for gpu in problem.gpus for tp in m.degrees(gpu.kind)})
    for tp in degrees:
        for gpus in groups_of(problem, tp):
            if joined(problem, (), Replica(model, gpus)) is not None:
                return tp
    return degrees[0]


def joined(problem: Problem, plan: Plan, new: Replica) -> Plan | None:
    """The plan with one replica more, or None where it has no costs there, is there already, or memory does not hold it."""
    m = problem.models[new.model]
    if any((new.tp, new.sm) not in m.costs.get(problem.gpus[g].kind, {}) for g in new.gpus):
        return None
    longer = tuple(sorted((*plan, new)))
    for g in new.gpus:
        on = [r for r in longer if g in r.gpus]
        if sum(r.model == new.model for r in on) > 1 or not fits(problem, g, on):
            return None
    return longer


def round_robin(problem: Problem) -> Plan:
    """Models in the order given, each on the next GPUs; those that are full are passed over."""
    plan: Plan = ()
    turn = dict.fromkeys(range(1, 1 + len(problem.gpus)), 0)
    for i in range(len(problem.models)):
        tp = base_degree(problem, i)
        places = groups_of(problem, tp)
        for k in range(len(places)):
            longer = joined(problem, plan, Replica(i, places[(turn[tp] + k) % len(places)]))
            if longer is not None:
                plan, turn[tp] = longer, turn[tp] + k + 1
                break
    return plan


def least(problem: Problem, order: Iterable[int], measure: Callable[[Plan, Replica], float]) -> Plan:
    """Each model of `order` where `measure(plan with it, it)` is least; of equals the first."""
    plan: Plan = ()
    for i in order:
        best, found = inf, None
        for gpus in groups_of(problem, base_degree(problem, i)):
            new = Replica(i, gpus)
            longer = joined(problem, plan, new)
            if longer is not None and (value := measure(longer, new)) < best:
                best, found = value, longer
        plan = found if found is not None else plan
    return plan


def memory_balanced(problem: Problem) -> Plan:
    """Heaviest weights first, each where the fewest bytes of weights are."""
    heavy = sorted(range(len(problem.models)), key=lambda i: -problem.models[i].weight_bytes)

    def used(plan: Plan, new: Replica) -> float:
        of = [sum(problem.models[r.model].weight_bytes / r.tp for r in plan if g in r.gpus) for g in new.gpus]
        return max(of)

    return least(problem, heavy, used)


def prism(problem: Problem) -> Plan:
    """Prism's greedy rule: by falling rate / SLO, each where the KV pressure ratio ends least."""
    order = sorted(range(len(problem.models)), key=lambda i: -urgency(problem.models[i]))

    def pressure(plan: Plan, new: Replica) -> float:
        found = []
        for g in new.gpus:
            on = [r for r in plan if g in r.gpus]
            left = pool_bytes(problem, g, on)
            load = sum(urgency(problem.models[r.model]) / r.tp for r in on)
            found.append(load / left if left > 0 else inf)
        return max(found)

    return least(problem, order, pressure)


def chance(problem: Problem, seed: int) -> Plan:
    """Every model on GPUs drawn from those with room."""
    rng = Random(seed)
    plan: Plan = ()
    for i in rng.sample(range(len(problem.models)), len(problem.models)):
        places = groups_of(problem, base_degree(problem, i))
        rng.shuffle(places)
        fitting = (p for gpus in places if (p := joined(problem, plan, Replica(i, gpus))) is not None)
        plan = next(fitting, plan)
    return plan


def meshes(problem: Problem) -> Iterator[list[tuple[int, ...]]]:
    """Ways to cut every node into groups of 1, 2, 4 or 8 GPUs; nodes of one size are interchangeable."""
    by_size: dict[int, list[tuple[int, ...]]] = {}
    for gpus in problem.nodes.values():
        by_size.setdefault(len(gpus), []).append(gpus)
    ways: list[list[tuple[int, ...]]] = [[]]
    for size, nodes in by_size.items():
        cut = [
            [g for node, sizes in zip(nodes, patterns, strict=True) for g in _cut(node, sizes)]
            for patterns in combinations_with_replacement(list(partitions(size)), len(nodes))
        ]
        ways = [have + more for have in ways for more in cut]
    yield from ways


def partitions(size: int, largest: int = 8) -> Iterator[tuple[int, ...]]:
    """Of a node of `size` GPUs into powers of two, the largest first."""
    if size == 0:
        yield ()
    for part in (8, 4, 2, 1):
        if part <= min(size, largest):
            yield from ((part, *rest) for rest in partitions(size - part, part))


def _cut(gpus: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    found, at = [], 0
    for size in sizes:
        found.append(tuple(gpus[at : at + size]))
        at += size
    return found


def alpaserve(problem: Problem, simulate: Simulate, *, uniform: bool = True) -> Plan:
    """For each cut of the GPUs into groups (all of one size where `uniform`, as AlpaServe's): again and again simulate, and
    give the model with the most requests missed a replica on the least loaded group with room; keep the best of all."""
    best: Plan = ()
    value = -1.0
    for groups in meshes(problem):
        if uniform and len({len(g) for g in groups}) > 1:
            continue
        for plan, found in _grown(problem, groups, simulate):
            if found > value:
                best, value = plan, found
    return best


def _grown(
    problem: Problem, groups: Sequence[tuple[int, ...]], simulate: Simulate
) -> Iterator[tuple[Plan, float]]:
    plan: Plan = ()
    rates = [m.rate for m in problem.models]
    total = sum(rates) or 1.0
    while True:
        attained = [a if a is not None else 1.0 for a in simulate(plan)]
        yield plan, sum(a * r for a, r in zip(attained, rates, strict=True)) / total
        missed = sorted(range(len(rates)), key=lambda i: (-(1 - attained[i]) * rates[i], i))
        load = {g: sum(rates[r.model] / r.tp for r in plan if set(g) & set(r.gpus)) for g in groups}
        counts = {i: sum(r.model == i for r in plan) for i in missed}
        for i in missed:
            most = problem.models[i].replicas or problem.max_replicas
            if counts[i] >= most or (attained[i] >= 1.0 and counts[i]):
                continue
            order = sorted(groups, key=lambda g: (load[g], g))
            longer = next((p for g in order if (p := joined(problem, plan, Replica(i, g))) is not None), None)
            if longer is not None:
                plan = longer
                break
        else:
            return
