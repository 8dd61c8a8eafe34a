"""What a replay hears of one request, and the record that comes of it.  Times on the workload's clock, in seconds."""

from dataclasses import dataclass, field
from typing import Any

from sched.metrics import Record
from sched.workload import Request


@dataclass(slots=True)
class Heard:
    """Filled while the answer comes.  `sent_s`: when the last byte of the request was handed to the socket."""

    request: Request
    sent_s: float | None = None
    first_s: float | None = None
    end_s: float | None = None
    tokens: int = 0
    cached: int = 0
    error: str | None = None
    itl_s: list[float] = field(default_factory=list)
    _last_s: float = 0.0
    _deaf: bool = False

    @property
    def over(self) -> bool:
        return self.end_s is not None or self._deaf

    def give_up(self) -> None:
        """It stays unfinished, whatever still comes."""
        self._deaf = True

    def news(self, count: int, at_s: float) -> None:
        """`count` more tokens came.  A gap is between two moments at which tokens came, however many."""
        if self.over or count <= 0:
            return
        if self.first_s is None:
            self.first_s = at_s
        else:
            self.itl_s.append(at_s - self._last_s)
        self._last_s = at_s
        self.tokens += count

    def end(self, at_s: float, error: str | None = None) -> None:
        """Once; what comes later is not heard."""
        if not self.over:
            self.end_s, self.error = at_s, error

    def record(self) -> Record:
        r = self.request
        return Record(
            rid=r.rid, model=r.model, arrival_s=r.arrival_s, first_s=self.first_s, end_s=self.end_s,
            prompt_tokens=r.prompt_tokens, output_tokens=self.tokens, wanted_tokens=r.output_tokens, error=self.error,
            ttft_slo_s=r.ttft_slo_s, tpot_slo_s=r.tpot_slo_s, itl_s=tuple(self.itl_s), cached_tokens=self.cached,
        )  # fmt: skip

    def row(self, attained: bool, itl: bool) -> dict[str, Any]:
        """A line of the log; seconds, null where it never happened."""
        r, record = self.request, self.record()
        done = record.first_s is not None and record.end_s is not None
        found: dict[str, Any] = {
            "rid": r.rid, "model": r.model, "session": r.session, "turn": r.turn, "arrival_s": r.arrival_s, "sent_s": self.sent_s,
            "first_s": self.first_s, "end_s": self.end_s, "prompt_tokens": r.prompt_tokens, "cached_tokens": self.cached,
            "output_tokens": self.tokens, "wanted_tokens": r.output_tokens,
            "ttft_s": None if self.first_s is None else record.ttft_s, "tpot_s": record.tpot_s if done else None,
            "attained": attained, "error": self.error,
        }  # fmt: skip
        return found | ({"itl_s": self.itl_s} if itl else {})
