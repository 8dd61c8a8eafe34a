"""`python -m minserve.replay WORKLOAD --url http://...`: sends a workload's requests when they are due, and says what came.

Open loop: the clock of arrivals waits for no answer.  Prompts are random tokens of the workload's seed, answers have
the workload's length.  `--engine CONFIG` starts the engines itself and leaves HTTP out.  How late the client was is
part of the result: a run with a P99 of over 2 ms is marked.  The last line is one JSON object.
"""

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minserve.config import load_config
from minserve.replay_alone import measure_alone
from minserve.replay_heard import Heard
from minserve.replay_http import HttpTarget
from minserve.workload_saved import load_workload
from sched.metrics import Record, Slo, attained, summarize, table
from sched.workload import Request, Workload, cut, rescaled, token_ids

LATE_S = 0.002
AHEAD = 64  # requests made ready before they are due
NAP_S = 0.001  # a timer fires up to a millisecond late: from here on the clock is watched
START_IN_S = 0.05


class Target(Protocol):
    async def open(self) -> None: ...
    def prepared(self, request: Request, ids: list[int]) -> Any: ...
    def send(self, data: Any, heard: Heard) -> None: ...
    def cancel(self, heard: Heard) -> None: ...
    async def close(self) -> None: ...


class RunClock:
    """Seconds since the run began; before `start` it stands before 0."""

    def __init__(self) -> None:
        self._zero = time.monotonic() + 1e9

    def start(self, in_s: float) -> None:
        self._zero = time.monotonic() + in_s

    def __call__(self) -> float:
        return time.monotonic() - self._zero


async def replay(
    workload: Workload, target: Target, clock: RunClock, *, drain_s: float, ids: tuple[int, int]
) -> list[Heard]:
    """Sends everything; the answers that came until `drain_s` after the last arrival was due."""
    heards = [Heard(r) for r in workload.requests]
    ready: list[Any] = []

    def prepare() -> None:
        r = workload.requests[len(ready)]
        ready.append(target.prepared(r, token_ids(r, workload.seed, *ids).tolist()))

    clock.start(START_IN_S)
    for i, heard in enumerate(heards):
        at = heard.request.arrival_s
        while len(ready) < len(heards) and (
            len(ready) <= i or (len(ready) < i + AHEAD and at - clock() > 2 * NAP_S)
        ):
            prepare()
        await until(at, clock)
        target.send(ready[i], heard)
        ready[i] = None
    end = workload.duration_s + drain_s
    while clock() < end and not all(h.over for h in heards):
        await asyncio.sleep(0.02)
    for heard in heards:
        if not heard.over:
            heard.give_up()
            target.cancel(heard)
    return heards


async def until(at_s: float, clock: RunClock) -> None:
    """Lets others run at least once, and comes back as near to `at_s` as it can."""
    await asyncio.sleep(max(0.0, at_s - clock() - NAP_S))
    while clock() < at_s:
        await asyncio.sleep(0)


def lateness(heards: Sequence[Heard]) -> dict[str, Any]:
    """Milliseconds from when requests were due until they were sent; `void` where the P99 is over 2 ms."""
    late = np.array([h.sent_s - h.request.arrival_s for h in heards if h.sent_s is not None])
    found: dict[str, Any] = {"sent": len(late), "p50_ms": None, "p99_ms": None, "max_ms": None}
    if len(late):
        numbers = (*np.percentile(late, (50, 99)), late.max())
        found |= dict(
            zip(("p50_ms", "p99_ms", "max_ms"), (round(1e3 * float(n), 4) for n in numbers), strict=True)
        )
        found["void"] = bool(numbers[1] > LATE_S)
    return found


def read_slos(args: argparse.Namespace, workload: Workload) -> dict[str, Slo]:
    """The workload's, over them those of --slo MODEL=TTFT_MS:TPOT_MS or --alone and --slo-scale."""
    slos = dict(workload.slos)
    if (args.alone is None) != (args.slo_scale is None):
        raise ValueError("--alone FILE and --slo-scale TTFT:TPOT go together")
    if args.alone is not None:
        first, _, token = args.slo_scale.partition(":")
        try:
            scales = float(first), float(token or first)
            found = json.loads(Path(args.alone).read_text())
            slos |= {m: Slo(**found[m]).scaled(*scales) for m in workload.models}
        except (ValueError, TypeError, KeyError, OSError) as error:
            says = '{"MODEL": {"ttft_s": .., "tpot_s": ..}, ..} and --slo-scale numbers TTFT:TPOT'
            raise ValueError(
                f"--alone must have {says}, got {args.alone!r}, {args.slo_scale!r}: {error}"
            ) from None
    for given in args.slo or ():
        model, _, rest = given.partition("=")
        first, _, token = rest.partition(":")
        try:
            slo = Slo(float(first) / 1e3, float(token) / 1e3)
        except ValueError:
            raise ValueError(f"--slo must be MODEL=TTFT_MS:TPOT_MS, got {given!r}") from None
        if model not in workload.models:
            raise ValueError(f"--slo must name one of {', '.join(workload.models)}, got {model!r}")
        slos[model] = slo
    return slos


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m minserve.replay", description=(__doc__ or "").split("\n\n")[0]
    )
    p.add_argument("workload", metavar="WORKLOAD", help="a file of `python -m minserve.workload`")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a server with /v1/completions")
    where.add_argument(
        "--engine", metavar="CONFIG.yaml", help="start the engines of a configuration, without HTTP"
    )
    p.add_argument(
        "--api-key-env", default="MINSERVE_API_KEY", metavar="NAME", help="the variable with the key"
    )
    p.add_argument(
        "--salt",
        help="of the prefix cache: replays with the same find each other's prompts; default: none does",
    )
    p.add_argument("--log", metavar="FILE.jsonl", help="a line for each request")
    p.add_argument("--itl", action="store_true", help="with every gap between tokens in the log")
    p.add_argument("--rate-scale", type=float, default=1.0, metavar="X", help="X times as many a second")
    p.add_argument(
        "--duration", type=float, metavar="S", help="only the first S seconds (after --rate-scale)"
    )
    p.add_argument(
        "--drain-s", type=float, default=20.0, metavar="S", help="for answers, when arrivals have ended"
    )
    p.add_argument("--warmup-s", type=float, default=0.0, metavar="S", help="arrivals that do not count")
    p.add_argument(
        "--token-ids",
        default="5:250",
        metavar="LOW:HIGH",
        help="of prompts; every vocabulary has the default's",
    )
    p.add_argument(
        "--slo", action="append", metavar="MODEL=TTFT_MS:TPOT_MS", help="over the workload's; may be repeated"
    )
    p.add_argument(
        "--alone", metavar="FILE.json", help="by model ttft_s, ttft_per_token_s, tpot_s of a request alone"
    )
    p.add_argument(
        "--measure-alone", metavar="FILE.json", help="no replay: write that file, of one request at a time"
    )
    p.add_argument("--slo-scale", metavar="TTFT:TPOT", help="SLOs are so many times those of --alone")
    p.add_argument(
        "--send-slo", action="store_true", help="tell the server the SLO that each request is judged by"
    )
    return p


def told(workload: Workload, slos: Mapping[str, Slo]) -> Workload:
    """Every request has the SLO of its model as its own, where it has none and its model has one."""

    def with_slo(r: Request) -> Request:
        slo = slos.get(r.model)
        if slo is None:
            return r
        first_s = slo.first_s(r.prompt_tokens) if r.ttft_slo_s is None else r.ttft_slo_s
        return replace(r, ttft_slo_s=first_s, tpot_slo_s=slo.tpot_s if r.tpot_slo_s is None else r.tpot_slo_s)

    return replace(workload, requests=tuple(map(with_slo, workload.requests)))


def read_ids(given: str) -> tuple[int, int]:
    low, _, high = given.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high) < 1 << 31):
        raise ValueError(f"--token-ids must be LOW:HIGH with LOW < HIGH, got {given!r}")
    return int(low), int(high)


def target_of(args: argparse.Namespace, workload: Workload, clock: RunClock) -> Target:
    """ValueError where it cannot take the workload."""
    if args.url is not None:
        # a second replay must not find the prompts of the first
        salt = f"replay-{time.time_ns()}" if args.salt is None else args.salt
        return HttpTarget(args.url, os.environ.get(args.api_key_env), clock, salt)
    from minserve.replay_engine import EngineTarget  # what follows from it, a client has no use for

    config = load_config(args.engine)
    strangers = sorted(set(workload.models) - {m.name for m in config.models})
    if strangers:
        names = ", ".join(m.name for m in config.models)
        raise ValueError(
            f"{args.engine} must have the workload's models, got {names} without {strangers[0]!r}"
        )
    return EngineTarget(config, clock)


async def run(args: argparse.Namespace, workload: Workload) -> list[Heard]:
    """What was heard of each request; of none where --measure-alone is what was asked."""
    clock, ids = RunClock(), read_ids(args.token_ids)
    target = target_of(args, workload, clock)
    try:
        await target.open()
        if args.measure_alone is None:
            return await replay(workload, target, clock, drain_s=args.drain_s, ids=ids)
        found = await measure_alone(workload, target, clock, ids)
        Path(args.measure_alone).write_text(json.dumps(found, indent=1) + "\n")
        return []
    finally:
        await target.close()


def result(
    workload: Workload, heards: list[Heard], slos: dict[str, Slo], args: argparse.Namespace
) -> dict[str, Any]:
    """The one object: `summarize` of all, how late the client was, and what was replayed."""
    records: list[Record] = [h.record() for h in heards]
    found: dict[str, Any] = {
        "workload": str(args.workload), "seed": workload.seed, "rate_scale": args.rate_scale,
        "target": args.url or args.engine, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    found |= {
        "client": lateness(heards),
        "slos": {m: [s.ttft_s, s.ttft_per_token_s, s.tpot_s] for m, s in slos.items()},
    }
    return found | summarize(records, slos, warmup_s=args.warmup_s)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 also where requests failed, which the result says."""
    args = parser().parse_args(argv)
    try:
        workload = load_workload(Path(args.workload))
        if args.rate_scale != 1:
            workload = rescaled(workload, args.rate_scale, "--rate-scale")
        if args.duration is not None and args.duration < workload.duration_s:
            workload = cut(workload, 0.0, args.duration)
        slos = read_slos(args, workload)
        if args.send_slo:
            workload = told(workload, slos)
        read_ids(args.token_ids)
        if not 0 <= args.warmup_s < workload.duration_s:
            raise ValueError(f"--warmup-s must be in [0, {workload.duration_s:g}), got {args.warmup_s:g}")
        gc.freeze()
        heards = asyncio.run(run(args, workload))
        if args.measure_alone is not None:
            sys.stdout.write(Path(args.measure_alone).read_text())
            return 0
        if args.log is not None:
            lines = (json.dumps(h.row(attained(h.record(), slos), args.itl)) for h in heards)
            Path(args.log).write_text("".join(f"{line}\n" for line in lines))
        found = result(workload, heards, slos, args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        sys.stderr.write(f"minserve: {error}\n")
        return 2
    sys.stdout.write(f"{report(found)}\n{json.dumps(found, allow_nan=False)}\n")
    return 0


def report(found: dict[str, Any]) -> str:
    client = found["client"]
    lines = [table(found)]
    if client["sent"]:
        lines.append(
            f"client: {client['sent']} sent, late by P50 {client['p50_ms']} ms, P99 {client['p99_ms']} ms, at most {client['max_ms']} ms"
        )
        if client["void"]:
            lines.append(
                f"VOID: the client's P99 is over {1e3 * LATE_S:g} ms, so what it measured is partly itself"
            )
    worst = found["slo_attainment_worst_model"]
    if worst is not None:
        lines.append(
            f"worst model {found['worst_model']} {worst:.1%}, Jain's index {found['jain'] or 0:.3f}; "
            f"{found['unfinished']} unfinished, errors {found['errors'] or 'none'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
