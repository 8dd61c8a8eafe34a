"""Two processes on one GPU in each mode of sharing: how much each is slowed by the other, and what a mode costs alone.

Each runs decode steps (a graph) or chunks of a prompt of a random Llama-3.2-1B over and over, first alone, then beside
another, between two moments on the common clock.  Slow-down is the rate alone in mode none over the rate then.  MPS is
started and stopped here, in private directories; a daemon that runs already is left alone and used.  In a dry run the
processes step a tiny model on a CPU, whose kernels they compile, and what has no daemon there says so.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from bench import sharing
from bench.shapes import MODELS, TINY
from bench.whole_model import CELLS, Cell, Engine, empty_pool, random_llama
from kernels.kv_layout import KvLayout
from kernels.launch import SM_LIMITS, gpu_facts
from minserve.cuda_memory import CudaError, export_memory, import_memory, open_driver
from minserve.green import create_green
from minserve.keeper import ROOT
from minserve.mps import Daemon, MpsError
from minserve.pool import device_tensor
from minserve.probe import choose, probe

MODES = ("none", "mps", "mps-capped", "mps-static", "green")
ROLES = ("decode", "prefill")
PAIRS = (("decode", "decode"), ("decode", "prefill"), ("prefill", "prefill"))
CHUNK = 2048
# which memory the pool is: torch's own, or exported and imported as a served model's
POOLS = ("torch", "exported")


class Seat(NamedTuple):
    """Where a process sits: its environment, and its groups of SMs (first, count), (0, 0) for all."""

    environ: dict[str, str]
    groups: tuple[int, int] = (0, 0)


# ---- the process


def prefilling(cell: Cell, *, dry: bool) -> Callable[[], object]:
    """One chunk of a prompt, from its first token, ready to run."""
    device, model = torch.device("cpu" if dry else "cuda:0"), TINY if dry else MODELS[sharing.MODEL]
    chunk = 48 if dry else CHUNK
    layout = KvLayout(cell.kv, model.shape.G, model.shape.K)
    llama = random_llama(model, cell.weights, chunk + 1, device)
    call = Engine(llama, empty_pool(model, layout, 1, chunk + 1, device)).step((0, 0, chunk))
    call()
    return call


def exported(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of the same size in memory that went through the driver's export, as a pool's has."""
    driver = open_driver()
    made = export_memory(driver, tensor.device.index or 0, tensor.nbytes)
    memory = import_memory(driver, tensor.device.index or 0, made.handle, made.fds)
    for fd in made.fds:
        os.close(fd)
    return device_tensor(memory)[: tensor.nbytes].zero_()


def work(args: argparse.Namespace) -> int:
    if args.mps and not args.dry_run:
        torch.zeros(1, device="cuda:0")
        Daemon().assert_attached([os.getpid()])
    if args.groups[1] and not args.dry_run:
        green = create_green(open_driver(), 0, *args.groups)
        SM_LIMITS[0] = green.sms
        torch.cuda.set_stream(torch.cuda.ExternalStream(green.stream, device="cuda:0"))
    if not args.dry_run:
        sys.stderr.write(f"{args.role}: {gpu_facts(torch.device('cuda:0')).num_sms} SMs\n")

    def ready(cell: Cell, *, dry: bool) -> Callable[[], object]:
        if args.role == "prefill":
            return prefilling(cell, dry=dry)
        move = exported if args.pool == "exported" and not dry else None
        return sharing.stepping(cell, dry=dry, move=move)

    return sharing.decode(Cell(*args.cell), dry=args.dry_run, ready=ready)


# ---- who sits where


@contextmanager
def mps(static: bool) -> Iterator[Daemon]:
    """A daemon of this kind; MpsError where there cannot be one."""
    daemon = Daemon()
    began = daemon.ours and daemon.start(static=static)
    try:
        yield daemon
    finally:
        if began:
            daemon.stop(force=True)


@contextmanager
def seats(mode: str) -> Iterator[list[Seat]]:
    """Of two processes.  MpsError or ValueError where this machine has no such mode."""
    plain = dict(os.environ)
    beside = plain | {"CUDA_MPS_PIPE_DIRECTORY": str(Daemon().root / "none")}
    if mode == "none":
        yield [Seat(beside)] * 2
    elif mode == "green":
        found = probe(0)
        choose("green", found.modes, "cuda:0")
        half = len(found.gpu.green_sms) // 2
        yield [Seat(beside, (0, half)), Seat(beside, (half, half))]
    elif mode == "mps-static":
        found = probe(0)
        with mps(static=True) as daemon:
            half = daemon.partitions()[found.gpu.mps_uuid].free_chunks // 2
            parts = [daemon.add_partition(found.gpu.mps_uuid, half) for _ in range(2)]
            try:
                yield [Seat(plain | daemon.client_environ | {"CUDA_MPS_SM_PARTITION": p}) for p in parts]
            finally:
                for part in parts:
                    daemon.remove_partition(part)
    else:
        cap = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50"} if mode == "mps-capped" else {}
        with mps(static=False) as daemon:
            yield [Seat(plain | daemon.client_environ | cap)] * 2


def command(mode: str, role: str, cell: Cell, seat: Seat, *, dry: bool, pool: str = "torch") -> list[str]:
    first, count = seat.groups
    found = [sys.executable, "-m", "bench.sm_shares", "--role", role, "--pool", pool, "--cell", *cell]
    found += ["--groups", str(first), str(count)]
    return found + ["--mps"] * mode.startswith("mps") + ["--dry-run"] * dry


def rates(mode: str, roles: tuple[str, ...], cell: Cell, at: list[Seat], *, dry: bool) -> list[float]:
    """Steps a second of each."""
    run_s = 0.5 if dry else sharing.RUN_S
    commands = [
        (command(mode, role, cell, seat, dry=dry), seat.environ)
        for role, seat in zip(roles, at, strict=False)
    ]
    return [n / run_s for n in sharing.together(commands, run_s)]


def matrix_rows(mode: str, *, dry: bool) -> Iterator[dict[str, Any]]:
    """Slow-downs against a process alone without any sharing."""
    cell, tag = CELLS[1], "static" if dry else "measured"
    row = {"bench": "sm-shares", "mode": mode, **cell._asdict(), "tag": tag}
    try:
        with seats(mode) as at, seats("none") as free:
            alone = {r: rates("none", (r,), cell, free, dry=dry)[0] for r in ROLES}
            for role in () if dry else ROLES:
                (rate,) = rates(mode, (role,), cell, at, dry=dry)
                yield {**row, "roles": [role], "steps_s": [rate], "slow_down": [ratio(alone[role], rate)]}
            for pair in PAIRS[1:2] if dry else PAIRS:
                found = rates(mode, pair, cell, at, dry=dry)
                slow = [ratio(alone[role], rate) for role, rate in zip(pair, found, strict=True)]
                yield {**row, "roles": list(pair), "steps_s": found, "slow_down": slow}
    except (MpsError, CudaError, ValueError) as error:
        yield {**row, "unsupported": str(error)}


def ratio(alone: float, rate: float) -> float | None:
    return round(alone / rate, 3) if rate else None


def cost_rows(*, dry: bool) -> Iterator[dict[str, Any]]:
    """One model: decode steps on torch's memory without MPS, on exported memory, and on that under MPS."""
    cell, run_s = CELLS[1], 0.5 if dry else sharing.RUN_S
    row = {"bench": "sharing-cost", **cell._asdict(), "tag": "static" if dry else "measured"}
    found: dict[str, list[float]] = {}
    for mode, pool in (("none", "torch"), ("none", "exported"), ("mps", "exported")) * (1 if dry else 3):
        try:
            with seats(mode) as at:
                run = (command(mode, "decode", cell, at[0], dry=dry, pool=pool), at[0].environ)
                steps = sharing.together([run], run_s)[0]
        except MpsError as error:
            yield {**row, "arm": f"{mode} {pool}", "unsupported": str(error)}
            continue
        found.setdefault(f"{mode} {pool}", []).append(steps / run_s)
    off = max(found["none torch"])
    for arm, each in found.items():
        yield {**row, "arm": arm, "steps_s": each, "cost": ratio(off, max(each)), "target": 1.01}


def probe_rows(*, dry: bool) -> Iterator[dict[str, Any]]:
    """What `python -m minserve.probe --exports` says, without a daemon and beside one of ours."""
    row: dict[str, Any] = {"bench": "probe", "tag": "static" if dry else "measured"}
    yield {**row, **probed()}
    try:
        with mps(static=False):
            yield {**row, "under": "mps", **probed()}
    except MpsError as error:
        yield {**row, "under": "mps", "unsupported": str(error)}


def probed() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "minserve.probe", "--exports"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stdout.splitlines()
    if not lines:
        raise RuntimeError(f"the probe ended with {done.returncode}: {done.stderr[-1000:]}")
    # without a driver the probe says so, which is what it found
    said: dict[str, Any] = json.loads(lines[-1])
    return {"unsupported" if k == "error" else k: v for k, v in said.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--role", choices=ROLES, required=True)
    parser.add_argument("--cell", nargs=2, required=True)
    parser.add_argument("--pool", choices=POOLS, default="torch")
    parser.add_argument("--groups", nargs=2, type=int, default=(0, 0))
    parser.add_argument("--mps", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    sys.stdout.write(f"{work(parser.parse_args())}\n")


if __name__ == "__main__":
    main()
