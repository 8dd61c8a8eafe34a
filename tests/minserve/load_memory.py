"""Loads a model and prints what memory that took: `python -m tests.minserve.load_memory FOLDER QUANTIZATION...`.

One line of JSON a quantization: bytes held afterwards, the most that the process held beyond what it held before, and
the same where what was read is never let go of.  A process of its own: memory of another test must not count.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from minserve.checkpoint import Checkpoint
from minserve.config import ModelEntry
from minserve.loading import load_model
from minserve.resolve import resolve_model


def status(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def measure(folder: str, quantization: str) -> tuple[int, int]:
    """(bytes that stay, most bytes beyond those of before)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    entry = ModelEntry.read({"name": "m", "path": folder, "quantization": quantization, "dtype": "bf16"})
    model = load_model(resolve_model(entry, "cpu"), "cpu")
    return model.report.nbytes, status("VmHWM") - before


def main() -> None:
    folder, *quantizations = sys.argv[1:]
    torch.set_num_threads(1)
    for quantization in quantizations:
        measure(folder, quantization)  # what is made once, by the first load: libraries and their caches
        stays, peak = measure(folder, quantization)
        release, Checkpoint.release = Checkpoint.release, lambda self, name: None
        _, kept = measure(folder, quantization)
        Checkpoint.release = release
        print(json.dumps({"quantization": quantization, "stays": stays, "peak": peak, "kept": kept}))


if __name__ == "__main__":
    main()
