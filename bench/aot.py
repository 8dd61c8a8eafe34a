"""The static gate: every kernel that serving launches, compiled for GPUs that are not here, counted and held to limits.

    python -m bench.aot                            # what `make test` checks: sm_90 in full, one case an op elsewhere
    python -m bench.aot --op attention --target 90 # one op, one target; --case T16 takes the cases that say so
    python -m bench.aot --full                     # all cases on sm_80, 89, 90 and 100, and every spec's own compiles
    python -m bench.aot --record                   # the full run becomes bench/results/aot.json

Nothing is timed: these are counts out of machine code, tagged static.  Loops are read on sm_80, 89 and 90 alone.
Figures are kept under bench/out/aot, keyed by the sources of kernels and of this reader.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, is_dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError

from bench.gates import failures
from bench.shapes import MODELS
from bench.static import figures
from bench.target import TARGETS, recorded
from kernels.catalog import SPECS
from kernels.launch import ASSUMED
from kernels.spec import Case, KernelSpec

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "aot.json"
CACHE = ROOT / "bench" / "out" / "aot"
READERS = ("aot", "packs", "sass", "static", "shapes", "target")
NO_FP8 = "fp8e4nv not supported in this architecture"


@dataclass(frozen=True)
class Job:
    """One launch of one op for one target.  `case` is already small; `config` is what serving picks for the real ones."""

    op: str
    target: int
    case: Case
    config: Any
    served: tuple[str, ...]

    @property
    def key(self) -> str:
        config = asdict(self.config) if is_dataclass(self.config) else None
        return json.dumps([self.op, self.target, self.case.id, config])


def spec_of(op: str) -> KernelSpec:
    return next(s for s in SPECS if s.name == op)


def jobs_of(spec: KernelSpec, target: int, cases: Iterator[Case] | tuple[Case, ...]) -> list[Job]:
    gpu = ASSUMED[target]
    return [
        Job(spec.name, target, spec.small(c), spec.config(c, gpu) if spec.config else None, (c.id,))
        for c in cases
    ]


def served(spec: KernelSpec) -> list[Case]:
    return [c for model in MODELS.values() for c in spec.serving(model.shape)]


def plan(*, full: bool, ops: list[str], targets: list[int], wanted: str = "") -> list[Job]:
    """Jobs without repetition.  Not full: all served cases on sm_90, and elsewhere one for each op."""
    jobs: dict[str, Job] = {}
    for spec in SPECS:
        if spec.name not in ops or "triton" not in spec.runs:
            continue
        cases = served(spec)
        own = list(spec.compiles)
        for target in targets:
            # the first of the served: 16-bit or int8, so that tensor cores take its products on every target
            chosen = cases + own if full else (cases or own) if target == 90 else (cases or own)[:1]
            for job in jobs_of(spec, target, chosen):
                if any(wanted in name for name in (job.case.id, *job.served)):
                    known = jobs.get(job.key, job)
                    names = tuple(dict.fromkeys((*known.served, *job.served)))
                    jobs[job.key] = replace(known, served=names)
    return list(jobs.values())


def sources() -> str:
    """A hash of all that the figures depend on but the case."""
    files = sorted((ROOT / "kernels").rglob("*.py")) + [ROOT / "bench" / f"{name}.py" for name in READERS]
    files += sorted((ROOT / "kernels").rglob("*.json"))
    digest = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from: Triton wraps the reason once for each inlined function."""
    while error is not None:
        yield error
        error = error.__cause__


def compile_job(job: Job) -> dict[str, Any]:
    """The rows of a job, or why this target cannot have it."""
    spec = spec_of(job.op)
    options = {"config": job.config} if job.config is not None else {}
    with recorded(job.target) as launches:
        try:
            spec.bind("triton", spec.make(job.case, torch.Generator().manual_seed(0)), **options)()
        except CompilationError as error:
            if job.target >= 89 or not any(NO_FP8 in str(e) for e in causes(error)):
                raise
            return {"rows": [], "unsupported": f"sm_{job.target} has no fp8"}
    rows: list[dict[str, Any]] = []
    for launch in launches:
        row = figures(launch, job.target, spec.streams.get(launch.name))
        twins = sum(r["kernel"].split("#")[0] == row["kernel"] for r in rows)
        row["kernel"] += f"#{twins + 1}" if twins else ""
        config = asdict(job.config) if is_dataclass(job.config) else None
        rows.append({"op": job.op, "case": job.case.id, **row, "config": config, "tag": "static"})
    if not rows:
        raise AssertionError(f"{job.key} launched nothing")
    return {"rows": rows, "unsupported": None}


def work(job: Job, source: str) -> dict[str, Any]:
    """`compile_job`, or what it found before from the same sources."""
    torch.set_num_threads(1)
    file = CACHE / "figures" / f"{hashlib.sha256((source + job.key).encode()).hexdigest()[:32]}.json"
    if file.exists():
        return json.loads(file.read_text())
    result = compile_job(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(result))
    partial.replace(file)
    return result


def run(jobs: list[Job], workers: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """All rows, and the (op, case, target, reason) of what a target cannot have.  Workers: one a core."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
    rows: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    source = sources()
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(work, job, source) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            try:
                result = future.result()
            except Exception as error:
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(f"sm_{job.target} {job.op} {job.case.id} {job.config}") from error
            rows += [{**row, "served": job.served} for row in result["rows"]]
            if result["unsupported"]:
                reason = {"case": job.case.id, "target": job.target, "reason": result["unsupported"]}
                missing.append({"op": job.op, **reason, "tag": "static"})
    return {"rows": rows, "unsupported": missing}


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}".rstrip("0").rstrip(".") or "0"


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'sm':>3} {'op':<14}{'case':<46}{'kernel':<27}{'warps':>5}{'regs':>5}{'spill':>6}{'shared':>7}{'CTAs':>5}"
    lines = [f"{head}{'loop':>6}{'byte':>5}{'sync':>5}{'tiles':>6}{'is/mem':>7}{'is/mma':>7}  products"]
    for r in sorted(rows, key=lambda r: (r["op"], r["case"], r["target"])):
        loop = r.get("loop") or {}
        lines.append(
            f"{r['target']:>3} {r['op']:<14}{r['case'][:45]:<46}{r['kernel'][:26]:<27}{r['warps']:>5}{r['regs']:>5}"
            f"{r['spill']:>6}{r['shared']:>7}{r['ctas']:>5}{number(loop.get('instructions')):>6}"
            f"{number(loop.get('byte_loads')):>5}{number(loop.get('waiting_loads')):>5}{number(loop.get('tiles')):>6}"
            f"{number(loop.get('issue_mem'), 3):>7}{number(loop.get('issue_mma')):>7}  {', '.join(r['mma'])}"
        )
    # configs that differ in their splits alone print the same line
    return "\n".join(dict.fromkeys(lines))


def report(result: dict[str, list[dict[str, Any]]], wrong: list[str]) -> None:
    print(table(result["rows"]))
    for m in result["unsupported"]:
        print(f"not on sm_{m['target']}: {m['op']} {m['case']}: {m['reason']}")
    print(
        "loop: instructions of the hot loop; byte: loads of single bytes; sync: loads that wait; counted, not timed;"
    )
    print("sm_100: no loop is read.")
    for line in wrong:
        print(f"FAILS: {line}")
    print(json.dumps({"bench": "aot", "triton": triton.__version__, **result, "failures": wrong}))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [s.name for s in SPECS]
    parser.add_argument("--op", nargs="+", default=names, choices=names)
    parser.add_argument("--target", type=int, nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument("--full", action="store_true", help="every case on every target")
    parser.add_argument("--record", action="store_true", help="run in full and write bench/results/aot.json")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    result = run(plan(full=args.full or args.record, ops=args.op, targets=args.target, wanted=args.case))
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() and not args.record else None
    whole = len(args.op) == len(SPECS) and len(args.target) == len(TARGETS) and not args.case
    wrong = failures(result["rows"], known, whole=whole, full=args.full or args.record)
    report(result, wrong)
    if args.record:
        text = json.dumps({"bench": "aot", "triton": triton.__version__, **result}, separators=(",", ":"))
        RESULTS.write_text(text.replace('{"op"', '\n{"op"') + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
