"""What a step costs: linear in its decodes, its prefill tokens and what they read, and a curve over its rows.

The Batcher predicts with it, the simulator executes with it.  Coefficients come from a measurement; nothing here
reads a clock.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from sched.step import Chunk

COEFFICIENTS = ("base_s", "per_decode_s", "per_prefill_token_s", "per_context_token_s", "per_pair_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of a step = base + decodes, prefill tokens, tokens of context read and pairs, each times its coefficient,
    + what `rows` says.

    Pairs: of a chunk's tokens and the positions that attention multiplies them with, count x (start + count).
    `rows`: (rows of a step, seconds), ascending, straight lines between them and flat outside: what the weights cost beyond
    the straight line of the tokens, such as the time to read them while they are the most of it.
    """

    base_s: float
    per_decode_s: float = 0.0
    per_prefill_token_s: float = 0.0
    per_context_token_s: float = 0.0
    per_pair_s: float = 0.0
    rows: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for name in COEFFICIENTS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be a finite number of seconds >= 0, got {getattr(self, name)!r}"
                )

        lines = all(a[0] < b[0] for a, b in pairwise(self.rows))
        if not lines or not all(0 <= x < float("inf") for point in self.rows for x in point):
            raise ValueError(f"rows must be ascending (rows, seconds >= 0), got {self.rows!r}")

    def rows_s(self, rows: float) -> float:
        """What `rows` says of a step of so many."""
        knots = self.rows
        if not knots:
            return 0.0
        i = bisect_right(knots, (rows, 0.0))
        if i == 0 or i == len(knots):
            return knots[min(i, len(knots) - 1)][1]
        (low, a), (high, b) = knots[i - 1], knots[i]
        return a + (b - a) * (rows - low) / (high - low)

    def decode_s(self, decodes: int, context_tokens: int) -> float:
        """A step of `decodes` requests that read `context_tokens` in all, and no chunk."""
        known = self.base_s + self.per_decode_s * decodes + self.per_context_token_s * context_tokens
        return known + self.rows_s(decodes) if self.rows else known

    def step_s(self, decodes: int, context_tokens: int, chunks: Iterable[Chunk]) -> float:
        """A step with chunks too."""
        seconds, tokens = self.decode_s(decodes, context_tokens), 0
        for c in chunks:
            seconds += self.chunk_s(c.start, c.count)
            tokens += c.count
        if self.rows and tokens:
            seconds += self.rows_s(decodes + tokens) - self.rows_s(decodes)
        return seconds

    def slope_s(self, decodes: int) -> float:
        """What a step of so many decodes takes longer than the one before, each having one token of context more."""
        return self.per_context_token_s * decodes

    def chunk_s(self, start: int, count: int) -> float:
        """What a chunk adds to a step, beside what the step's rows do."""
        end = start + count
        return (
            self.per_prefill_token_s * count + self.per_context_token_s * end + self.per_pair_s * count * end
        )
