"""E1: how much of a KV pool holds live blocks when somebody is refused, for our slabs and for eight other allocators.

    python -m bench.slabs                   # 20 seeds, minutes; --record keeps it in bench/results/slabs.json
    python -m bench.slabs --quick           # under a minute
    python -m bench.slabs --trace azure-llm-2023-conv.csv
    python -m bench.slabs --paths           # what a lease, a block and a message cost (bench/slabs_paths.py)

Every arm replays the same arrivals (bench/slabs_load.py) by the same rule (bench/slabs_replay.py) with the same tokens a
block, and pays for its tables.  A table for people, a plot where matplotlib is there, last one line of JSON.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import slabs_arms as peers
from bench.plots import save
from bench.slabs_load import GIB, REGIMES, Lengths, Model, Regime, Workload, make_workload, mix, read_trace
from bench.slabs_ours import Slabs
from bench.slabs_replay import Arm, replay
from sched.slabs import MAX_SLAB_BYTES

RESULT = Path(__file__).parent / "results" / "slabs.json"
PLOT = Path(__file__).parent / "out" / "slabs.png"
POOL_BYTES = 40 * GIB
SECONDS, SEEDS = 60.0, 20
QUICK_SEEDS, QUICK_REGIMES = 2, ("light", "deep")
PACKED, IDEAL, OURS = "head-wise, packed", "ideal, no grain", "slabs, compacted"
LIVE, AHEAD, TIE = 0.97, 1.15, 0.99

Build = Callable[[Sequence[Model], int, Workload], Arm]


@dataclass(frozen=True, slots=True)
class Entry:
    """An arm of the table.  `kind`: ours, peer, or bound; `P`: tokens of a block, 32 where all have the same, 0 for what
    our kernels like best; `regimes`: where it runs."""

    build: Build
    kind: str
    P: int = 32
    regimes: tuple[str, ...] = tuple(r.name for r in REGIMES)


def slabs(*, compact: bool, reserves: bool = False, max_slab: int = MAX_SLAB_BYTES) -> Build:
    return lambda models, pool, load: Slabs(
        models, pool, compact=compact, reserves=reserves, max_slab=max_slab
    )


def depth_split(models: Sequence[Model], pool: int, load: Workload) -> Arm:
    """With the slab that ours would plan here."""
    arm = Slabs(models, pool, compact=False)
    arm.close()
    return peers.depth_slabs(models, pool, load.rates, arm.plan.slab_bytes)


DEEP = ("deep",)
ARMS: dict[str, Entry] = {
    "static split, oracle rates": Entry(lambda m, b, w: peers.Split(m, b, w.shares), "peer"),
    "static split, equal": Entry(lambda m, b, w: peers.Split(m, b, [1 / len(m)] * len(m)), "peer"),
    "head-wise, 16-bit slots (MuxServe)": Entry(lambda m, b, w: peers.head_wise(m, b), "peer"),
    PACKED: Entry(lambda m, b, w: peers.head_wise_packed(m, b), "peer"),
    "2 MiB pages (kvcached)": Entry(lambda m, b, w: peers.Pages(m, b, mapped=True), "peer"),
    "2 MiB pages, free mapping": Entry(lambda m, b, w: peers.Pages(m, b, mapped=False), "peer"),
    "one slot size": Entry(lambda m, b, w: peers.one_slot(m, b), "peer"),
    "our slab, pools by depth": Entry(depth_split, "peer"),
    "2 x LCM, scales in blocks (FineServe)": Entry(lambda m, b, w: peers.lcm_slabs(m, b, w.rates), "peer"),
    "2 x LCM, 8 bit without scales": Entry(
        lambda m, b, w: peers.lcm_slabs(m, b, w.rates, scales=False), "peer"
    ),
    "slabs, not compacted": Entry(slabs(compact=False), "ours"),
    OURS: Entry(slabs(compact=True), "ours"),
    "slabs, compacted, with reserves": Entry(slabs(compact=True, reserves=True), "ours", regimes=DEEP),
    IDEAL: Entry(lambda m, b, w: peers.ideal(m, b), "bound"),
    "slabs up to 1 MiB, not compacted": Entry(slabs(compact=False, max_slab=1 << 20), "ours", regimes=DEEP),
    "slabs up to 512 KiB, not compacted": Entry(slabs(compact=False, max_slab=1 << 19), "ours", regimes=DEEP),
    "slabs up to 512 KiB, compacted": Entry(slabs(compact=True, max_slab=1 << 19), "ours", regimes=DEEP),
    "own blocks: static split, oracle rates, P 16": Entry(
        lambda m, b, w: peers.Split(m, b, w.shares), "own blocks", 16, DEEP
    ),
    "own blocks: head-wise, packed, P 16": Entry(
        lambda m, b, w: peers.head_wise_packed(m, b), "own blocks", 16, DEEP
    ),
    "own blocks: 2 MiB pages, P 16": Entry(
        lambda m, b, w: peers.Pages(m, b, mapped=True), "own blocks", 16, DEEP
    ),
    "own blocks: 2 x LCM, P 32 and 64": Entry(
        lambda m, b, w: peers.lcm_slabs(m, b, w.rates, scales=False), "own blocks", 0, DEEP
    ),
    "own blocks: slabs, compacted, P 32 and 64": Entry(slabs(compact=True), "own blocks", 0, DEEP),
}


def models_of(P: int) -> tuple[Model, ...]:
    """4 bit cannot have blocks below 32 tokens; a peer whose kernels can is given that here."""
    if P != 16:
        return mix(P or None)
    # a block's parts are proportional to its tokens, so half a block is half the bytes
    halves = [(m, m.with_blocks(16) if m.fmt != "int4z" else None) for m in mix(32)]
    return tuple(
        h or Model(m.name, m.layers, m.fmt, m.heads, m.head_dim, 16, m.block_bytes // 2) for m, h in halves
    )


def run_one(name: str, regime: Regime, seed: int, seconds: float, trace: Lengths | None) -> dict[str, float]:
    load = make_workload(mix(32), regime, seed, pool_bytes=POOL_BYTES, seconds=seconds, trace=trace)
    entry = ARMS[name]
    arm = entry.build(models_of(entry.P), POOL_BYTES, load)
    try:
        return replay(arm, load)
    finally:
        arm.close()


def run_all(
    regimes: Sequence[Regime], seeds: Sequence[int], seconds: float, trace: Lengths | None, workers: int
) -> list[dict[str, Any]]:
    """A row for each arm and regime, with the figures of every seed."""
    cells = [(n, r) for r in regimes for n, e in ARMS.items() if r.name in e.regimes]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        runs = {(n, r.name): [pool.submit(run_one, n, r, s, seconds, trace) for s in seeds] for n, r in cells}
        return [row(n, r, [f.result() for f in runs[n, r.name]]) for n, r in cells]


def mean(values: Sequence[float]) -> float | None:
    """Over the seeds that have a value."""
    there = [v for v in values if not math.isnan(v)]
    return sum(there) / len(there) if there else None


def row(name: str, regime: Regime, runs: list[dict[str, float]]) -> dict[str, Any]:
    found = {key: mean([r[key] for r in runs]) for key in runs[0]}
    each = [None if math.isnan(r["live"]) else round(r["live"], 5) for r in runs]
    # what is simulated: the requests, the peers, and the copies of compaction; the pools and the table are the real ones
    head = {
        "tag": "simulated",
        "regime": regime.name,
        "load": regime.load,
        "arm": name,
        "kind": ARMS[name].kind,
    }
    return head | {k: None if v is None else round(v, 5) for k, v in found.items()} | {"live_by_seed": each}


def ratio(ours: dict[str, Any], other: dict[str, Any], seed: int = 0) -> tuple[float, float, float] | None:
    """Mean of ours over theirs, seed by seed, with the ends of a 95 % bootstrap interval."""
    pairs = [a / b for a, b in zip(ours["live_by_seed"], other["live_by_seed"], strict=True) if a and b]
    if not pairs:
        return None
    draws = np.random.default_rng(seed).choice(np.array(pairs), (2000, len(pairs))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(np.mean(pairs)), float(low), float(high)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By regime, ours against the best peer other than packed head-wise, and against that one."""
    found = []
    for name in dict.fromkeys(r["regime"] for r in rows):
        cells = {r["arm"]: r for r in rows if r["regime"] == name}
        rivals = [r for r in cells.values() if r["kind"] == "peer" and r["arm"] != PACKED and r["live"]]
        best = max(rivals, key=lambda r: r["live"], default=None)
        said: dict[str, Any] = {"regime": name, "live": cells[OURS]["live"]}
        for key, other in (("best_peer", best), ("packed", cells[PACKED])):
            x = other and ratio(cells[OURS], other)
            said[key] = other and other["arm"]
            said[f"x_{key}"] = x and [round(v, 4) for v in x]
        found.append(said)
    return found


def judge(comparisons: list[dict[str, Any]]) -> dict[str, bool]:
    """The targets, in deep saturation."""
    deep = next(c for c in comparisons if c["regime"] == "deep")
    if deep["live"] is None or not deep["x_best_peer"] or not deep["x_packed"]:
        return {"refused": False}
    return {
        f"live >= {LIVE}": deep["live"] >= LIVE,
        f"x best peer >= {AHEAD}": deep["x_best_peer"][0] >= AHEAD,
        f"x packed >= {TIE}": deep["x_packed"][0] >= TIE,
    }


def shown(value: float | None, form: str = ".1%") -> str:
    return "-" if value is None else format(value, form)


def print_table(rows: list[dict[str, Any]], comparisons: list[dict[str, Any]]) -> None:
    for said in comparisons:
        cells = [r for r in rows if r["regime"] == said["regime"]]
        print(
            f"\n{said['regime']}: blocks of a pool without end would take {cells[0]['load']:.2f} of this one"
        )
        print(f"{'shares of the pool at steps with a refusal':<46} {'live':>7} {'tokens':>7} {'tail':>6} {'partial':>7} | "
              f"{'refused':>7} {'preempt':>7} {'<2 s':>6} {'tok/s':>7} {'moved':>9}")  # fmt: skip
        for r in sorted(cells, key=lambda r: (r["kind"] == "own blocks", r["live"] is not None, r["live"])):
            moved = f"{r['moved_gib']:.1f} GiB" if r["moved_gib"] else "-"
            print(
                f"{r['arm']:<46} {shown(r['live']):>7} {shown(r['tokens']):>7} {shown(r['tail']):>6} "
                f"{shown(r['partial']):>7} | {r['refused_steps']:>7.1%} {r['preempted']:>7.0f} {r['soon']:>6.1%} "
                f"{r['tokens_s']:>7,.0f} {moved:>9}"
            )
        for key, name in (("best_peer", "best peer"), ("packed", "packed")):
            if said[f"x_{key}"]:
                x, low, high = said[f"x_{key}"]
                print(f"  {OURS}: {x:.3f} x {name} ({said[key]}), 95 % interval {low:.3f} to {high:.3f}")


def draw(rows: list[dict[str, Any]], path: Path) -> str:
    """Writes the plot and says where; or says why there is none."""
    regimes = list(dict.fromkeys(r["regime"] for r in rows))
    arms = [n for n, e in ARMS.items() if len(e.regimes) > 1]

    def bars(plt: Any) -> Any:
        size = (4 * len(regimes), 5)
        figure, axes = plt.subplots(
            1, len(regimes), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for axis, regime in zip(axes[0], regimes, strict=True):
            cells = {r["arm"]: r for r in rows if r["regime"] == regime}
            left = np.zeros(len(arms))
            for part, color in (("live", "#2a7"), ("partial", "#e94"), ("tail", "#b33")):
                width = np.array([cells[a][part] or 0 for a in arms])
                axis.barh(arms, width, left=left, color=color, label=part)
                left += width
            axis.set(title=regime, xlim=(0, 1), xlabel="of the pool, when refused")
        axes[0][0].invert_yaxis()
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return figure

    return save(path, bars)


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.slabs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="2 seeds, two regimes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"how many, default {SEEDS}")
    parser.add_argument("--seconds", type=float, help=f"simulated, default {SECONDS:.0f}")
    parser.add_argument("--trace", metavar="PATH", help="lengths and gaps from a CSV of Azure's form")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.parent.name}/{RESULT.name}")
    parser.add_argument("--paths", action="store_true", help="time the paths in place of E1")
    args = parser.parse_args(argv)
    counts = [n for n in (args.seeds, args.workers) if n is not None]
    if args.seed < 0 or min(counts) < 1 or (args.seconds is not None and args.seconds < 40):
        parser.error("--seed must not be negative, --seeds and --workers at least 1, --seconds at least 40")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where a target is missed."""
    args = read_arguments(argv)
    if args.paths:
        from bench.slabs_paths import report

        return report(quick=args.quick, record=args.record)
    try:
        trace = read_trace(args.trace) if args.trace else None
    except ValueError as error:
        sys.stderr.write(f"bench.slabs: {error}\n")
        return 2
    seconds = args.seconds or SECONDS
    count = args.seeds or (QUICK_SEEDS if args.quick else SEEDS)
    regimes = [r for r in REGIMES if not args.quick or r.name in QUICK_REGIMES]
    began = time.monotonic()
    rows = run_all(regimes, range(args.seed, args.seed + count), seconds, trace, args.workers)
    comparisons = compare(rows)
    print_table(rows, comparisons)
    print(f"\n{draw(rows, PLOT)}")
    targets = judge(comparisons)
    print("; ".join(f"{what}: {'met' if met else 'MISSED'}" for what, met in targets.items()))
    result = {
        "bench": "slabs", "seeds": count, "first_seed": args.seed, "seconds": seconds, "pool_gib": POOL_BYTES // GIB,
        "trace": Path(args.trace).stem if args.trace else None, "models": [m.name for m in mix()],
        "wall_s": round(time.monotonic() - began), "comparisons": comparisons, "targets": targets, "rows": rows,
    }  # fmt: skip
    line = json.dumps(result)
    if args.record:
        RESULT.write_text(line + "\n")
    print(line)
    return 0 if all(targets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
