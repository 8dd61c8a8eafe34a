"""What a replica's pace is, from the outside: from when requests came, when their tokens came, and nothing else.

A first token came after a + b x tokens of prompts since the one before it (or since there was anything to do); a step of
n decodes took a + b x n.  Both are least squares that forget, with no coefficient below 0.  Times in seconds on any clock
that is handed in.
"""

from math import inf

from sched.router import Prefixes, ReplicaState

# tokens that arrive so close together came out of one step
ONE_STEP_S = 0.0005
FORGET = 0.98
ENDS_WEIGHT = 0.1
# what was seen of a replica that has had nothing to do counts half after so long: it is tried again, and can show better
HALF_LIFE_S = 30.0


class Line:
    """y = a + b x."""

    __slots__ = ("_n", "_sx", "_sxx", "_sxy", "_sy")

    def __init__(self) -> None:
        self._n = self._sx = self._sy = self._sxx = self._sxy = 0.0

    def add(self, x: float, y: float) -> None:
        self.fade(FORGET)
        self._n, self._sx, self._sy = self._n + 1, self._sx + x, self._sy + y
        self._sxx, self._sxy = self._sxx + x * x, self._sxy + x * y

    def fade(self, part: float) -> None:
        """All points so far count that part of what they did."""
        self._n, self._sx, self._sy = self._n * part, self._sx * part, self._sy * part
        self._sxx, self._sxy = self._sxx * part, self._sxy * part

    def fit(self, flat: float) -> tuple[float, float]:
        """(a, b); (0, 0) before there is a point.  Where x has not varied, a is y, but at most `flat`, and b x the rest."""
        n, sx, sy, sxx, sxy = self._n, self._sx, self._sy, self._sxx, self._sxy
        if not n:
            return 0.0, 0.0
        spread = n * sxx - sx * sx
        if spread <= 1e-3 * n * sxx:
            a = min(sy / n, flat) if sx else sy / n
            return a, (sy / n - a) * n / sx if sx else 0.0
        b = (n * sxy - sx * sy) / spread
        a = (sy - b * sx) / n
        if b < 0:
            return sy / n, 0.0
        return (a, b) if a >= 0 else (0.0, sxy / sxx)


class Observed:
    """One replica.  `queued_tokens` and `decoding` are what is known to be there; the caller counts open requests."""

    __slots__ = ("_batch_s", "_batch_tokens", "_busy_s", "_ended_s", "_first_s", "_idle_s", "_prompts", "_stepped_s",
                 "_steps", "decoding", "end_s", "queued_tokens", "waiting")  # fmt: skip

    def __init__(self) -> None:
        self.queued_tokens = self.waiting = self.decoding = 0
        self.end_s = 0.0
        self._prompts, self._steps = Line(), Line()
        self._busy_s = self._first_s = -1.0  # since when prompts wait, and when a first token came last
        self._batch_tokens, self._batch_s = 0, 0.0  # of the step that gave it
        self._stepped_s: float | None = None
        self._ended_s: float | None = None
        self._idle_s: float | None = None  # since when there is nothing to do

    def came(self, tokens: int, now: float) -> None:
        """A prompt, of which so many tokens are to be computed."""
        if not self.waiting:
            self._busy_s = now
        if self._idle_s is not None:
            self._flush()
            part = self._remembered(now)
            self._prompts.fade(part)
            self._steps.fade(part)
            self._idle_s = None
        self.waiting += 1
        self.queued_tokens += tokens

    def gone(self, tokens: int, now: float) -> None:
        """It ended without a token."""
        self.waiting -= 1
        self.queued_tokens -= tokens
        self._rest(now)

    def _rest(self, now: float) -> None:
        if not self.waiting and not self.decoding:
            self._idle_s = now

    def _remembered(self, now: float) -> float:
        return 1.0 if self._idle_s is None else float(2 ** (min(0.0, self._idle_s - now) / HALF_LIFE_S))

    def first(self, tokens: int, now: float, *, computed: int | None = None, full: bool = False) -> None:
        """Its first token; of its prompt `computed` tokens were not cached after all, where that is known by now.

        `full`: it waited for a place, which says nothing of its prompt.
        """
        self.waiting -= 1
        self.queued_tokens -= tokens
        self.decoding += 1
        tokens = tokens if computed is None else computed
        if now - self._first_s < ONE_STEP_S:
            self._batch_tokens += tokens
        else:
            self._flush()
            begun = max(self._busy_s, self._first_s)
            self._batch_tokens, self._batch_s = (0, 0.0) if full else (tokens, now - begun)
        self._first_s = now
        self.stepped(now)

    def stepped(self, now: float) -> None:
        """Further tokens."""
        last = self._stepped_s
        if last is not None and now - last < ONE_STEP_S:
            return
        if last is not None:
            self._steps.add(self.decoding, now - last)
        self._stepped_s = now

    def ended(self, now: float) -> None:
        """One that had its first token."""
        self.decoding -= 1
        if self._ended_s is not None:
            self.end_s += (now - self._ended_s - self.end_s) * (ENDS_WEIGHT if self.end_s else 1.0)
        busy = self.decoding > 0
        self._ended_s = now if busy else None
        if not busy:
            self._stepped_s = None
        self._rest(now)

    def _flush(self) -> None:
        if self._batch_tokens and self._batch_s > 0:
            self._prompts.add(self._batch_tokens, self._batch_s)
        self._batch_tokens = 0

    def state(
        self, name: str, tier: int, now: float, *, open_: int, most_running: int, recent: Prefixes,
        memory: tuple[int, int] | None, takes: bool = True,
    ) -> ReplicaState:  # fmt: skip
        """`memory`: tokens free and held, None where they are not known."""
        if now - self._first_s >= ONE_STEP_S:
            self._flush()
        part = self._remembered(now)
        step_s, decode_s = self._steps.fit(inf)
        # a first token takes a step at least, and prompts of one length do not tell what a token of them takes
        first_s, prompt_token_s = self._prompts.fit(step_s + decode_s)
        free, held = memory or (None, 0)
        return ReplicaState(
            name=name, tier=tier, open=open_, queued_tokens=self.queued_tokens, first_s=part * first_s,
            prompt_token_s=part * prompt_token_s, step_s=part * step_s, decode_s=part * decode_s,
            silent_s=now - max(self._busy_s, self._first_s) if self.waiting else 0.0,
            most_running=most_running, end_s=self.end_s, free_tokens=free, held_tokens=held, recent=recent,
            takes=takes,
        )  # fmt: skip
