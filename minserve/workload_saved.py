"""Whole workloads in files: our own JSON Lines (docs/workloads.md) and FineServe's JSON, which is read only."""

import json
from pathlib import Path
from typing import Any

from minserve.workload_tables import file_text, seconds, tokens
from sched.workload import MOST_S, SECONDS, Request, Workload, from_lines, ordered, to_lines


def save_workload(workload: Workload, path: Path) -> None:
    path.write_text("\n".join(to_lines(workload)) + "\n")


def load_workload(path: Path) -> Workload:
    """ValueError, beginning with the file's name, where it is none."""
    try:
        return from_lines(file_text(path).splitlines())
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(repr(str(path))) else f"{str(path)!r}: {said}") from None


def read_fineserve(path: Path, seed: int = 0) -> Workload:
    """FineServe's workload: `info`, `arrivals` and `requests`; a request's slo is seconds to the first token.

    Its prompts' token ids are left: those of the workload are drawn from `seed`.
    """
    try:
        found = json.loads(file_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    try:
        return _fineserve(found, path.name, seed)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None


def _fineserve(found: Any, name: str, seed: int) -> Workload:
    parts = [found.get(k) if isinstance(found, dict) else None for k in ("info", "arrivals", "requests")]
    info, arrivals, requests = parts
    if not isinstance(info, dict) or not isinstance(arrivals, list) or not isinstance(requests, list):
        raise ValueError("it must be an object with info, arrivals and requests, as FineServe writes it")
    if len(arrivals) != len(requests) or not requests:
        raise ValueError(f"arrivals and requests must be as many, got {len(arrivals)} and {len(requests)}")
    out = []
    for i, (at, r) in enumerate(zip(arrivals, requests, strict=True)):
        try:
            out.append(_request(at, r))
        except ValueError as error:
            raise ValueError(f"requests[{i}]: {error}") from None
    end = max(r.arrival_s for r in out)
    given = seconds(info.get("duration", 0), "info.duration")
    laws = {"gaps": str(info.get("distribution", "not said")), "lengths": "as the file has them"}
    rates = info.get("rates")
    kept: dict[str, Any] = {"source": "fineserve", "file": name, "laws": laws}
    if isinstance(rates, list) and all(isinstance(r, list) and len(r) == 2 for r in rates):
        kept["rates"] = {str(model): rate for model, rate in rates}
    # it says how long arrivals were drawn for, but counts more of them than that
    return Workload(ordered(out), max(given, end + 1e-6), seed, {}, kept)


def _request(at: Any, r: Any) -> Request:
    model, data = (r.get("model_name"), r.get("data")) if isinstance(r, dict) else (None, None)
    if not isinstance(model, str) or not model or not isinstance(data, list) or len(data) != 3:
        raise ValueError(
            f"must have model_name and data, [token ids, prompt length, answer length], got {str(r)[:60]!r}"
        )
    counts = tokens(data[1], "the prompt's length", 1), tokens(data[2], "the answer's length", 1)
    slo = None if r.get("slo") is None else seconds(r["slo"], "slo")
    if slo is not None and slo > MOST_S:
        raise ValueError(f"slo must be {SECONDS}, got {slo!r}")
    return Request(0, model, seconds(at, "its arrival"), *counts, ttft_slo_s=slo)
