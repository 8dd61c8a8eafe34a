"""Recipes side by side: makes the quantized checkpoints of a model by each and judges them through the engine.

    python -m bench.recipes examples/demo --calib calib.txt --text test.txt --outliers too    # every row of JOBS, to results
    python -m bench.recipes MODEL --calib calib.txt --text test.txt --only "w4a8-int8*" --json other.json

Each row is judged against the model as it is stored: perplexity, KL, top-1, and the KL of its weights alone, under
activations and keys that nothing rounds: what is more than that, rounded activations and keys add.  `--outliers` does
it again with the model's norms putting out 50 times as much in 6 channels, its function preserved.  Calibration and
judging read different texts.  Rows replace those of the same name in the file, so parts can be run one after another.
"""

import argparse
import contextlib
import json
import platform
import shutil
import time
from argparse import Namespace
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from bench.quality import (
    HEAD,
    KV,
    Reference,
    Variant,
    Window,
    check,
    line,
    log_probs,
    measure,
    open_llm,
    read_ids,
    windows,
)
from bench.report import RESULTS
from bench.variants import weights_alone, with_folds, with_outliers
from quant.ptq import calibration, command
from quant.ptq.model import read_shape
from quant.ptq.recipe import parse

PLAIN = "none"
KEYS = "smooth_attention(alpha=auto)"


@dataclass(frozen=True, slots=True)
class Job:
    """One checkpoint and the KV formats that it is judged with.  `method`: what the table calls it.

    `weights`: a scheme and its group, or none (then `steps` are folds, made anew for each of `kv`).
    `steps`: what to do where `method` is no recipe of the tool.  `options`: others of its command.  `run_as`: how the engine
    is asked to read the checkpoint.
    """

    weights: str
    method: str
    kv: tuple[str, ...] = ("auto",)
    steps: str | None = None
    options: tuple[str, ...] = ()
    run_as: str = "auto"

    @property
    def name(self) -> str:
        return f"{self.weights} {self.method}".strip()

    @property
    def scheme(self) -> tuple[str, str]:
        """The scheme, and 128 or channel."""
        scheme, _, group = self.weights.partition(" ")
        return scheme, group.removeprefix("g") or "128"


def jobs() -> list[Job]:
    folded = ("int4", "int4z")
    made = [
        Job(PLAIN, "plain keys", ("fp8", "int8", *folded)),
        Job(PLAIN, "SmoothAttention 0.5", folded, "smooth_attention(alpha=0.5)"),
        Job(PLAIN, "SmoothAttention, searched", folded, KEYS),
        Job(PLAIN, "FireQ keys, folded alone", folded, "scale_keys(top_k=0)"),
        Job(PLAIN, "FireQ keys", folded, "scale_keys"),
        Job(PLAIN, "SmoothAttention, turned values", folded, f"rotate(residual=false); {KEYS}"),
    ]
    for weights, methods in {
        "w8a8-int8": "rtn smoothquant",
        "w8a8-fp8": "rtn smoothquant",
        "w4a8-int8 g128": "rtn awq gptq",
        "w4a8-int8 channel": "rtn awq gptq",
        "w4a8-fp8 g128": "rtn awq gptq",
    }.items():
        made += [Job(weights, method) for method in methods.split()]
        made.append(Job(weights, "best", ("auto", "int8") if "g128" in weights else ("auto",)))
        if "g128" in weights:  # what is served; keys of 4 bits have a step of their own
            made += [Job(weights, "best", (kv,), options=("--kv", kv)) for kv in folded]
    fireq, qoq = ("--kv", "int4", "--fp8-queries"), ("--kv", "int4z")
    return [
        *made,
        Job("w4a8-fp8 g128", "fireq", ("auto", "int4"), options=fireq),
        Job("w4a8-fp8 g128", "fireq, its products", ("auto", "int4"), options=fireq, run_as="w8a8-fp8"),
        Job("w4a8-int8 g128", "qoq", ("auto", "int4z"), options=qoq),
        Job("w4a8-int8 channel", "qoq", ("auto", "int4z"), options=qoq),
    ]


def make(job: Job, model: Path, out: Path, args: Namespace) -> None:
    """Writes the checkpoint of `job` to `out`; what the tool says goes to a file beside it."""
    if out.exists():
        shutil.rmtree(out)
    if job.weights == PLAIN:
        found = calibration.from_text(args.calib, model, args.window)
        with_folds(
            model,
            out,
            parse(job.steps or "rtn"),
            calibration.split(found, args.samples, 0).calib_ST,
            job.kv[0],
        )
        return
    scheme, group = job.scheme
    method = ("--method", job.method.partition(",")[0]) if job.steps is None else ("--steps", job.steps)
    fixed = (
        "--calib",
        str(args.calib),
        "--samples",
        str(args.samples),
        "--length",
        str(args.window),
        "--judged",
        "0",
    )
    argv = [str(model), "--scheme", scheme, "--group-size", group, "--out", str(out), *method, *fixed, *job.options, "--quiet"]  # fmt: skip
    with out.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
        command.run(command.read_arguments(argv))


@dataclass(slots=True)
class Bench:
    """One model, with or without outliers; `rows` fill as it goes."""

    model: Path
    label: dict[str, Any]  # model and outliers
    args: Namespace
    rows: list[dict[str, Any]]

    def run(self, chosen: list[Job]) -> None:
        args, texts = self.args, windows(read_ids(self.args), self.args.window, self.args.stride)
        with open_llm(Variant(self.model, "auto", "auto"), args) as llm:
            reference = Reference(llm, texts, log_probs(llm, texts[0]).shape[1])
            base = measure(llm, texts, iter(reference)).figures()
            plain = {
                "weights": PLAIN,
                "method": "",
                "kv": llm.dtype,
                "recipe": "",
                "kl_weights": None,
                "seconds": 0.0,
            }
            self._add(plain | base | {"above": 0.0, "tokens": sum(w.scored for w in texts)})
            for job in chosen:
                # folds may be searched for the cache that is judged: one checkpoint each
                folds = job.weights == PLAIN and job.steps is not None
                for one in [replace(job, kv=(kv,)) for kv in job.kv] if folds else [job]:
                    self._job(one, texts, reference, base["perplexity"])

    def _job(self, job: Job, texts: list[Window], reference: Reference, base: float) -> None:
        folds = job.weights == PLAIN and job.steps is not None
        name = f"{job.name} {job.kv[0]}" if folds else job.name
        folder = self.args.work / f"{self.model.name}-{''.join(c if c.isalnum() else '-' for c in name)}"
        start = time.perf_counter()
        recipe, quantized = "", job.weights != PLAIN
        if quantized or job.steps is not None:
            make(job, self.model, folder, self.args)
            recipe = job.steps or json.loads((folder / command.REPORT_FILE).read_text())["recipe"]
        else:
            folder = self.model
        seconds = round(time.perf_counter() - start, 1)
        alone = None
        if quantized:
            plain = folder.with_name(folder.name + "-alone")
            weights_alone(folder, plain, read_shape(self.model))
            alone = self._judge(Variant(plain, "auto", "auto"), texts, reference)["kl"]
            shutil.rmtree(plain)
        for kv in job.kv:
            found = self._judge(Variant(folder, job.run_as, kv), texts, reference)
            self._add(
                {"weights": job.weights, "method": job.method, "recipe": recipe, "seconds": seconds, "kl_weights": alone}
                | found
                | {"above": found["perplexity"] / base - 1, "tokens": sum(w.scored for w in texts)}
            )  # fmt: skip

    def _judge(self, variant: Variant, texts: list[Window], reference: Reference) -> dict[str, Any]:
        with open_llm(variant, self.args) as llm:
            figures = measure(llm, texts, iter(reference)).figures()
            return {"kv": llm.dtype if variant.kv == "auto" else variant.kv, **figures}

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append({**self.label, **row, "tag": "measured"})
        name = f"{self.label['model']} {row['method']}{', outliers' * self.label['outliers']}"
        print(line(row | {"model": name, "weights": row["weights"]}), flush=True)
        save(self.args, self.rows)


KEY = ("model", "outliers", "weights", "method", "kv")


def save(args: Namespace, rows: list[dict[str, Any]]) -> None:
    """Into the file, over rows of the same name."""
    old = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    merged = {tuple(r[k] for k in KEY): r for r in [*old, *rows]}
    result = {
        "bench": "quality",
        "device": platform.machine() if args.device in ("auto", "cpu") and not torch.cuda.is_available() else args.device,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "window": args.window,
        "stride": args.stride,
        "dtype": args.dtype,
        "rows": list(merged.values()),
    }  # fmt: skip
    args.json.write_text(json.dumps(result, indent=1) + "\n")


def parsed() -> Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL")
    add("--calib", type=Path, required=True, help="text to calibrate on, UTF-8")
    add("--text", type=Path, required=True, help="another, to judge on")
    add("--outliers", choices=("no", "too", "only"), default="no", help="of the norms (default %(default)s)")
    add("--only", nargs="+", metavar="GLOB", help="of 'weights method', as the table has them")
    add(
        "--work", type=Path, default=Path("bench/out/recipes"), help="where checkpoints are written, and left"
    )
    add(
        "--kv", nargs="+", choices=KV, default=list(KV), help="formats to judge with, of those that a row has"
    )
    add("--samples", type=int, default=64, help="windows to calibrate on")
    add("--tokens", type=int, default=20_000, help="of the text to judge on, from its start")
    add("--window", type=int, default=512)
    add("--stride", type=int, default=448)
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="what plain layers compute in")
    add("--device", default="auto")
    add("--pool-bytes", type=int, default=64 << 20)
    add("--json", type=Path, default=RESULTS / "quality.json")
    args = parser.parse_args()
    for path in (args.model, args.calib, args.text):
        if not path.exists():
            parser.error(f"{path} does not exist")
    args.models = [args.model]
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parsed()
    chosen = [j for j in jobs() if args.only is None or any(fnmatch(j.name, g) for g in args.only)]
    chosen = [replace(j, kv=kv) for j in chosen if (kv := tuple(k for k in j.kv if k in args.kv))]
    if not chosen:
        raise SystemExit(f"--only must match one of {', '.join(j.name for j in jobs())}, got {args.only}")
    args.work.mkdir(parents=True, exist_ok=True)
    print(HEAD)
    rows: list[dict[str, Any]] = []
    name, label = args.model.name, {"model": args.model.name, "samples": args.samples}
    if args.outliers != "only":
        Bench(args.model, {**label, "outliers": False}, args, rows).run(chosen)
    if args.outliers != "no":
        spread = args.work / f"{name}-outliers"
        with_outliers(args.model, spread)
        # keys and values are what they were: only the rows of weights are worth repeating
        again = [replace(j, kv=("auto",)) for j in chosen if j.weights != PLAIN and "auto" in j.kv]
        Bench(spread, {**label, "outliers": True}, args, rows).run(again)


if __name__ == "__main__":
    main()
