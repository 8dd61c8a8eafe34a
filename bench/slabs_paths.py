"""What the paths to KV memory cost: a block, a lease, a reclaim, a copy, and beside them the messages of others.

    python -m bench.slabs --paths [--quick] [--record]

Block pool, leases and slab table are those that serve, on a pool in host memory.  What is timed alone stays on one core.
Each figure is the median over repeats, also of the 99th percentiles: other work on this machine is part of a single one,
and its load is printed.  Contention is four processes on two cores, at 100 leases and 100 returns a second each, and as
fast as they can.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.slabs_contend import LAYERS
from bench.slabs_load import REGIMES, make_workload, mix
from bench.slabs_messages import GIVE_BACK, REFILL, CountedCalls, has_zmq, time_pipe, time_zmq
from bench.slabs_ours import Slabs
from bench.slabs_replay import replay
from kernels.copy_blocks import copy_blocks_cpu
from minserve.pool import LeasedSets, SlabPool
from minserve.slab_table import SlabTable
from sched.blocks import BlockPool
from sched.slabs import ModelShape, PoolPlan, solve
from sched.step import SLOT_BITS

RESULT = Path(__file__).parent / "results" / "slab_paths.json"
ROOT = Path(__file__).resolve().parent.parent
SLOTS, MODELS, P = 16, 4, 32
BATCH = 256  # sequences that each take a block
ZMQ = "ZeroMQ REQ, asyncio, pickle"
MiB, GIB = 1 << 20, 1 << 30
PROCESSES, CORES, RATE = 4, 2, 100


def plan_of(num_slabs: int, slab_bytes: int = 4096) -> PoolPlan:
    """Four models of 32 layers, without reserves: the table is what matters, the pages are never touched."""
    shapes = [
        ModelShape(
            name=f"m{i}",
            layers=LAYERS,
            block_bytes=slab_bytes // SLOTS,
            block_tokens=P,
            max_model_len=512,
            reserve_tokens=0,
        )
        for i in range(MODELS)
    ]
    return solve(shapes, num_slabs * slab_bytes, min_sets=1, max_slab_bytes=slab_bytes)


class Sets:
    """A source without a table: what the blocks alone cost."""

    def __init__(self) -> None:
        self.next = 0

    def lease(self, *, urgent: bool = False) -> int | None:
        self.next += 1
        return self.next

    def give_back(self, set_id: int) -> None:
        """Ids are not used again."""


def columns_of(repeats: int, measure: Callable[[], Sequence[float]]) -> list[tuple[float, ...]]:
    """Each figure's values over the repeats."""
    return list(zip(*(measure() for _ in range(repeats)), strict=True))


def median_of(repeats: int, measure: Callable[[], Sequence[float]]) -> list[float]:
    """Figure by figure over the repeats."""
    return [statistics.median(column) for column in columns_of(repeats, measure)]


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def time_blocks(n: int) -> tuple[float, float, float, float]:
    """Nanoseconds a block: `n` of them allocated and released one by one, and 64 at a time; medians of 100 rounds."""
    pool = BlockPool(Sets(), SLOTS, P)
    rounds: list[tuple[float, ...]] = []
    # sets with room are there, as in a server that has been running: a lease is another figure
    kept = [pool.allocate(1) or [] for _ in range(SLOTS * (n // (SLOTS - 1) + 1))]
    for i, blocks in enumerate(kept):
        if i % SLOTS:
            pool.release(blocks)
    for _ in range(100):
        start = time.perf_counter_ns()
        taken = [pool.allocate(1) for _ in range(n)]
        allocated = time.perf_counter_ns()
        for blocks in taken:
            pool.release(blocks or [])
        released = time.perf_counter_ns()
        many = [pool.allocate(64) for _ in range(n // 64)]
        together = time.perf_counter_ns()
        for blocks in many:
            pool.release(blocks or [])
        end = time.perf_counter_ns()
        lots = n // 64 * 64
        rounds.append(
            (
                (allocated - start) / n,
                (released - allocated) / n,
                (together - released) / lots,
                (end - together) / lots,
            )
        )
    one, two, three, four = (statistics.median(column) for column in zip(*rounds, strict=True))
    return one, two, three, four


def time_leases(n: int) -> tuple[float, float, float, float]:
    """Microseconds of a lease (p50, p99) and of a return, of a model alone, through the sets that serve."""
    pool = SlabPool.create(plan_of(30_000))
    sets = LeasedSets(pool, "m0")
    leases, returns = [], []
    for _ in range(n // 50):
        held = []
        for _ in range(50):
            start = time.perf_counter_ns()
            held.append(sets.lease())
            leases.append((time.perf_counter_ns() - start) / 1e3)
        for set_id in held:
            assert set_id is not None, "the pool refused"
            start = time.perf_counter_ns()
            sets.give_back(set_id)
            returns.append((time.perf_counter_ns() - start) / 1e3)
    pool.close()
    return quantile(leases, 0.5), quantile(leases, 0.99), quantile(returns, 0.5), quantile(returns, 0.99)


def time_contention(seconds: float, rate: float) -> tuple[float, float, float, float]:
    """Microseconds of a lease (p50, p99) and of a return, over four processes on two cores."""
    table = SlabTable.create(plan_of(30_000))
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    workers = []
    begin = time.monotonic() + 2.0  # by then all have started
    for owner in range(PROCESSES):
        numbers = [str(x) for x in (table.fd, owner, begin, seconds, rate, *cores)]
        command = [sys.executable, "-m", "bench.slabs_contend", *numbers]
        workers.append(
            subprocess.Popen(command, cwd=ROOT, pass_fds=[table.fd], stdout=subprocess.PIPE, text=True)
        )
    found = [json.loads(worker.communicate(timeout=seconds + 120)[0]) for worker in workers]
    table.check()
    table.close()
    leases, returns = ([v for f in found for v in f[kind]] for kind in ("lease", "return"))
    return quantile(leases, 0.5), quantile(leases, 0.99), quantile(returns, 0.5), quantile(returns, 0.99)


def time_reclaim(sets: int) -> tuple[float]:
    """Microseconds to take back all that a dead worker held."""
    table = SlabTable.create(plan_of(30_000))
    times = []
    for _ in range(20):
        for _ in range(sets):
            assert table.lease(1, LAYERS) is not None, "the pool refused"
        start = time.perf_counter_ns()
        assert table.reclaim(1) == sets * LAYERS, "slabs are lost"
        times.append((time.perf_counter_ns() - start) / 1e3)
    table.close()
    return (statistics.median(times),)


def time_copy(block_bytes: int, total: int) -> tuple[float]:
    """GB a second that compaction copies on a CPU: half-empty sets of 4 layers are emptied into others."""
    layers, slots = 4, 16
    sets = total // (layers * slots * block_bytes)
    slabs = torch.randperm(sets * layers, generator=torch.Generator().manual_seed(0)).view(sets, layers)
    pool = torch.randint(0, 255, (sets * layers * slots * block_bytes,), dtype=torch.uint8)
    table_SL, units_L = (
        slabs * (slots * block_bytes),
        torch.full((layers,), block_bytes // 16, dtype=torch.int32),
    )
    ids = torch.tensor(
        [s << SLOT_BITS | slot for s in range(sets) for slot in range(0, slots, 2)], dtype=torch.int32
    )
    moves_M2 = torch.stack((ids[: len(ids) // 2], ids[len(ids) // 2 :] + 1), 1)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        copy_blocks_cpu(pool, table_SL, units_L, moves_M2)
        times.append(time.perf_counter() - start)
    return (len(moves_M2) * layers * block_bytes / statistics.median(times) / 1e9,)


def time_call(n: int) -> tuple[float]:
    """Nanoseconds of calling a Python function that does nothing: the machine's pace, to read the others by."""

    def nothing() -> None:
        return None

    times = []
    for _ in range(20):
        start = time.perf_counter_ns()
        for _ in range(n):
            nothing()
        times.append((time.perf_counter_ns() - start) / n)
    return (statistics.median(times),)


def time_table(n: int) -> tuple[float, float, float, float]:
    """As time_leases, of the table alone: a return is one change there, behind no fence."""
    table = SlabTable.create(plan_of(30_000))
    leases, returns = [], []
    for _ in range(n):
        start = time.perf_counter_ns()
        lease = table.lease(0, LAYERS)
        leases.append((time.perf_counter_ns() - start) / 1e3)
        assert lease is not None, "the pool refused"
        start = time.perf_counter_ns()
        table.free(0, lease)
        returns.append((time.perf_counter_ns() - start) / 1e3)
    table.close()
    return quantile(leases, 0.5), quantile(leases, 0.99), quantile(returns, 0.5), quantile(returns, 0.99)


def count_calls(seconds: float) -> dict[str, int]:
    """Over one replay of E1: tokens, blocks and leases of ours, and the calls FineServe's engines make for the same."""
    models = mix()
    load = make_workload(models, REGIMES[1], 0, pool_bytes=40 * GIB, seconds=seconds)
    arm = CountedCalls(Slabs(models, 40 * GIB, compact=False))
    replay(arm, load)
    arm.close()
    return {"tokens": arm.tokens, "blocks": arm.blocks, "leases": arm.leases, "calls": arm.calls}


def row(
    path: str, value: float | None, unit: str, target: float | None = None, note: str = ""
) -> dict[str, Any]:
    rounded = None if value is None else float(f"{value:.4g}")
    return {"tag": "measured", "path": path, "value": rounded, "unit": unit, "target": target, "note": note}


@contextmanager
def one_core() -> Iterator[None]:
    """What is timed alone stays where it is: a move to another core costs more than a lease."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def measure(*, quick: bool) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    repeats, n, seconds = (3, 1000, 1.0) if quick else (9, 5000, 2.0)
    with one_core():
        alloc, free, many, many_free = median_of(repeats, lambda: time_blocks(BATCH))
        (call,) = median_of(repeats, lambda: time_call(n))
        own = columns_of(repeats, lambda: time_leases(n))
        table = columns_of(repeats, lambda: time_table(n))
    rows = [
        row("an empty Python function, for scale", call, "ns"),
        row("block, one allocated", alloc, "ns", 500),
        row("block, one released", free, "ns", 500),
        row("block, of 64 allocated", many, "ns", 500),
        row("block, of 64 released", many_free, "ns", 500),
    ]
    rows += lease_rows("alone", own, (10, 10))
    rows += lease_rows("alone, the table only", table, (10, 10))
    calm = columns_of(min(repeats, 5), lambda: time_contention(seconds, RATE))
    rows += lease_rows(f"{PROCESSES} processes, {RATE}/s each", calm, (200, 200))
    wild = columns_of(min(repeats, 3), lambda: time_contention(seconds, 0))
    rows += lease_rows(f"{PROCESSES} processes, without pause", wild, (None, None))
    for sets in (10, 900):
        (us,) = median_of(1, lambda sets=sets: time_reclaim(sets))
        rows.append(row(f"reclaim of a dead worker's {sets} sets", us, "us"))
    for kib in (34, 128):
        (gbs,) = median_of(1, lambda kib=kib: time_copy(kib << 10, (64 if quick else 256) * MiB))
        rows.append(row(f"compaction of blocks of {kib} KiB, host memory", gbs, "GB/s"))
    set_us = statistics.median(own[0]) + statistics.median(own[2])
    return rows + message_rows(repeats, n, (alloc + free) / 1e3, set_us, 40.0 if quick else 60.0)


def lease_rows(
    who: str, figures: Sequence[Sequence[float]], targets: tuple[float | None, float | None]
) -> list[dict[str, Any]]:
    """Medians over the runs, and the best of them: what the machine was doing beside is in all others."""
    names = ("lease, p50", "lease, p99", "return, p50", "return, p99")
    limits = (None, targets[0], None, targets[1])
    return [
        row(
            f"{name}, {who}",
            statistics.median(runs),
            "us",
            limit,
            f"best of {len(runs)} runs: {min(runs):.3g} us",
        )
        for name, runs, limit in zip(names, figures, limits, strict=True)
    ]


def message_rows(
    repeats: int, n: int, block_us: float, set_us: float, seconds: float
) -> list[dict[str, Any]]:
    """The calls of others, and what a token costs by both: over one replay, and in steps that only decode."""
    few = max(500, n // 10)
    (pipe,) = median_of(repeats, lambda: (quantile(time_pipe(few), 0.5),))
    rows = [row("pickled pipe, round trip, p50", pipe, "us")]
    counts = count_calls(seconds)
    # a set is leased and returned once for so many blocks: most find room in sets that are held
    ours_ns = (block_us + set_us * counts["leases"] / counts["blocks"]) / P * 1e3
    note = f"{counts['blocks']:,} blocks in {counts['leases']:,} sets, replayed"
    rows.append(row("ours, a token", ours_ns, "ns", note=note))
    if not has_zmq():
        return [*rows, row(f"{ZMQ}, round trip, p50", None, "us", note="pyzmq is not installed")]
    (zmq,) = median_of(repeats, lambda: (quantile(time_zmq(few), 0.5),))
    rows.append(row(f"{ZMQ}, round trip, p50", zmq, "us"))
    rows.append(row("that, over a block allocated and released", zmq / block_us, "x", 100))
    for batch in (1, 16, 64):
        # a step's call for the free count, and its part of a refill and of a lot given back
        calls = 1 + batch / P / REFILL + batch / P / GIVE_BACK
        times = calls * zmq / batch * 1e3 / ours_ns
        rows.append(row(f"FineServe's calls over ours, a token, {batch} decoding", times, "x", 100))
    theirs = counts["calls"] * zmq / counts["tokens"] * 1e3
    note = f"{counts['calls']:,} calls for {counts['tokens']:,} tokens, replayed"
    return [*rows, row("FineServe's calls over ours, a token, prompts too", theirs / ours_ns, "x", 100, note)]


def met(r: dict[str, Any]) -> bool | None:
    """Against its target; None where it has none or was not measured."""
    if r["target"] is None or r["value"] is None:
        return None
    at_least = r["unit"] == "x"
    return bool(r["value"] >= r["target"] if at_least else r["value"] <= r["target"])


def report(*, quick: bool, record: bool) -> int:
    """Prints and, to `record`, writes; 1 where a target is missed."""
    before = os.getloadavg()
    rows = measure(quick=quick)
    loads = [round(v, 1) for v in (*before[:2], *os.getloadavg()[:2])]
    print(f"{'path':<62} {'median':>10} {'unit':<5} target")
    for r in rows:
        value = "-" if r["value"] is None else f"{r['value']:,.4g}"
        ends = {None: "", True: "met", False: "MISSED"}[met(r)]
        target = "" if r["target"] is None else f"{r['target']:g} "
        print(f"{r['path']:<62} {value:>10} {r['unit']:<5} {target}{ends} {r['note']}")
    print(f"load of the machine before and after (1 and 5 minutes): {loads}, {os.cpu_count()} cores")
    result = {
        "bench": "slab_paths", "device": platform.machine(), "cores": os.cpu_count(), "load": loads,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"), "rows": rows,
    }  # fmt: skip
    line = json.dumps(result)
    if record:
        RESULT.write_text(line + "\n")
    print(line)
    return 1 if any(met(r) is False for r in rows) else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    return report(quick=args.quick, record=args.record)


if __name__ == "__main__":
    sys.exit(main())
