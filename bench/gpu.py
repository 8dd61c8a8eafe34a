"""All that a GPU run should do, most informative first; what is done is not done again, so calls of minutes add up.

    python -m bench.gpu --out bench/results/gpu             # every stage, at most 9 minutes; call again until it says done
    python -m bench.gpu --stage attention matmul            # named stages
    python -m bench.gpu --dry-run                           # on a CPU: everything short of the launch, at small sizes

One file of JSON lines a stage.  An item that failed leaves a row with its `error` and is tried again only with --retry.
Each stage runs in a process of its own: a fault on the GPU ends that process, and the next one goes on behind it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.stages import STAGES, Item, Workshop, items_of
from bench.timing import clocks

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "results" / "gpu"
MAX_MINUTES = 9.0
BEGINS = "begins: "


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def left(stage: str, args: argparse.Namespace) -> list[Item]:
    """Items without a row.  Rows of an item that did not end (`last` is missing) do not count."""
    rows = read(args.out / f"{stage}.jsonl")
    done = {r["item"] for r in rows if r.get("last") and not (args.retry and "error" in r)}
    return [i for i in items_of(stage, dry=args.dry_run) if i.name not in done and args.item in i.name]


def finished(rows: list[dict[str, Any]], item: Item, shop: Workshop) -> list[dict[str, Any]]:
    stamped = [{**row, **shop.where, "stage": item.stage, "item": item.name} for row in rows]
    if shop.dry:  # times of a rehearsal mean nothing
        stamped = [
            {**{k: v for k, v in r.items() if v != "measured"}, "dry": True, "tag": "static"} for r in stamped
        ]
    stamped[-1]["last"] = True
    return stamped


def run_stage(stage: str, args: argparse.Namespace, deadline: float) -> bool:
    """In the worker: items until the deadline.  True when none is left."""
    file = args.out / f"{stage}.jsonl"
    shop = Workshop(dry=args.dry_run)
    for item in left(stage, args):
        if time.time() > deadline:
            return False
        print(f"{BEGINS}{item.name}", flush=True)
        begin = time.time()
        try:
            rows = list(item.run(shop, deadline))
        except Exception as error:
            rows = [{"error": f"{type(error).__name__}: {error}"[-2000:], "tag": "measured"}]
        if not rows:  # out of time before it had anything
            return False
        append(file, finished(rows, item, shop))
        wrong = f"  {rows[-1]['error'][:300]}" if "error" in rows[-1] else ""
        print(f"  {time.time() - begin:.1f} s, clocks {clocks(shop.device)}{wrong}", flush=True)
        if "CUDA error" in wrong:
            sys.exit(3)  # the context is lost: the next process goes on
    return True


def worker(stage: str, args: argparse.Namespace, deadline: float) -> bool:
    """The stage in its own process, started again behind an item that took it down."""
    command = [sys.executable, "-m", "bench.gpu", "--worker", "--stage", stage, "--out", str(args.out)]
    command += (
        ["--item", args.item, "--deadline", str(deadline)]
        + ["--retry"] * args.retry
        + ["--dry-run"] * args.dry_run
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    while True:
        last = None
        with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(f"[{stage}] {line}", end="", flush=True)
                last = line.removeprefix(BEGINS).strip() if line.startswith(BEGINS) else last
        if process.returncode in (0, 2):
            return process.returncode == 0
        if process.returncode != 3 and last is None:
            raise SystemExit(f"{stage}: its process ended with {process.returncode} before any item")
        if process.returncode != 3:
            died = {"error": f"the process ended with {process.returncode}", "tag": "measured"}
            append(args.out / f"{stage}.jsonl", [{**died, "stage": stage, "item": last, "last": True}])


def summary(out: Path, *, dry: bool) -> str:
    lines = []
    for stage in STAGES:
        rows = read(out / f"{stage}.jsonl")
        errors = [r for r in rows if "error" in r]
        items = {r["item"] for r in rows if r.get("last")}
        lines.append(
            f"{stage:<14}{len(items):>4} of {len(items_of(stage, dry=dry)):>4} items, {len(errors)} failed"
        )
        lines += [f"    {r['item']}: {r['error'].splitlines()[-1][:200]}" for r in errors]
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--out", type=Path, help="folder of the results; default bench/results/gpu")
    parser.add_argument("--item", default="", help="only items whose name holds this")
    parser.add_argument("--minutes", type=float, default=MAX_MINUTES)
    parser.add_argument("--retry", action="store_true", help="try failed items again")
    parser.add_argument("--resume", action="store_true", help="nothing but a reminder: every run resumes")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    if args.out is None:
        args.out = ROOT / "bench" / "out" / "gpu-dry" if args.dry_run else OUT
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no GPU here: --dry-run executes everything short of the launch")
    if args.worker:
        sys.exit(0 if run_stage(args.stage[0], args, args.deadline) else 2)
    if args.dry_run:
        for stage in args.stage:
            (args.out / f"{stage}.jsonl").unlink(missing_ok=True)
    deadline = time.time() + 60 * args.minutes
    done = [worker(stage, args, deadline) for stage in args.stage if time.time() < deadline]
    print(summary(args.out, dry=args.dry_run))
    rows = [r for stage in args.stage for r in read(args.out / f"{stage}.jsonl")]
    whole = len(done) == len(args.stage) and all(done)
    failed = sum("error" in r for r in rows)
    print(json.dumps({"bench": "gpu", "done": whole, "rows": len(rows), "failed": failed}))
    sys.exit(bool(args.dry_run and (failed or not whole)))


if __name__ == "__main__":
    main()
