"""Several processes that decode on one GPU at once: what each gets, and what all get together.

Each runs the graph of one decode step of a random Llama-3.2-1B over and over between two moments on the common clock,
which are named once all have compiled and captured.  Whether the driver cuts time or MPS cuts SMs between them is the
machine's setting; rows say which.  In a dry run the processes step a tiny model on a CPU, whose kernels they compile.
"""

import dataclasses
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch

from bench.shapes import MODELS, TINY
from bench.target import recorded
from bench.timing import captured
from bench.whole_model import Cell, Engine, empty_pool, random_llama
from kernels import backend
from kernels.kv_layout import KvLayout

MODEL, BATCH, CONTEXT = "llama-3.2-1b", 16, 1024
READY = "ready"
READY_S, RUN_S = 110.0, 4.0  # until all have compiled and captured; then the run
TARGET = 90


def stepping(
    cell: Cell, *, dry: bool, move: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Callable[[], object]:
    """One decode step of the whole batch, ready to run.  `move`: what its pool is to be in place of torch's memory."""
    device, model = torch.device("cpu" if dry else "cuda:0"), TINY if dry else MODELS[MODEL]
    batch, context = (2, 32) if dry else (BATCH, CONTEXT)
    layout = KvLayout(cell.kv, model.shape.G, model.shape.K)
    llama = random_llama(model, cell.weights, context + 1, device)
    paged = empty_pool(model, layout, batch, context + 1, device)
    if move is not None:
        paged = dataclasses.replace(paged, pool=move(paged.pool))
    engine = Engine(llama, paged)
    engine.fill(batch, context)
    call = engine.step(*((b, context - 1, 1) for b in range(batch)))
    call()
    return call if dry else captured(call)


def decode(cell: Cell, *, dry: bool, ready: Callable[..., Callable[[], object]] = stepping) -> int:
    """Steps that ended between the two times that the parent names once it has been told that this process is ready."""
    compiling = recorded(TARGET) if dry else nullcontext()
    with compiling, mock.patch.object(backend, "runs_triton", return_value=True):
        run = ready(cell, dry=dry)
        wait = (lambda: None) if dry else torch.cuda.synchronize
        wait()
        print(READY, flush=True)
        begin, end = map(float, sys.stdin.readline().split())
        time.sleep(max(0.0, begin - time.time()))
        steps = 0
        while time.time() < end:
            for _ in range(1 if dry else 4):
                run()
                steps += 1
            wait()
        return steps


def rows(processes: int, cell: Cell, *, dry: bool) -> Iterator[dict[str, Any]]:
    row = {"bench": "sharing", "model": MODEL, **cell._asdict(), "processes": processes, "batch": BATCH}
    row["mps"] = "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    run_s = 0.5 if dry else RUN_S
    command = [sys.executable, "-m", "bench.sharing", *cell, *(["--dry-run"] if dry else [])]
    steps = together([(command, dict(os.environ))] * processes, run_s)
    rates = [n * BATCH / run_s for n in steps]
    each = [round(r, 1) for r in rates]
    rates_row = {"tok_s": round(sum(rates), 1), "each_tok_s": each}
    yield {**row, **rates_row, "tag": "static" if dry else "measured"}


def together(commands: list[tuple[list[str], dict[str, str]]], run_s: float) -> list[int]:
    """Steps of each process, a command and its environment, between the same two moments, once all are ready."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children: list[Any] = []
    try:
        children += [subprocess.Popen(command, env=env, **pipes) for command, env in commands]
        await_all(children)
        begin = time.time() + 1.0
        for child in children:
            child.stdin.write(f"{begin} {begin + run_s}\n")
            child.stdin.flush()
        return [int(child.communicate(timeout=run_s + 60)[0].split()[-1]) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def await_all(children: list[Any]) -> None:
    """RuntimeError where one ends before it is ready, or all are not within READY_S."""
    end = time.time() + READY_S
    for i, child in enumerate(children):
        who = f"process {i} of {len(children)}"
        poll = select.poll()
        poll.register(child.stdout, select.POLLIN)
        line = ""
        while line.strip() != READY:
            if not poll.poll(max(0.0, end - time.time()) * 1000):
                raise RuntimeError(f"{who} was not ready within {READY_S:.0f} s")
            line = child.stdout.readline()
            if not line:
                raise RuntimeError(f"{who} ended with {child.wait()} before it was ready")


def main() -> None:
    weights, kv, *dry = sys.argv[1:]
    print(decode(Cell(weights, kv), dry=bool(dry)))


if __name__ == "__main__":
    main()
