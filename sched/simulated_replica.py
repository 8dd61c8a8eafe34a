"""What the simulator runs: a replica with the stretch that it is in, the requests that come, and what became of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

from sched.batching import Batcher
from sched.latency import StepCost
from sched.step import StepPlan

IDLE, DECODE, PREFILL = "idle", "decode", "prefill"
WHOLE = {DECODE: 1.0, PREFILL: 1.0}


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

    __slots__ = ("a_s", "after", "b_s", "batcher", "begun_s", "beside", "cost", "devices", "done", "factor", "first_s", "generation", "index",
                 "k", "keys", "left", "model", "move_s", "name", "phase", "plan", "slope_s", "stalled", "start_s", "steps", "use")  # fmt: skip

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
        self.generation = self.steps = self.index = 0
        # the stretch under way: its begin, and what its first step takes alone, and each longer than the one before
        self.start_s = self.first_s = self.slope_s = 0.0
        # its steps at an earlier pace, at that of now, and at another one from then on
        self.done = self.k = self.left = 0
        self.begun_s = self.a_s = self.b_s = self.factor = 0.0  # of those at the pace of now
        self.stalled = False

    def end_of(self, k: int) -> float:
        """When the first `k` steps at this pace are over."""
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


def shortest_queue(arrival: Arrival, replicas: Sequence[Replica], now: float) -> Replica:
    """The replica with the fewest requests; of equals the first."""
    return min(replicas, key=lambda r: r.batcher.num_open)
