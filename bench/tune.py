"""Finds the fastest launch shape of every op at the sizes of serving, and writes kernels/tables/<GPU>.json.

    python -m bench.tune                                   # all that the table lacks; safe to stop and to start again
    python -m bench.tune --op gemm_w4a8 --shape llama-3-8b --budget-s 500
    python -m bench.tune --dry-run --op silu_mul           # all but the timing, for an sm_90 that is not here

Candidates are those of the op's spec.  Before any is timed, each is compiled and counted: what spills, does not fit or
issues over 1.2 times the best's instructions for a byte is dropped.  The rest is checked against the reference, then
timed with L2 flushed, in rounds; a candidate must beat the op's own rule by 2 % to take its place.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from bench.aot import CACHE, Job, sources, work
from bench.kernels import arguments, machine, verify
from bench.shapes import MODELS
from bench.timing import Stopwatch
from kernels import table
from kernels.catalog import SPECS
from kernels.launch import ASSUMED, GpuFacts, gpu_facts
from kernels.spec import Case, KernelSpec

ISSUE_LIMIT = 1.2
WORTH = 0.98
ROUNDS = 3
REFUSALS = (CompilationError, OutOfResources)


class Question(NamedTuple):
    """What an op asks its table for these cases: one answer serves all."""

    spec: KernelSpec
    op: str
    dims: dict[str, Any]
    cases: list[Case]

    @property
    def name(self) -> str:
        return f"{self.op} {json.dumps(self.dims)}"


@dataclass
class Probe:
    """Counts of one candidate; `why` it is dropped, if it is."""

    config: Any
    issue_mem: float | None = None
    why: str | None = None


def asked(spec: KernelSpec, case: Case, gpu: GpuFacts) -> tuple[str, dict[str, Any]]:
    """The op's look-up for this case, with no table there.  One, or this tuner could not answer it."""
    found: list[tuple[str, dict[str, Any]]] = []

    def nothing(
        cls: type, op: str, gpu: GpuFacts, dims: tuple[tuple[str, Any, type], ...], folder: Path
    ) -> None:
        found.append((op, {name: value for name, value, _ in dims}))

    with mock.patch.object(table, "_nearest", nothing):
        spec.config(case, gpu)
    assert len(found) == 1, f"{spec.name} {case.id} looks up {found}"
    return found[0]


def questions(ops: list[str], shapes: list[str], gpu: GpuFacts) -> list[Question]:
    found: dict[str, Question] = {}
    for spec in SPECS:
        if spec.name not in ops or spec.config is None:
            continue
        for case in (c for shape in shapes for c in spec.serving(MODELS[shape].shape)):
            if not list(spec.candidates(case, gpu)):
                continue
            question = Question(spec, *asked(spec, case, gpu), [])
            cases = found.setdefault(question.name, question).cases
            if case not in cases:
                cases.append(case)
    return list(found.values())


def candidates(q: Question, gpu: GpuFacts) -> list[Any]:
    """The op's own choice first, then what its spec offers, each once."""
    with mock.patch.object(table, "_nearest", return_value=None):
        own = q.spec.config(q.cases[0], gpu)
    return list(dict.fromkeys([own, *q.spec.candidates(q.cases[0], gpu)]))


def probe(job: Job, source: str) -> dict[str, Any]:
    """What `bench.aot` counts, or how the compiler refused."""
    try:
        return work(job, source)
    except REFUSALS as error:
        return {"refused": type(error).__name__}
    except RuntimeError as error:
        if "PassManager" not in str(error):
            raise
        return {"refused": "PassManager::run failed"}


def judged(config: Any, result: dict[str, Any]) -> Probe:
    if why := result.get("refused") or result.get("unsupported"):
        return Probe(config, why=why)
    rows = result["rows"]
    ratios = [loop["issue_mem"] for r in rows if (loop := r.get("loop")) and "issue_mem" in loop]
    if spilled := max(r["spill"] for r in rows):
        return Probe(config, why=f"spills {spilled} bytes")
    if not all(r["ctas"] for r in rows):
        return Probe(config, why="does not fit an SM")
    return Probe(config, max(ratios, default=None))


def pruned(probes: list[Probe]) -> list[Probe]:
    """In the same order, those that issue too much marked as well."""
    ratios = [p.issue_mem for p in probes if p.why is None and p.issue_mem is not None]
    for p in probes:
        if p.why is None and p.issue_mem is not None and p.issue_mem > ISSUE_LIMIT * min(ratios):
            p.why = f"issue/mem {p.issue_mem}, {min(ratios)} is possible"
    return probes


def probed(q: Question, gpu: GpuFacts, pool: Executor, source: str) -> list[Probe]:
    case, configs = q.spec.small(q.cases[0]), candidates(q, gpu)
    # machine code of sm_100 has no loops that are read, and other chips take the nearest
    target = max((t for t in ASSUMED if t <= gpu.capability), default=80)
    served = tuple(c.id for c in q.cases)
    futures = [pool.submit(probe, Job(q.spec.name, target, case, c, served), source) for c in configs]
    return pruned([judged(c, f.result()) for c, f in zip(configs, futures, strict=True)])


def timed(q: Question, configs: list[Any], device: torch.device) -> list[float]:
    """Geometric mean over the cases of the median of some rounds, in microseconds; infinite where one cannot run.

    Candidates take turns within a round, so that a drift of the clocks meets all of them.
    """
    watch = Stopwatch(device, budget_s=0.05)
    logs: list[list[float]] = [[] for _ in configs]
    for case in q.cases:
        args = arguments(q.spec, case, device)
        calls = [q.spec.launch("triton", args, config=c) for c in configs]
        rounds: list[list[float]] = [[] for _ in configs]
        for c, times in zip(configs, rounds, strict=True):
            try:
                verify(q.spec, case, args, q.spec.bind("triton", args, config=c)())
            except OutOfResources:
                times.append(math.inf)
        for _ in range(ROUNDS):
            for call, times in zip(calls, rounds, strict=True):
                if math.inf not in times:
                    times.append(watch.time(call, graph=True).us)
        for times, log in zip(rounds, logs, strict=True):
            log.append(math.log(statistics.median(times)))
    return [math.exp(statistics.fmean(log)) for log in logs]


def best_of(times: list[float]) -> int:
    """The first is the op's own rule, and stays unless another is clearly faster."""
    best = min(range(len(times)), key=lambda i: (times[i], i))
    return best if times[best] < WORTH * times[0] else 0


class Table:
    """The file being written.  Known entries stay, an entry of the same shape and number of SMs is replaced."""

    def __init__(self, path: Path, gpu: GpuFacts) -> None:
        self.path, self.gpu = path, gpu
        self.entries: dict[str, dict[str, Any]] = {}
        if path.exists():
            capability, known = table.read_table(path)
            if capability != gpu.capability:
                raise ValueError(f"{path} is of sm_{capability}, this is an sm_{gpu.capability}")
            for e in known:
                values = {k: v for k, v in e._asdict().items() if k != "where"}
                self.entries[self.key(e.op, e.sm_count, e.dims)] = values

    @staticmethod
    def key(op: str, sm_count: int, dims: dict[str, Any]) -> str:
        return json.dumps([op, sm_count, dims], sort_keys=True)

    def has(self, q: Question) -> bool:
        return self.key(q.op, self.gpu.num_sms, q.dims) in self.entries

    def put(self, q: Question, config: Any, measured: dict[str, Any]) -> None:
        entry = {"op": q.op, "sm_count": self.gpu.num_sms, "dims": q.dims, "config": asdict(config)}
        self.entries[self.key(q.op, self.gpu.num_sms, q.dims)] = {**entry, "measured": measured}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(self.entries[k], sort_keys=True) for k in sorted(self.entries))
        partial = self.path.with_suffix(".partial")
        partial.write_text(f'{{"capability": {self.gpu.capability}, "entries": [\n{lines}\n]}}\n')
        partial.replace(self.path)


def tune(q: Question, probes: list[Probe], device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The winner, and where its numbers come from."""
    own, *rest = (p.config for p in probes)
    alive = [own, *(p.config for p in probes[1:] if p.why is None)]
    times = timed(q, alive, device)
    best = best_of(times)
    origin = machine(device)
    measured = {
        "us": round(times[best], 3),
        "own_rule_us": round(times[0], 3),
        "by": f"bench.tune {origin['commit']}",
        **{k: origin[k] for k in ("date", "torch", "triton", "driver")},
        "candidates": f"{len(alive)} timed of {1 + len(rest)}",
        "cases": len(q.cases),
    }
    return alive[best], measured


def shown(q: Question, probes: list[Probe]) -> Iterator[str]:
    alive = [p for p in probes if p.why is None]
    yield f"{q.name}: {len(q.cases)} cases, {len(alive)} of {len(probes)} candidates"
    for p in probes:
        yield f"    {p.config}: {p.why or ('' if p.issue_mem is None else f'issue/mem {p.issue_mem}')}"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [s.name for s in SPECS if s.config is not None]
    parser.add_argument("--op", nargs="+", default=names, choices=names)
    parser.add_argument("--shape", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--budget-s", type=float, default=math.inf, help="begin nothing new after this many seconds"
    )
    parser.add_argument("--out", type=Path, help="default: kernels/tables/<GPU>.json")
    parser.add_argument("--again", action="store_true", help="also what the table has")
    parser.add_argument("--dry-run", action="store_true", help="time nothing, write nothing")
    return parser.parse_args()


def main() -> int:
    args = parsed()
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit(
            "bench.tune times kernels on a GPU, and torch sees none: --dry-run does all the rest"
        )
    device = torch.device("cpu" if args.dry_run else "cuda:0")
    gpu = gpu_facts(device)
    out = Table(args.out or table.TABLES / f"{table.family(gpu.name)}.json", gpu)
    wanted = questions(args.op, args.shape, gpu)
    todo = wanted if args.again else [q for q in wanted if not out.has(q)]
    start, done, source = time.monotonic(), 0, sources()
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for q in todo:
            if time.monotonic() - start > args.budget_s:
                break
            probes = probed(q, gpu, pool, source)
            print("\n".join(shown(q, probes)), flush=True)
            if not args.dry_run:
                config, measured = tune(q, probes, device)
                out.put(q, config, measured)
                print(
                    f"    takes {config}: {measured['us']} us, own rule {measured['own_rule_us']} us",
                    flush=True,
                )
            done += 1
    tag = "static" if args.dry_run else "measured"
    left = len(todo) - done
    print(
        json.dumps(
            {"bench": "tune", "tag": tag, "gpu": gpu.name, "done": done, "left": left, "out": str(out.path)}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
