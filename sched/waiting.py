"""Requests that hold no blocks.  Preempted ones go first, eldest first: their callers have seen tokens.  The order of the
new ones is the policy's.
"""

from heapq import heapify, heappop, heappush

from sched.policy import Load, Policy
from sched.sequence import Seq, State


class WaitQueue:
    """`head` looks, `pop` takes what `head` showed.  A sequence that left the WAITING state is skipped."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.num_preempted = 0
        self.num_tokens = 0  # of all that wait: what their blocks would hold
        self._preempted: list[tuple[int, Seq]] = []

    def __len__(self) -> int:
        return len(self.policy) + self.num_preempted

    @property
    def num_new(self) -> int:
        return len(self.policy)

    def push(self, seq: Seq) -> None:
        """A new sequence, or with an `order` one that was preempted."""
        assert seq.state is State.WAITING, f"request {seq.rid} is {seq.state}"
        self.num_tokens += seq.total
        if seq.order >= 0:
            self.num_preempted += 1
            heappush(self._preempted, (seq.order, seq))
        else:
            self.policy.push(seq)

    def head(self, load: Load) -> Seq | None:
        heap = self._preempted
        while heap and heap[0][1].state is not State.WAITING:
            heappop(heap)
        return heap[0][1] if heap else self.policy.head(load)

    def pop(self, seq: Seq) -> None:
        """`seq` is what `head` said."""
        self.num_tokens -= seq.total
        if seq.order >= 0:
            heappop(self._preempted)
            self.num_preempted -= 1
        else:
            self.policy.pop()

    def discard(self, seq: Seq) -> None:
        """It is no longer WAITING."""
        assert seq.state is not State.WAITING, f"request {seq.rid} still waits"
        self.num_tokens -= seq.total
        if seq.order < 0:
            self.policy.discard(seq)
            return
        self.num_preempted -= 1
        if len(self._preempted) > 2 * self.num_preempted + 64:
            self._preempted = [e for e in self._preempted if e[1].state is State.WAITING]
            heapify(self._preempted)

    def check(self) -> None:
        self.policy.check()
        again = [seq for _, seq in self._preempted if seq.state is State.WAITING]
        assert len(again) == self.num_preempted, f"{len(again)} wait again, {self.num_preempted=}"
        new = list(self.policy.waiting())
        wrong = [seq.rid for seq in new if seq.state is not State.WAITING or seq.order >= 0]
        assert not wrong, f"requests {wrong} are not new ones that wait"
        assert sum(seq.total for seq in [*again, *new]) == self.num_tokens, f"{self.num_tokens=} wait"
