"""What steps take: told of each step by the engine, it keeps the Batcher's cost model true to them.

A step took from the end of the one before to its own, where there was work all the time: that is what its requests
waited for, on a device that is kept busy as on one that is not, and nothing is waited for to know it.  After a pause it
counts from when it was planned.  Steps of nothing but decodes are added up, several of a kind at a time.
"""

from collections.abc import Callable
from typing import Protocol

from sched.latency import StepCost
from sched.step import StepPlan
from sched.step_time import Corrected, Point

TOGETHER = 8


class Predicting(Protocol):
    """The Batcher."""

    def recost(self, cost: StepCost) -> None: ...


class StepWatch:
    """`batcher` predicts with `cost` from now on, and with what steps make of it.  `heard` is told of every step: its plan,
    seconds, and when it ended."""

    def __init__(self, batcher: Predicting, cost: StepCost, *, trust: float = 50.0) -> None:
        self.corrected = Corrected(cost, trust)
        self.heard: Callable[[StepPlan, float, float], None] | None = None
        self._batcher = batcher
        self._last_s: float | None = None  # end of the step before, None: there was a pause
        self._seconds = 0.0
        self._alike = self._decodes = self._context = 0
        batcher.recost(cost)

    @property
    def error(self) -> float:
        """The mean of |predicted / measured - 1| over the last hundred steps or so."""
        return self.corrected.error

    def paused(self) -> None:
        """No step is under way."""
        self._last_s = None

    def landed(self, plan: StepPlan, planned_s: float, now: float) -> None:
        """The step has ended, and was planned `planned_s`."""
        seconds = now - (planned_s if self._last_s is None else self._last_s)
        self._last_s = now
        if plan.moves:
            return  # copies of compaction are not the model's
        if self.heard is not None:
            self.heard(plan, seconds, now)
        decodes = len(plan.decode)
        if plan.chunks or decodes != self._decodes:
            self._flush()
        if plan.chunks:
            self._learn(point_of(plan, seconds))
            return
        self._decodes = decodes
        self._context += plan.context
        self._seconds += seconds
        self._alike += 1
        if self._alike == TOGETHER:
            self._flush()

    def _flush(self) -> None:
        n = self._alike
        if n:
            self._learn(Point(self._seconds, n, n * self._decodes, 0, self._context))
            self._seconds, self._alike, self._context = 0.0, 0, 0

    def _learn(self, point: Point) -> None:
        if self.corrected.observe(point):
            self._batcher.recost(self.corrected.cost)


def point_of(plan: StepPlan, seconds: float) -> Point:
    """One step as the cost model counts it."""
    tokens = context = pairs = 0
    for _, start, count, _ in plan.chunks:
        end = start + count
        tokens += count
        context += end
        pairs += count * end
    return Point(seconds, 1, len(plan.decode), tokens, plan.context + context, pairs)
