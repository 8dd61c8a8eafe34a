"""Statistics of served requests, by model and in all: one rule for a replay against a server and for the simulator.

A request has *attained* its SLO when it ended without an error, with all the tokens it was to have, its first token
came within `ttft` of its arrival and the next ones every `tpot` in the mean.  Shed, aborted, unfinished: missed.
TTFT and latency count from the arrival in the workload, not from when a client got round to sending.
Keys ending in _ms, `completed`, `request_throughput` and their like mean what they mean in vLLM's benchmark file.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99)
SHED = "shed"  # an error that begins so was a decision of a policy, not a fault
INF = float("inf")


@dataclass(frozen=True, slots=True)
class Slo:
    """Seconds: first token within ttft_s + ttft_per_token_s x prompt tokens, then one every tpot_s in the mean."""

    ttft_s: float
    tpot_s: float
    ttft_per_token_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "ttft_per_token_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be seconds >= 0, got {getattr(self, name)!r}")

    def scaled(self, ttft: float, tpot: float) -> "Slo":
        """Where this says what a request takes that has the device to itself: the SLO of `ttft` and `tpot` times that."""
        return Slo(ttft * self.ttft_s, tpot * self.tpot_s, ttft * self.ttft_per_token_s)

    def first_s(self, prompt_tokens: int) -> float:
        return self.ttft_s + self.ttft_per_token_s * prompt_tokens


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one request.  Seconds on the workload's clock, which starts at 0; None: it never happened.

    `output_tokens` came, `wanted_tokens` were to come.  `error` None: nothing went wrong (`end_s` None: it still runs).
    The request's own SLO, where it has one, goes before its model's.  `itl_s`: gaps between its tokens, if kept.
    """

    rid: int
    model: str
    arrival_s: float
    first_s: float | None
    end_s: float | None
    prompt_tokens: int
    output_tokens: int
    wanted_tokens: int
    error: str | None = None
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    itl_s: tuple[float, ...] = ()
    cached_tokens: int = 0

    @property
    def completed(self) -> bool:
        whole = self.output_tokens >= self.wanted_tokens
        return self.error is None and self.first_s is not None and self.end_s is not None and whole

    @property
    def ttft_s(self) -> float:
        """inf where no token came."""
        return INF if self.first_s is None else self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Mean seconds of a token after the first; 0 for an answer of one token, inf where it did not end."""
        if self.first_s is None or self.end_s is None:
            return INF
        return (self.end_s - self.first_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def limits(record: Record, slos: Mapping[str, Slo]) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds that the request must keep; inf where nobody set one."""
    slo = slos.get(record.model)
    first = INF if slo is None else slo.first_s(record.prompt_tokens)
    token = INF if slo is None else slo.tpot_s
    return (
        first if record.ttft_slo_s is None else record.ttft_slo_s,
        token if record.tpot_slo_s is None else record.tpot_slo_s,
    )


def attained(record: Record, slos: Mapping[str, Slo]) -> bool:
    first, token = limits(record, slos)
    return record.completed and record.ttft_s <= first and record.tpot_s <= token


def summarize(
    records: Sequence[Record],
    slos: Mapping[str, Slo] | None = None,
    *,
    duration_s: float | None = None,
    warmup_s: float = 0.0,
) -> dict[str, Any]:
    """All of `_group` for the whole and, under `models`, for each model; every value is plain JSON.

    `slos`: by model, seconds.  `duration_s`: what rates are divided by, by default until the last end (or arrival).
    Requests that arrived before `warmup_s` are left out, and so is that time.
    """
    slos = slos or {}
    if not 0 <= warmup_s < INF:
        raise ValueError(f"warmup_s must be seconds >= 0, got {warmup_s!r}")
    last = max((max(r.end_s or 0.0, r.arrival_s) for r in records), default=0.0)
    seconds = (last if duration_s is None else duration_s) - warmup_s
    kept = [r for r in records if r.arrival_s >= warmup_s]
    if kept and seconds <= 0:
        raise ValueError(f"duration_s must be longer than warmup_s={warmup_s}, got {seconds + warmup_s}")
    models = {name: _group([r for r in kept if r.model == name], slos, seconds) for name in _names(kept)}
    shares = {name: m["slo_attainment"] for name, m in models.items()}
    found = _group(kept, slos, seconds)
    found["slo_attainment_mean_of_models"] = float(np.mean(list(shares.values()))) if shares else None
    found["slo_attainment_worst_model"] = min(shares.values(), default=None)
    found["worst_model"] = min(shares, key=lambda name: shares[name], default=None)
    found["jain"] = jain(list(shares.values()))
    found["warmup_s"] = warmup_s
    return found | {"models": models}


def _names(records: Sequence[Record]) -> list[str]:
    return sorted({r.model for r in records})


def jain(values: Sequence[float]) -> float | None:
    """Jain's index of fairness: 1 where all are equal, 1/n where one has everything."""
    squares = sum(v * v for v in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def _group(records: Sequence[Record], slos: Mapping[str, Slo], seconds: float) -> dict[str, Any]:
    done = [r for r in records if r.completed]
    good = [r for r in done if attained(r, slos)]
    errors = Counter(r.error for r in records if r.error is not None)
    n = len(records)

    def share(condition: Callable[[Record], bool]) -> float | None:
        return sum(map(condition, records)) / n if n else None

    def rate(count: float) -> float:
        return count / seconds if seconds > 0 else 0.0

    found: dict[str, Any] = {
        "requests": n,
        "completed": len(done),
        "failed": n - len(done),
        "shed": sum(c for error, c in errors.items() if error.startswith(SHED)),
        "unfinished": sum(r.error is None and not r.completed for r in records),
        "errors": dict(sorted(errors.items())),
        "duration": seconds,
        "total_input_tokens": sum(r.prompt_tokens for r in done),
        "total_output_tokens": sum(r.output_tokens for r in done),
        "cached_tokens": sum(r.cached_tokens for r in done),
        "request_throughput": rate(len(done)),
        "request_goodput": rate(len(good)),
        "output_throughput": rate(sum(r.output_tokens for r in done)),
        "total_token_throughput": rate(sum(r.prompt_tokens + r.output_tokens for r in done)),
        "attained_output_throughput": rate(sum(r.output_tokens for r in good)),
        "slo_attainment": len(good) / n if n else None,
        "ttft_attainment": share(lambda r: r.completed and r.ttft_s <= limits(r, slos)[0]),
        "tpot_attainment": share(lambda r: r.completed and r.tpot_s <= limits(r, slos)[1]),
    }
    found |= _spread("ttft", [r.ttft_s for r in done])
    # an answer of one token has no time per further token
    found |= _spread("tpot", [r.tpot_s for r in done if r.output_tokens > 1])
    found |= _spread("itl", [gap for r in done for gap in r.itl_s])
    found |= _spread("e2el", [r.end_s - r.arrival_s for r in done if r.end_s is not None])
    return found | _concurrency(records, seconds)


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Milliseconds; None where there are no values.  Percentiles are linear between ranks, as numpy's are."""
    keys = ["mean", "median", "std", *(f"p{p}" for p in PERCENTILES)]
    if not values:
        return {f"{key}_{name}_ms": None for key in keys}
    v = np.asarray(values) * 1e3
    numbers = [v.mean(), np.median(v), v.std(), *np.percentile(v, PERCENTILES)]
    return {f"{key}_{name}_ms": float(x) for key, x in zip(keys, numbers, strict=True)}


def _concurrency(records: Sequence[Record], seconds: float) -> dict[str, float]:
    """Requests between arrival and end; one without an end is not counted."""
    ended = [r for r in records if r.end_s is not None]
    begins = np.sort([r.arrival_s for r in ended])
    ends = np.sort([r.end_s or 0.0 for r in ended])
    # one that ends at the moment another arrives makes room for it
    inside = np.arange(1, len(ended) + 1) - np.searchsorted(ends, begins, side="right")
    total = float(ends.sum() - begins.sum())
    return {
        "mean_concurrency": total / seconds if seconds > 0 else 0.0,
        "max_concurrency": int(inside.max(initial=0)),
    }


COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("requests", "requests", "{:d}"),
    ("done", "completed", "{:d}"),
    ("shed", "shed", "{:d}"),
    ("req/s", "request_throughput", "{:.2f}"),
    ("out tok/s", "output_throughput", "{:.1f}"),
    ("TTFT p50 ms", "p50_ttft_ms", "{:.1f}"),
    ("p99", "p99_ttft_ms", "{:.1f}"),
    ("TPOT p50 ms", "p50_tpot_ms", "{:.2f}"),
    ("p99", "p99_tpot_ms", "{:.2f}"),
    ("attained", "slo_attainment", "{:.1%}"),
)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def table(summary: Mapping[str, Any]) -> str:
    """A line a model and one for all, of what `summarize` found."""

    def cells(name: str, group: Mapping[str, Any]) -> list[str]:
        return [name, *("-" if group[k] is None else f.format(group[k]) for _, k, f in COLUMNS)]

    rows = [["model", *(title for title, _, _ in COLUMNS)]]
    rows += [cells(name, group) for name, group in summary["models"].items()]
    return aligned([*rows, cells("all", summary)])
