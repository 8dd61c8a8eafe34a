"""Several processes that decode on one GPU at once: what each gets, and what all get together.

Each runs the graph of one decode step of a random Llama-3.2-1B over and over between two moments on the common clock.
Whether the driver cuts time or MPS cuts SMs between them is the machine's setting; rows say which.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.shapes import MODELS
from bench.timing import captured
from bench.whole_model import Cell, Engine, empty_pool, random_llama
from kernels.kv_layout import KvLayout

MODEL, BATCH, CONTEXT = "llama-3.2-1b", 16, 1024
READY_S, RUN_S = 40.0, 4.0  # until all have compiled and captured; then the run


def decode_between(cell: Cell, begin: float, end: float) -> int:
    """Steps that ended between the two times."""
    device, model = torch.device("cuda:0"), MODELS[MODEL]
    layout = KvLayout(cell.kv, model.shape.G, model.shape.K)
    llama = random_llama(model, cell.weights, CONTEXT + 1, device)
    engine = Engine(llama, empty_pool(model, layout, BATCH, CONTEXT + 1, device))
    engine.fill(BATCH, CONTEXT)
    replay = captured(engine.step(*((b, CONTEXT - 1, 1) for b in range(BATCH))))
    torch.cuda.synchronize()
    assert time.time() < begin, f"{time.time() - begin:.1f} s late: raise READY_S"
    time.sleep(begin - time.time())
    steps = 0
    while time.time() < end:
        for _ in range(4):
            replay()
        torch.cuda.synchronize()
        steps += 4
    return steps


def rows(processes: int, cell: Cell, *, dry: bool) -> Iterator[dict[str, Any]]:
    begin = time.time() + READY_S
    command = [sys.executable, "-m", "bench.sharing", *cell, str(begin), str(begin + RUN_S)]
    row = {"bench": "sharing", "model": MODEL, **cell._asdict(), "processes": processes, "batch": BATCH}
    row["mps"] = "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    if dry:
        yield {**row, "command": command[1:5], "tag": "static"}
        return
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    printed = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise RuntimeError(f"of {processes} processes, {sum(bool(c.returncode) for c in children)} failed")
    rates = [json.loads(text.splitlines()[-1])["steps"] * BATCH / RUN_S for text in printed]
    yield {
        **row,
        "tok_s": round(sum(rates), 1),
        "each_tok_s": [round(r, 1) for r in rates],
        "tag": "measured",
    }


def main() -> None:
    weights, kv, begin, end = sys.argv[1:]
    print(json.dumps({"steps": decode_between(Cell(weights, kv), float(begin), float(end))}))


if __name__ == "__main__":
    main()
