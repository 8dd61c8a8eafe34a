"""Requests that hold no blocks, in the order in which they are to be admitted.

Preempted ones first, eldest first: their callers have seen tokens.  Then new ones by slack: deadline of the first
token less the seconds its prompt takes, an order that time does not change, so one heap and no re-sort.  Whoever can
no longer make its deadline moves to a second heap, served by arrival, one admission in LATE_SHARE: no one starves.
"""

from heapq import heapify, heappop, heappush

from sched.sequence import Seq, State

LATE_SHARE = 4
Entry = tuple[float, int, Seq]


class WaitQueue:
    """`head` looks, `pop` takes what `head` showed.  A sequence that left the WAITING state is skipped."""

    def __init__(self, seconds_per_token: float = 0.0) -> None:
        self.seconds_per_token = seconds_per_token
        self.num_new = 0
        self.num_preempted = 0
        self.num_tokens = 0  # of all that wait: what their blocks would hold
        self._preempted: list[Entry] = []
        self._timely: list[Entry] = []
        self._late: list[Entry] = []
        self._turn = 0
        self._shown: list[Entry] | None = None

    def __len__(self) -> int:
        return self.num_new + self.num_preempted

    def push(self, seq: Seq) -> None:
        """A new sequence, or with an `order` one that was preempted."""
        assert seq.state is State.WAITING, f"request {seq.rid} is {seq.state}"
        self.num_tokens += seq.total
        if seq.order >= 0:
            self.num_preempted += 1
            heappush(self._preempted, (seq.order, seq.serial, seq))
        else:
            self.num_new += 1
            r = seq.request
            key = r.arrival_s + r.ttft_s - r.prompt_tokens * self.seconds_per_token
            heappush(self._timely, (key, seq.serial, seq))
        self._shown = None

    def head(self, now: float) -> Seq | None:
        """Who is next.  The answer changes only by a push, a pop, a discard or a deadline that passed."""
        if self.num_preempted:
            self._shown = self._preempted
        else:
            self._demote(now)
            late_turn = self._turn % LATE_SHARE == LATE_SHARE - 1
            self._shown = self._late if self._late and (late_turn or not self._timely) else self._timely
        _skip_gone(self._shown)
        return self._shown[0][2] if self._shown else None

    def pop(self) -> Seq:
        assert self._shown, "pop without head"
        seq = heappop(self._shown)[2]
        self.num_tokens -= seq.total
        if seq.order >= 0:
            self.num_preempted -= 1
        else:
            self.num_new -= 1
            self._turn += 1
        self._shown = None
        return seq

    def discard(self, seq: Seq) -> None:
        """It is no longer WAITING; its entry goes when it surfaces, or when such entries are most of the heap."""
        assert seq.state is not State.WAITING, f"request {seq.rid} still waits"
        self.num_tokens -= seq.total
        if seq.order >= 0:
            self.num_preempted -= 1
        else:
            self.num_new -= 1
        self._shown = None
        for heap in (self._preempted, self._timely, self._late):
            if len(heap) > 2 * len(self) + 64:
                heap[:] = [e for e in heap if e[2].state is State.WAITING]
                heapify(heap)

    def slack(self, now: float) -> tuple[float, float]:
        """Seconds until the first new request must be begun to be in time, and those it had when it came; 0, 0 if none
        waits."""
        self._demote(now)
        heap = self._late or self._timely
        if not heap:
            return 0.0, 0.0
        r = heap[0][2].request
        begin_s = r.arrival_s + r.ttft_s - r.prompt_tokens * self.seconds_per_token
        return begin_s - now, r.ttft_s

    def _demote(self, now: float) -> None:
        timely, late = self._timely, self._late
        _skip_gone(late)
        _skip_gone(timely)
        while timely and timely[0][0] < now:
            _, serial, seq = heappop(timely)
            heappush(late, (seq.request.arrival_s, serial, seq))
            _skip_gone(timely)

    def check(self) -> None:
        waiting = [e[2] for h in (self._preempted, self._timely, self._late) for e in h]
        waiting = [s for s in waiting if s.state is State.WAITING]
        assert len({s.rid for s in waiting}) == len(waiting), "a request waits twice"
        preempted = sum(s.order >= 0 for s in waiting)
        assert preempted == self.num_preempted, f"{preempted} wait again, {self.num_preempted=}"
        assert len(waiting) == len(self), f"{len(waiting)} wait, {self.num_new=} {self.num_preempted=}"
        assert sum(s.total for s in waiting) == self.num_tokens, f"{self.num_tokens=} wait"


def _skip_gone(heap: list[Entry]) -> None:
    while heap and heap[0][2].state is not State.WAITING:
        heappop(heap)
