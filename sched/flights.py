"""Steps that are planned but not advanced, and the blocks that they still name.

A freed block goes back to the BlockPool only when the newest step naming it has been advanced: until then a kernel
may write into it.
"""

from collections import deque

from sched.blocks import BlockPool
from sched.sequence import Seq
from sched.step import StepPlan


class Flight:
    """One planned step, and what becomes true when it is advanced."""

    __slots__ = ("done", "ending", "freed", "joined", "plan", "planned_s")

    def __init__(self, plan: StepPlan, joined: list[Seq], planned_s: float) -> None:
        self.plan = plan
        self.planned_s = planned_s
        self.done = 0  # times that it has been repeated, of a stretch that goes on
        self.joined = joined  # whose prefill it completes: for most their first token
        self.ending: list[Seq] = []
        self.freed: list[list[int]] = []


class Flights:
    """Oldest first; step numbers have no gaps.  `pending` blocks come free when all are advanced."""

    def __init__(self, blocks: BlockPool) -> None:
        self.pending = 0
        self._blocks = blocks
        self._flights: deque[Flight] = deque()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def oldest(self) -> Flight | None:
        return self._flights[0] if self._flights else None

    @property
    def predicted_s(self) -> float:
        return sum(f.plan.seconds for f in self._flights)

    def push(self, flight: Flight) -> None:
        self._flights.append(flight)

    def peek(self, step: int) -> Flight:
        """The oldest, which is to be advanced next: it must be `step`."""
        assert self._flights, f"step {step} is advanced, but none is planned"
        flight = self._flights[0]
        assert flight.plan.step == step, f"step {step} is advanced before step {flight.plan.step}"
        return flight

    def pop(self, step: int) -> Flight:
        """The oldest is advanced.  Its freed blocks are still to be landed."""
        self.peek(step)
        return self._flights.popleft()

    def land(self, flight: Flight) -> None:
        """The blocks that only this step kept."""
        for blocks in flight.freed:
            self.pending -= len(blocks)
            self._blocks.release(blocks)

    def advanced(self, step: int) -> bool:
        return not self._flights or step < self._flights[0].plan.step

    def release(self, blocks: list[int], last: int) -> None:
        """`last` is the newest step that names these blocks."""
        if self.advanced(last):
            self._blocks.release(blocks)
        else:
            self._flights[last - self._flights[0].plan.step].freed.append(blocks)
            self.pending += len(blocks)

    def check(self) -> None:
        assert self.pending == sum(map(len, self.held())), f"{self.pending=} {self.held()=}"

    def held(self) -> list[list[int]]:
        return [blocks for flight in self._flights for blocks in flight.freed]
