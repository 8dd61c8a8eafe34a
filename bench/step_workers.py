"""Workers of a configuration whose steps are timed, and what is made of their logs: points to fit, slow-downs."""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from bench.step_worker import BOOT, FOLDER, ROW, log_file
from minserve.config import Config
from minserve.replay import RunClock, replay
from minserve.replay_engine import EngineTarget
from minserve.replay_heard import Heard
from sched.metrics import SHED
from sched.slowdown import DECODE, PREFILL, Ran
from sched.step_time import Fitted, Point
from sched.workload import Request, Workload

IDS = (5, 250)
TOGETHER = 8  # decodes alike are one point of the fit: a mean says more than a moment
SETTLE_S = 1.0
PATIENT = {"ttft_slo_s": 1e3, "tpot_slo_s": 1e2}
assert ROW[1:-1] == Point._fields, "the log's columns are those of a Point"


class Workers:
    """`spans`: what was run, whose requests, from when to when on the machine's monotonic clock.  `log` and
    `watch_us`, the mean of what watching a step took of the processor, are there by model once they are closed."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.names = config, [m.name for m in config.models]
        self._folder = folder
        self.clock = RunClock()
        self._target: EngineTarget | None = None
        self.spans: list[tuple[str, tuple[str, ...], float, float]] = []
        self.log: dict[str, np.ndarray] = {}
        self.watch_us: dict[str, float] = {}
        self.costs: dict[str, list[float]] = {}

    @property
    def target(self) -> EngineTarget:
        assert self._target is not None, "the workers are not there"
        return self._target

    async def open(self) -> None:
        os.environ[FOLDER] = str(self._folder)
        self._target = EngineTarget(self.config, self.clock, BOOT)
        await self._target.open()
        # the first steps load what they run
        await self.burst("warm", [(name, 16, 4) for name in self.names * 4])
        await asyncio.sleep(SETTLE_S)

    async def close(self) -> None:
        if self._target is None:
            return
        target, self._target = self._target, None
        await target.close()
        for name in self.names:
            with np.load(log_file(self._folder, name)) as found:
                self.log[name] = found["steps"]
                self.costs[name] = found["cost"].tolist()
                self.watch_us[name] = 1e6 * float(found["watch_s"].mean())

    async def run(self, what: str, work: Workload, drain_s: float) -> list[Heard]:
        """All answers, or what came of them until `drain_s` after the last arrival was due."""
        begin = time.monotonic()
        heards = await replay(work, self.target, self.clock, drain_s=drain_s, ids=IDS)
        names = tuple(dict.fromkeys(r.model for r in work.requests))
        self.spans.append((what, names, begin, time.monotonic()))
        return heards

    async def burst(self, what: str, asked: Sequence[tuple[str, int, int]]) -> list[Heard]:
        """(model, prompt tokens, answer tokens) at once, all answered.  RuntimeError where one is not."""
        requests = [
            Request(i, name, 0.0, prompt, answer, session=len(self.spans) * 4096 + i, **PATIENT)
            for i, (name, prompt, answer) in enumerate(asked)
        ]
        heards = await self.run(what, Workload(tuple(requests), 1.0), 300.0)
        if wrong := [h for h in heards if not h.record().completed]:
            raise RuntimeError(f"{wrong[0].request.model} did not answer: {wrong[0].error or SHED}")
        return heards

    def rows(self, name: str, what: str) -> np.ndarray:
        """Of a model's log, those of all spans of that kind."""
        log = self.log[name]
        parts = [
            log[(log[:, 0] > begin) & (log[:, 0] <= end)] for of, _, begin, end in self.spans if of == what
        ]
        return np.concatenate(parts) if parts else log[:0]

    def span(self, index: int, name: str) -> np.ndarray:
        """Of a model's log, those of one span."""
        _, _, begin, end = self.spans[index]
        log = self.log[name]
        return log[(log[:, 0] > begin) & (log[:, 0] <= end)]


def points_of(rows: np.ndarray) -> list[Point]:
    """Steps with prompts one by one, decodes of as many requests TOGETHER at a time."""
    found: list[Point] = []
    alike: list[Point] = []

    def flush() -> None:
        if alike:
            found.append(Point(*(float(x) for x in np.sum(alike, 0))))
            alike.clear()

    for row in rows:
        point = Point(*(float(x) for x in row[1:-1]))
        if point.prefill_tokens or (alike and alike[0].decodes != point.decodes) or len(alike) == TOGETHER:
            flush()
        if point.prefill_tokens:
            found.append(point)
        else:
            alike.append(point)
    flush()
    return found


def ran(rows: np.ndarray, fit: Fitted) -> list[Ran]:
    """Each step with what it takes alone."""
    found = []
    for row in rows:
        point = Point(*(float(x) for x in row[1:-1]))
        phase = PREFILL if point.prefill_tokens else DECODE
        found.append(Ran(float(row[0]), point.seconds, phase, point.predicted(fit.cost)))
    return found


def said(slowdown: Mapping[tuple[str, str], float]) -> str:
    return ", ".join(f"{own} beside {other} +{s:.0%}" for (own, other), s in slowdown.items())
