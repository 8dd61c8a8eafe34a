"""Witness: executes plans by brute force, token by token, and objects to whatever cannot have been meant.

It keeps its own tables and counts, learns of the Batcher only through plans, and shares no code with it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sched.batching import Batcher
from sched.limits import Limits
from sched.simulated_replica import DECODE, PREFILL
from sched.step import Request, StepPlan

# a slow-down by neighbours that tells all four pairs of phases apart
UNEVEN = {(DECODE, DECODE): 0.3, (DECODE, PREFILL): 1.1, (PREFILL, DECODE): 0.2, (PREFILL, PREFILL): 0.9}


class Sets:
    """A SetSource of `num_sets`.  `foreign` are held by another model; the last `reserve` only go to the urgent."""

    def __init__(self, num_sets: int, reserve: int = 0) -> None:
        self.num_sets = num_sets
        self.reserve = reserve
        self.foreign = 0
        self.refuses: Callable[[], bool] = lambda: False
        self.on_urgent: Callable[[], None] = lambda: None
        self.free = list(range(num_sets - 1, -1, -1))
        self.num_asked = 0
        self.num_urgent = 0

    def lease(self, *, urgent: bool = False) -> int | None:
        self.num_asked += 1
        if urgent:
            self.on_urgent()
        kept = self.foreign + (0 if urgent else self.reserve)
        if self.refuses() or len(self.free) <= kept:
            return None
        self.num_urgent += urgent
        return self.free.pop()

    def give_back(self, set_id: int) -> None:
        assert set_id not in self.free, f"set {set_id} came back twice"
        self.free.append(set_id)

    @property
    def num_leased(self) -> int:
        return self.num_sets - len(self.free)


@dataclass
class Record:
    """What the witness knows of one request: `computed` positions since its last start, `sampled` tokens."""

    request: Request
    computed: int = 0
    sampled: int = 0
    ended: str = ""
    table: list[int] | None = None
    starts: int = 0

    @property
    def total(self) -> int:
        return self.request.prompt_tokens + self.sampled


@dataclass
class Planned:
    plan: StepPlan
    blocks: set[int]  # named by the step
    sampled: dict[int, Record]  # by rid
    last: list[Record] = field(default_factory=list)  # those whose last token it samples


class Witness:
    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.limits: Limits = batcher.limits
        self.P = batcher.blocks.block_tokens
        self.records: dict[int, Record] = {}
        self.planned: list[Planned] = []
        self.num_moves = self.num_chunks = self.num_steps = self.num_restarts = self.num_empty = 0

    def add(self, request: Request) -> None:
        self.batcher.add(request)
        self.records[request.rid] = Record(request)

    def abort(self, rid: int) -> None:
        assert self.batcher.abort(rid) == (not self.records[rid].ended)
        self.records[rid].ended = self.records[rid].ended or "abort"
        self.batcher.check()

    @property
    def live(self) -> list[Record]:
        return [r for r in self.records.values() if not r.ended]

    def plan(self, now: float) -> StepPlan:
        plan = self.batcher.plan(now)
        self.batcher.check()
        for rid in plan.shed:
            r = self.records[rid]
            assert not r.ended, f"request {rid} is shed, but ended by {r.ended}"
            assert r.table is None, f"request {rid} is shed while it runs"
            r.ended = "shed"
        self._leave(plan)
        self._grant(plan)
        planned = Planned(plan, set(), {})
        self._move(plan, planned)
        self._execute(plan, planned)
        tabled = [r for r in self.records.values() if r.table is not None]
        assert all(not r.ended for r in tabled), "a table outlives its request"
        assert len(tabled) - len(planned.last) == self.batcher.num_running <= self.limits.max_running
        if plan.empty:
            self.num_empty += 1
        else:
            self.planned.append(planned)
            self.num_steps += 1
        return plan

    def _leave(self, plan: StepPlan) -> None:
        assert len(set(plan.left)) == len(plan.left), f"{plan.left=}"
        for rid in plan.left:
            r = self.records[rid]
            assert r.table is not None, f"request {rid} left, but had no table"
            r.table = None
            r.computed = 0
        ending = {id(r) for p in self.planned for r in p.last}
        for rid, r in self.records.items():
            # its last token is planned, or it ended: the table goes with the next plan
            assert r.table is None or not (r.ended or id(r) in ending), f"request {rid} did not leave"

    def _grant(self, plan: StepPlan) -> None:
        assert len({g.rid for g in plan.grants}) == len(plan.grants), f"{plan.grants=}"
        held = {b for r in self.records.values() for b in r.table or ()}
        flying = {b for p in self.planned for b in p.blocks}
        for rid, blocks in plan.grants:
            r = self.records[rid]
            assert not r.ended, f"request {rid} ended, {blocks} granted"
            assert blocks, f"an empty grant to {rid}"
            assert not held & set(blocks), f"{held & set(blocks)} granted to {rid} but held"
            assert not flying & set(blocks), (
                f"{flying & set(blocks)} granted to {rid} but a step in flight names it"
            )
            assert len(set(blocks)) == len(blocks), f"{blocks=}"
            held |= set(blocks)
            if r.table is None:
                r.table = []
                r.starts += 1
                self.num_restarts += r.starts > 1
            r.table += blocks

    def _move(self, plan: StepPlan, planned: Planned) -> None:
        """Sources and targets belong to the step: neither may be given to anybody before it has run."""
        moved = dict(plan.moves)
        assert plan.moves == () or not plan.empty, f"{plan.moves} in no step"
        assert len(moved) == len(plan.moves) == len(set(moved.values())), f"{plan.moves=}"
        held = {b for r in self.records.values() for b in r.table or ()}
        flying = {b for p in self.planned for b in p.blocks}
        taken = set(moved.values()) & (held | flying | moved.keys())
        assert not taken, f"blocks are moved to {taken}, which are taken"
        assert moved.keys() <= held, f"{moved.keys() - held} are moved, but nobody's"
        for rid, index, block in plan.patches:
            table = self.records[rid].table
            assert table is not None, f"request {rid} has no table"
            assert moved[table[index]] == block, f"request {rid}: {table[index]} went to {block}"
            table[index] = block
        left = {b for r in self.records.values() for b in r.table or ()} & moved.keys()
        assert not left, f"{left} were moved, and are still named"
        planned.blocks |= {*moved.keys(), *moved.values()}
        self.num_moves += len(moved)

    def _execute(self, plan: StepPlan, planned: Planned) -> None:
        rids = [*plan.decode, *(c.rid for c in plan.chunks)]
        assert len(set(rids)) == len(rids), f"a request is twice in step {plan.step}"
        assert plan.num_tokens <= self.limits.max_step_tokens, f"{plan.num_tokens} tokens in step {plan.step}"
        for rid in plan.decode:
            r = self.records[rid]
            assert r.sampled, f"request {rid} decodes before its prompt"
            assert r.computed == r.total - 1, f"request {rid}: {r.computed=} {r.total=}"
            self._compute(r, 1, True, planned)
        for rid, start, count, samples in plan.chunks:
            r = self.records[rid]
            assert start == r.computed, f"request {rid}: {start=} {r.computed=}"
            assert 0 < count <= self.limits.max_chunk_tokens, f"request {rid}: {count=}"
            assert start + count <= r.total, f"request {rid}: {start=} {count=} {r.total=}"
            assert samples == (start + count == r.total), (
                f"request {rid}: {start=} {count=} {r.total=} {samples=}"
            )
            unknown = [p.plan.step for p in self.planned if rid in p.sampled]
            assert not unknown, f"a chunk of {rid} contains the token of step {unknown}"
            self._compute(r, count, samples, planned)
            self.num_chunks += 1

    def _compute(self, r: Record, count: int, samples: bool, planned: Planned) -> None:
        rid = r.request.rid
        assert not r.ended, f"request {rid} ended, but is in step {planned.plan.step}"
        assert r.sampled < r.request.max_tokens, f"request {rid} has its {r.sampled} tokens already"
        assert r.table is not None, f"request {rid} has no table"
        r.computed += count
        used = -(-r.computed // self.P)
        assert used <= len(r.table), f"request {rid}: {r.computed} positions in {len(r.table)} blocks"
        planned.blocks |= set(r.table)
        if samples:
            r.sampled += 1
            planned.sampled[rid] = r
            if r.sampled == r.request.max_tokens:
                planned.last.append(r)

    def advance(self, now: float, stops: Callable[[int], bool] = lambda rid: False) -> tuple[int, ...]:
        """The oldest planned step ran; every token it sampled may be a stop."""
        planned = self.planned.pop(0)
        stopped = {rid for rid, r in planned.sampled.items() if not r.ended and stops(rid)}
        by_length = {r.request.rid for r in planned.last if not r.ended}
        ended = self.batcher.advance(planned.plan, 1, now, stopped)
        self.batcher.check()
        assert len(set(ended)) == len(ended), f"{ended=}"
        assert set(ended) == stopped | by_length, f"{ended=} {stopped=} {by_length=}"
        for rid in ended:
            self.records[rid].ended = "stop" if rid in stopped else "length"
        return ended

    def finish(self, now: float, max_turns: int) -> None:
        """Drive to the end without new events: everything must end and nothing may leak."""
        for _ in range(max_turns):
            if not self.batcher.has_work:
                break
            plan = self.plan(now)
            while self.planned:
                self.advance(now)
            now += plan.seconds or 1.0
        assert not self.batcher.has_work, (
            f"{[r.request.rid for r in self.live]} still live after {max_turns} turns"
        )
        assert not self.live, f"{len(self.live)} requests never ended"
        assert self.batcher.num_running == self.batcher.num_waiting == 0
        assert all(r.table is None for r in self.records.values()), "a table was never dropped"
        blocks, source = self.batcher.blocks, self.batcher.blocks.source
        assert blocks.num_live == 0, f"{blocks.num_live} blocks leaked"
        assert blocks.num_sets <= 1, f"{blocks.num_sets} empty sets kept"
        blocks.trim()
        assert isinstance(source, Sets)
        assert source.num_leased == 0, f"{source.num_leased} sets leaked"


def requests(rids: Iterable[int], prompt: int = 8, output: int = 8) -> list[Request]:
    return [Request(rid=i, prompt_tokens=prompt, max_tokens=output) for i in rids]
