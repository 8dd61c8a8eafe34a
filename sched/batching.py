"""Batcher: the only owner of requests and blocks.  Decides what each step computes; knows no token id and no clock.

    plan(now) -> StepPlan        state moves on as if the step had run: plan(s + 1) may come before advance(s)
    horizon() -> k               how often the plan just made could be repeated with nothing new to decide
    advance(plan, k, now, stopped) -> ended rids        plans are advanced in the order in which they were made

A stop is known one step late when steps overlap: the request may be in step s + 1 already, and its row there is to be
ignored.  Blocks that are freed can be granted again once every planned step that names them has been advanced.
A block is found in the cache from the plan on that fills it: steps run in order, and each layer writes before it reads.
"""

from collections.abc import Iterable

from sched.blocks import BlockPool
from sched.claims import check_held, claim, publish, spoiled
from sched.compaction import NOTHING, Compactor
from sched.flights import Flight, Flights
from sched.forecast import Forecast
from sched.latency import StepCost
from sched.limits import Limits
from sched.policy import Load, Policy
from sched.recount import check_states
from sched.running import Running
from sched.sequence import Seq, State
from sched.slack import Slack
from sched.step import Chunk, Grant, Request, StepPlan
from sched.waiting import WaitQueue

# after a refusal the source is asked for a newcomer's blocks again this many steps later, or when blocks come free
RETRY_STEPS = 8


class Batcher:
    """Decodes first, then prompts as the policy says: a Slack where none is given.  Without a `cost` it predicts nothing."""

    def __init__(
        self, blocks: BlockPool, limits: Limits, cost: StepCost | None = None, policy: Policy | None = None
    ) -> None:
        self.blocks = blocks
        self.limits = limits
        self.policy = Slack(limits, cost) if policy is None else policy
        self._forecast = Forecast(cost, self.policy)
        self.num_preemptions = 0
        self._live: dict[int, Seq] = {}
        self._queue = WaitQueue(self.policy)
        # admitted, in state PREFILLING, RUNNING or PAUSED; each of them also in one of the three below
        self._active: dict[int, Seq] = {}
        self._prefilling: dict[int, Seq] = {}
        self._running = Running(blocks.block_tokens)
        self._paused: dict[int, Seq] = {}
        self._flights = Flights(blocks)
        self.compactor = Compactor(blocks, self._flights)
        self._left: list[int] = []
        self._joins: list[int] = []
        self._step = 0  # the next to be planned
        self._retry_step = self._refused_at = 0
        self._num_added = self._num_admitted = 0

    @property
    def cost(self) -> StepCost | None:
        return self._forecast.cost

    @property
    def num_running(self) -> int:
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_open(self) -> int:
        """Requests that came and have not ended: those that run, wait, or have their last token in a step under way."""
        return len(self._live)

    @property
    def _full(self) -> bool:
        """Nobody can be admitted, so a policy that is steady is not asked: in a stretch it would not be, either."""
        return self.policy.steady and len(self._active) >= self.limits.max_running

    @property
    def has_work(self) -> bool:
        """A request lives, a step is not advanced, or a table is still to be dropped by a plan."""
        return bool(self._live or self._flights or self._left)

    def add(self, request: Request) -> None:
        """Raises ValueError where the request could never run, QueueFull where too many wait."""
        if request.rid in self._live:
            raise ValueError(f"request {request.rid} is already there")
        self.limits.accept(request, self._queue.num_new)
        seq = Seq(request, self._num_added)
        self._num_added += 1
        self._live[request.rid] = seq
        self._queue.push(seq)

    def abort(self, rid: int) -> bool:
        """False where no such request lives.  An aborted one is not among the ended that advance returns."""
        seq = self._live.pop(rid, None)
        if seq is None:
            return False
        self._drop(seq)
        return True

    def plan(self, now: float, most: int | None = None) -> StepPlan:
        """The next step, with at most `most` tokens of prompts.  An empty one need not be advanced, but its `left` counts."""
        step = self._step
        grants = self._grow(step)
        decode = self._running.rids()
        moves, patches, held = self.compactor.make(self._active, step) if decode else NOTHING
        load = self._forecast.load(
            now, len(decode), self._running, len(self._active), self._prefilling.values()
        )
        chunks: list[Chunk] = []
        joined: list[Seq] = []
        shed: tuple[int, ...] = ()
        if self._prefilling or (self._queue and not self._full):
            if decode:
                load.due_s, load.tpot_s = self._running.deadline(step, load.begin_s), self._running.tpot_s
                load.paces = self._running.paces
            shed = tuple(seq.rid for seq in self.policy.begin(load))
            for rid in shed:
                self.abort(rid)
            budget = self.policy.budget(load)
            chunks = self._prefill(load, budget if most is None else min(budget, most), grants, joined)
        seconds = self._forecast.seconds(load, chunks)
        named = tuple(chunks), tuple(grants), tuple(self._left), tuple(self._joins)
        plan = StepPlan(step, decode, *named, seconds, load.context, moves, patches, shed)
        self._left.clear()
        self._joins.clear()
        if not plan.empty:
            self._forecast.planned(load, seconds)
            self._depart(Flight(plan, joined, now))
            self._flights.release(held, step)
        return plan

    def recost(self, cost: StepCost) -> None:
        """From the next plan on, steps are predicted by `cost`."""
        self._forecast.recost(cost)

    def horizon(self) -> int:
        """Steps, the newest plan's included, that need no decision: nobody joins or ends before the last of them."""
        flight = self._flights.oldest
        if flight is None or len(self._flights) > 1 or flight.plan.chunks or flight.ending:
            return 1
        if self._paused or self._prefilling or (self._queue and not self._full):
            return 1
        end = self._running.next_end()
        if end is None:
            return 1
        step = flight.plan.step
        k = end - step + 1
        free = self.blocks.num_unasked  # for more, single steps would ask where neighbours ask
        if free < len(self._running) * (1 + k // self.blocks.block_tokens):
            return self._running.steps_within(free, step, k)
        return k

    def advance(self, plan: StepPlan, k: int, now: float, stopped: Iterable[int] = ()) -> tuple[int, ...]:
        """The step has run, `k` times over; returns who ended with it, by length or because the caller says so.

        k > 1 is for the simulator (at most `horizon`): blocks of the repeated steps are taken here, and in no plan.
        """
        if plan.empty:
            return ()
        if k > 1 or self._flights.peek(plan.step).done:
            self._repeat(plan.step, k)
        flight = self._flights.pop(plan.step)
        for seq in flight.joined:
            if seq.first_s is None:
                seq.first_s = now
                if seq.state is State.RUNNING:
                    self._running.track(seq)
        ended = [seq.rid for seq in flight.ending if self._live.get(seq.rid) is seq]
        for rid in ended:
            self._live.pop(rid).state = State.GONE
        for rid in sorted(stopped):
            if self.abort(rid):
                ended.append(rid)
        self._flights.land(flight)
        self._forecast.landed(flight, k, now, self._flights.predicted_s)
        return tuple(ended)

    def progress(self, plan: StepPlan, k: int, now: float) -> None:
        """`k` steps of a stretch have run that goes on, at another pace: `advance` is then for the rest of them."""
        flight = self._flights.peek(plan.step)
        self._forecast.landed(flight, k, now, 0.0)
        flight.done += k

    def fail(self, plan: StepPlan, now: float) -> tuple[int, ...]:
        """In place of `advance`, for a step that raised: ends whoever was in it or relied on what it was to write, and
        the cache forgets that."""
        gone = spoiled(plan, self._live.values())
        self.blocks.forget(since=plan.step)
        self.advance(plan, 1, now, gone)
        return tuple(gone)

    def extend(self, rid: int, keys: Iterable[bytes]) -> None:
        """The next full blocks of a request have these keys; all their positions are in steps advanced, or about to be."""
        seq = self._live.get(rid)
        if seq is None:
            return
        seq.keys += keys
        if seq.state in (State.RUNNING, State.PAUSED):
            publish(self.blocks, seq, len(seq.keys) * self.blocks.block_tokens)

    # -- plan: blocks for those that run

    def _grow(self, step: int) -> list[Grant]:
        """One block to each that cannot decode in `step` without; who gets none is paused."""
        due = self._running.due(step)
        if self._paused or len(due) > self.blocks.num_available:
            return self._grow_scarce(step, sorted([*self._paused.values(), *due], key=lambda seq: seq.order))
        grants: list[Grant] = []
        if due:
            blocks = self.blocks.allocate(len(due))
            assert blocks is not None, f"{self.blocks.num_available=} but {len(due)} blocks were refused"
            for seq, block in zip(due, blocks, strict=True):
                seq.blocks.append(block)
                grants.append(Grant(seq.rid, (block,)))
        return grants

    def _grow_scarce(self, step: int, due: list[Seq]) -> list[Grant]:
        """Blocks may run out: eldest first, and after the first refusal the rest waits for the next plan."""
        grants: list[Grant] = []
        for i, seq in enumerate(due):
            if seq.state is State.WAITING:
                continue  # preempted just now for an elder one
            blocks = self._block_for(seq)
            if blocks is None:
                for later in due[i:]:
                    if later.state is State.RUNNING:
                        self._running.stop(later, step - 1, State.PAUSED)
                        self._paused[later.rid] = later
                break
            seq.blocks += blocks
            grants.append(Grant(seq.rid, tuple(blocks)))
            if seq.state is State.PAUSED:
                del self._paused[seq.rid]
                self._run(seq, step - 1)
        return grants

    def _block_for(self, seq: Seq) -> list[int] | None:
        """Preempts the youngest, one by one, until `seq` has its block; never an elder one."""
        while (blocks := self.blocks.allocate(1)) is None:
            if self._flights.pending:
                return None  # the steps in flight will free some
            younger = [other for other in self._active.values() if other.order > seq.order]
            if not younger:
                alone = len(self._active) == 1 and not self._flights
                return self.blocks.allocate(1, urgent=True) if alone else None
            self._preempt(self.policy.victim(younger))
        return blocks

    def _preempt(self, seq: Seq) -> None:
        """Its blocks go, and all of it is to be computed again, produced tokens included."""
        self.num_preemptions += 1
        self._deactivate(seq, State.WAITING)
        seq.computed = 0
        self._queue.push(seq)

    # -- plan: chunks

    def _prefill(self, load: Load, budget: int, grants: list[Grant], joined: list[Seq]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for seq in self.policy.order(self._prefilling.values()):
            if budget <= 0:
                break
            budget -= self._cut(seq, budget, chunks, joined)
        if budget > 0 and self._queue:
            cap = min(self.policy.cap(load), self.limits.max_running)
            while budget > 0 and len(self._active) < cap and (admitted := self._admit(load)) is not None:
                grants.append(Grant(admitted.rid, tuple(admitted.blocks)))
                budget -= self._cut(admitted, budget, chunks, joined)
        return chunks

    def _cut(self, seq: Seq, budget: int, chunks: list[Chunk], joined: list[Seq]) -> int:
        """Plan the next chunk of `seq`; returns its tokens."""
        count = min(budget, self.limits.max_chunk_tokens, seq.total - seq.computed)
        start = seq.computed
        seq.computed += count
        seq.last = self._step
        samples = seq.computed == seq.total
        chunks.append(Chunk(seq.rid, start, count, samples))
        if samples:
            joined.append(seq)
        publish(self.blocks, seq, seq.computed, self._step)
        return count

    def _admit(self, load: Load) -> Seq | None:
        """The head of the queue with blocks for all its tokens, or None; nobody overtakes the head."""
        if self._paused:
            return None
        seq = self._queue.head(load)
        # a preempted one waits until all its tokens are known: none is in a step that has not been advanced
        if seq is None or not self._flights.advanced(seq.last):
            return None
        alone = not self._active and not self._flights
        if self._step < self._retry_step and self.blocks.num_released <= self._refused_at and not alone:
            return None
        if not claim(self.blocks, seq, len(self._active) // 8, alone):  # the others will grow
            self._retry_step = self._step + RETRY_STEPS
            self._refused_at = self.blocks.num_released
            return None
        self._queue.pop(seq)
        self._joins.append(seq.rid)
        if seq.order < 0:
            seq.order = self._num_admitted
            self._num_admitted += 1
        seq.state = State.PREFILLING
        self._active[seq.rid] = self._prefilling[seq.rid] = seq
        return seq

    # -- plan: the state after the step

    def _depart(self, flight: Flight) -> None:
        step = self._step
        self._step += 1
        self._flights.push(flight)
        flight.ending = self._running.tick(step)
        for seq in flight.joined:
            del self._prefilling[seq.rid]
            seq.produced += 1
            seq.base = step
            if seq.remaining:
                self._run(seq, step)
            else:
                seq.state = State.ENDING
                flight.ending.append(seq)
        for seq in flight.ending:
            del self._active[seq.rid]
            self._release(seq)

    def _run(self, seq: Seq, base: int) -> None:
        self._running.start(seq, base)
        if seq.first_s is not None:
            self._running.track(seq)

    def _repeat(self, first: int, k: int) -> None:
        """Steps that differ from the one planned in nothing but one more token a request."""
        flight = self._flights.peek(first)
        k += flight.done
        assert first == self._step - 1, f"step {first} is not the only one planned"
        alike = not (flight.plan.chunks or flight.ending or self._paused)
        assert alike, f"step {first} ends or prefills a request: it cannot be repeated"
        running, last = self._running, first + k - 1
        end = running.next_end()
        assert end is None or end >= last, (
            f"one ended in step {end}: {k} steps from {first} are no repetition"
        )
        due = [seq for step in range(first + 1, last + 1) for seq in running.due(step)]
        blocks = self.blocks.allocate(len(due)) if due else ()
        assert blocks is not None, f"steps {first + 1} to {last} are short of blocks: {len(due)=}"
        for seq, block in zip(due, blocks, strict=True):
            seq.blocks.append(block)
        flight.ending = running.tick(last, k - 1)
        self._step = last + 1
        for seq in flight.ending:
            del self._active[seq.rid]
            seq.last = first  # the flight that stands for all of them
            self._release(seq)

    # -- leaving

    def _drop(self, seq: Seq) -> None:
        """The request ends from outside, whatever its state."""
        if seq.state is State.WAITING:
            seq.state = State.GONE
            self._queue.discard(seq)
        elif seq.state is State.ENDING:
            seq.state = State.GONE  # its blocks wait for its last step already
        else:
            self._deactivate(seq, State.GONE)

    def _deactivate(self, seq: Seq, state: State) -> None:
        if seq.state is State.RUNNING:
            self._running.stop(seq, self._step - 1, state)
        elif seq.state is State.PAUSED:
            del self._paused[seq.rid]
        else:
            del self._prefilling[seq.rid]
        seq.state = state
        del self._active[seq.rid]
        self._release(seq)

    def _release(self, seq: Seq) -> None:
        """Its table is to be dropped; its blocks come free when the newest step that names them is advanced."""
        self._left.append(seq.rid)
        blocks, seq.blocks = seq.blocks, []
        blocks.reverse()  # the end goes from the cache first: without its beginning it is not found
        self._flights.release(blocks, seq.last)

    def check(self) -> None:
        """Recounts everything.  Raises AssertionError where the structures disagree."""
        self.blocks.check()
        self._queue.check()
        self._running.check(self._step - 1)
        check_states(self._live, self._active, self._prefilling, self._paused, self.blocks.block_tokens)
        assert len(self._active) <= self.limits.max_running, f"{len(self._active)} run"
        assert len(self._running) + len(self._prefilling) + len(self._paused) == len(self._active)
        self._flights.check()
        check_held(self.blocks, self._flights.held() + [seq.blocks for seq in self._active.values()])
