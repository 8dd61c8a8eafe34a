"""`python -m quant MODEL --scheme SCHEME --method METHOD --calib TEXT --out DIR`: quantizes a Llama, ready to serve.

A mistake of the user's is one line on stderr and exit status 2.  What a killed run had finished lies beside DIR, in
DIR.work, and the same command goes on from there.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kernels.kv_layout import KV_FORMATS
from quant.ptq import calibration
from quant.ptq.checks import (
    check_format,
    check_out,
    check_recipe,
    chosen_container,
    unexpected,
)
from quant.ptq.folding import Target
from quant.ptq.grid import Rounding
from quant.ptq.model import Shape, Source
from quant.ptq.recipe import BEST_STEPS, RECIPES, Recipe, recipe
from quant.ptq.report import figures, table
from quant.ptq.run import Job, Outcome, Run
from quant.ptq.spent import Spent
from quant.ptq.state import Work, folder_key, key_of, locked
from quant.ptq.steps import described
from quant.ptq.write import FORMATS, SCALE_TYPES, Writer, fill, publish, write_json
from quant.scheme import GROUP_SIZES, ONLINE, Scheme

SCHEMES = tuple(name for name in ONLINE if "-" in name)
WEIGHTS = ("symmetric", "zeros", "progressive")
# what the papers run besides the weights: without it a method of that name is half of theirs
PUBLISHED = {"fireq": ("int4", "--kv int4 --fp8-queries"), "qoq": ("int4z", "--kv int4z")}
MOST = {"samples": 1 << 20, "length": 1 << 20, "judged": 1 << 20, "batch": 1 << 12}
REPORT_FILE = "quantization_report.json"
VERSION = 2  # of the arithmetic and of what is kept: a resumed run must not mix two


def read_arguments(argv: Sequence[str]) -> argparse.Namespace:
    methods = "\n".join(f"  {name}: {text}" for name, text in {"best": BEST_STEPS, **RECIPES}.items())
    parser = argparse.ArgumentParser(
        prog="python -m quant",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"methods:\n{methods}\nsteps, joined by ';', with options as name(option=value, ...):\n{described()}",
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
    add(
        "--container",
        metavar="KIND",
        help="of compressed-tensors: packed or int8 (default: packed for symmetric int4, int8 for what is left)",
    )
    add("--steps-report", action="store_true", help="KL and perplexity after each step too: a run for each")
    add("--batch", type=int, default=4, help="windows that run at once (default %(default)s)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """The whole command; ValueError with what the user has to change, before any work where that can be known."""
    spent = Spent(memory=True)
    # a link to an empty folder is that folder, and the name of "." is its own
    args.out = Path(os.path.abspath(args.out))
    check_out(args.out)
    args.out = args.out.resolve()
    source = Source(args.model)
    job, writer = planned(args, source)
    with locked(args.out.with_name(args.out.name + ".work")) as folder:
        work = open_work(folder, args, job, writer)
        try:
            quantize(args, job, writer, work, spent)
        except KeyboardInterrupt:
            kept = f"{work.next_layer} of {source.shape.layers} layers are kept in {folder}: the same command goes on"
            warn(
                "interrupted; " + (kept if work.next_layer else "no layer was finished, and nothing is left")
            )
            return 130
        finally:
            work.leave()
    return 0


def planned(args: argparse.Namespace, source: Source) -> tuple[Job, Writer]:
    """What is to be done, all of it checked."""
    asked = chosen_recipe(args)
    kind = chosen_format(args)
    target = chosen_target(args, source, kind)
    check_recipe(asked, kind, target, source.shape)
    container = chosen_container(args.container, kind, target.rounding.scheme)
    windows = read_windows(args, source.shape, asked)
    calib_ST, judged_ST = (None, None) if windows is None else windows
    if args.steps_report and judged_ST is None:
        raise ValueError(
            "--steps-report needs held-back windows: --judged above 0, and more text or a smaller --length"
        )
    for line in unexpected(target.rounding.scheme, kind, container, source.shape):
        warn(line)
    kv, options = PUBLISHED.get(args.method or "", (args.kv, ""))
    if kv != args.kv:
        warn(f"{args.method} as published is {options}: keys and values were given {args.kv or 'no format'}")
    if windows is not None:
        say(windows.described())
        for line in windows.lacking(args.samples, args.judged):
            warn(line)
    job = Job(args.model, asked, target, calib_ST, judged_ST, args.batch)
    return job, Writer(kind, container, target.stored, source.shape)


def quantize(args: argparse.Namespace, job: Job, writer: Writer, work: Work, spent: Spent) -> None:
    outcome = Run(job, writer, work, shown(args), spent)()
    say(f"{job.recipe}: {len(outcome.layers)} layers")
    before = steps_before(job, args) if args.steps_report else []
    config = writer.config(
        json.loads((args.model / "config.json").read_text()), outcome.schemes, outcome.outer
    )
    files = [work.layer_path(i) for i in range(len(outcome.layers))]
    files.append(work.write_outer(outcome.outer))
    result = work.new_result()
    fill(result, args.model, files, config)
    report = figures(job, outcome, before) | {"model_bytes": Source(args.model).nbytes}
    write_json(result / REPORT_FILE, report, indent=1)
    written = publish(result, args.out)
    work.remove()
    say(table(report))
    size = sum(p.stat().st_size for p in written)
    say(f"wrote {len(written)} files, {size / 1e6:.1f} MB, to {args.out} ({writer.format})")
    say(served(args, job.recipe))
    most = report["peak_extra_bytes"]
    memory = "memory unknown" if most is None else f"at most {most / 1e6:.0f} MB beyond the start"
    legs = f" over {spent.legs} legs" if spent.legs > 1 else ""
    say(f"{spent.wall:.1f} s{legs}, {memory}")


def served(args: argparse.Namespace, done: Recipe) -> str:
    """How to run it as it was calibrated."""
    flags = f" --kv-dtype {args.kv}" * bool(args.kv) + " --fp8-queries true" * args.fp8_queries
    keys = [name for name in ("smooth_attention", "scale_keys") if done.find(name) is not None]
    told = (
        f"   (its keys are scaled for 4 bits by {keys[0]}: --kv-dtype int4 or int4z)"
        if keys and not args.kv
        else ""
    )
    return f"serve it: python -m minserve.serve --model {args.out}{flags}{told}"


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
    check_format(kind, scheme, source.shape)
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
    if args.weights not in (None, "symmetric") and rows is not None and rows.dtype == "fp8":
        raise ValueError(f"--weights must be symmetric for fp8 activations, got {weights!r}")
    return replace(
        scheme, group_size=group, symmetric=weights != "zeros", progressive=weights == "progressive"
    )


def read_windows(args: argparse.Namespace, shape: Shape, asked: Recipe) -> calibration.Windows | None:
    if args.calib is not None and args.calib_tokens is not None:
        raise ValueError("give --calib or --calib-tokens, not both")
    given = args.calib is not None or args.calib_tokens is not None
    for name, least in (("samples", 1), ("length", calibration.SHORTEST), ("judged", 0), ("batch", 1)):
        # beyond its positions a model says nothing that it learnt
        most = shape.positions if name == "length" and given else MOST[name]
        if not least <= getattr(args, name) <= most:
            where = ", the model's max_position_embeddings" if name == "length" else ""
            raise ValueError(
                f"--{name} must be at least {least} and at most {most}{where}, got {getattr(args, name)}"
            )
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


def open_work(folder: Path, args: argparse.Namespace, job: Job, writer: Writer) -> Work:
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
    work = Work(folder, key)
    if work.next_layer:
        say(f"going on after layer {work.next_layer - 1}, found in {work.folder}")
    if others := work.others():
        warn(
            f"{folder} also holds {len(others)} unfinished of other options, models or texts: "
            f"delete what you will not go on with ({', '.join(p.name for p in others[:4])})"
        )
    return work


def steps_before(job: Job, args: argparse.Namespace) -> list[tuple[str, Outcome]]:
    """Plain rounding, and the recipe cut off after each step but the last."""
    cuts = [r for r in job.recipe.prefixes() if r != job.recipe]
    return [(str(r), Run(replace(job, recipe=r), show=shown(args))()) for r in cuts]


def warn(line: str) -> None:
    sys.stderr.write(f"python -m quant: {line}\n")
    sys.stderr.flush()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def shown(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()
