"""Who of the models of a GPU may compute prompts now, and how many tokens of them at a time.

One at a time: two prompts at once slow each other and everybody's decodes, and end no sooner.  The eldest waiter is
next; one that has fallen silent, or has let its chance pass, is passed over.  A chunk is as long as the tightest slack
of all models' decodes allows: with none left it has the least size that is worth a step, and half of the time is left
to the decodes.
"""

from collections.abc import Iterable
from typing import NamedTuple

from sched.batching import RETRY_STEPS, Batcher
from sched.slack import MIN_PREFILL_TOKENS

NS = 1_000_000_000
# a waiter looks once a step: one that does not take what is free for two of its steps and this long is not there
CHANCE_S, CHANCE_STEPS = 0.02, 2.0
# a model publishes every step: what it said last holds for this long, or for so many of its steps
SILENT_S, SILENT_STEPS = 2.0, 3.0
# how long a holder may be without a sign: seconds, or so many times what its chunk was predicted to take
LEASE_S, LEASE_STEPS = 1.0, 4.0
# a decode that is later than this is not saved by shorter chunks
HOPELESS_S = 2.0
WEIGHT = 0.2
SMALL_CHUNK = 16  # tokens: what a step of fewer takes says nothing of a token


class Neighbour(NamedTuple):
    """A model as its row shows it.  `since_ns`: it waits for its turn since then, 0: it does not; `due_ns`: when its next
    decoded token is due, 0: nothing decodes."""

    since_ns: int
    heard_ns: int
    step_us: int
    due_ns: int


def is_silent(n: Neighbour, now_ns: int) -> bool:
    return now_ns - n.heard_ns > max(SILENT_S * NS, SILENT_STEPS * 1000 * n.step_us)


def is_next(since_ns: int, others: Iterable[Neighbour], freed_ns: int, now_ns: int) -> bool:
    """Whether whoever waits since `since_ns` may take the turn that is free since `freed_ns`."""
    free_ns = now_ns - freed_ns
    for n in others:
        elder = 0 < n.since_ns < since_ns
        if elder and not is_silent(n, now_ns) and free_ns < CHANCE_S * NS + CHANCE_STEPS * 1000 * n.step_us:
            return False
    return True


def tightest_slack_s(own_due_ns: int, own_step_s: float, others: Iterable[Neighbour], now_ns: int) -> float:
    """Seconds that a chunk may take so that every model's next token is still in time; infinite where nobody decodes."""
    found = [(n.due_ns, n.step_us / 1e6) for n in others if n.due_ns and not is_silent(n, now_ns)]
    found += [(own_due_ns, own_step_s)] if own_due_ns else []
    slacks = [(due_ns - now_ns) / NS - step_s for due_ns, step_s in found]
    return min((s for s in slacks if s > -HOPELESS_S), default=float("inf"))


class Pace:
    """Seconds of a step and of a token of a prompt, as measured, and the chunk that they allow."""

    def __init__(self) -> None:
        self.token_s = self.step_s = 0.0
        self._rest_until_s = 0.0

    def stepped(self, tokens: int, seconds: float, now_s: float, pressed: bool) -> None:
        """A step with so many tokens of prompts took so long.  `pressed`: it was cut to the least size."""
        if not tokens:
            self.step_s += (seconds - self.step_s) * (WEIGHT if self.step_s else 1.0)
            return
        if tokens >= SMALL_CHUNK or not self.token_s:
            token_s = max(0.0, seconds - self.step_s) / tokens
            self.token_s += (token_s - self.token_s) * (WEIGHT if self.token_s else 1.0)
        if pressed:
            self._rest_until_s = now_s + seconds

    def predicted_s(self, tokens: int) -> float:
        return self.step_s + tokens * self.token_s

    def chunk(self, slack_s: float, now_s: float) -> int | None:
        """Tokens of prompts that the next step may have; None: as many as it likes."""
        if slack_s == float("inf"):
            return None
        tokens = int(max(0.0, slack_s) / self.token_s) if self.token_s else 0
        if tokens >= MIN_PREFILL_TOKENS:
            return tokens
        return 0 if now_s < self._rest_until_s else MIN_PREFILL_TOKENS


def wants_prefill(batcher: Batcher) -> bool:
    """Whether the next plan could have a chunk, as far as that is known before it is made."""
    if batcher._prefilling:
        return True
    full = len(batcher._active) >= batcher.limits.max_running
    if full or batcher._paused or not batcher._queue:
        return False
    refused = batcher._step < batcher._retry_step <= batcher._step + RETRY_STEPS
    return not refused or batcher.blocks.num_released != batcher._refused_at or not batcher._active


def next_due_s(batcher: Batcher) -> float:
    """When the most urgent token of the next step is due, on the Batcher's clock; infinite where nothing decodes."""
    return batcher._running.deadline(batcher._step)
