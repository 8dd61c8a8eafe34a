"""What an engine's steps take on the device at hand: a table, a cost model, and how two models slow each other down.

    python -m bench.profile_steps --model DIR --csv costs.csv --json profile.json
    python -m bench.profile_steps                       # random weights of 57M parameters
    python -m bench.profile_steps --device cuda:0 --shares 100,50 --sharing mps-static

Workers are those of `serve`, every step of theirs is timed from the end of the one before.  The table has FineServe's
form (`minserve.simulate --costs`); the JSON file is `simulate --profile`'s, and `profile:` of a model in a configuration.
"""

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.fidelity_cells import SCALES, plain, write_model
from bench.step_workers import PATIENT, SETTLE_S, Workers, points_of, ran, said
from minserve.config import Config, parse_config
from minserve.step_profile import Measured, Profile, write_costs
from sched.metrics import aligned
from sched.slowdown import DECODE, PREFILL, Slowdown, slowdowns
from sched.step_time import Fitted, Point, best_fit, cross_validated, error_of, fit
from sched.workload import Request, Workload

A, B = "a", "b"
PAIRS = ((DECODE, DECODE), (DECODE, PREFILL), (PREFILL, PREFILL))
FLOOD = 512


def config_of(args: argparse.Namespace, share: int) -> Config:
    """The model twice, as two that share a device."""
    common: dict[str, Any] = {
        "path": str(args.model), "max_model_len": args.window, "max_num_seqs": max(args.batches),
        "max_num_batched_tokens": args.step_tokens, "enable_prefix_caching": False,
        "reserve_tokens": args.window, "quantization": args.quantization, "kv_dtype": args.kv_dtype, "dtype": args.dtype,
    }  # fmt: skip
    if args.sharing != "none":
        common["sm_share"] = share
    gpu: dict[str, Any] = {"name": "pool", "device": args.device, "sharing": args.sharing}
    if args.pool is not None:
        gpu["pool_bytes"] = args.pool
    models = [{"name": name, **common} for name in (A, B)]
    return parse_config({"nodes": [{"name": "local", "gpus": [gpu]}], "models": models}, Path.cwd())


async def grid(workers: Workers, args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """Each batch of each prompt, one after the other, `repeats` times; returns (batch, prompt, span)."""
    done = []
    for _ in range(args.repeats):
        for prompt in args.prompts:
            for batch in args.batches:
                done.append((batch, prompt, len(workers.spans)))
                await workers.burst("grid", [(A, prompt, args.answer)] * batch)
    return done


async def pairs(workers: Workers, args: argparse.Namespace) -> None:
    """Each phase beside each for a while: more long answers, or prompts, than there is time for."""
    batch, prompt = args.batches[len(args.batches) // 2], args.prompts[-1]
    work = {DECODE: [(min(args.prompts), args.window // 2)] * batch, PREFILL: [(prompt, 1)] * FLOOD}
    for phases in PAIRS:
        asked = [(name, *one) for name, phase in zip((A, B), phases, strict=True) for one in work[phase]]
        requests = [Request(i, *of[:1], 0.0, *of[1:], session=i, **PATIENT) for i, of in enumerate(asked)]
        await workers.run("pair", Workload(tuple(requests), args.pair_seconds), 0.0)
        await asyncio.sleep(SETTLE_S)  # who was given up is gone


def rows_of(
    workers: Workers, done: Sequence[tuple[int, int, int]], key: tuple[str, str, str, str], answer: int
) -> list[Measured]:
    """The table: of each cell the median of its repeats.  Prompts: all steps with some; tokens: steps of the whole batch."""
    seen: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for batch, prompt, span in done:
        log = workers.span(span, A)
        prefill, decode = log[log[:, 4] > 0], log[(log[:, 4] == 0) & (log[:, 3] == batch)]
        if len(prefill) and len(decode):
            seen.setdefault((batch, prompt), []).append(
                (float(prefill[:, 1].sum()), float(decode[:, 1].mean()))
            )
    return [
        Measured(key, batch, prompt, answer, median(p for p, _ in times), median(d for _, d in times))
        for (batch, prompt), times in sorted(seen.items())
    ]


async def measure(
    args: argparse.Namespace, share: int, folder: Path
) -> tuple[list[Measured], list[Point], Slowdown]:
    workers = Workers(config_of(args, share), folder)
    await workers.open()
    try:
        done = await grid(workers, args)
        if share == args.shares[0]:
            await pairs(workers, args)
    finally:
        await workers.close()
    key = (args.name, args.format, "1", str(share))
    points = points_of(workers.rows(A, "grid"))
    alone = best_fit(points)
    beside = {name: ran(workers.rows(name, "pair"), alone) for name in (A, B)}
    slow = slowdowns(beside) if share == args.shares[0] else {}
    say(f"watching a step took {workers.watch_us[A]:.1f} us of the processor in the mean")
    return rows_of(workers, done, key, args.answer), points, slow


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if args.model is None:
        args.model = folder / "model"
        parameters = write_model(args.model, args.scale.shape)
        say(f"a random model of {parameters / 1e6:.0f}M parameters")
    rows: list[Measured] = []
    models: dict[str, Fitted] = {}
    fits, slowdown = [], Slowdown()
    for share in args.shares:
        measured, points, slow = asyncio.run(measure(args, share, folder))
        rows += measured
        slowdown |= slow
        name = args.name if share == args.shares[0] else f"{args.name}/{share}"
        models[name] = best_fit(points)
        fits.append(describe(name, points, models[name]))
    write_costs(args.csv, rows)
    about = {"device": args.device, "machine": platform.processor() or platform.machine(), "date": today()}
    Profile(models, slowdown, about).write(args.json)
    say(table(rows))
    for found in fits:
        say(
            f"{found['name']}: {found['points']} points, off by {found['error']:.1%} where left out of the fit "
            f"({found['plain_error']:.1%} without a curve over the rows), {found['in_sample']:.1%} in it"
        )
    say(f"slow-downs: {said(slowdown)}")
    say(f"{args.csv}, {args.json}")
    return {
        "bench": "profile_steps", "date": today(), "device": args.device, "fits": [plain(f) for f in fits],
        "slowdown": {f"{own} beside {other}": round(s, 4) for (own, other), s in slowdown.items()},
        "load_average": [round(x, 2) for x in os.getloadavg()], "rows": [plain(r._asdict()) | {"tag": "measured"} for r in rows],
    }  # fmt: skip


def describe(name: str, points: Sequence[Point], found: Fitted) -> dict[str, Any]:
    return {
        "name": name, "points": len(points), "error": found.error, "plain_error": cross_validated(points),
        "in_sample": error_of(found.cost, points), "plain_in_sample": fit(points).error,
    }  # fmt: skip


def table(rows: Sequence[Measured]) -> str:
    lines = [["model/format/tp/% of SMs", "batch", "prompt", "prefill ms", "tokens/s", "TPOT ms", "tokens/s"]]
    for r in rows:
        lines.append(
            ["/".join(r.key), str(r.batch), str(r.input_tokens), f"{1e3 * r.prefill_s:.1f}",
             f"{r.batch * r.input_tokens / r.prefill_s:,.0f}", f"{1e3 * r.tpot_s:.2f}", f"{r.batch / r.tpot_s:,.0f}"]
        )  # fmt: skip
    return aligned(lines)


def today() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def integers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if not found or min(found) < 1:
        raise ValueError
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    doc = (__doc__ or "").split("\n\n")[0].replace("\n", " ")
    parser = argparse.ArgumentParser(prog="python -m bench.profile_steps", description=doc)
    parser.add_argument("--model", metavar="DIR", help="a checkpoint; random weights without")
    parser.add_argument("--name", help="of the model in both files (default: the folder's)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, ...")
    for key in ("dtype", "quantization", "kv-dtype"):
        parser.add_argument(f"--{key}", default="auto", help="as in a configuration")
    parser.add_argument("--batches", type=integers, help="1,2,3,4,8,16,32")
    parser.add_argument("--prompts", type=integers, help="tokens, such as 32,128,512")
    parser.add_argument("--answer", type=int, help="tokens of each answer")
    parser.add_argument(
        "--shares", type=integers, default=[100], help="per cent of the SMs, in order; models on a GPU only"
    )
    parser.add_argument(
        "--sharing", default="none", help="the mode that gives shares: mps, mps-static, green"
    )
    parser.add_argument("--window", type=int, help="longest prompt and answer")
    parser.add_argument("--step-tokens", type=int, help="most tokens in a step")
    parser.add_argument("--pool", metavar="SIZE", help="of the KV pool, such as 1GiB")
    parser.add_argument("--repeats", type=int, help="of each cell (default 3, quick 1)")
    parser.add_argument("--pair-seconds", type=float, help="of each pair of phases (default 8, quick 1)")
    parser.add_argument(
        "--seed", type=int, default=1, help="nothing is drawn: taken for the other benches' sake"
    )
    parser.add_argument("--csv", default="costs.csv")
    parser.add_argument("--json", default="profile.json")
    parser.add_argument("--quick", action="store_true", help="a small random model and grid, under a minute")
    args = parser.parse_args(argv)
    args.scale = scale = SCALES["quick" if args.quick else args.device.partition(":")[0]]
    short = args.quick
    args.batches = args.batches or ([1, 2, 4] if short else [1, 2, 3, 4, 6, 8, 16])
    args.prompts = args.prompts or (
        [16, 64] if short else [n for n in (16, 64, 128, 256, 1024) if n <= scale.window // 2]
    )
    args.answer = args.answer or (8 if short else 24)
    args.window, args.step_tokens = args.window or scale.window, args.step_tokens or scale.step_tokens
    args.pool = args.pool or (scale.pool if args.device == "cpu" or args.model is None else None)
    args.repeats = args.repeats or (1 if short else 3)
    args.pair_seconds = args.pair_seconds or (1.0 if short else 8.0)
    if args.model is None and args.dtype == "auto":
        args.dtype = scale.dtype
    args.format = "org" if args.quantization in ("auto", "none") else args.quantization
    args.name = args.name or (Path(args.model).resolve().name if args.model else "random")
    if args.shares != [100] and args.sharing == "none":
        parser.error("--shares need --sharing mps, mps-static or green, on a GPU")
    if max(args.prompts) + max(args.answer, 1) > args.window:
        parser.error(
            f"--window {args.window} must hold prompts of {max(args.prompts)} and answers of {args.answer}"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each worker
    with tempfile.TemporaryDirectory() as folder:
        found = run(args, Path(folder))
    say(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
