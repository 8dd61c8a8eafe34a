"""Requests to send or to simulate, their file, and what can be done with them: rescale, cut, split, merge.

A workload is a header and requests in the order of arrival.  What a prompt says is not in it: its tokens are drawn from
the seed, the session and the prefix (`token_ids`), so that prompts which share a beginning do so token by token.
The file is JSON Lines, the header first; the same workload is the same bytes.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sched.metrics import Slo, aligned

FORMAT, VERSION = "minserve_workload", 1
TICK_S = 1e-6  # arrivals are whole microseconds
LEAST_S, MOST_S = 1e-3, 1e9  # of a workload; nothing that a request waits for takes more
MOST_TOKEN_S = 1e3
SECONDS = f"seconds >= 0 and at most {MOST_S:g}"


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `rid` counts them in order of arrival, from 0.

    Its prompt begins with `prefix_tokens` of the common prefix `prefix`; the others are the beginning of what is said in
    `session`, so a later turn repeats the earlier ones and stand-ins for their answers.  `turn` counts from 0.
    SLOs in seconds, where the request has its own.  `priority`: the lower the more urgent.
    """

    rid: int
    model: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    session: int = -1
    turn: int = 0
    prefix: int = -1
    prefix_tokens: int = 0
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    priority: int = 0


FIELDS = dataclasses.fields(Request)
DEFAULTS = {f.name: f.default for f in FIELDS if f.default is not dataclasses.MISSING}
NAMES = frozenset(f.name for f in FIELDS)


@dataclass(frozen=True, slots=True)
class Workload:
    """`info`: plain JSON, how it was made (seed, source, formulas, what was done since).  `slos`: by model.

    `duration_s`: arrivals are drawn for that long; rates are requests over it.  `seed`: of the prompts' tokens.
    """

    requests: tuple[Request, ...]
    duration_s: float
    seed: int = 0
    slos: Mapping[str, Slo] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        """In alphabetical order."""
        return sorted({r.model for r in self.requests})

    def rates(self) -> dict[str, float]:
        """Requests a second by model, as they came out."""
        return {m: sum(r.model == m for r in self.requests) / self.duration_s for m in self.models}


def ordered(requests: Iterable[Request]) -> tuple[Request, ...]:
    """By arrival (in whole microseconds), with rids anew; one without a session gets one of its own."""
    found = sorted(requests, key=lambda r: round(r.arrival_s / TICK_S))
    free = max((r.session for r in found), default=-1) + 1
    out = []
    for rid, r in enumerate(found):
        session = r.session
        if session < 0:
            session, free = free, free + 1
        arrival = round(round(r.arrival_s / TICK_S) * TICK_S, 6)
        out.append(dataclasses.replace(r, rid=rid, arrival_s=arrival, session=session))
    return tuple(out)


def token_ids(request: Request, seed: int, low: int, high: int) -> np.ndarray:
    """The prompt: int64 [prompt_tokens] in [low, high), the same for the same seed, session and prefix."""
    if not 0 <= low < high:
        raise ValueError(
            f"token ids must come from a range [low, high) with 0 <= low < high, got {low}, {high}"
        )
    own = np.random.default_rng((seed, 0, request.session)).integers(
        low, high, request.prompt_tokens - request.prefix_tokens
    )
    if not request.prefix_tokens:
        return own
    common = np.random.default_rng((seed, 1, request.prefix)).integers(low, high, request.prefix_tokens)
    return np.concatenate([common, own])


# ---- what can be done with one


def _made(workload: Workload, what: str, **changes: Any) -> Workload:
    info = dict(workload.info)
    info["made"] = [*info.get("made", ()), what]
    return dataclasses.replace(workload, info=info, **changes)


def rescaled(workload: Workload, factor: float, name: str = "the rate's factor") -> Workload:
    """`factor` times as many requests a second: the same ones in 1 / factor of the time.

    ValueError, where the result would be too short or too long, calls the factor `name`.
    """
    whole_s = workload.duration_s
    if not (0 < factor < math.inf and LEAST_S * factor <= whole_s <= MOST_S * factor):
        raise ValueError(
            f"{name} must be > 0 and turn the {whole_s:g} s into {LEAST_S:g} to {MOST_S:g} s, got {factor!r}"
        )
    moved = (dataclasses.replace(r, arrival_s=r.arrival_s / factor) for r in workload.requests)
    what, seconds = f"rate x {factor:g}", whole_s / factor
    return _made(workload, what, requests=ordered(moved), duration_s=seconds)


def cut(workload: Workload, start_s: float, end_s: float) -> Workload:
    """What arrives in [start_s, end_s), on a clock that begins at start_s."""
    if not 0 <= start_s < end_s <= workload.duration_s:
        raise ValueError(
            f"a cut must be 0 <= start < end <= {workload.duration_s:g} s, got {start_s!r} to {end_s!r}"
        )
    kept = (
        dataclasses.replace(r, arrival_s=r.arrival_s - start_s)
        for r in workload.requests
        if start_s <= r.arrival_s < end_s
    )
    what = f"cut {start_s:g} to {end_s:g} s"
    return _made(workload, what, requests=ordered(kept), duration_s=end_s - start_s)


def only(workload: Workload, models: Sequence[str]) -> Workload:
    """The requests of some models; at the times, and with the prompts, that they have in the whole."""
    unknown = sorted(set(models) - set(workload.models))
    if unknown or not models:
        raise ValueError(
            f"models must be among {', '.join(workload.models)}, got {', '.join(unknown) or 'none'}"
        )
    kept = (r for r in workload.requests if r.model in models)
    slos = {m: s for m, s in workload.slos.items() if m in models}
    return _made(workload, f"only {', '.join(sorted(models))}", requests=ordered(kept), slos=slos)


def split(workload: Workload) -> dict[str, Workload]:
    """A workload for each model."""
    return {m: only(workload, [m]) for m in workload.models}


def merged(workloads: Sequence[Workload]) -> Workload:
    """All requests on one clock.  Parts of one workload (of the same seed) come together as they were.

    ValueError where two give a model another SLO.  The prompts of a part with another seed are drawn anew.
    """
    if not workloads:
        raise ValueError("merged needs a workload, got none")
    slos: dict[str, Slo] = {}
    for w in workloads:
        for model, slo in w.slos.items():
            if slos.setdefault(model, slo) != slo:
                raise ValueError(
                    f"the SLO of {model} must be the same in all parts, got {slos[model]} and {slo}"
                )
    requests: list[Request] = []
    shifts: dict[int, tuple[int, int]] = {}
    free = (0, 0)
    for w in workloads:
        # parts with a seed in common share sessions and prefixes; the first seed keeps its numbers
        session, prefix = shifts.setdefault(w.seed, free)
        moved = [
            dataclasses.replace(
                r, session=r.session + session, prefix=r.prefix + prefix if r.prefix >= 0 else -1
            )
            for r in w.requests
        ]
        requests += moved
        free = (
            max([free[0], *(r.session + 1 for r in moved)]),
            max([free[1], *(r.prefix + 1 for r in moved)]),
        )
    info = {"parts": [dict(w.info) for w in workloads]}
    seconds = max(w.duration_s for w in workloads)
    return Workload(ordered(requests), seconds, workloads[0].seed, slos, info)


# ---- the file


def to_lines(workload: Workload) -> Iterator[str]:
    """The lines of the file, without their ends."""
    slos = {m: dataclasses.asdict(s) for m, s in sorted(workload.slos.items())}
    head: dict[str, Any] = {
        FORMAT: VERSION,
        "requests": len(workload.requests),
        "duration_s": workload.duration_s,
    }
    head |= {"seed": workload.seed, "slos": slos, "info": dict(workload.info)}
    yield json.dumps(head, separators=(",", ":"), allow_nan=False)
    for r in workload.requests:
        row = {name: getattr(r, name) for name in Request.__slots__}
        kept = {k: v for k, v in row.items() if k not in DEFAULTS or v != DEFAULTS[k]}
        yield json.dumps(kept, separators=(",", ":"), allow_nan=False)


def from_lines(lines: Iterable[str]) -> Workload:
    """ValueError names the line, counted from 1, the key and what it must be."""
    rows = enumerate((line for line in lines if line.strip()), 1)
    head = _object(*next(rows, (1, "")))
    if head.get(FORMAT) != VERSION:
        raise ValueError(
            f"line 1: {FORMAT} must be {VERSION}, the header of a workload, got {head.get(FORMAT)!r}"
        )
    requests = [_request(i, _object(i, line)) for i, line in rows]
    for i, r in enumerate(requests):
        if r.rid != i:
            raise ValueError(f"line {i + 2}: rid must count the requests from 0, here {i}, got {r.rid}")
    if head.get("requests") != len(requests):
        raise ValueError(
            f"line 1: requests must be {len(requests)}, as many as follow, got {head.get('requests')!r}"
        )
    for i, (a, b) in enumerate(itertools.pairwise(requests), 3):
        if b.arrival_s < a.arrival_s:
            raise ValueError(
                f"line {i}: arrival_s must not lie before {a.arrival_s} of the line above, got {b.arrival_s}"
            )
    seconds: Any = head.get("duration_s")
    seed, info = head.get("seed"), head.get("info", {})
    if not _seconds(seconds) or seconds == 0:
        raise ValueError(f"line 1: duration_s must be seconds > 0 and at most {MOST_S:g}, got {seconds!r}")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise ValueError(f"line 1: seed must be an integer in [0, 2^63), got {seed!r}")
    if not isinstance(info, dict):
        raise ValueError(f"line 1: info must be an object, got {info!r:.60}")
    return Workload(ordered(requests), float(seconds), seed, _slos(head.get("slos", {})), info)


def _object(i: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {i}: must be a JSON object, got {line[:60]!r}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"line {i}: must be a JSON object, got {line[:60]!r}")
    return found


def _seconds(value: Any, most: float = MOST_S) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def _slos(given: Any) -> dict[str, Slo]:
    if not isinstance(given, dict):
        raise ValueError(f"line 1: slos must be an object, got {given!r:.60}")
    found = {}
    for model, slo in given.items():
        keys = ("ttft_s", "tpot_s", "ttft_per_token_s")
        if not isinstance(slo, dict) or not set(slo) <= set(keys):
            raise ValueError(f"line 1: slos.{model} must have seconds for {', '.join(keys)}, got {slo!r:.80}")
        if not {"ttft_s", "tpot_s"} <= set(slo):
            raise ValueError(f"line 1: slos.{model} must have ttft_s and tpot_s, got {slo!r:.80}")
        for key, value in slo.items():
            most = MOST_TOKEN_S if key == "ttft_per_token_s" else MOST_S
            if not _seconds(value, most):
                says = f"seconds >= 0 and at most {most:g}"
                raise ValueError(f"line 1: slos.{model}: {key} must be {says}, got {value!r:.60}")
        found[model] = Slo(**slo)
    return found


COUNTS = {
    "prompt_tokens": 1,
    "output_tokens": 1,
    "session": -1,
    "turn": 0,
    "prefix": -1,
    "prefix_tokens": 0,
    "rid": 0,
}


def _request(i: int, row: dict[str, Any]) -> Request:
    def bad(name: str, says: str) -> ValueError:
        return ValueError(f"line {i}: {name} must be {says}, got {row.get(name)!r:.60}")

    unknown = sorted(set(row) - NAMES)
    if unknown:
        raise ValueError(f"line {i}: the keys are {', '.join(Request.__slots__)}, got {unknown[0]!r:.60}")
    if not isinstance(row.get("model"), str) or not row["model"]:
        raise bad("model", "a name")
    if not _seconds(row.get("arrival_s")):
        raise bad("arrival_s", SECONDS)
    for name, least in COUNTS.items():
        value = row.get(name, DEFAULTS.get(name))
        if type(value) is not int or not least <= value < 1 << 31:
            raise bad(name, f"an integer in [{least}, 2^31)")
    if row.get("prefix_tokens", 0) > row["prompt_tokens"]:
        raise bad("prefix_tokens", f"at most prompt_tokens={row['prompt_tokens']}")
    if row.get("prefix_tokens", 0) > 0 and row.get("prefix", -1) < 0:
        raise bad("prefix", "the number of a prefix >= 0 where there are prefix_tokens")
    for name in ("ttft_slo_s", "tpot_slo_s"):
        if row.get(name) is not None and not _seconds(row[name]):
            raise bad(name, f"{SECONDS}, or null")
    if type(row.get("priority", 0)) is not int:
        raise bad("priority", "an integer")
    return Request(**row | {"arrival_s": float(row["arrival_s"])})


# ---- for people


def described(workload: Workload) -> str:
    """A table: by model its rate and share, mean, P50 and P99 of lengths, and the CV of the gaps between arrivals."""
    columns = [
        "model",
        "requests",
        "req/s",
        "share",
        "prompt mean",
        "P50",
        "P99",
        "output mean",
        "P50",
        "P99",
        "gap CV",
    ]
    total = len(workload.requests)

    def row(name: str, requests: Sequence[Request]) -> list[str]:
        p, o = np.array([r.prompt_tokens for r in requests]), np.array([r.output_tokens for r in requests])
        gaps = np.diff([r.arrival_s for r in requests])
        cv = f"{gaps.std() / gaps.mean():.2f}" if len(gaps) and gaps.mean() > 0 else "-"
        n = len(requests)
        cells = [name, str(n), f"{n / workload.duration_s:.3f}", f"{n / total:.1%}" if total else "-"]
        for v in (p, o):
            cells += (
                [f"{v.mean():.0f}", *(f"{x:.0f}" for x in np.percentile(v, (50, 99)))] if n else ["-"] * 3
            )
        return [*cells, cv]

    by_model = {m: [r for r in workload.requests if r.model == m] for m in workload.models}
    rows = [columns, *(row(m, rs) for m, rs in by_model.items()), row("all", workload.requests)]
    rates = workload.rates()
    least, most = min(rates.values(), default=0.0), max(rates.values(), default=0.0)
    lines = [
        f"{total} requests in {workload.duration_s:g} s, seed {workload.seed}; rates of models from {least:.4g} to {most:.4g} a second"
    ]
    lines += [f"{key}: {value}" for key, value in workload.info.get("laws", {}).items()]
    lines += [f"made: {what}" for what in workload.info.get("made", ())]
    return "\n".join([*lines, aligned(rows)])
