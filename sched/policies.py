"""The policies that a model's `policy` can name: ours, and the baselines that it is measured against, in one interface.

`slack` is ours (sched/slack.py), `fcfs` is the base class, and what vLLM does.  `sjf`: the shortest prompt first.  `lsf`:
longest slowdown first.  `saab`: FineServe's rule (arXiv 2509.06261).  `prism`: the same with each prompt's own completion, as
FineServe has Prism.  `sarathi`: a static chunk for decodes and prompts together.  `fixed`: at most `batch` at once.
`itl-feedback`: a cap that follows the time of steps.  `adbs`: MuxServe's, which follows its use (arXiv 2404.02015).
"""

from abc import abstractmethod
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sched.latency import StepCost
from sched.limits import Limits
from sched.policy import INFINITY, Entry, Load, Policy, Took, pick_shortest, token_s
from sched.sequence import Seq, State
from sched.slack import Slack
from sched.step import Request

GATE = 3  # prompts under way beyond which FineServe's rules add no batch
ADBS_S, ADBS_USED, ADBS_QUEUE, ADBS_STEP, ADBS_LEFT = 8.0, 0.9, 1.1, 0.1, 0.05
AIMD_BACK = 0.9


class ShortestFirst(Policy):
    def key(self, request: Request) -> float:
        return request.prompt_tokens


class LongestSlowdownFirst(Policy):
    """Scores change as time passes: all of them are sorted anew for each step."""

    steady = False

    def begin(self, load: Load) -> Sequence[Seq]:
        ahead = load.prefill_tokens + load.decodes

        def slowdown(entry: Entry) -> tuple[int, float, int]:
            r = entry[3].request
            return entry[0], -(load.now - r.arrival_s) / (ahead + r.prompt_tokens), entry[2]

        waiting = [e for e in self._heap if e[3].state is State.WAITING]
        # a sorted list is a heap too
        self._heap = [(e[0], float(i), e[2], e[3]) for i, e in enumerate(sorted(waiting, key=slowdown))]
        return ()


class StaticChunk(Policy):
    def __init__(self, limits: Limits, cost: StepCost | None, *, chunk: int = 512) -> None:
        super().__init__(limits, cost)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")
        self.chunk = min(chunk, limits.max_step_tokens)

    def budget(self, load: Load) -> int:
        # more decodes than the chunk holds leave one token: prompts must not starve
        return max(self.chunk - load.decodes, 1)


class FixedBatch(Policy):
    def __init__(self, limits: Limits, cost: StepCost | None, *, batch: int = 64) -> None:
        super().__init__(limits, cost)
        if batch < 1:
            raise ValueError(f"batch must be at least 1 request, got {batch}")
        self.batch = batch

    def cap(self, load: Load) -> int:
        return self.batch


class ItlFeedback(Policy):
    steady = False

    def __init__(self, limits: Limits, cost: StepCost | None) -> None:
        super().__init__(limits, cost)
        self._cap, self._active, self._target_s = 1.0, 0, INFINITY
        self._hold_s = 0.0

    def cap(self, load: Load) -> int:
        self._active = load.active
        # the published rule has one target for all requests
        self._target_s = min(load.paces, default=self._target_s)
        return int(self._cap)

    def observe(self, took: Took) -> None:
        if took.step_s > self._target_s:
            # once for what is in flight: a smaller cap shows only when requests have ended
            if took.now >= self._hold_s:
                self._cap = max(1.0, self._cap * AIMD_BACK)
                self._hold_s = took.now + 10 * took.step_s
        elif self._active >= int(self._cap):
            self._cap = min(self._cap + took.steps, self.limits.max_running)


class Adbs(Policy):
    steady = False

    def __init__(self, limits: Limits, cost: StepCost | None) -> None:
        super().__init__(limits, cost)
        self._cap = max(1.0, limits.max_running / 2)
        self._turn_s = ADBS_S
        self._active = 0
        self._samples = self._used = self._queued = 0.0

    def cap(self, load: Load) -> int:
        self._active = load.active
        return int(self._cap)

    def observe(self, took: Took) -> None:
        self._samples += took.steps
        self._used += took.steps * self._active
        self._queued += took.steps * len(self)
        if took.now < self._turn_s:
            return
        usage = self._used / self._samples / self._cap
        if usage >= ADBS_USED and len(self) > ADBS_QUEUE * self._queued / self._samples:
            self._cap *= 1 + ADBS_STEP
        elif usage < ADBS_USED:
            self._cap *= min(1.0, usage + ADBS_LEFT)
        self._cap = min(max(self._cap, 1.0), self.limits.max_running)
        self._turn_s = took.now + ADBS_S
        self._samples = self._used = self._queued = 0.0


class Batches(Policy):
    """FineServe's local scheduler: sends batches of prompts to an engine that serves them in the order sent.

    A prompt of n tokens is predicted to take `token_s` x (n + tokens ahead of it), at the rate of a batch of one; whoever
    could not be in time alone is dropped.  Which of the rest are sent is `pick`'s.
    """

    steady = False

    def __init__(self, limits: Limits, cost: StepCost | None) -> None:
        super().__init__(limits, cost)
        self.token_s = token_s(cost)
        self._pending: list[Entry] = []  # sorted
        self._sent: deque[Seq] = deque()

    def push(self, seq: Seq) -> None:
        self._num += 1
        insort(self._pending, (seq.request.priority, self.key(seq.request), seq.serial, seq))

    def discard(self, seq: Seq) -> None:
        self._num -= 1
        i = bisect_left(self._pending, (seq.request.priority, self.key(seq.request), seq.serial, seq))
        if i < len(self._pending) and self._pending[i][3] is seq:
            del self._pending[i]
        elif seq in self._sent:
            self._sent.remove(seq)

    def head(self, load: Load) -> Seq | None:
        return self._sent[0] if self._sent else None

    def pop(self) -> None:
        self._sent.popleft()
        self._num -= 1

    def waiting(self) -> Iterable[Seq]:
        return [*(e[3] for e in self._pending), *self._sent]

    def slack(self, now: float) -> tuple[float, float]:
        first = next(iter([*self._sent, *(e[3] for e in self._pending[:1])]), None)
        return self._slack_of(first.request, now) if first else (0.0, 0.0)

    def begin(self, load: Load) -> Sequence[Seq]:
        under_way = [*self._sent, *load.prefilling]
        tokens = sum(seq.request.prompt_tokens for seq in under_way) + load.decodes
        seqs = load.active + len(self._sent)
        if seqs > self.limits.max_running or tokens > self.limits.max_step_tokens or len(under_way) > GATE:
            return ()
        ready = load.now + self.token_s * tokens
        feasible: list[Entry] = []
        shed: list[Seq] = []
        for entry in self._pending:
            r = entry[3].request
            in_time = ready + self.token_s * r.prompt_tokens < r.arrival_s + r.ttft_s
            (feasible if in_time else shed).append(entry if in_time else entry[3])  # type: ignore[arg-type]
        kept = self.pick([e[3].request for e in feasible], ready)
        sent: set[int] = set()
        for i, entry in enumerate(feasible):
            # the one that goes over a limit is the last to be sent, as there
            if i in kept and seqs <= self.limits.max_running and tokens <= self.limits.max_step_tokens:
                seqs += 1
                tokens += entry[3].request.prompt_tokens
                self._sent.append(entry[3])
                sent.add(entry[2])
        self._pending = [e for e in feasible if e[2] not in sent]
        return shed

    @abstractmethod
    def pick(self, requests: Sequence[Request], ready: float) -> set[int]:
        """Indices of those to send, of requests in the order of their arrival, to an engine that is ready then."""


class Saab(Batches):
    """The whole batch must be done by the earliest deadline in it; while it would not, the longest prompt stays behind."""

    def pick(self, requests: Sequence[Request], ready: float) -> set[int]:
        order = sorted(range(len(requests)), key=lambda i: (requests[i].prompt_tokens, i))
        kept, tokens, due = 0, 0, INFINITY
        for n, i in enumerate(order, 1):
            r = requests[i]
            tokens += r.prompt_tokens
            due = min(due, r.arrival_s + r.ttft_s)
            # the first that holds from the longest down is the longest prefix that holds
            if ready + self.token_s * tokens < due:
                kept = n
        return set(order[:kept])


class Prism(Batches):
    def pick(self, requests: Sequence[Request], ready: float) -> set[int]:
        due = [r.arrival_s + r.ttft_s for r in requests]
        order = sorted(range(len(requests)), key=lambda i: (due[i], i))
        prompts = [r.prompt_tokens for r in requests]
        most = [(d - ready) / self.token_s if self.token_s else INFINITY for d in due]
        return pick_shortest(prompts, most, order)


POLICIES: dict[str, type[Policy]] = {
    "slack": Slack,
    "fcfs": Policy,
    "sjf": ShortestFirst,
    "lsf": LongestSlowdownFirst,
    "saab": Saab,
    "prism": Prism,
    "sarathi": StaticChunk,
    "fixed": FixedBatch,
    "itl-feedback": ItlFeedback,
    "adbs": Adbs,
}


def options_of(name: str) -> dict[str, Any]:
    """What a policy lets one set, with its defaults.  ValueError for a name that is none of POLICIES."""
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    return dict(POLICIES[name].__init__.__kwdefaults__ or {})


def make_policy(
    name: str, limits: Limits, cost: StepCost | None, options: Mapping[str, Any] | None = None
) -> Policy:
    """ValueError for a policy, an option or a value that does not exist."""
    options, known = options or {}, options_of(name)
    if unknown := options.keys() - known.keys():
        choices = ", ".join(known) or "none"
        raise ValueError(f"policy {name} has no option {sorted(unknown)[0]!r}; its options are {choices}")
    return POLICIES[name](limits, cost, **options)
