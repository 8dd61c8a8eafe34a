"""What steps are predicted to take and when they begin, and what they took: between the Batcher and its policy."""

from collections.abc import Collection, Iterable

from sched.flights import Flight
from sched.latency import StepCost
from sched.policy import Load, Policy, Took
from sched.running import Running
from sched.sequence import Seq
from sched.step import Chunk


class Forecast:
    """Steps run one after another; those planned ahead begin when the one before is predicted to end."""

    def __init__(self, cost: StepCost | None, policy: Policy) -> None:
        self.cost, self.policy = cost, policy
        self._busy_until = self._landed_s = 0.0

    def recost(self, cost: StepCost) -> None:
        self.cost = cost
        self.policy.recost(cost)

    def load(
        self, now: float, decodes: int, running: Running, active: int, prefilling: Collection[Seq]
    ) -> Load:
        """Of the step to be planned; nothing is said yet of when its tokens are due."""
        seconds = self.cost.decode_s(decodes, running.context) if self.cost else 0.0
        return Load(now, max(now, self._busy_until), seconds, decodes, running.context, active, prefilling)

    def seconds(self, load: Load, chunks: Iterable[Chunk]) -> float:
        """Of the step with these chunks."""
        return self.cost.step_s(load.decodes, load.context, chunks) if self.cost else 0.0

    def planned(self, load: Load, seconds: float) -> None:
        """The step is under way, or next to be."""
        self._busy_until = load.begin_s + seconds

    def landed(self, flight: Flight, k: int, now: float, rest_s: float) -> None:
        """It has run `k` times more; those planned since will take `rest_s`."""
        plan = flight.plan
        slope_s = self.cost.slope_s(len(plan.decode)) if self.cost else 0.0
        predicted_s = plan.seconds + slope_s * (flight.done + (k - 1) / 2)
        step_s = (now - max(flight.planned_s, self._landed_s)) / k
        slope_s *= step_s / predicted_s if predicted_s else 0.0
        self.policy.observe(Took(step_s, predicted_s, slope_s, k, now))
        self._landed_s = now
        self._busy_until = now + rest_s
