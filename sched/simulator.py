"""Discrete events in place of devices: the Batchers and pools that serve, run on a clock that jumps.

A replica is a Batcher on one device.  It plans a step, the step takes what its cost model says, times the slow-down by
the replicas that run beside it when it starts, and is advanced at its end.  Decodes that need no decision are advanced
many at a time (`Batcher.horizon`): step i of such a stretch takes A + B * i seconds, so k of them take A * k +
B * k * (k - 1) / 2.  What happens meanwhile to the replica cuts the stretch at the end of the step under way; what happens
beside it changes A and B from there on.  So the result is that of single steps, but for who looks at things once a stretch:
`Replica.after` (and at every turn), policies that see the mean of its steps (itl-feedback, adbs), a replica that waits for
memory and looks again when a neighbour's stretch ends; and but for events at exactly the same time.  No clock and no chance:
the same arrivals give the same records.
"""

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from math import ceil, inf
from typing import NamedTuple

from sched.limits import QueueFull
from sched.metrics import SHED
from sched.simulated_replica import DECODE, IDLE, PREFILL, Arrival, Record, Replica, shortest_queue
from sched.step import Request, StepPlan

# what happens at a moment: requests come before steps end, and steps end before quotas are divided anew
ARRIVE, END, TURN = range(3)
IDLE_TURNS = 1000
# how much longer a step takes beside one of the other kind, as (own, other): two that share a device's time get half each
TIME_SLICED = {(a, b): 1.0 for a in (DECODE, PREFILL) for b in (DECODE, PREFILL)}


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
        for i, replica in enumerate(self.replicas):
            replica.index = i
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
                elif first[3] == (replica := self.replicas[first[2]]).generation:
                    (self._change if replica.left else self._end)(replica)
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
        plan, k = replica.plan, replica.done + replica.k
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
        for rid in replica.batcher.advance(plan, replica.k, self.now):
            self.records[rid].end_s = self.now
        if replica.after is not None:
            replica.after((self.now - replica.start_s) / k)
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
        plan, cost = replica.plan, replica.cost
        decodes = len(plan.decode)
        known = cost is batcher.cost  # and has just predicted this step
        replica.first_s = plan.seconds if known else cost.step_s(decodes, plan.context, plan.chunks)
        replica.slope_s = cost.slope_s(decodes)
        if plan.moves:
            replica.first_s += len(plan.moves) * replica.move_s
        # the steps behind one that moves have no moves
        replica.k = batcher.horizon() if self._stretch and not plan.moves else 1
        replica.done, replica.start_s = 0, self.now
        self._pace(replica)
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
                stretched = other.plan is not None and other.k > 1 and not other.left
                if stretched and self._factor(other) != other.factor:
                    self._cut(other, goes_on=True)

    def _change(self, replica: Replica) -> None:
        """Those beside it have changed their phases: the rest of its stretch is at another pace."""
        assert replica.plan is not None, f"{replica.name} goes on with a step that it does not make"
        replica.batcher.progress(replica.plan, replica.k, self.now)
        replica.done += replica.k
        replica.k = replica.left
        self._pace(replica)

    def _pace(self, replica: Replica) -> None:
        """From now on, the steps that are left take as long as who runs beside them makes them."""
        factor = replica.factor = self._factor(replica)
        replica.begun_s, replica.left = self.now, 0
        replica.a_s = (replica.first_s + replica.slope_s * replica.done) * factor
        replica.b_s = replica.slope_s * factor
        self._schedule(replica)

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

    def _cut(self, replica: Replica, *, goes_on: bool = False) -> None:
        """The step under way is the last of its stretch, or the last at its pace."""
        if replica.plan is None:
            return
        if replica.left and not goes_on:
            replica.left = 0
        elif replica.k > 1 and (k := replica.steps_until(self.now)) < replica.k:
            replica.left = replica.k - k if goes_on else 0
            replica.k = k
            self._schedule(replica)

    def _schedule(self, replica: Replica) -> None:
        replica.generation += 1
        heappush(self._heap, (replica.end_of(replica.k), END, replica.index, replica.generation))

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
