"""Policies in the real engine: the server under a replay of a bursty workload of three models, the same for each policy.

    python -m bench.live               # the demo on this machine, most of ten minutes; --quick: one policy, under a minute

For every policy, in an order that rotates between repeats, a server is started, a warm-up is sent, and the workload is
replayed open loop over HTTP.  SLOs are multiples of what a request takes alone on the idle server (--scale TTFT:TPOT), and
each request says its own.  The server runs at a lower priority than the client, which is to be on time also where both share
the cores.  A run whose client was late by more than 2 ms at P99 is marked void, as part of what it measured is the client.
Measured, not simulated.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from bench.recorded import parser_of, show
from bench.scheduling_tables import live_table

ROOT = Path(__file__).resolve().parent.parent
ARMS = {
    "slack": [],
    "slack, shed": ["--policy-options", "shed=hopeless"],
    "fcfs": ["--policy", "fcfs"],
    "saab": ["--policy", "saab"],
    "prism": ["--policy", "prism"],
}
READY_S, STOP_S = 120.0, 40.0
NICE = 10


def python(*arguments: str, seconds: float) -> str:
    """What the module printed; ValueError with its words where it failed."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )
    if done.returncode:
        raise ValueError(f"python -m {' '.join(arguments)}: {done.stderr.strip()[-500:]}")
    return done.stdout


@contextmanager
def server(config: str, flags: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of a server that is ready; it has ended when this has."""
    with log.open("w") as out:
        process = subprocess.Popen(
            ["nice", "-n", str(NICE), sys.executable, "-m", "minserve.serve", config, "--port", "0", *flags],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            end = time.monotonic() + READY_S
            while not (found := re.search(r"ready in .*?(http://\S+)", log.read_text())):
                if process.poll() is not None or time.monotonic() > end:
                    raise ValueError(f"the server did not get ready: {log.read_text()[-500:]}")
                time.sleep(0.1)
            yield found[1].rstrip(":,")
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    load, alone, rows = folder / "load.jsonl", folder / "alone.json", []
    python(
        "minserve.workload", "synthetic", "--config", args.config, "--rate", str(args.rate), "--alpha", str(args.alpha),
        "--cv", str(args.cv), "--groups", "3", "--on-s", str(args.seconds / 6), "--duration", str(args.seconds), "--prompt-tokens", "256",
        "--output-tokens", "48", "--max-len", "900", "--seed", str(args.seed), "--out", str(load), seconds=60,
    )  # fmt: skip
    with server(args.config, [], folder / "alone.log") as url:
        python("minserve.replay", str(load), "--url", url, "--measure-alone", str(alone), seconds=300)
    arms = [name for name in ARMS if not args.quick or name == "slack"]
    for repeat in range(args.repeats):
        for name in arms[repeat % len(arms) :] + arms[: repeat % len(arms)]:
            with server(args.config, ARMS[name], folder / "server.log") as url:
                replay = [
                    "minserve.replay",
                    str(load),
                    "--url",
                    url,
                    "--alone",
                    str(alone),
                    "--slo-scale",
                    args.scale,
                    "--send-slo",
                ]
                # the first requests of a server fit its cost model and fill its caches
                python(*replay, "--duration", str(min(8.0, args.seconds / 2)), seconds=120)
                said = python(*replay, "--warmup-s", str(args.seconds * 0.1), seconds=args.seconds + 120)
            found = json.loads(said.strip().splitlines()[-1])
            rows.append({
                "arm": name, "repeat": repeat, "attained": found["slo_attainment"], "ttft": found["ttft_attainment"],
                "tpot": found["tpot_attainment"], "worst_model": found["slo_attainment_worst_model"], "requests": found["requests"],
                "shed": found["shed"], "failed": found["failed"], "tokens_s": found["output_throughput"],
                "attained_tokens_s": found["attained_output_throughput"], "p50_ttft_ms": found["p50_ttft_ms"], "p99_ttft_ms": found["p99_ttft_ms"],
                "p99_tpot_ms": found["p99_tpot_ms"], "client_p99_ms": found["client"]["p99_ms"], "void": found["client"]["void"], "tag": "measured",
            })  # fmt: skip
            sys.stderr.write(f"{name} {repeat}: {rows[-1]['attained']:.1%}\n")
    return rows


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("live", __doc__, "our policy alone, once, shorter")
    parser.add_argument(
        "--config", default=str(ROOT / "examples" / "demo.yaml"), help="of three models or more"
    )
    parser.add_argument("--repeats", type=int, help="3 by default")
    parser.add_argument("--seconds", type=float, help="of arrivals in a run, 30 by default")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second, all models together")
    parser.add_argument("--cv", type=float, default=3.0, help="of the gaps between requests")
    parser.add_argument("--alpha", type=float, default=0.7, help="of the models' popularity, k^-alpha")
    parser.add_argument(
        "--scale", default="5:5", metavar="TTFT:TPOT", help="SLOs over what a request takes alone"
    )
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (1 if args.quick else 3)
    args.seconds = args.seconds or (12.0 if args.quick else 30.0)
    if args.seed < 0 or args.repeats < 1 or not 6 <= args.seconds <= 3600 or not 0 < args.rate < 1e5:
        parser.error("--seed must be >= 0, --repeats >= 1, --seconds in [6, 3600], --rate in (0, 100000)")
    return args


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """ValueError where the server or the replay gives up."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = measure(args, Path(folder))
        except subprocess.TimeoutExpired as late:
            raise ValueError(str(late)) from late
    return {
        "bench": "live", "date": date.today().isoformat(), "seed": args.seed, "seconds": args.seconds, "rate": args.rate, "cv": args.cv,
        "alpha": args.alpha, "scale": args.scale, "config": Path(args.config).name, "rows": rows,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = read_arguments(argv)
    return show("live", args, lambda: run_all(args), live_table)


if __name__ == "__main__":
    sys.exit(main())
