"""`python -m quant MODEL --scheme SCHEME --method METHOD --calib TEXT --out DIR`: quantizes a Llama, ready to serve.

A mistake of the user's is one line on stderr and exit status 2.  What a killed run had finished lies beside DIR, in
DIR.work, and the same command goes on from there.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kernels.kv_layout import KV_FORMATS
from quant.ptq import calibration
from quant.ptq.folding import Target
from quant.ptq.grid import Rounding
from quant.ptq.model import Shape, Source
from quant.ptq.recipe import BEST_STEPS, RECIPES, STEPS, Recipe, recipe
from quant.ptq.report import figures, table
from quant.ptq.run import Job, Outcome, Run
from quant.ptq.state import Work, folder_key, key_of
from quant.ptq.write import FORMATS, SCALE_TYPES, Writer, assemble, check_out
from quant.scheme import GROUP_SIZES, ONLINE, Scheme

SCHEMES = tuple(name for name in ONLINE if "-" in name)
WEIGHTS = ("symmetric", "zeros", "progressive")
REPORT_FILE = "quantization_report.json"
VERSION = 1  # of the arithmetic: a resumed run must not mix two


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    steps = "\n".join(f"  {name}: {kind.help}" for name, kind in STEPS.items())
    methods = "\n".join(f"  {name}: {text}" for name, text in {"best": BEST_STEPS, **RECIPES}.items())
    parser = argparse.ArgumentParser(
        prog="python -m quant",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"methods:\n{methods}\nsteps, joined by ';', options in brackets:\n{steps}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "model",
        type=Path,
        metavar="MODEL",
        help="folder of a plain Llama: config.json, safetensors, tokenizer.json",
    )
    add("--scheme", required=True, metavar="SCHEME", help=", ".join(SCHEMES))
    add("--out", required=True, type=Path, metavar="DIR", help="where to write; must not exist yet")
    add("--method", metavar="NAME", help=f"best (default) or one of {', '.join(RECIPES)}")
    add("--steps", metavar="TEXT", help="a recipe of one's own: 'rotate; clip; gptq(actorder=true)'")
    add("--calib", type=Path, metavar="TEXT", help="calibration text, UTF-8")
    add("--calib-tokens", type=Path, metavar="NPY", help="or token ids, an array [windows, length]")
    add("--samples", type=int, default=128, help="windows to calibrate on (default %(default)s)")
    add("--length", type=int, default=512, help="tokens of a window (default %(default)s)")
    add(
        "--judged",
        type=int,
        default=16,
        help="windows held back for the report; 0 for none (default %(default)s)",
    )
    add(
        "--group-size",
        default="128",
        help=f"{', '.join(map(str, GROUP_SIZES))} or channel (default %(default)s)",
    )
    add(
        "--weights", metavar="KIND", help=f"{', '.join(WEIGHTS)}: of int4 (default: what the method asks for)"
    )
    add("--kv", metavar="FORMAT", help="KV format to calibrate for: fp8, int8, int4, int4z (default: none)")
    add("--fp8-queries", action="store_true", help="queries in fp8 too, as FireQ's prefill has them")
    add("--format", metavar="NAME", help=f"{', '.join(FORMATS)} (default: the method's own)")
    add("--container", default="packed", help="of compressed-tensors: packed or int8 (default %(default)s)")
    add("--steps-report", action="store_true", help="KL and perplexity after each step too: a run for each")
    add("--batch", type=int, default=4, help="windows that run at once (default %(default)s)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """The whole command; ValueError with what the user has to change."""
    started = time.perf_counter()
    check_out(args.out)
    source = Source(args.model)
    asked = chosen_recipe(args)
    kind = chosen_format(args)
    target = chosen_target(args, source, kind)
    windows = read_windows(args, source.shape, asked)
    job = Job(
        args.model,
        asked,
        target,
        None if windows is None else windows.calib_ST,
        None if windows is None else windows.judged_ST,
        args.batch,
    )
    writer = Writer(kind, args.container, target.stored, source.shape)
    work = open_work(args, job, writer)
    held = peak_bytes()
    outcome = Run(job, writer, work, show=shown(args))()
    say(f"{asked}: {len(outcome.layers)} layers")
    before = steps_before(job, args) if args.steps_report else []
    report = figures(job, outcome, before)
    report |= {"peak_extra_bytes": peak_bytes() - held, "model_bytes": source.nbytes}
    config = writer.config(
        json.loads((args.model / "config.json").read_text()), outcome.schemes, outcome.outer
    )
    written = finish(args, work, outcome, config, report)
    say(table(report))
    say(
        f"wrote {len(written)} files, {sum(p.stat().st_size for p in written) / 1e6:.1f} MB, to {args.out} ({kind})"
    )
    kv = f" --kv-dtype {args.kv}" if args.kv else ""
    say(f"serve it: python -m minserve.serve --model {args.out}{kv}")
    say(f"{time.perf_counter() - started:.1f} s, {report['peak_extra_bytes'] / 1e6:.0f} MB beyond the start")
    return 0


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    if args.scheme not in SCHEMES:
        raise ValueError(f"--scheme must be one of {', '.join(SCHEMES)}, got {args.scheme!r}")
    if args.method is not None and args.steps is not None:
        raise ValueError("give --method or --steps, not both")
    method = "best" if args.method is None and args.steps is None else args.method
    channel = args.scheme.startswith("w4") and args.group_size == "channel"
    return recipe(method, args.steps, args.scheme + "-channel" * channel, args.kv)


def chosen_format(args: argparse.Namespace) -> str:
    own = {"fireq": "fireq", "qoq": "qserve"}.get(args.method or "", "compressed-tensors")
    kind = args.format or own
    if kind not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {kind!r}")
    return kind


def chosen_target(args: argparse.Namespace, source: Source, kind: str) -> Target:
    scheme = ONLINE[args.scheme]
    if scheme.bits == 4:
        scheme = int4_scheme(args, scheme, kind)
    elif args.weights not in (None, "symmetric") or args.group_size not in ("128", "channel"):
        raise ValueError(f"--weights and --group-size are for int4 weights, got {args.scheme}")
    if args.kv is not None and args.kv not in KV_FORMATS:
        raise ValueError(f"--kv must be one of {', '.join(KV_FORMATS)}, got {args.kv!r}")
    scale_dtype = SCALE_TYPES[kind] or source.dtype
    rounding = Rounding(scheme, scale_dtype, fireq=kind == "fireq")
    # QServe's kernels know float16 alone
    stored = torch.float16 if kind == "qserve" else source.dtype
    return Target(rounding, args.kv, stored, "fp8" if args.fp8_queries else None)


def int4_scheme(args: argparse.Namespace, scheme: Scheme, kind: str) -> Scheme:
    sizes = (*map(str, GROUP_SIZES), "channel")
    if args.group_size not in sizes:
        raise ValueError(f"--group-size must be one of {', '.join(sizes)}, got {args.group_size!r}")
    group = None if args.group_size == "channel" else int(args.group_size)
    fallback = "symmetric"
    if kind == "qserve":
        fallback = "zeros" if group is None else "progressive"
    weights = args.weights or fallback
    if weights not in WEIGHTS:
        raise ValueError(f"--weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    rows = scheme.activations
    if weights != "symmetric" and rows is not None and rows.dtype == "fp8":
        raise ValueError(f"--weights must be symmetric for fp8 activations, got {weights!r}")
    return replace(
        scheme, group_size=group, symmetric=weights != "zeros", progressive=weights == "progressive"
    )


def read_windows(args: argparse.Namespace, shape: Shape, asked: Recipe) -> calibration.Windows | None:
    if args.calib is not None and args.calib_tokens is not None:
        raise ValueError("give --calib or --calib-tokens, not both")
    for name, least in (("samples", 1), ("length", 2), ("judged", 0), ("batch", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.calib is not None:
        found = calibration.from_text(args.calib, args.model, args.length)
    elif args.calib_tokens is not None:
        found = calibration.from_array(args.calib_tokens, args.length, shape.vocab)
    elif asked.wants_data:
        raise ValueError(f"{asked} needs calibration text: give --calib text.txt or --calib-tokens ids.npy")
    else:
        return None
    if int(found.max()) >= shape.vocab:
        raise ValueError(f"the tokenizer gives ids up to {int(found.max())}, the model knows {shape.vocab}")
    return calibration.split(found, args.samples, args.judged)


def open_work(args: argparse.Namespace, job: Job, writer: Writer) -> Work:
    key = key_of(
        version=VERSION,
        recipe=str(job.recipe),
        target=str(job.target),
        model=folder_key(args.model),
        writer=[writer.format, writer.container],
        calib="" if job.calib_ST is None else job.calib_ST,
        judged="" if job.judged_ST is None else job.judged_ST,
        batch=args.batch,
    )
    work = Work(args.out.with_name(args.out.name + ".work"), key)
    if work.next_layer:
        say(f"going on after layer {work.next_layer - 1}, found in {work.folder}")
    return work


def steps_before(job: Job, args: argparse.Namespace) -> list[tuple[str, Outcome]]:
    """Plain rounding, and the recipe cut off after each step but the last."""
    if job.judged_ST is None:
        raise ValueError("--steps-report needs held-back windows: more text, or a smaller --length")
    cuts = [r for r in job.recipe.prefixes() if r != job.recipe]
    return [(str(r), Run(replace(job, recipe=r), show=shown(args))()) for r in cuts]


def finish(
    args: argparse.Namespace, work: Work, outcome: Outcome, config: dict[str, Any], report: dict[str, Any]
) -> list[Path]:
    files = [work.layer_path(i) for i in range(len(outcome.layers))]
    files.append(work.write_outer(outcome.outer))
    written = assemble(args.out, args.model, files, config)
    path = args.out / REPORT_FILE
    path.write_text(json.dumps(report, indent=1) + "\n")
    work.remove()
    return [*written, path]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def shown(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()
