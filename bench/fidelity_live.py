"""Runs cells on the workers, and makes of what was seen there what the simulator is told."""

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.fidelity_cells import BOTH, FIT, Cell, Scale
from bench.step_workers import PATIENT, Workers, points_of, ran
from minserve.config import Config
from minserve.place import plan_memory
from minserve.replay import lateness
from minserve.replay_heard import Heard
from minserve.simulate import simulate
from minserve.step_profile import Profile
from sched.metrics import Record, summarize
from sched.slowdown import DECODE, PREFILL, Slowdown, complete, slowdowns
from sched.step_time import Fitted, best_fit
from sched.synthetic import Lengths
from sched.workload import Request, Workload, ordered

BURST, ALONE, LONG_BURST = 24, 12, 300
SOLO, BESIDE, ONE, JUDGED = "solo", "beside", "one", "judged"


@dataclasses.dataclass(frozen=True)
class Rates:
    """Requests a second that a burst is served with, alone and beside the other's."""

    alone: dict[str, float]
    together: dict[str, float]

    def of(self, cell: Cell) -> dict[str, float]:
        most = self.together if cell.together else self.alone
        return {name: load * most[name] for name, load in cell.loads.items()}


class Live:
    """The workers of a configuration, and cells to run on them."""

    def __init__(self, scale: Scale, config: Config, folder: Path, drain_s: float) -> None:
        self.scale, self.workers, self._drain_s = scale, Workers(config, folder), drain_s
        self._asked: dict[str, list[tuple[float, float]]] = {name: [] for name in BOTH}

    async def run(self, cell: Cell, work: Workload) -> list[Heard]:
        """What is no cell of the fit is judged, and nothing is fitted to it."""
        what = JUDGED if cell not in FIT else BESIDE if cell.together else SOLO
        heards = await self.workers.run(what, work, self._drain_s)
        await asyncio.sleep(0.3)  # who was given up is gone
        return heards

    async def rates(self) -> Rates:
        """Together with as many requests of each as take about as long."""
        asked = (int(self.scale.prompt), int(self.scale.answer))
        alone = {name: _rate(await self.workers.burst(SOLO, [(name, *asked)] * BURST), name) for name in BOTH}
        share = 2 * BURST / sum(alone.values())
        each = {name: max(1, round(share * alone[name])) for name in BOTH}
        heards = await self.workers.burst(
            BESIDE, [(name, *asked) for name, n in each.items() for _ in range(n)]
        )
        return Rates(alone, {name: _rate(heards, name) for name in BOTH})

    async def ask_alone(self) -> None:
        """Requests that come one at a time, for `overheads`."""
        for name in BOTH:
            for _ in range(ALONE):
                (heard,) = await self.workers.burst(ONE, [(name, int(self.scale.prompt), 2)])
                assert heard.first_s is not None, f"{heard} was not answered"
                zero = time.monotonic() - self.workers.clock()
                self._asked[name].append((zero + heard.first_s, heard.first_s - heard.request.arrival_s))
                await asyncio.sleep(0.05)

    def overheads(self) -> dict[str, float]:
        """Seconds of a TTFT between client and worker, by model: the median of what was no step, of requests that came one
        at a time."""
        found = {}
        for name, asked in self._asked.items():
            ends, seconds = self.workers.log[name][:, 0], self.workers.log[name][:, 1]
            last = [int(np.searchsorted(ends, at)) - 1 for at, _ in asked]
            between = [ttft - float(seconds[i]) for i, (_, ttft) in zip(last, asked, strict=True)]
            found[name] = max(0.0, statistics.median(between))
        return found

    def step_errors(self) -> dict[str, float]:
        """What the workers said last of their own predictions."""
        return {name: host.stats.step_error for name, host in self.workers.target.hosts.items()}

    def step_ratios(self, span: int, profile: Profile) -> dict[str, float]:
        """By model, what its steps in a span took over what they take alone by the profile: drift since the fit, and the
        other model's doing."""
        found = {}
        for name in self.workers.spans[span][1]:
            steps = ran(self.workers.span(span, name), profile.models[name])
            found[name] = sum(s.seconds for s in steps) / max(sum(s.alone_s for s in steps), 1e-9)
        return found

    def predicted(self, span: int) -> dict[str, dict[str, float]]:
        """By model and phase, what the Batcher predicted a step to take over what it took: mean and standard deviation."""
        found: dict[str, dict[str, float]] = {}
        for name in self.workers.spans[span][1]:
            rows = self.workers.span(span, name)
            found[name] = {}
            for phase, of in ((PREFILL, rows[rows[:, 4] > 0]), (DECODE, rows[rows[:, 4] == 0])):
                if len(of):
                    part = of[:, 7] / of[:, 1]
                    found[name] |= {phase: float(part.mean()), f"{phase} sd": float(part.std())}
        return found

    def fitted(self) -> tuple[dict[str, Fitted], Slowdown, dict[str, Any]]:
        """By model from what it did alone; slow-downs from what both did; and of how many points."""
        models, counts = {}, {}
        for name in BOTH:
            points = points_of(np.concatenate([self.workers.rows(name, what) for what in (SOLO, ONE)]))
            models[name], counts[name] = best_fit(points), len(points)
        beside = {name: ran(self.workers.rows(name, BESIDE), models[name]) for name in BOTH}
        return models, slowdowns(beside), {"points": counts, "beside": {n: len(r) for n, r in beside.items()}}


def _rate(heards: Sequence[Heard], name: str) -> float:
    ends = [h.end_s for h in heards if h.request.model == name and h.end_s is not None]
    return len(ends) / max(ends)


def capacity(config: Config, scale: Scale, profile: Profile) -> Rates:
    """By simulation, of bursts that last: what the loads of the judged cells are parts of."""
    costs = {name: fit.cost for name, fit in profile.models.items()}
    pools, slowdown = plan_memory(config), complete(profile.slowdown)
    lengths = Lengths(scale.prompt, scale.answer, max_len=scale.window // 2)

    def burst(each: Mapping[str, int]) -> dict[str, float]:
        rng, requests = np.random.default_rng(0), []
        for name, n in each.items():
            prompts, answers = lengths.draw(rng, n)
            requests += [
                Request(0, name, 0.0, int(p), int(a), **PATIENT)
                for p, a in zip(prompts, answers, strict=True)
            ]
        work = Workload(ordered(requests), 1.0)
        _, records, _ = simulate(config, work, costs, pools, slowdown=slowdown)
        ends = {name: max(r.end_s or 0.0 for r in records if r.model == name) for name in each}
        return {name: n / ends[name] for name, n in each.items()}

    alone = {name: burst({name: LONG_BURST})[name] for name in BOTH}
    share = 2 * LONG_BURST / sum(alone.values())
    return Rates(alone, burst({name: round(share * alone[name]) for name in BOTH}))


def simulated(
    config: Config, work: Workload, profile: Profile, overhead_s: Mapping[str, float], drain_s: float
) -> list[Record]:
    """The same requests; what has not ended when the client gives up is a miss there, too."""
    costs = {name: fit.cost for name, fit in profile.models.items()}
    _, records, _ = simulate(config, work, costs, plan_memory(config), slowdown=complete(profile.slowdown))
    return [_cut(_later(r, overhead_s[r.model]), work.duration_s + drain_s) for r in records]


def _later(r: Record, by_s: float) -> Record:
    if r.first_s is None or r.end_s is None:
        return r
    return dataclasses.replace(r, first_s=r.first_s + by_s, end_s=r.end_s + by_s)


def _cut(r: Record, end_s: float) -> Record:
    if r.end_s is None or r.end_s <= end_s:
        return r
    first = r.first_s if r.first_s is not None and r.first_s <= end_s else None
    return dataclasses.replace(r, first_s=first, end_s=None, output_tokens=0)


def summary_of(records: Sequence[Record]) -> dict[str, Any]:
    return summarize(records, {})


def late_ms(heards: Sequence[Heard]) -> float:
    return float(lateness(heards)["p99_ms"])
