"""Policy: the rule by which a Batcher admits, cuts prompts and gives up.  This one is FCFS; others override a method or two.

The Batcher keeps requests, blocks and steps in order whatever the rule says.  A rule decides who of those that wait is next
(`key`, or `push` to `pop`), who is given up before a step (`begin`: they are *shed*, ended with an error), how many may be
admitted at once (`cap`), how many tokens of prompts a step takes (`budget`), whose prompt goes on first (`order`) and who is
preempted (`victim`); it is told what steps took (`observe`).  Seconds are on the clock whose `now` the Batcher is handed.
A rule sees of a request what a server knows: `max_tokens` is a bound, not the length of the answer, and none looks at it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heappushpop
from operator import attrgetter
from typing import NamedTuple

from sched.latency import StepCost
from sched.limits import Limits
from sched.sequence import Seq, State
from sched.step import Request

INFINITY = float("inf")
# tokens of the profile's prompts that a batch of one was measured with (arXiv 2509.06261, artifact)
PROFILED_PROMPTS = (256, 512)
Entry = tuple[int, float, int, Seq]


@dataclass(slots=True)
class Load:
    """What the step to be planned has already.  `decodes` requests decode in it, `decode_s` seconds by prediction (0
    without a cost model), beginning at `begin_s`; the first of their tokens is due at `due_s`, the strictest of their
    TPOTs is `tpot_s` (both infinite where none decodes); `paces`: how many have each TPOT.  `active`: admitted, those in
    `prefilling` included.
    """

    now: float
    begin_s: float
    decode_s: float
    decodes: int
    context: int
    active: int
    prefilling: Collection[Seq]
    due_s: float = INFINITY
    tpot_s: float = INFINITY
    paces: Mapping[float, int] = field(default_factory=dict)

    @property
    def prefill_tokens(self) -> int:
        """Of prompts under way, still to be computed."""
        return sum(seq.total - seq.computed for seq in self.prefilling)


class Took(NamedTuple):
    """What `steps` steps, mostly 1, took: `step_s` seconds each in the mean, predicted `predicted_s`, each `slope_s` longer
    than the one before; the last of them ended `now`."""

    step_s: float
    predicted_s: float
    slope_s: float = 0.0
    steps: int = 1
    now: float = 0.0

    def mean(self, before: float, weight: float) -> float:
        """The running mean `before`, after each of the steps has moved it by `weight` of the difference."""
        k, q = self.steps, 1 - weight
        if k == 1:
            return before + weight * (self.step_s - before)
        first_s, left = self.step_s - self.slope_s * (k - 1) / 2, q**k
        # sum of w q^(k-1-i) (first + slope i) over i < k
        ramp = (k - 1) * (1 - left) - q * (1 - k * q ** (k - 1) + (k - 1) * left) / weight
        return left * before + first_s * (1 - left) + self.slope_s * ramp


class Policy:
    """First come, first served, as many tokens as a step may have.  Lower priority numbers go first, in every policy.

    `steady`: while nobody comes, joins or ends, the passing of steps changes no decision; so it is not asked while
    `max_running` run and no prompt is under way.
    """

    steady = True

    def __init__(self, limits: Limits, cost: StepCost | None) -> None:
        self.limits, self.cost = limits, cost
        self._heap: list[Entry] = []
        self._num = 0

    def __len__(self) -> int:
        """Those that wait and have not begun."""
        return self._num

    # -- who waits

    def key(self, request: Request) -> float:
        """The least goes first; fixed when the request comes."""
        return request.arrival_s

    def push(self, seq: Seq) -> None:
        self._num += 1
        heappush(self._heap, (seq.request.priority, self.key(seq.request), seq.serial, seq))

    def discard(self, seq: Seq) -> None:
        """It is no longer WAITING; its entry goes when it surfaces, or when such entries are most of the heap."""
        self._num -= 1
        if len(self._heap) > 2 * self._num + 64:
            self._heap = [entry for entry in self._heap if entry[3].state is State.WAITING]
            heapify(self._heap)

    def head(self, load: Load) -> Seq | None:
        """Who is to be admitted next, if anyone; the same until a `pop`, a `push`, a `discard` or a `begin`."""
        heap = self._heap
        while heap and heap[0][3].state is not State.WAITING:
            heappop(heap)
        return heap[0][3] if heap else None

    def pop(self) -> None:
        """The head is admitted."""
        heappop(self._heap)
        self._num -= 1

    def waiting(self) -> Iterable[Seq]:
        """All of them, in any order."""
        return (entry[3] for entry in self._heap if entry[3].state is State.WAITING)

    def slack(self, now: float) -> tuple[float, float]:
        """Seconds until the next of them must be begun to be in time, and those it had when it came; 0, 0 if none waits."""
        while self._heap and self._heap[0][3].state is not State.WAITING:
            heappop(self._heap)
        return self._slack_of(self._heap[0][3].request, now) if self._heap else (0.0, 0.0)

    def _slack_of(self, request: Request, now: float) -> tuple[float, float]:
        per_token = self.cost.per_prefill_token_s if self.cost else 0.0
        begin_s = request.arrival_s + request.ttft_s - request.prompt_tokens * per_token
        return begin_s - now, request.ttft_s

    # -- a step

    def begin(self, load: Load) -> Sequence[Seq]:
        """Called before each step while someone waits or has a prompt under way (but see `steady`); returns whom to shed,
        waiting ones all."""
        return ()

    def cap(self, load: Load) -> int:
        """Nobody is admitted while so many are."""
        return self.limits.max_running

    def budget(self, load: Load) -> int:
        return self.limits.max_step_tokens - load.decodes

    def order(self, prefilling: Collection[Seq]) -> Iterable[Seq]:
        return list(prefilling)

    def victim(self, active: Collection[Seq]) -> Seq:
        """Of those it is allowed to preempt."""
        return max(active, key=_order)

    def observe(self, took: Took) -> None:
        """One step has been advanced, or a stretch of steps without a decision."""

    def recost(self, cost: StepCost) -> None:
        """Predictions are from this model now."""
        self.cost = cost

    def check(self) -> None:
        rids = [seq.rid for seq in self.waiting()]
        assert len(rids) == len(set(rids)) == self._num, f"{sorted(rids)} wait, {self._num} were counted"


_order: Callable[[Seq], int] = attrgetter("order")


def token_s(cost: StepCost | None) -> float:
    """Seconds of TTFT a prompt token in a batch of one, as FineServe's rules count it: base time and all."""
    if cost is None:
        return 0.0
    found = [(cost.decode_s(0, 0) + cost.chunk_s(0, n)) / n for n in PROFILED_PROMPTS]
    return sum(found) / len(found)


def pick_shortest(prompts: Sequence[int], most: Sequence[float], order: Iterable[int]) -> set[int]:
    """Moore and Hodgson's rule: of jobs in the `order` of their deadlines, the longest goes whenever one would be late.

    Job i has `prompts[i]` tokens, and is late with more than `most[i]` up to and with its own.  What is left is the largest
    number that can all be in time on one machine (Moore 1968).
    """
    n, kept, tokens = len(prompts), list[int](), 0  # heap of (-prompt, index), as one number of base n
    for i in order:
        key = i - prompts[i] * n
        tokens += prompts[i]
        if tokens > most[i]:
            tokens += heappushpop(kept, key) // n
        else:
            heappush(kept, key)
    return {key % n for key in kept}
