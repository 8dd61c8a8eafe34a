"""What models that share a device take from each other: slow-downs by phase, from steps that ran at the same time.

While one model runs a step in phase a beside another in phase b its speed is r(a, b) of what it is alone.  A step that
takes t alone then took t = alone + sum over b of r(a, b) x (seconds beside b), which is linear in r: least squares over
all steps, 0 < r <= 1.  The slow-down, what a step takes longer as a part of itself, is 1 / r - 1: what
`sched.simulator.Simulation` takes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

DECODE, PREFILL = PHASES = ("decode", "prefill")
MOST = 20.0  # a model that stands still beside another is not slower, it is shut out
LEAST_S = 0.2  # of a pair of phases side by side, to say anything about it


class Ran(NamedTuple):
    """A step that ended `end_s`, took `seconds`, and takes `alone_s` with the device to itself."""

    end_s: float
    seconds: float
    phase: str
    alone_s: float


Slowdown = dict[tuple[str, str], float]


def slowdowns(steps: Mapping[str, Sequence[Ran]]) -> Slowdown:
    """(own phase, other's phase) to slow-down, of what was seen for LEAST_S at least.  `steps` by model, in order of their ends.

    ValueError unless there are two models: with more, who slowed whom cannot be told.
    """
    if len(steps) != 2:
        raise ValueError(f"slow-downs are between two models, got steps of {sorted(steps)}")
    first, second = steps.values()
    rows = [*_beside(first, second), *_beside(second, first)]
    found: Slowdown = {}
    for own in PHASES:
        mine = [(ran, shared) for ran, shared in rows if ran.phase == own]
        beside = np.array([shared for _, shared in mine]).reshape(-1, len(PHASES))
        seen = [p for p in range(len(PHASES)) if beside[:, p].sum() >= LEAST_S]
        if not seen:
            continue
        # what it had to do beside others, over the step's own length: a long step says no more than a short one
        length = np.array([ran.seconds for ran, _ in mine])
        alone = np.array([ran.seconds - sum(shared) for ran, shared in mine])
        todo = np.array([ran.alone_s for ran, _ in mine]) - alone
        speed = np.linalg.lstsq(beside[:, seen] / length[:, None], todo / length, rcond=None)[0]
        for p, r in zip(seen, speed, strict=True):
            found[own, PHASES[p]] = 1 / min(max(float(r), 1 / (1 + MOST)), 1.0) - 1
    return found


def complete(found: Mapping[tuple[str, str], float]) -> Slowdown:
    """For every pair of phases; one that was not seen is the mean of those that were, 0 where none was."""
    mean = sum(found.values()) / len(found) if found else 0.0
    return {(own, other): found.get((own, other), mean) for own in PHASES for other in PHASES}


def _beside(mine: Sequence[Ran], others: Sequence[Ran]) -> Iterator[tuple[Ran, tuple[float, ...]]]:
    """Each step of `mine` with the seconds that the other was in each phase meanwhile."""
    first = 0
    for ran in mine:
        begin = ran.end_s - ran.seconds
        while first < len(others) and others[first].end_s <= begin:
            first += 1
        shared = dict.fromkeys(PHASES, 0.0)
        i = first
        while i < len(others) and (since := others[i].end_s - others[i].seconds) < ran.end_s:
            shared[others[i].phase] += max(0.0, min(ran.end_s, others[i].end_s) - max(begin, since))
            i += 1
        yield ran, tuple(shared.values())
