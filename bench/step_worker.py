"""A worker as `serve` starts it, that also writes down what each step took: for bench.profile_steps and bench.fidelity.

MINSERVE_STEP_LOG names a folder.  One file a worker, NAME.npz, written when it is told to stop: `steps`, a ROW each, and
`watch_s`, what its StepWatch took of the processor for each, and `cost`, the coefficients that it came to.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minserve.loop import ServedEngine, serve
from minserve.step_watch import StepWatch, point_of
from minserve.wire import Loaded, Start
from minserve.worker import EngineServed, open_engine
from sched.step import StepPlan
from sched.step_time import coefficients

ROOT = Path(__file__).resolve().parent.parent
BOOT = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bench.step_worker as w; sys.path.pop(0); w.main()"
)
FOLDER = "MINSERVE_STEP_LOG"
# of a row: when the step ended on the machine's monotonic clock, the fields of a Point, and what the Batcher predicted
ROW = ("end_s", "seconds", "steps", "decodes", "prefill_tokens", "context_tokens", "pairs", "predicted_s")


def log_file(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"{name.replace('/', '_')}.npz"


def main() -> None:
    torch.set_grad_enabled(False)
    rows: list[tuple[float, ...]] = []
    spent: list[float] = []
    names: list[str] = []
    watches: list[StepWatch] = []

    def heard(plan: StepPlan, seconds: float, now: float) -> None:
        begin = time.thread_time()
        rows.append((now, *point_of(plan, seconds), plan.seconds))
        spent[-1] -= time.thread_time() - begin

    def opener(start: Start) -> tuple[ServedEngine, Loaded]:
        served, loaded = open_engine(start)
        assert isinstance(served, EngineServed), f"{served} has no engine to watch"
        names.append(str(start.entry["name"]))
        watch, landed = served.watch, served.watch.landed
        watches.append(watch)

        def timed(plan: StepPlan, planned_s: float, now: float) -> None:
            spent.append(0.0)
            begin = time.thread_time()
            landed(plan, planned_s, now)
            spent[-1] += time.thread_time() - begin

        watch.heard, watch.landed = heard, timed  # type: ignore[method-assign]
        return served, loaded

    try:
        serve(opener, sys.argv[1:])
    finally:
        table: Any = np.array(rows, np.float64).reshape(-1, len(ROW))
        for name, watch in zip(names, watches, strict=True):
            cost = np.array(coefficients(watch.corrected.cost))
            np.savez(log_file(os.environ[FOLDER], name), steps=table, watch_s=np.array(spent), cost=cost)
