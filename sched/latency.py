"""What a step costs: linear in its decodes, its prefill tokens and the context they read.

The Batcher predicts with it, the simulator executes with it.  Coefficients come from a measurement; nothing here
reads a clock.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Seconds of a step = base + decodes, prefill tokens and tokens of context read, each times its coefficient."""

    base_s: float
    per_decode_s: float = 0.0
    per_prefill_token_s: float = 0.0
    per_context_token_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("base_s", "per_decode_s", "per_prefill_token_s", "per_context_token_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be a finite number of seconds >= 0, got {getattr(self, name)!r}"
                )

    def decode_s(self, decodes: int, context_tokens: int) -> float:
        """A step of `decodes` requests that read `context_tokens` in all, and no chunk."""
        return self.base_s + self.per_decode_s * decodes + self.per_context_token_s * context_tokens

    def chunk_s(self, start: int, count: int) -> float:
        """What a chunk adds to a step."""
        return self.per_prefill_token_s * count + self.per_context_token_s * (start + count)
