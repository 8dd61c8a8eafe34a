"""Where the coefficients of a StepCost come from: a profile, the shape of a model and a device, or the steps themselves.

    fit        a profile's prefill and decode times, by least squares of relative errors, no coefficient below 0
    roofline   bytes and operations of a model over a device's bandwidth and speed: before anything was measured
    Corrected  recursive least squares over the steps that really run, from either of the two

All of them say by how much they are off, as the mean of |predicted / measured - 1|.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sched.latency import StepCost

Floats = NDArray[np.float64]
FIELDS = ("base_s", "per_decode_s", "per_prefill_token_s", "per_context_token_s")
# tokens of prompts in a step of the profile, as FineServe's engines run (arXiv 2509.06261, artifact)
PROFILE_STEP_TOKENS = 2048
FORGET = 0.999  # of a step, in the next: a few thousand steps count
ERROR_WEIGHT = 0.01


class Point(NamedTuple):
    """`steps` steps that together have so many decodes, prompt tokens and tokens of context read took `seconds`."""

    seconds: float
    steps: float
    decodes: float
    prefill_tokens: float
    context_tokens: float

    def predicted(self, cost: StepCost) -> float:
        return float(np.dot(self[1:], coefficients(cost)))


class Fitted(NamedTuple):
    cost: StepCost
    error: float


def coefficients(cost: StepCost) -> tuple[float, ...]:
    return tuple(getattr(cost, name) for name in FIELDS)


def prefill_point(batch: int, prompt: int, seconds: float) -> Point:
    """A batch of prompts, computed in steps of at most PROFILE_STEP_TOKENS."""
    tokens = batch * prompt
    return Point(seconds, -(-tokens // PROFILE_STEP_TOKENS), 0, tokens, tokens)


def decode_point(batch: int, prompt: int, answer: int, tpot_s: float) -> Point:
    """The mean step of a batch that answers."""
    return Point(tpot_s, 1, batch, 0, batch * (prompt + answer / 2))


def error_of(cost: StepCost, points: Iterable[Point]) -> float:
    off = [abs(p.predicted(cost) / p.seconds - 1) for p in points]
    return float(np.mean(off)) if off else 0.0


def fit(points: Sequence[Point]) -> Fitted:
    """ValueError without points, or with one that took no time.

    The best of all subsets of coefficients whose least squares are not negative: with four there are fifteen, so this is
    the exact solution of the constrained problem.
    """
    if not points:
        raise ValueError("a step-time model needs at least one measured point, got none")
    if bad := [p for p in points if not 0 < p.seconds < np.inf]:
        raise ValueError(f"measured seconds must be above 0, got {bad[0]}")
    x = np.array([p[1:] for p in points], np.float64) / np.array([[p.seconds] for p in points])
    ones = np.ones(len(points))
    best, least = np.zeros(4), np.inf
    for n in range(1, 5):
        for columns in combinations(range(4), n):
            part = x[:, columns]
            scale = np.abs(part).max(0)
            if not scale.all():
                continue  # nothing in the profile tells this coefficient
            found = np.linalg.lstsq(part / scale, ones, rcond=None)[0] / scale
            rest = float(((part @ found - ones) ** 2).sum())
            if (found >= 0).all() and rest < least - 1e-12:
                best, least = np.zeros(4), rest
                best[list(columns)] = found
    cost = StepCost(**dict(zip(FIELDS, best.tolist(), strict=True)))
    return Fitted(cost, error_of(cost, points))


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What bounds a step.  `reach`: the part of bandwidth and speed that kernels reach; `floor_s`: a step of nothing."""

    bandwidth: float  # bytes a second
    flops: dict[str, float]  # a second, by the type that is multiplied
    reach: float = 0.7
    floor_s: float = 0.0015


# published figures, dense
DEVICES = {
    "a100": Device(bandwidth=2.04e12, flops={"16": 312e12, "8": 624e12}),
    "h100": Device(bandwidth=3.35e12, flops={"16": 989e12, "8": 1979e12}),
    "h200": Device(bandwidth=4.8e12, flops={"16": 989e12, "8": 1979e12}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a model's steps move and compute.  Bytes of all weights; parameters that multiply each token; bytes of KV a
    token of context; `bits`: 16 or 8, of the rows that are multiplied."""

    weight_bytes: float
    parameters: float
    kv_token_bytes: float
    bits: int = 16


def roofline(work: Work, device: Device) -> StepCost:
    """Decodes are bound by bytes, prompts by operations; weights are read once a step, whoever is in it."""
    rate = device.bandwidth * device.reach
    speed = device.flops[str(work.bits)] * device.reach
    per_token = 2 * work.parameters / speed
    return StepCost(
        base_s=device.floor_s + work.weight_bytes / rate,
        # beside the weights that are read anyway a decode's products cost nothing until they are many
        per_decode_s=per_token,
        per_prefill_token_s=per_token,
        per_context_token_s=work.kv_token_bytes / rate,
    )


class Corrected:
    """A cost model that follows the steps: recursive least squares of relative errors, with forgetting.

    Starts at `cost`, believed as if `trust` steps had shown it.  `error` is the running mean of what the prediction was
    off by before each step was known; 0 until one is.
    """

    def __init__(self, cost: StepCost, trust: float = 50.0) -> None:
        self.cost, self.error, self.num_steps = cost, 0.0, 0
        self._start = np.array(coefficients(cost))
        # in units of the coefficients themselves; one that was 0 may become what a microsecond a unit is
        self._unit = np.where(self._start > 0, self._start, 1e-9)
        self._theta = self._start / self._unit
        self._p = np.eye(4) / trust

    def observe(self, point: Point) -> None:
        """A step that has run."""
        if not point.seconds > 0:
            return  # a clock that stood still says nothing
        off = abs(point.predicted(self.cost) / point.seconds - 1)
        self.num_steps += 1
        self.error += (off - self.error) * max(ERROR_WEIGHT, 1 / self.num_steps)
        x = np.array(point[1:]) * self._unit / point.seconds
        px = self._p @ x
        gain = px / (FORGET + x @ px)
        self._theta = np.maximum(self._theta + gain * (1.0 - x @ self._theta), 0.0)
        self._p = (self._p - np.outer(gain, px)) / FORGET
        # what no step tells apart would be believed less and less, without end
        trace = float(np.trace(self._p))
        if trace > 1e3:
            self._p *= 1e3 / trace
        self.cost = StepCost(**dict(zip(FIELDS, (self._theta * self._unit).tolist(), strict=True)))
