"""Discrete events in place of devices: the Batchers and pools that serve, run on a clock that jumps.

A replica is a Batcher on one device.  It plans a step, the step takes what its cost model says, times the slow-down by
the replicas that run beside it when it starts, and is advanced at its end.  Decodes that need no decision are advanced
many at a time (`Batcher.horizon`): step i of such a stretch takes A + B * i seconds, so k of them take A * k +
B * k * (k - 1) / 2.  What happens meanwhile to the replica or beside it cuts the stretch at the end of the step under
way, so the result is that of single steps, save for what `Replica.after` does: it is called once a stretch and at every
turn.  No clock and no chance: the same arrivals give the same records.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, inf, sqrt
from typing import NamedTuple

from sched.batching import Batcher
from sched.latency import StepCost
from sched.limits import QueueFull
from sched.metrics import SHED
from sched.step import Request, StepPlan

# what happens at a moment: requests come before steps end, and steps end before quotas are divided anew
ARRIVE, END, TURN = range(3)
IDLE_TURNS = 1000
IDLE, DECODE, PREFILL = "idle", "decode", "prefill"
# how much longer a step takes beside one of the other kind, as (own, other): two that share a device's time get half each
WHOLE = {DECODE: 1.0, PREFILL: 1.0}
TIME_SLICED = {(a, b): 1.0 for a in (DECODE, PREFILL) for b in (DECODE, PREFILL)}


class Arrival(NamedTuple):
    """Request `rid` (unique) for `model`.  Token counts; seconds."""

    at_s: float
    rid: int
    model: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float = 10.0
    tpot_s: float = 1.0
    priority: int = 0


@dataclass(slots=True)
class Record:
    """What became of an arrival: `first_s` and `end_s` when its first and last token came out, None where they did not.
    `error`: why it was refused; `cached_tokens` of the prompt were not computed, None before it began or without a cache."""

    arrival: Arrival
    replica: str = ""
    first_s: float | None = None
    end_s: float | None = None
    error: str | None = None
    cached_tokens: int | None = None


class Replica:
    """`name` serves `model` on `devices`, all of them together; `stalled` while it has work and no memory to plan a step
    with.  `after(step_s)` is called when steps have ended, with the mean seconds of one, and with None while there is
    nothing to do.  `cost` is what steps take without neighbours, by default what the Batcher predicts.  `use`: the part of a
    device that a step in a phase keeps busy, less than all on some of its multiprocessors; those that run slow each other
    down where they want more than all of it together.  `keys` of the blocks of a prompt, where it has a prefix cache.
    `move_s`: of one block that compaction copies before a step."""

    __slots__ = ("a_s", "after", "b_s", "batcher", "begun_s", "beside", "cost", "devices", "generation", "k", "keys", "model",
                 "move_s", "name", "phase", "plan", "stalled", "steps", "use")  # fmt: skip

    def __init__(
        self,
        name: str,
        model: str,
        devices: tuple[str, ...],
        batcher: Batcher,
        after: Callable[[float | None], None] | None = None,
        cost: StepCost | None = None,
        use: Mapping[str, float] = WHOLE,
        keys: Callable[[Arrival], tuple[bytes, ...]] | None = None,
    ) -> None:
        cost = cost or batcher.cost
        if cost is None:
            raise ValueError(f"replica {name!r} needs a cost model: its steps would take no time")
        if not devices or len(set(devices)) != len(devices):
            raise ValueError(f"replica {name!r} needs different devices, and one at least, got {devices}")
        self.name, self.model, self.devices, self.batcher, self.after = name, model, devices, batcher, after
        self.cost, self.use, self.keys, self.move_s = cost, use, keys, 0.0
        self.beside: tuple[tuple[Replica, ...], ...] = ()  # of each device, the others on it
        self.plan: StepPlan | None = None
        self.phase = IDLE
        self.k = self.generation = self.steps = 0
        self.begun_s = self.a_s = self.b_s = 0.0
        self.stalled = False

    def end_of(self, k: int) -> float:
        """When `k` steps from the one under way are over."""
        return self.begun_s + self.a_s * k + self.b_s * (k * (k - 1) / 2)

    def steps_until(self, t: float) -> int:
        """The fewest whole steps that end at `t` or later, at least 1 and at most `k`."""
        if self.k == 1:
            return 1
        elapsed, a, b = t - self.begun_s, self.a_s, self.b_s
        if b > 0:
            # a k + b k (k - 1) / 2 = elapsed
            p = a - b / 2
            guess = (sqrt(p * p + 2 * b * max(elapsed, 0.0)) - p) / b
        else:
            guess = elapsed / a if a > 0 else 1.0
        k = max(1, min(self.k, int(guess)))
        while k < self.k and self.end_of(k) < t:
            k += 1
        while k > 1 and self.end_of(k - 1) >= t:
            k -= 1
        return k


class Turn(NamedTuple):
    """Something done every `every_s`, but once only while there is no request: a division of quotas, a sample of counters."""

    every_s: float
    do: Callable[[float], None]


class Simulation:
    """`route(arrival, replicas, now)` picks one of a model's replicas, or of those of the models that `groups` has under the
    arrival's name.  `slowdown[own, other]`: what a step in phase `own`
    takes longer, as a part of itself, for each replica in phase `other` on its device.  `stretch` False: step by step."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        arrivals: Sequence[Arrival],
        *,
        route: Callable[[Arrival, Sequence[Replica], float], Replica] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        slowdown: Mapping[tuple[str, str], float] = TIME_SLICED,
        turns: Sequence[Turn] = (),
        stretch: bool = True,
        trace: Callable[[Replica, float, float, int], None] | None = None,
    ) -> None:
        names = [r.name for r in replicas]
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"replicas need different names, and one at least, got {names}")
        self.now = 0.0
        self.tokens = 0  # sampled by all
        self.events = 0
        self.records = {a.rid: Record(a) for a in arrivals}
        if len(self.records) != len(arrivals):
            raise ValueError(f"{len(arrivals)} arrivals have {len(self.records)} different ids")
        self.replicas = tuple(replicas)
        self._of_model: dict[str, list[Replica]] = {}
        on: dict[str, list[Replica]] = {}
        for r in replicas:
            self._of_model.setdefault(r.model, []).append(r)
            for device in r.devices:
                on.setdefault(device, []).append(r)
        for r in replicas:
            r.beside = tuple(tuple(o for o in on[device] if o is not r) for device in r.devices)
        for name, models in (groups or {}).items():
            self._of_model[name] = [r for m in models for r in self._of_model.get(m, ())]
        missing = {a.model for a in arrivals} - self._of_model.keys()
        if missing:
            raise ValueError(f"no replica serves {sorted(missing)}; served are {sorted(self._of_model)}")
        self._route, self._slowdown, self._stretch, self._trace = (
            route or shortest_queue,
            slowdown,
            stretch,
            trace,
        )
        self._turns = turns
        # sorted already, and a heap only of what comes later
        self._arrivals = sorted(arrivals, key=lambda a: (a.at_s, a.rid))
        self._next = 0
        self._heap: list[tuple[float, int, int, int]] = []  # time, what, which replica or turn, generation
        self._index = {r.name: i for i, r in enumerate(self.replicas)}
        for i, turn in enumerate(turns):
            heappush(self._heap, (turn.every_s, TURN, i, 0))

    @property
    def num_open(self) -> int:
        """Requests that came and have not ended."""
        return sum(r.batcher.num_open for r in self.replicas)

    def run(self, until_s: float = inf) -> None:
        """To the end of the last request, or of the first event after `until_s`."""
        idle_turns = 0
        while True:
            at = self._arrivals[self._next].at_s if self._next < len(self._arrivals) else inf
            first = self._heap[0] if self._heap else None
            if first is None or at <= first[0]:
                if at == inf or at > until_s:
                    return
                self.now = at
                self._arrive(self._arrivals[self._next])
                self._next += 1
            else:
                if first[0] > until_s:
                    return
                if first[1] == TURN and at == inf and not self._busy:
                    # who is short of memory may get it by a turn, but not by a thousand
                    idle_turns += 1
                    if not self.num_open or idle_turns > IDLE_TURNS:
                        return
                else:
                    idle_turns = 0
                heappop(self._heap)
                self.now = first[0]
                if first[1] == TURN:
                    self._turn(first[2])
                elif first[3] == self.replicas[first[2]].generation:
                    self._end(self.replicas[first[2]])
            self.events += 1

    @property
    def _busy(self) -> bool:
        return any(r.plan is not None for r in self.replicas)

    # -- events

    def _arrive(self, arrival: Arrival) -> None:
        replica = self._route(arrival, self._of_model[arrival.model], self.now)
        record = self.records[arrival.rid]
        record.replica = replica.name
        request = Request(
            rid=arrival.rid,
            prompt_tokens=arrival.prompt_tokens,
            max_tokens=arrival.output_tokens,
            arrival_s=arrival.at_s,
            ttft_s=arrival.ttft_s,
            tpot_s=arrival.tpot_s,
            priority=arrival.priority,
            keys=() if replica.keys is None else replica.keys(arrival),
        )
        try:
            replica.batcher.add(request)
        except QueueFull as full:
            record.error = str(full)
        except ValueError as never:
            record.error = str(never)
        if record.error is None:
            self._cut(replica)
            self._start(replica)

    def _end(self, replica: Replica) -> None:
        plan, k = replica.plan, replica.k
        assert plan is not None, f"{replica.name} ends a step that it does not make"
        replica.plan = None
        replica.steps += k
        for chunk in plan.chunks:
            if chunk.samples:
                record = self.records[chunk.rid]
                self.tokens += 1
                if record.first_s is None:
                    record.first_s = self.now
        self.tokens += k * len(plan.decode)
        for rid in replica.batcher.advance(plan, k, self.now):
            self.records[rid].end_s = self.now
        if replica.after is not None:
            replica.after((self.now - replica.begun_s) / k)
        self._start(replica)
        # what came back to the pool may be what another waits for
        for others in replica.beside:
            for other in others:
                if other.stalled:
                    self._start(other)

    def _turn(self, index: int) -> None:
        turn = self._turns[index]
        turn.do(self.now)
        heappush(self._heap, (self._next_turn(turn.every_s), TURN, index, 0))
        for replica in self.replicas:
            self._cut(replica)  # what was decided now holds from the next step on
            if replica.plan is None:
                if replica.after is not None:
                    replica.after(None)
                self._start(replica)

    def _next_turn(self, every_s: float) -> float:
        """Nobody is there for the turns until the next request comes: the first of them is taken, and the others are not."""
        at = self.now + every_s
        if self._next < len(self._arrivals) and not self._busy and not self.num_open:
            at += every_s * max(0, ceil((self._arrivals[self._next].at_s - at) / every_s))
        return at

    # -- steps

    def _start(self, replica: Replica) -> None:
        """Plans the next step, if it makes none and there is something to do."""
        if replica.plan is not None:
            return
        batcher = replica.batcher
        replica.stalled = False
        phase = IDLE
        if batcher.has_work:
            plan = batcher.plan(self.now)
            for rid in plan.shed:
                self.records[rid].error = f"{SHED}: its first token cannot come in time"
            if plan.empty:
                replica.stalled = batcher.num_open > 0
            else:
                replica.plan = plan
                phase = PREFILL if plan.chunks else DECODE
                if plan.joins and replica.keys is not None:
                    self._joined(plan)
        self._enter(replica, phase)
        if replica.plan is None:
            return
        factor = self._factor(replica)
        replica.begun_s = self.now
        plan, cost = replica.plan, replica.cost
        known = cost is batcher.cost  # and has just predicted this step
        replica.a_s = (
            plan.seconds if known else cost.step_s(len(plan.decode), plan.context, plan.chunks)
        ) * factor
        replica.b_s = cost.slope_s(len(plan.decode)) * factor
        replica.k = batcher.horizon() if self._stretch else 1
        if plan.moves:
            replica.a_s += len(plan.moves) * replica.move_s * factor
            replica.k = 1  # the steps behind it have none
        self._schedule(replica)
        if self._trace is not None:
            self._trace(replica, self.now, replica.end_of(1), replica.plan.num_tokens)

    def _joined(self, plan: StepPlan) -> None:
        starts = {chunk.rid: chunk.start for chunk in plan.chunks}
        for rid in plan.joins:
            record = self.records[rid]
            if record.cached_tokens is None:  # else it was preempted, and finds its own
                record.cached_tokens = starts[rid]

    def _enter(self, replica: Replica, phase: str) -> None:
        """Whoever runs beside a replica that changes its phase goes on at another pace from its next step on."""
        if replica.phase == phase:
            return
        replica.phase = phase
        for others in replica.beside:
            for other in others:
                self._cut(other)

    def _factor(self, replica: Replica) -> float:
        """Of the slowest of its devices."""
        more, phase = self._slowdown, replica.phase
        worst = 0.0
        for beside in replica.beside:
            others = 0.0
            for other in beside:
                if other.phase != IDLE:
                    others += more[phase, other.phase] * other.use[other.phase]
            worst = max(worst, others)
        return max(1.0, replica.use[phase] + worst)

    def _cut(self, replica: Replica) -> None:
        """The step under way is the last of its stretch."""
        if replica.plan is None or replica.k == 1:
            return
        k = replica.steps_until(self.now)
        if k < replica.k:
            replica.k = k
            self._schedule(replica)

    def _schedule(self, replica: Replica) -> None:
        replica.generation += 1
        event = (replica.end_of(replica.k), END, self._index[replica.name], replica.generation)
        heappush(self._heap, event)

    def check(self) -> None:
        """AssertionError unless every request that came is in one place: ended, refused, or known to its replica."""
        came = [self.records[a.rid] for a in self._arrivals[: self._next]]
        ended = sum(r.end_s is not None for r in came)
        refused = sum(r.error is not None for r in came)
        assert ended + refused + self.num_open == len(came), (
            f"{len(came)} came, {ended} ended, {self.num_open} are open"
        )
        for r in came:
            assert r.end_s is None or r.first_s is not None, (
                f"request {r.arrival.rid} ended before its first token"
            )
            assert r.first_s is None or r.arrival.at_s <= r.first_s <= (r.end_s or inf), f"{r}"
        for replica in self.replicas:
            replica.batcher.check()


def shortest_queue(arrival: Arrival, replicas: Sequence[Replica], now: float) -> Replica:
    """The replica with the fewest requests; of equals the first."""
    return min(replicas, key=lambda r: r.batcher.num_open)
