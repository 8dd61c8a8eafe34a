"""Speed of single ops against the device's own ceilings, torch and FlashInfer.

    python -m bench.kernels                              # the specs' bench cases
    python -m bench.kernels --op attention --case int8   # those whose name holds int8; --served: at sizes of serving
    python -m bench.kernels --op gemm_w8a8 --json FILE   # rows as JSON lines
    python -m bench.kernels --dry-run                    # no timing: compiles what would run, builds all that is compared

Nothing is reported of an op whose result for the case is wrong: rows of it are held against the reference in float64
first.  Without a GPU the CPU runs are timed.
"""

import argparse
import json
import os
import platform
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.baselines import BASELINES, big_attention, sequence_lengths
from bench.shapes import MODELS
from bench.target import recorded
from bench.timing import Ceilings, Stopwatch, ceilings, clocks, said_by
from kernels.catalog import SPECS
from kernels.launch import ASSUMED
from kernels.spec import Case, KernelSpec
from tests.close import assert_no_worse, assert_within, in_float64, is_float, ordered

CHECKED_ROWS = 6
# their arguments hold a pool, which is built on the host where it is small; others are drawn where they are used
PAGED = ("attention", "attn_prefill", "rope_kv_write", "kv_dequant", "kv_to_fp8", "copy_blocks")
# their references go through the pool byte by byte
READ_BACK = ("rope_kv_write", "kv_dequant", "kv_to_fp8", "copy_blocks")
# contexts beyond this are written to the pool on the device
HOST_TOKENS = 4096
NEAR_CODES = 0.01  # share of codes that may differ by one: values on the border of two


def machine(device: torch.device) -> dict[str, Any]:
    """What every row says of where and when it was taken."""
    commit = said_by(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"])
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device)
        if gpu
        else f"cpu {platform.processor() or platform.machine()}",
        "driver": clocks(device).get("driver_version"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or None,
    }


def on(device: torch.device, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to(device) if hasattr(a, "to") else a for a in args)


def arguments(spec: KernelSpec, case: Case, device: torch.device) -> tuple[Any, ...]:
    """Canonical arguments on the device; places of rows stay on the host, where steps are built."""
    if spec.name in ("attention", "attn_prefill"):
        if sum(sequence_lengths(case)) > HOST_TOKENS:
            return big_attention(spec, case, device)
        q_THK, place_T2, paged, *rest = spec.make(case, torch.Generator().manual_seed(0))
        return q_THK.to(device), place_T2, paged.to(device), *rest
    if spec.name in PAGED or device.type == "cpu":
        return on(device, spec.make(case, torch.Generator().manual_seed(0)))
    # a host would draw the head of an 8B model for seconds
    with device:
        return spec.make(case, torch.Generator(device).manual_seed(0))


def some_rows(spec: KernelSpec, args: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
    """(rows, the arguments of those rows alone): a row's result depends on that row alone."""
    T = len(args[spec.row_args[0]])
    rows = torch.linspace(0, T - 1, min(T, CHECKED_ROWS), device="cpu").round().long().unique()
    picked = [a[rows.to(a.device)] if i in spec.row_args and a is not None else a for i, a in enumerate(args)]
    return rows, on(torch.device("cpu"), tuple(picked)) if spec.name in READ_BACK else tuple(picked)


def parts(result: Any) -> list[Tensor]:
    return [r for r in (result if isinstance(result, tuple) else (result,)) if r is not None]


def verify(spec: KernelSpec, case: Case, args: tuple[Any, ...], result: Any) -> None:
    """`compare`, where the arguments are: what a reference makes for itself lies beside them."""
    device = parts(result)[0].device
    with nullcontext() if spec.name in PAGED or device.type == "cpu" else device:
        compare(spec, case, args, result)


def compare(spec: KernelSpec, case: Case, args: tuple[Any, ...], result: Any) -> None:
    """Raises where rows of the result are not as close to the truth as torch itself comes, or the op's own bound says.

    Tensor cores of Hopper keep about 14 bits while they add fp8 products, so those may be 2e-3 off on a GPU; queries
    rounded to int8 move the scores by up to half a quantum each, 5e-3 of the result.
    """
    fp8 = any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in args)
    floor = 2e-3 if fp8 and parts(result)[0].is_cuda else 1e-6
    floor = 5e-3 if case.dims.get("int8_qk") else floor
    rows, picked = some_rows(spec, args)
    bound = spec.bound(case, picked)
    if bound is not None:
        assert_within(result[rows.to(result.device)], bound)
        return
    owns, truths = parts(spec.ref(*picked)), parts(spec.ref(*in_float64(picked)))
    for out, own, truth in zip(parts(result), owns, truths, strict=True):
        got = out[rows.to(out.device)].to(own.device)
        if not is_float(own.dtype):
            off = (ordered(got) - ordered(own)).abs()
            worst, share = int(off.max()), float((off > 0).float().mean())
            assert worst <= 1, f"codes differ by {worst}"
            assert share <= NEAR_CODES, f"{share:.2%} of the codes differ"
        else:
            assert_no_worse(got, own, truth, floor=floor)


def peak_of(spec: KernelSpec, case: Case, top: Ceilings) -> float:
    if case.dims.get("fp8") and top.fp8:
        return top.fp8
    return top.int8 if spec.name.startswith("gemm_w") else top.bf16


def measure(spec: KernelSpec, case: Case, watch: Stopwatch, top: Ceilings) -> dict[str, Any]:
    """One row; raises where the result is wrong."""
    device = watch.device
    args = arguments(spec, case, device)
    run = "triton" if device.type == "cuda" and "triton" in spec.runs else "cpu"
    verify(spec, case, args, spec.bind(run, args)())
    own, cost = watch.time(spec.launch(run, args)), spec.cost(case)
    seconds = own.us / 1e6
    others, failed = compared(spec, case, args, watch)
    return {
        "bench": "kernels",
        "op": spec.name,
        "case": case.id,
        "run": run,
        **own._asdict(),
        "gbs": round(cost.bytes / seconds / 1e9, 2),
        "tflops": round(cost.flops / seconds / 1e12, 3),
        "of_copy": round(cost.bytes / seconds / top.copy, 4),
        "of_matmul": round(cost.flops / seconds / peak_of(spec, case, top), 4),
        "baseline_us": others,
        "x": {name: round(us / own.us, 3) for name, us in others.items()},
        **({"baseline_errors": failed} if failed else {}),
        "tag": "measured",
    }


def compared(
    spec: KernelSpec, case: Case, args: tuple[Any, ...], watch: Stopwatch
) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of the baselines, and why there are none of the others: what a library refuses is no fault of ours."""
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, make in BASELINES.get(spec.name, {}).items():
        try:
            call = make(case, args)
            if call is not None:
                found[name] = watch.time(call).us
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    return found, failed


def rehearse(spec: KernelSpec, case: Case, target: int = 90) -> dict[str, Any]:
    """Everything `measure` does short of the GPU, at a small size: the CPU run is checked, the Triton one compiled."""
    cpu, small = torch.device("cpu"), spec.small(case)
    args = arguments(spec, small, cpu)
    if "cpu" in spec.runs:
        verify(spec, small, args, spec.bind("cpu", args)())
    kernels: list[str] = []
    if "triton" in spec.runs:
        with recorded(target) as launches:
            options = {"config": spec.config(case, ASSUMED[target])} if spec.config else {}
            spec.launch("triton", args, **options)()
            spec.bind("triton", args, **options)()
        kernels = [launch.name for launch in launches]
    calls = {n: c for n, make in BASELINES.get(spec.name, {}).items() if (c := make(small, args))}
    for call in calls.values():
        call()
    row = {"bench": "kernels", "op": spec.name, "case": case.id, "small": small.id, "kernels": kernels}
    return {**row, "baselines": list(calls), "bytes": spec.cost(case).bytes, "tag": "static"}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'op':<14}{'case':<48}{'us':>10}{'low..high':>19}{'by':>7}{'GB/s':>9}{'of copy':>9}{'TFLOP/s':>9}{'of mm':>7}  faster than"
    ]
    for r in rows:
        against = ", ".join(f"{name} {x:.2f}x" for name, x in r["x"].items())
        lines.append(
            f"{r['op']:<14}{r['case'][:47]:<48}{r['us']:>10.1f}{r['low_us']:>9.1f}..{r['high_us']:<8.1f}{r['launch']:>7}"
            f"{r['gbs']:>9.1f}{r['of_copy']:>9.1%}{r['tflops']:>9.2f}{r['of_matmul']:>7.1%}  {against}"
        )
    return "\n".join(lines)


def chosen(ops: list[str], wanted: str, *, served: bool) -> list[tuple[KernelSpec, Case]]:
    pairs = []
    for spec in SPECS:
        cases = [c for m in MODELS.values() for c in spec.serving(m.shape)] if served else spec.benches
        unique = {c.id: c for c in cases if wanted in c.id}
        pairs += [(spec, c) for c in unique.values() if spec.name in ops]
    return pairs


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [s.name for s in SPECS]
    parser.add_argument("--op", nargs="+", default=names, choices=names)
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    parser.add_argument(
        "--served", action="store_true", help="the cases of serving in place of the bench's own"
    )
    parser.add_argument("--json", type=Path, help="append rows to this file")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    os.environ.pop("TRITON_INTERPRET", None)
    pairs = chosen(args.op, args.case, served=args.served)
    if not pairs:
        raise SystemExit(f"no case of {', '.join(args.op)} holds {args.case!r}")
    if args.dry_run:
        for spec, case in pairs:
            print(json.dumps(rehearse(spec, case)))
        return
    device = torch.device(args.device)
    watch = Stopwatch(device)
    top, where, before = ceilings(watch), machine(device), clocks(device)
    rows, red = [], []
    for spec, case in pairs:
        try:
            rows.append({**measure(spec, case, watch, top), **where})
        except AssertionError as error:
            red.append(f"{spec.name} {case.id}: {error}")
    print(
        f"{where['device']}: copy {top.copy / 1e9:.0f} GB/s, bf16 {top.bf16 / 1e12:.1f} TFLOP/s, clocks {before} .. {clocks(device)}"
    )
    print(table(rows))
    for line in red:
        print(f"WRONG, not reported: {line}")
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in rows)
    print(json.dumps({"bench": "kernels", "ceilings": top._asdict(), "rows": rows, "wrong": red}))
    sys.exit(bool(red))


if __name__ == "__main__":
    main()
