"""A policy of one's own, in twenty lines, beside ours and FCFS in the simulator: `python -m examples.policy`.

To serve with it, put the class into sched/policies.py and its name into POLICIES there: `policy: impatient` of a model, and
`--policy impatient`, know it then, and so do the simulator and the benches.
"""

import random
import sys

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.placement_simulate import attained as kept_its_slo
from sched.policies import POLICIES, make_policy
from sched.policy import Load, Policy
from sched.simulated_replica import Arrival, Replica
from sched.simulator import Simulation
from sched.step import Request


class Impatient(Policy):
    """Earliest deadline first, and no step longer than `most_s`: short stalls for everybody, whatever it costs."""

    def __init__(self, limits: Limits, cost: StepCost | None, *, most_s: float = 0.025) -> None:
        super().__init__(limits, cost)
        if most_s <= 0:
            raise ValueError(f"most_s must be above 0 seconds, got {most_s}")
        self.most_s = most_s

    def key(self, request: Request) -> float:
        return request.arrival_s + request.ttft_s

    def budget(self, load: Load) -> int:
        room = super().budget(load)
        if self.cost is None:
            return room
        return min(room, max(16, int((self.most_s - load.decode_s) / self.cost.per_prefill_token_s)))


# an 8B model on an H100, by the table of FineServe's authors
COST = StepCost(base_s=8e-3, per_decode_s=3e-5, per_prefill_token_s=1.5e-5, per_context_token_s=2e-8)
LIMITS = Limits(
    max_running=256, max_step_tokens=2048, max_chunk_tokens=2048, max_model_len=8192, max_waiting=10**6
)


class Sets:
    """Memory without a pool: 4,000 sets of 512 tokens."""

    def __init__(self) -> None:
        self.free = list(range(4000))

    def lease(self, *, urgent: bool = False) -> int | None:
        return self.free.pop() if self.free else None

    def give_back(self, set_id: int) -> None:
        self.free.append(set_id)


def arrivals(rate: float, n: int, seed: int = 0) -> list[Arrival]:
    rng, at, found = random.Random(seed), 0.0, []
    for rid in range(n):
        at += rng.expovariate(rate)
        prompt, answer = (min(2000, int(rng.lognormvariate(mean, 0.9)) + 1) for mean in (6.3, 4.8))
        found.append(Arrival(at, rid, "m", prompt, answer, ttft_s=0.3, tpot_s=0.025))
    return found


def attained(name: str, asked: list[Arrival]) -> float:
    """The share of requests whose first token came in time, and the others in the mean."""
    batcher = Batcher(BlockPool(Sets(), 16, 32), LIMITS, COST, make_policy(name, LIMITS, COST))
    simulation = Simulation([Replica("r", "m", ("gpu",), batcher)], asked)
    simulation.run()
    return sum(map(kept_its_slo, simulation.records.values())) / len(asked)


def main() -> int:
    POLICIES["impatient"] = Impatient
    for rate in (24, 30, 36):
        asked = arrivals(rate, 1500)
        shares = ", ".join(f"{name} {attained(name, asked):.1%}" for name in ("impatient", "slack", "fcfs"))
        sys.stdout.write(f"{rate} requests a second: {shares}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
