"""E3: how far placements are from the best one, for our solver and for its peers' rules.

    python -m bench.placement                          # 30 instances of six sizes, half an hour; --record keeps it
    python -m bench.placement --quick                  # under a minute
    python -m bench.placement --kvpr kvpr-50.json      # the public instances of Prism's placement problem alone
    python -m bench.placement --fineserve COSTS.csv    # FineServe's rule on its authors' table alone

Every arm has the same memory and the same costs of a step, its own aim, and 60 s.  All are judged by the estimate and, on
the first instances of a size, by the simulator with requests that no arm has seen (bench/placement_cells.py).  A table for
people, plots into --plots where matplotlib is there, last one line of JSON.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.fleet import interval
from bench.placement_cells import (
    ARMS,
    ONE_EACH,
    OPTIMUM,
    OURS,
    SEARCHED,
    run_instance,
    run_large,
    run_misjudged,
)
from bench.placement_fineserve import run_fineserve
from bench.placement_kvpr import run_kvpr
from bench.plots import draw_placement

RESULT = Path(__file__).parent / "results" / "placement.json"
SIZES = ((6, 2), (6, 4), (8, 2), (8, 4), (10, 2), (10, 4))
INSTANCES, SIMULATED, SIMULATED_S, NEAR = 30, 5, 30.0, 32
QUICK_SIZES, QUICK_INSTANCES, QUICK_SIMULATED, QUICK_S, QUICK_NEAR = ((6, 2), (8, 2)), 3, 1, 6.0, 40
NEAR_BEST = 0.95
MEAN_TARGET, WORST_TARGET, LARGE_S = 0.97, 0.9, 60.0
PEERS = [n for n in ARMS if n not in (OURS, ONE_EACH, OPTIMUM) and not n.startswith("ours")]


def rounded(values: Sequence[float]) -> list[float]:
    """The mean and the ends of its 95 % bootstrap interval."""
    return [round(x, 4) for x in interval(values)]


def summed(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm over these instances, as parts of the best known of each."""
    rows = []
    for name in ARMS:
        of = [c["arms"][name] for c in cells]
        best = [c["arms"][OPTIMUM]["value"] for c in cells]
        part = [r["value"] / b for r, b in zip(of, best, strict=True)]
        row: dict[str, Any] = {
            "tag": "simulated", "arm": name, "instances": len(of), "of_optimum": rounded(part), "worst": round(min(part), 4),
            "near": round(float(np.mean([p >= NEAR_BEST for p in part])), 3),
            "worst_model": round(float(np.mean([r["worst"] for r in of])), 4),
            "seconds": round(float(np.mean([r["seconds"] for r in of])), 4),
            "most_seconds": round(max(r["seconds"] for r in of), 3),
        }  # fmt: skip
        judged = [(r, c) for r, c in zip(of, cells, strict=True) if "sim_value" in r]
        if judged:
            part = [r["sim_value"] / c["best_simulated"] for r, c in judged]
            joint = [r["sim_joint"] for r, _ in judged]
            row |= {
                "simulated": len(judged), "sim_of_optimum": rounded(part), "sim_worst": round(min(part), 4),
                "sim_near": round(float(np.mean([p >= NEAR_BEST for p in part])), 3),
                "sim_joint": round(float(np.mean(joint)), 4),
                "sim_worst_model": round(float(np.mean([r["sim_worst"] for r, _ in judged])), 4),
            }  # fmt: skip
        rows.append(row)
    return rows


def paired(cells: Sequence[dict[str, Any]], key: str) -> dict[str, list[float]]:
    """Ours less each peer, instance by instance, with intervals."""
    judged = [c for c in cells if key in c["arms"][OURS]]
    return (
        {n: rounded([c["arms"][OURS][key] - c["arms"][n][key] for c in judged]) for n in PEERS}
        if judged
        else {}
    )


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n{title}")
    print(
        f"{'':<30} {'of the optimum, by the estimate':^44} | {'of the best known, simulated':^44} | seconds"
    )
    head = f"{'mean (95 %)':>22} {'worst':>6} {'>=95%':>6} {'model':>6}"
    print(f"{'arm':<30} {head}   | {head}   |")
    for r in sorted(rows, key=lambda r: -r["of_optimum"][0]):
        cells = [_cells(r, ""), _cells(r, "sim_") if "simulated" in r else "-".rjust(43)]
        print(f"{r['arm']:<30} {cells[0]} | {cells[1]} | {r['seconds']:.3f}")


def _cells(r: dict[str, Any], pre: str) -> str:
    mean, low, high = r[f"{pre}of_optimum"]
    return (
        f"{mean:>7.3f} ({low:.3f}..{high:.3f}) {r[f'{pre}worst']:>6.3f} {r[f'{pre}near']:>6.0%} "
        f"{r[f'{pre}worst_model']:>6.1%}  "
    )


def run_cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    quick = args.quick
    sizes = QUICK_SIZES if quick else SIZES
    count = args.instances or (QUICK_INSTANCES if quick else INSTANCES)
    judged, seconds, near = (
        (QUICK_SIMULATED, QUICK_S, QUICK_NEAR) if quick else (SIMULATED, SIMULATED_S, NEAR)
    )
    jobs = [
        (args.seed + k, models, gpus, seconds if k < judged else 0.0, near)
        for models, gpus in sizes
        for k in range(count)
    ]
    known = read_cells(args.cells) if args.cells else {}
    todo = [job for job in jobs if job not in known]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        for job, cell in zip(
            todo, pool.map(run_instance, *zip(*todo, strict=True)) if todo else (), strict=True
        ):
            known[job] = cell
            if args.cells:
                with args.cells.open("a") as file:
                    file.write(json.dumps([job, cell]) + "\n")
            mine = cell["arms"]
            sys.stderr.write(
                f"{cell['models']} x {cell['gpus']} seed {cell['seed']}: ours {mine[OURS]['value']:.3f}, "
                f"one each {mine[ONE_EACH]['value']:.3f}, optimum {mine[OPTIMUM]['value']:.3f}\n"
            )
    return [known[job] for job in jobs]


def read_cells(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Of a run that was ended before it was done."""
    if not path.exists():
        return {}
    return {tuple(job): cell for job, cell in map(json.loads, path.read_text().splitlines())}


def run_rates(args: argparse.Namespace) -> dict[str, list[float]]:
    """Rates 30 % wrong: mean part of the optimum, by arm."""
    sizes, count = (((6, 2),), 3) if args.quick else (SIZES[:4], 5)
    found: dict[str, list[float]] = {}
    for models, gpus in sizes:
        for k in range(count):
            for name, part in run_misjudged(args.seed + k, models, gpus).items():
                found.setdefault(name, []).append(part)
    return {name: rounded(of) for name, of in found.items()}


def judge(rows: Sequence[dict[str, Any]], large: dict[str, Any]) -> dict[str, bool]:
    by_name = {r["arm"]: r for r in rows}
    # each against the optimum of its own aim: by the estimate what never saw a simulation, by the simulator what is placed
    ours, searched = by_name[OURS], by_name[SEARCHED]
    targets = {
        f"mean >= {MEAN_TARGET} of the optimum": searched["of_optimum"][0] >= MEAN_TARGET,
        f"worst >= {WORST_TARGET}": searched["worst"] >= WORST_TARGET,
        "better than every baseline on average": all(
            ours["of_optimum"][0] > by_name[n]["of_optimum"][0]
            and ours["sim_of_optimum"][0] > by_name[n]["sim_of_optimum"][0]
            for n in PEERS
        ),
    }
    if large["models"] == 48:
        targets[f"48 x 16 within {LARGE_S:.0f} s"] = large["seconds"] < LARGE_S
    if "sim_of_optimum" in ours:
        targets[f"simulated: mean >= {MEAN_TARGET}"] = ours["sim_of_optimum"][0] >= MEAN_TARGET
        targets[f"simulated: worst >= {WORST_TARGET}"] = ours["sim_worst"] >= WORST_TARGET
    return targets


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.placement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, three instances of each")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first instance")
    parser.add_argument("--instances", type=int, metavar="N", help=f"of a size, default {INSTANCES}")
    parser.add_argument("--kvpr", metavar="PATH", help="JSON of the public KVPR instances, and nothing else")
    parser.add_argument(
        "--fineserve", metavar="CSV", help="the authors' table: FineServe's placement of seven models alone"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--cells", metavar="FILE", type=Path, help="keep instances that are done here, and go on from there"
    )
    parser.add_argument("--plots", metavar="DIR", type=Path)
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.parent.name}/{RESULT.name}")
    args = parser.parse_args(argv)
    if args.seed < 0 or args.workers < 1 or (args.instances or 1) < 1:
        parser.error("--seed must not be negative, --instances and --workers at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a target is missed."""
    args = read_arguments(argv)
    began = time.monotonic()
    if args.kvpr or args.fineserve:
        try:
            result = run_kvpr(args.kvpr, args.seed) if args.kvpr else run_fineserve(args.fineserve)
        except (OSError, ValueError) as error:
            sys.stderr.write(f"bench.placement: {error}\n")
            return 2
        name = "placement_kvpr" if args.kvpr else "placement_fineserve"
        return finish(args, {"bench": name} | result, RESULT.with_name(f"{name}.json"))
    large = run_large(args.seed, *((16, 8, 3000) if args.quick else ()))
    print(
        f"{large['models']} models x {large['gpus']} GPUs: {large['seconds']:.1f} s for {large['budget']:,} plans; by the estimate"
    )
    for name, v in large["values"].items():
        print(
            f"  {name:<18} value {v['value']:.3f}, {v['joint']:.1%} of requests, worst model {v['worst']:.1%}"
        )
    cells = run_cells(args)
    rows = summed(cells)
    by_size = {f"{m}x{g}": summed([c for c in cells if (c["models"], c["gpus"]) == (m, g)]) for m, g in dict.fromkeys((c["models"], c["gpus"]) for c in cells)}  # fmt: skip
    for size, of in by_size.items():
        print_rows(f"{size}, {of[0]['instances']} instances", of)
    print_rows(f"all {len(cells)} instances", rows)
    rates = run_rates(args)
    print("\nrates up to 30 % wrong, part of the optimum that knows them, by the estimate: "
          + ", ".join(f"{n} {v[0]:.3f}" for n, v in sorted(rates.items(), key=lambda p: -p[1][0])))  # fmt: skip
    if args.plots:
        print(draw_placement(rows, args.plots / "placement.png"))
    result = {
        "targets": judge(rows, large), "seed": args.seed, "instances": len(cells), "wall_s": round(time.monotonic() - began),
        "large": large, "rates_30_percent_wrong": rates, "ours_less": {k: paired(cells, k) for k in ("value", "sim_value")},
        "rows": rows, "by_size": by_size,
    }  # fmt: skip
    return finish(args, {"bench": "placement"} | result, RESULT)


def finish(args: argparse.Namespace, result: dict[str, Any], path: Path) -> int:
    print("; ".join(f"{what}: {'met' if met else 'MISSED'}" for what, met in result["targets"].items()))
    line = json.dumps(result)
    if args.record:
        path.write_text(line + "\n")
    print(line)
    return 0 if all(result["targets"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
