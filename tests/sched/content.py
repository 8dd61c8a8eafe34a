"""A Batcher with a cache over a memory that says of every position what was written there, and by which tokens.

Steps run in the order of their plans: all rows of a step write, then all rows read all positions up to their own, as a
layer does.  What is read must have been made of exactly this request's tokens and salt, whoever wrote it.
"""

import random
from dataclasses import dataclass, field

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.limits import Limits
from sched.prefix import KeyChain, root_key
from sched.step import Request, StepPlan
from tests.sched.witness import Sets

GARBAGE = -1


@dataclass
class Sequence:
    """`tokens`: all, those included that steps under way sample.  `known`: how many of them the engine has been told."""

    request: Request
    salt: str
    tokens: list[int]
    known: int
    chain: KeyChain
    fed: int
    table: list[int] | None = None
    hit: int | None = None  # cached tokens at its first start
    spoiled: float = float("inf")  # the first step that computed with what a failed one left behind
    ended: str = ""
    made: list[int] = field(default_factory=list)

    def marks(self, count: int) -> list[int]:
        """What the first `count` positions must hold."""
        made = self.made
        for token in self.tokens[len(made) : count]:
            made.append(hash((made[-1] if made else sum(self.salt.encode()), token)))
        return made[:count]


@dataclass
class Flight:
    plan: StepPlan
    fails: bool
    sampled: dict[int, int] = field(default_factory=dict)


class Generous(BlockPool):
    """Nobody is refused, paused or preempted while a block is free or idle."""

    def allocate(self, n: int, *, headroom: int = 0, urgent: bool = False) -> list[int] | None:
        idle = self.num_idle
        blocks = super().allocate(n, headroom=headroom, urgent=urgent)
        if blocks is None:
            assert n + headroom > self.num_available, f"{n} refused with {self.num_available} to be had"
            assert self.num_idle == idle, "a refusal evicted something"
        return blocks


class Content:
    def __init__(self, sets: Sets, slots: int, P: int, limits: Limits, *, cache: bool = True) -> None:
        self.pool = Generous(sets, slots, P)
        self.batcher = Batcher(self.pool, limits)
        self.P, self.cache = P, cache
        self.memory: dict[int, list[int]] = {}
        self.sequences: dict[int, Sequence] = {}
        self.flights: list[Flight] = []
        self.queries = self.hits = self.spoiled = self.moved = 0
        given = sets.give_back

        def give_back(set_id: int) -> None:
            """Another model writes there from now on."""
            for block in range(set_id << 12, (set_id << 12) + slots):
                self.memory.pop(block, None)
            given(set_id)

        sets.give_back = give_back  # type: ignore[method-assign]

    def add(
        self, rid: int, prompt: list[int], max_tokens: int, *, salt: str = "", reads: bool = True
    ) -> Sequence:
        chain = KeyChain(root_key(salt), self.P)
        keys = chain.extend(prompt) if self.cache else ()
        request = Request(
            rid=rid, prompt_tokens=len(prompt), max_tokens=max_tokens, keys=keys, reads_cache=reads
        )
        seq = Sequence(request, salt, list(prompt), len(prompt), chain, len(prompt))
        self.batcher.add(request)
        self.sequences[rid] = seq
        return seq

    def abort(self, rid: int) -> None:
        seq = self.sequences[rid]
        assert self.batcher.abort(rid) == (not seq.ended)
        seq.ended = seq.ended or "abort"
        self.batcher.check()

    def plan(self, *, fails: bool = False) -> StepPlan:
        plan = self.batcher.plan(0.0)
        self.batcher.check()
        for rid in plan.left:
            self.sequences[rid].table = None
        for rid, blocks in plan.grants:
            seq = self.sequences[rid]
            assert (seq.table is None) == (rid in plan.joins), f"request {rid}: {plan.joins=} {seq.table=}"
            seq.table = [*(seq.table or []), *blocks]
        for rid, index, block in plan.patches:
            table = self.sequences[rid].table
            assert table is not None
            assert (table[index], block) in plan.moves, f"request {rid} is to find {block} at {index}"
            table[index] = block
        for chunk in plan.chunks:
            if chunk.rid in plan.joins:
                self._joined(self.sequences[chunk.rid], chunk.start)
        if not plan.empty:
            self._run(plan, fails)
        return plan

    def _joined(self, seq: Sequence, start: int) -> None:
        assert start % self.P == 0
        assert start < len(seq.tokens), "nothing is left to compute"
        assert seq.request.reads_cache or not start
        if seq.hit is None and seq.request.reads_cache:
            seq.hit = start
            self.queries += seq.request.prompt_tokens
            self.hits += start

    def _run(self, plan: StepPlan, fails: bool) -> None:
        flight = Flight(plan, fails)
        # all are read before any is written, as by a kernel in whatever order
        copies = {b: list(self.memory.get(a, [0] * self.P)) for a, b in plan.moves}
        assert not copies.keys() & {a for a, _ in plan.moves}, (
            "a block is moved to where another is moved from"
        )
        self.moved += len(copies)
        for block, values in copies.items():
            self.memory[block] = [GARBAGE] * self.P if fails else values
        decodes = [(rid, len(self.sequences[rid].tokens) - 1, 1, True) for rid in plan.decode]
        rows = [(self.sequences[rid], start, count, s) for rid, start, count, s in [*decodes, *plan.chunks]]
        for seq, start, count, _ in rows:
            marks = seq.marks(start + count)
            for at in range(start, start + count):
                assert seq.table is not None
                block = self.memory.setdefault(seq.table[at // self.P], [0] * self.P)
                block[at % self.P] = GARBAGE if fails or seq.spoiled <= plan.step else marks[at]
        for seq, start, count, samples in rows:
            read = [self.memory[b] for b in (seq.table or [])[: -(-(start + count) // self.P)]]
            values = [v for block in read for v in block][: start + count]
            if GARBAGE in values:
                seq.spoiled = min(seq.spoiled, plan.step)
            else:
                assert values == seq.marks(start + count), f"request {seq.request.rid} reads another's"
            if samples:
                seq.tokens.append(seq.marks(start + count)[-1] % 7)
                flight.sampled[seq.request.rid] = len(seq.tokens)
        self.flights.append(flight)

    def advance(self, stops: float = 0.0, rng: random.Random | None = None) -> tuple[int, ...]:
        flight = self.flights.pop(0)
        if flight.fails:
            ended = self.batcher.fail(flight.plan, 0.0)
            for rid in ended:
                self.sequences[rid].ended = "failed"
            # of another failing step that is not known yet, whoever is spoiled may go on for now
            later = min((f.plan.step for f in self.flights if f.fails), default=float("inf"))
            left = [s for s in self.sequences.values() if s.spoiled < later and not s.ended]
            assert not left, f"{[s.request.rid for s in left]} computed with what a failed step left behind"
            named = {*flight.plan.decode, *(c.rid for c in flight.plan.chunks)}
            named |= {p.rid for p in flight.plan.patches}
            self.spoiled += len(set(ended) - named)
        else:
            stopped = []
            for rid, total in flight.sampled.items():
                seq = self.sequences[rid]
                if seq.ended:
                    continue
                assert seq.spoiled > flight.plan.step, f"request {rid} hands out a token made of garbage"
                seq.known = total
                self._feed(seq)
                if rng is not None and rng.random() < stops:
                    stopped.append(rid)
            ended = self.batcher.advance(flight.plan, 1, 0.0, stopped)
            for rid in ended:
                self.sequences[rid].ended = "end"
        self.batcher.check()
        return ended

    def _feed(self, seq: Sequence) -> None:
        """As the engine does: the newest token is not in memory yet, all before it are."""
        if not self.cache:
            return
        keys = seq.chain.extend(seq.tokens[seq.fed : seq.known - 1])
        seq.fed = max(seq.fed, seq.known - 1)
        if keys:
            self.batcher.extend(seq.request.rid, keys)

    def step(self) -> StepPlan:
        plan = self.plan()
        if not plan.empty:
            self.advance()
        return plan

    def finish(self, turns: int = 5000) -> None:
        while self.batcher.has_work and turns:
            self.plan()
            while self.flights:
                self.advance()
            turns -= 1
        assert not self.batcher.has_work, "requests never ended"
        assert self.pool.num_live == 0
        self.pool.give_up(10**6)
        assert self.pool.num_sets == 0, f"{self.pool.num_sets} sets leaked"
