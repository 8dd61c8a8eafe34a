"""MuxServe's placement (arXiv 2404.02015): cut the nodes into meshes, and put each model where throughput grows most.

Models go by falling rate x size; of every cut of the GPUs the one with the most throughput is kept.  A mesh's estimate:
the models' batches begin at one and the worst-served one's grows while the mesh's memory holds it; a model serves

    batch / (answer tokens x decode(batch) + the prefills of all on the mesh)      and no more than its rate.

`released` does what the published code does: increments are taken from a table of meshes that is indexed by place while
the meshes are sorted anew after every model, so they may be another's; a mesh counts the mean of its models'
throughput weighted by rate; every model takes 7.6 GB beside its weights.  Costs are of whole GPUs, not 10 % steps of them.
"""

from collections.abc import Sequence
from math import ceil, inf

from sched.placement import Model, Plan, Problem, Replica
from sched.placement_baselines import joined, meshes

EXTRA_BYTES = 7.6e9  # activations and two processes a model, in the published code
MEMORY_PART = 0.98
MOST_BATCH = 256
GROW = 1.15  # of a batch, or by one where that is more


def prefill_s(problem: Problem, r: Replica, batch: float) -> float:
    m, cost = problem.models[r.model], problem.cost(r)
    tokens = batch * m.prompt_tokens
    steps = ceil(tokens / m.max_step_tokens)
    every = steps * (cost.base_s + cost.rows_s(min(tokens, m.max_step_tokens)))
    return every + tokens * (
        cost.per_prefill_token_s + cost.per_context_token_s + cost.per_pair_s * m.prompt_tokens
    )


def decode_s(problem: Problem, r: Replica, batch: float) -> float:
    m = problem.models[r.model]
    return problem.cost(r).decode_s(int(batch), int(batch * (m.prompt_tokens + m.output_tokens / 2)))


def mesh_rates(problem: Problem, on: Sequence[Replica], *, released: bool) -> list[float]:
    """Requests a second of each replica of one mesh."""
    models = [problem.models[r.model] for r in on]
    memory = sum(problem.gpus[g].memory_bytes for g in on[0].gpus) * (MEMORY_PART if released else 1.0)
    memory -= sum(
        m.weight_bytes + (EXTRA_BYTES if released else m.work_bytes * len(on[0].gpus)) for m in models
    )
    share = sum(m.rate * m.kv_token_bytes for m in models) or 1.0
    caps = [_cap(m, max(0.0, memory) * m.rate * m.kv_token_bytes / share) for m in models]
    batches = [1.0] * len(on)
    best: list[float] = [0.0] * len(on)
    while True:
        prefill = sum(prefill_s(problem, r, b) for r, b in zip(on, batches, strict=True))
        got = []
        for r, m, b, cap in zip(on, models, batches, caps, strict=True):
            served = b / (m.output_tokens * decode_s(problem, r, b) + prefill)
            got.append(min(served, m.rate) if cap >= 1 else 0.0)
        if sum(got) > sum(best):
            best = got
        short = [
            (g / m.rate if m.rate > 0 else 1.0, i) for i, (g, m) in enumerate(zip(got, models, strict=True))
        ]
        growing = [(part, i) for part, i in short if part < 1 and batches[i] < caps[i]]
        if not growing:
            return best
        i = min(growing)[1]
        batches[i] = min(caps[i], max(batches[i] + 1, batches[i] * GROW))


def _cap(m: Model, kv_bytes: float) -> float:
    sequence = m.kv_token_bytes * (m.prompt_tokens + m.output_tokens)
    return min(kv_bytes / sequence if sequence > 0 else inf, m.max_running, MOST_BATCH)


def mesh_value(problem: Problem, on: Sequence[Replica], *, released: bool) -> float:
    if not on:
        return 0.0
    got = mesh_rates(problem, on, released=released)
    if not released:
        return sum(got)
    rates = [problem.models[r.model].rate for r in on]
    return sum(g * r for g, r in zip(got, rates, strict=True)) / (sum(rates) or 1.0)


def muxserve(problem: Problem, *, released: bool = False) -> Plan:
    """The best of all cuts; where no cut holds every model, the one that holds most of them."""
    best: Plan = ()
    value = (-1, -inf)
    for groups in meshes(problem):
        plan = _greedy(problem, groups, released)
        on = [[r for r in plan if r.gpus == g] for g in groups]
        found = (len(plan), sum(mesh_value(problem, of, released=released) for of in on))
        if found > value:
            best, value = plan, found
    return best


def _greedy(problem: Problem, groups: Sequence[tuple[int, ...]], released: bool) -> Plan:
    load = [m.rate * m.weight_bytes for m in problem.models]
    order = sorted(range(len(load)), key=lambda i: (-load[i], i))
    places = list(groups)
    table = [0.0] * len(places)  # of the mesh at each place
    used = dict.fromkeys(places, 0.0)
    plan: Plan = ()
    for i in order:
        best, increase, at = None, -inf, -1
        for k, gpus in enumerate(places):
            longer = joined(problem, plan, Replica(i, gpus))
            if longer is None:
                continue
            more = mesh_value(problem, [r for r in longer if r.gpus == gpus], released=released) - table[k]
            if more > increase * (1 + 1e-9):
                best, increase, at = longer, more, k
        if best is None:
            continue
        plan = best
        table[at] += increase
        used[places[at]] += load[i] / len(places[at])
        # the least used first, then the one with most memory: who is equal in throughput goes there
        rank = {g: (used[g], -_free(problem, plan, g)) for g in places}
        moved = sorted(range(len(places)), key=lambda k: rank[places[k]])
        places = [places[k] for k in moved]
        if not released:
            table = [table[k] for k in moved]
    return plan


def _free(problem: Problem, plan: Plan, gpus: tuple[int, ...]) -> float:
    mine = [problem.models[r.model].weight_bytes + EXTRA_BYTES for r in plan if r.gpus == gpus]
    return sum(problem.gpus[g].memory_bytes for g in gpus) - sum(mine)
