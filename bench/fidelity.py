"""The simulator against the engine: the same requests, measured several times and simulated once.

    python -m bench.fidelity                    # this CPU: two workers of 57M parameters, one thread each, some 17 minutes
    python -m bench.fidelity --device cuda      # a GPU: 10 % and 3 points in place of 15 % and 4
    python -m bench.fidelity --quick            # under a minute: small models, three cells, no verdict

Workers are those of `serve`, the client that of `minserve.replay --engine`.  First they run cells of their own: from those
come a profile for workers, and what is spent between client and worker.  Then workers with that profile run the judged cells
and those of the fit, in an order drawn anew for each repeat, as a machine's speed changes within minutes.  What the latter
took then, alone and side by side, is what the simulator is told.  A table, then one JSON object.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.fidelity_cells import (
    BOTH,
    FIT,
    JUDGED,
    QUICK,
    SCALES,
    Cell,
    Scale,
    config_of,
    plain,
    workload_of,
    write_model,
)
from bench.fidelity_gate import FIGURES, GATES, Verdict, judge, verdict
from bench.fidelity_live import Live, Rates, capacity, late_ms, simulated, summary_of
from bench.step_workers import said
from minserve.step_profile import Profile
from sched.latency import StepCost
from sched.metrics import Record, aligned
from sched.step_time import Fitted
from sched.workload import Workload

FIRST_GUESS = StepCost(base_s=0.02, per_prefill_token_s=1e-3)


def fit_works(scale: Scale, rates: Rates, args: argparse.Namespace, number: int) -> dict[str, Workload]:
    """By cell, requests that are in no other run.  Their SLOs are far away: who is late is not the question here."""
    costs, works = dict.fromkeys(BOTH, FIRST_GUESS), {}
    for i, cell in enumerate(FIT):
        patient = Cell(cell.name, cell.loads, slo=1000.0, cv=cell.cv)
        seed = 1000 * args.seed + len(FIT) * number + i
        works[cell.name] = workload_of(patient, scale, args.seconds, rates.of(cell), costs, seed)
    return works


def profile_of(live: Live, device: str) -> Profile:
    """Of workers that are closed, from the cells of the fit."""
    models, slowdown, found = live.fitted()
    about = {"device": device, "machine": platform.processor() or platform.machine()}
    return Profile(models, slowdown, about | {"fit": found})


async def measure_profile(live: Live, args: argparse.Namespace) -> tuple[Profile, Rates, dict[str, float]]:
    """Before anything is judged: a profile, what a burst is served with, and seconds between client and worker."""
    await live.ask_alone()
    rates = await live.rates()
    works = fit_works(live.scale, rates, args, 0)
    for cell in FIT:
        await live.run(cell, works[cell.name])
    await live.workers.close()
    return profile_of(live, args.device), rates, live.overheads()


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    scale = SCALES["quick" if args.quick else args.device.partition(":")[0]]
    parameters = write_model(folder / "model", scale.shape)
    say(f"two models of {parameters / 1e6:.0f}M parameters, fit cells of {args.seconds:g} s")
    live = Live(scale, config_of(scale, folder / "model", args.device, None), folder, args.drain)
    await live.workers.open()
    try:
        profile, burst, overhead_s = await measure_profile(live, args)
    finally:
        await live.workers.close()
    file = Path(args.profile or folder / "profile.json")
    profile.write(file)
    config = config_of(scale, folder / "model", args.device, file.resolve())
    live = Live(scale, config, folder, args.drain)
    rates = capacity(config, scale, profile)
    say(describe(profile, rates, overhead_s))
    costs = {name: fit.cost for name, fit in profile.models.items()}
    works = {
        cell.name: workload_of(cell, scale, args.seconds, rates.of(cell), costs, 1000 * args.seed + 500 + i)
        for i, cell in enumerate(args.cells)
    }
    runs: dict[str, list[dict[str, Any]]] = {cell.name: [] for cell in args.cells}
    await live.workers.open()
    try:
        for repeat in range(args.repeats):
            cells, patient = list(args.cells), fit_works(scale, burst, args, 1 + repeat)
            if repeat == 0 or not args.quick:
                cells += FIT
            for cell in random.Random(args.seed + repeat).sample(cells, len(cells)):
                if cell in FIT:
                    await live.run(cell, patient[cell.name])
                    continue
                heards = await live.run(cell, works[cell.name])
                extra = {"late_ms": late_ms(heards), "span": len(live.workers.spans) - 1}
                records = [h.record() for h in heards]
                write_log(args.log, cell.name, str(repeat), records)
                runs[cell.name].append(summary_of(records) | extra)
        errors = live.step_errors()
    finally:
        await live.workers.close()
    before, profile = profile, profile_of(live, args.device)
    profile.write(file)
    say(f"beside the judged cells: {describe(profile, rates, overhead_s)}")
    return report(args, profile, rates, overhead_s, works, runs, live, errors) | {
        "parameters": parameters, "costs_before": {name: plain(fit_json(fit)) for name, fit in before.models.items()},
    }  # fmt: skip


def report(
    args: argparse.Namespace, profile: Profile, rates: Rates, overhead_s: dict[str, float],
    works: dict[str, Any], runs: dict[str, list[dict[str, Any]]], live: Live, errors: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    gate = GATES[args.device.partition(":")[0]]
    verdicts: dict[str, list[Verdict]] = {}
    cells = []
    for cell in args.cells:
        records = simulated(live.workers.config, works[cell.name], profile, overhead_s, args.drain)
        write_log(args.log, cell.name, "simulated", records)
        told = summary_of(records)
        verdicts[cell.name] = judge(runs[cell.name], told, gate)
        cells.append(
            {
                "cell": cell.name, "loads": dict(cell.loads), "slo": cell.slo, "cv": cell.cv,
                "requests": len(works[cell.name].requests), "late_p99_ms": max(r["late_ms"] for r in runs[cell.name]),
                "step_ratios": [live.step_ratios(r["span"], profile) for r in runs[cell.name]],
                "predicted": [live.predicted(r["span"]) for r in runs[cell.name]],
                "passed": all(v.passed for v in verdicts[cell.name]),
                "figures": {v.figure: v._asdict() | {"passed": v.passed} for v in verdicts[cell.name]},
                "models": by_model(runs[cell.name], told), "tag": "measured",
            }
        )  # fmt: skip
    passed, why = verdict(verdicts, gate, args.repeats)
    say(table(cells))
    for name, error in errors.items():
        us = live.workers.watch_us[name]
        say(
            f"{name}: steps were predicted off by {error:.1%} of late; watching one took {us:.0f} us in the mean"
        )
    say(why)
    return {
        "bench": "fidelity", "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "device": args.device, "seed": args.seed,
        "seconds": args.seconds, "repeats": args.repeats, "passed": passed, "verdict": why, "limit": gate.limit,
        "points": gate.points, "rates": plain(rates.alone | {"together": rates.together}), "overhead_s": plain(overhead_s),
        "slowdown": {f"{a} beside {b}": round(s, 4) for (a, b), s in profile.slowdown.items()},
        "costs": {name: plain(fit_json(fit)) for name, fit in profile.models.items()},
        "step_error_live": plain(errors), "watch_us": plain(live.workers.watch_us),
        "costs_live_us": {name: [round(1e6 * c, 4) for c in of] for name, of in live.workers.costs.items()}, "load_average": [round(x, 2) for x in os.getloadavg()], "rows": [plain(c) for c in cells],
    }  # fmt: skip


def write_log(path: str | None, cell: str, run: str, records: Sequence[Record]) -> None:
    if path is None:
        return
    with Path(path).open("a") as lines:
        for r in records:
            lines.write(json.dumps({"cell": cell, "run": run, **dataclasses.asdict(r), "itl_s": ()}) + "\n")


def fit_json(fit: Fitted) -> dict[str, Any]:
    cost = fit.cost
    names = ("base_s", "per_decode_s", "per_prefill_token_s", "per_context_token_s", "per_pair_s")
    return {"error": fit.error, "rows": len(cost.rows)} | {
        f"{n[:-2]}_us": 1e6 * getattr(cost, n) for n in names
    }


def by_model(runs: Sequence[dict[str, Any]], told: dict[str, Any]) -> dict[str, Any]:
    """Of each model alone the median of the repeats and what was simulated: reported, not judged."""
    found: dict[str, Any] = {}
    for name, of in told["models"].items():
        found[name] = {}
        for figure in (*FIGURES, "slo_attainment"):
            values = sorted(r["models"][name][figure] or 0.0 for r in runs)
            found[name][figure] = [values[len(values) // 2], of[figure]]
    return found


def describe(profile: Profile, rates: Rates, overhead_s: dict[str, float]) -> str:
    lines = [
        f"{name}: {rates.alone[name]:.1f} requests/s alone, {rates.together[name]:.1f} beside the other, steps off by "
        f"{fit.error:.1%} in the mean (left out of the fit), {1e3 * overhead_s[name]:.2f} ms to and from the worker"
        for name, fit in profile.models.items()
    ]
    return "\n".join([*lines, f"slow-downs: {said(profile.slowdown)}"])


def table(cells: Sequence[dict[str, Any]]) -> str:
    short = {"p50_ttft_ms": "TTFT p50", "p90_ttft_ms": "p90", "p50_tpot_ms": "TPOT p50", "p90_tpot_ms": "p90"}
    head = ["cell", "n"]
    for title in short.values():
        head += [f"{title} ms", "sim", "off", "spread"]
    rows = [[*head, "attained", "sim", "spread", "steps x", ""]]
    for cell in cells:
        row = [cell["cell"], str(cell["requests"])]
        for figure in short:
            v = cell["figures"][figure]
            mark = "" if v["passed"] else "!"
            row += [
                f"{v['measured']:.1f}",
                f"{v['simulated']:.1f}",
                f"{v['error']:.1%}{mark}",
                f"{v['spread']:.1%}",
            ]
        v = cell["figures"]["slo_attainment"]
        mark = "" if v["passed"] else "!"
        row += [f"{v['measured']:.1f}%", f"{v['simulated']:.1f}%{mark}", f"{v['spread']:.1f}"]
        ratios = [x for run in cell["step_ratios"] for x in run.values()]
        row.append(f"{min(ratios):.2f}-{max(ratios):.2f}")
        rows.append([*row, "PASS" if cell["passed"] else "FAIL"])
    return aligned(rows)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda, cuda:0, ...")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small models and three cells: shows that it runs, judges nothing",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="of arrivals in a cell (default 11, quick 1.5)")
    parser.add_argument(
        "--drain", type=float, help="seconds that answers are waited for (default 8, quick 2)"
    )
    parser.add_argument("--repeats", type=int, help="of each cell (default 3, quick 2)")
    parser.add_argument(
        "--only", metavar="WORD", action="append", help="cells with this in their names; no verdict then"
    )
    parser.add_argument("--profile", metavar="JSON", help="where the fitted profile is written")
    parser.add_argument(
        "--log", metavar="JSONL", help="a line for each request of each run and simulation, appended"
    )
    parser.add_argument("--out", metavar="JSON", help="where the result is written, too")
    args = parser.parse_args(argv)
    args.seconds = args.seconds or (1.5 if args.quick else 11.0)
    args.drain = args.drain or (2.0 if args.quick else 8.0)
    args.repeats = args.repeats or (2 if args.quick else 3)
    cells = QUICK if args.quick else JUDGED
    args.cells = [c for c in cells if not args.only or any(word in c.name for word in args.only)]
    if args.device.partition(":")[0] not in GATES:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {args.device!r}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """0 where the gate is passed, or there was nothing to judge."""
    args = arguments(argv)
    if args.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # of each worker
    args.device = "cuda:0" if args.device == "cuda" else args.device
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(args, Path(folder)))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    say(json.dumps(found))
    return 0 if found["passed"] or args.quick else 1


if __name__ == "__main__":
    sys.exit(main())
