"""Scores placements with the simulator: the Batchers that serve, on pools that count bytes, with the time of steps modelled.

All placements of a problem are asked the same requests.  Pools have the reserves and the loan to one model at a time of
the real ones; what is beyond them goes to whoever asks first.  No clock, no chance: the same requests give the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.limits import Limits
from sched.metrics import Slo
from sched.placement import Model, Plan, Problem, Replica, pool_bytes, residents, use_of
from sched.placement_estimate import value_of
from sched.policies import make_policy
from sched.policy import Policy
from sched.simulated_replica import DECODE, PREFILL, Arrival, Record
from sched.simulated_replica import Replica as Simulated
from sched.simulator import TIME_SLICED, Simulation
from sched.slabs import MAX_SLAB_BYTES
from sched.synthetic import Laws, Lengths, synthetic
from sched.synthetic import Model as Asked

DRAIN_S = 20.0  # after the last arrival; what is unfinished then has missed


class Pool:
    """The bytes of one GPU's keys and values, counted by who holds them."""

    def __init__(self, num_bytes: float, reserves: dict[str, float], lent_bytes: float) -> None:
        self.free = num_bytes - sum(reserves.values()) - lent_bytes
        self.lent_bytes, self.borrower = lent_bytes, ""
        self.kept = dict(reserves)
        self.held = dict.fromkeys(reserves, 0.0)

    def has(self, name: str, more: float, urgent: bool) -> bool:
        over = max(0.0, self.held[name] + more - self.kept[name]) - max(
            0.0, self.held[name] - self.kept[name]
        )
        room = self.free
        if urgent and self.borrower in ("", name):
            room += self.lent_bytes
        return over <= room + 1e-6

    def take(self, name: str, more: float) -> None:
        over = max(0.0, self.held[name] + more - self.kept[name]) - max(
            0.0, self.held[name] - self.kept[name]
        )
        self.held[name] += more
        self.free -= over
        if self.free < -1e-6 and not self.borrower:
            self.borrower = name

    def give(self, name: str, less: float) -> None:
        self.take(name, -less)
        if self.borrower and self.free >= -1e-6:
            self.borrower = ""


class Sets:
    """The slab sets of a replica, one in the pool of each of its ranks or none."""

    def __init__(self, name: str, pools: Sequence[Pool], set_bytes: float) -> None:
        self.name, self.pools, self.set_bytes = name, pools, set_bytes
        self._free: list[int] = []
        self._next = 0

    def lease(self, *, urgent: bool = False) -> int | None:
        if not all(pool.has(self.name, self.set_bytes, urgent) for pool in self.pools):
            return None
        for pool in self.pools:
            pool.take(self.name, self.set_bytes)
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._next - 1

    def give_back(self, set_id: int) -> None:
        for pool in self.pools:
            pool.give(self.name, self.set_bytes)
        self._free.append(set_id)


@dataclass(frozen=True, slots=True)
class Scored:
    """By model what the requests attained, None of one that was not asked; `value` as the estimate's."""

    value: float
    joint: float
    worst: float
    attained: tuple[float | None, ...]
    tokens: int


def requests(problem: Problem, seconds: float, seed: int) -> list[Arrival]:
    """What the models are asked in so many seconds, with the laws of sched/synthetic.py."""
    found: list[Arrival] = []
    for burst in sorted({m.burst for m in problem.models}):
        asked = [_asked(m, m.rate if m.burst == burst else 0.0) for m in problem.models]
        load = synthetic(asked, Laws(cv=burst), seconds=seconds, seed=seed)
        by_name = {m.name: m for m in problem.models}
        for r in load.requests:
            m = by_name[r.model]
            due = m.due_s(r.prompt_tokens)
            found.append(
                Arrival(r.arrival_s, len(found), r.model, r.prompt_tokens, r.output_tokens, due, m.tpot_s)
            )
    return found


def _asked(model: Model, rate: float) -> Asked:
    lengths = Lengths(
        prompt_mean=model.prompt_tokens,
        output_mean=model.output_tokens,
        prompt_median=model.prompt_tokens / (1 + model.prompt_cv**2) ** 0.5,
        output_median=model.output_tokens / (1 + model.output_cv**2) ** 0.5,
        max_len=model.max_len,
    )
    return Asked(model.name, rate, lengths, Slo(model.ttft_s, model.tpot_s, model.ttft_per_token_s))


class Scorer:
    """Runs plans over the same requests; `num_runs` counts.  `policy`: of every Batcher, by default each model's own."""

    def __init__(
        self, problem: Problem, arrivals: Sequence[Arrival], policy: Callable[..., Policy] | None = None
    ) -> None:
        self.problem, self.arrivals, self.policy = problem, arrivals, policy
        self.num_runs = 0
        self._known: dict[Plan, Scored] = {}

    def __call__(self, plan: Plan) -> Scored:
        if plan not in self._known:
            self._known[plan] = self._run(plan)
        return self._known[plan]

    def _run(self, plan: Plan) -> Scored:
        self.num_runs += 1
        placed = {self.problem.models[r.model].name for r in plan}
        asked = [a for a in self.arrivals if a.model in placed]
        records: list[Record] = []
        tokens = 0
        if asked:
            slowdown = dict.fromkeys(TIME_SLICED, self.problem.beside)
            simulation = Simulation(replicas_of(self.problem, plan, self.policy), asked, slowdown=slowdown)
            simulation.run(until_s=max(a.at_s for a in asked) + DRAIN_S)
            records, tokens = list(simulation.records.values()), simulation.tokens
        good = dict.fromkeys((m.name for m in self.problem.models), 0)
        for record in records:
            good[record.arrival.model] += attained(record)
        came = dict.fromkeys(good, 0)
        for arrival in self.arrivals:
            came[arrival.model] += 1
        shares = tuple(good[m.name] / came[m.name] if came[m.name] else None for m in self.problem.models)
        known = [(a, came[m.name]) for a, m in zip(shares, self.problem.models, strict=True) if a is not None]
        value, joint, worst = value_of([a for a, _ in known], [], [n for _, n in known])
        return Scored(value, joint, worst, shares, tokens)


def attained(record: Record) -> bool:
    a = record.arrival
    if record.error is not None or record.first_s is None or record.end_s is None:
        return False
    tpot = (record.end_s - record.first_s) / max(1, a.output_tokens - 1)
    return record.first_s - a.at_s <= a.ttft_s and tpot <= a.tpot_s


def replicas_of(
    problem: Problem, plan: Plan, policy: Callable[..., Policy] | None = None, *, static: bool = False
) -> list[Simulated]:
    """`static`: each replica has a pool of its own, and none is shared."""
    on = residents(problem, plan)
    names = {
        r: f"{problem.models[r.model].name}@{','.join(problem.gpus[g].name for g in r.gpus)}" for r in plan
    }
    if static:
        split = [_divided(problem, g, of) for g, of in enumerate(on)]
        return [
            _replica(
                problem,
                r,
                names[r],
                [Pool(split[g][r], {names[r]: split[g][r]}, 0.0) for g in r.gpus],
                policy,
            )
            for r in plan
        ]
    pools = []
    for g, of in enumerate(on):
        kept = {names[r]: problem.models[r.model].reserve_bytes(r.tp) for r in of}
        lent = [
            problem.models[r.model].max_len * problem.models[r.model].kv_bytes(r.tp) - kept[names[r]]
            for r in of
        ]
        pools.append(Pool(pool_bytes(problem, g, of), kept, max(lent, default=0.0)))
    return [_replica(problem, r, names[r], [pools[g] for g in r.gpus], policy) for r in plan]


def _divided(problem: Problem, gpu: int, on: Sequence[Replica]) -> dict[Replica, float]:
    """Bytes of a GPU's pool that each keeps for itself: its longest sequence, the rest by rate x bytes of a request."""
    models = {r: problem.models[r.model] for r in on}
    least = {r: m.max_len * m.kv_bytes(r.tp) for r, m in models.items()}
    wanted = {r: m.rate * (m.prompt_tokens + m.output_tokens) * m.kv_bytes(r.tp) for r, m in models.items()}
    room = pool_bytes(problem, gpu, on)
    rest, total = max(0.0, room - sum(least.values())), sum(wanted.values())
    shrink = min(1.0, room / sum(least.values())) if least else 1.0
    return {r: least[r] * shrink + (rest * wanted[r] / total if total else rest / len(on)) for r in on}


def _replica(
    problem: Problem, r: Replica, name: str, pools: Sequence[Pool], policy: Callable[..., Policy] | None
) -> Simulated:
    m, cost = problem.models[r.model], problem.cost(r)
    limits = Limits(
        max_running=m.max_running,
        max_step_tokens=m.max_step_tokens,
        max_chunk_tokens=m.max_step_tokens,
        max_model_len=m.max_len,
        max_waiting=1_000_000,
    )
    # as many blocks as slabs of the largest size hold, so that a set is what it is when served
    block = m.block_tokens * m.kv_bytes(r.tp)
    slots = max(1, min(4096, int(MAX_SLAB_BYTES * m.layers // block))) if block > 0 else 64
    blocks = BlockPool(Sets(name, pools, slots * block), slots, m.block_tokens)
    own = policy(limits, cost) if policy else make_policy(m.policy, limits, cost, dict(m.policy_options))
    batcher = Batcher(blocks, limits, cost, own)
    use = dict(zip((DECODE, PREFILL), use_of(problem, r), strict=True))
    return Simulated(name, m.name, tuple(problem.gpus[g].name for g in r.gpus), batcher, use=use)
