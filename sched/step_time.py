"""Where the coefficients of a StepCost come from: a profile, the shape of a model and a device, or the steps themselves.

    fit        a profile's prefill and decode times, by least squares of relative errors, nothing below 0
    roofline   bytes and operations of a model over a device's bandwidth and speed: before anything was measured
    Corrected  recursive least squares over the steps that really run, from either of the two

All of them say by how much they are off, as the mean of |predicted / measured - 1|; `cross_validated` says it of steps
that the fit has not seen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sched.latency import COEFFICIENTS, StepCost

Floats = NDArray[np.float64]
FIELDS = COEFFICIENTS
# tokens of prompts in a step of the profile, as FineServe's engines run (arXiv 2509.06261, artifact)
PROFILE_STEP_TOKENS = 2048
FORGET = 0.999  # of a step, in the next: a few thousand steps count
ERROR_WEIGHT = 0.01
BATCH = 64
LEAST_TRUST = 1.0
NOTHING = 1e-12  # a trifle, to stay at the start without any information
# 1, 2, 3, 4, 6, 8, 12 ... 4096 rows: a library may change its kernel at any of the small ones
KNOTS = np.array(sorted({f * 2.0**k for k in range(12) for f in (1, 1.5, 2)} - {1.5}))
FOLDS = 5
KNOT_POINTS = 3  # a knot needs so many points around it
RIDGE = 0.03  # of a knot as long as the step: what neither base nor tokens can say goes to the knots
WORTH = 0.9  # knots are used where they leave at most so much of the error


class Point(NamedTuple):
    """`steps` steps that together have so many decodes, prompt tokens, tokens of context read and pairs took `seconds`."""

    seconds: float
    steps: float
    decodes: float
    prefill_tokens: float
    context_tokens: float
    pairs: float = 0.0

    @property
    def rows(self) -> float:
        """Of one step."""
        return (self.decodes + self.prefill_tokens) / self.steps

    def predicted(self, cost: StepCost) -> float:
        s, n, c = self, self.steps, cost
        known = n * c.base_s + s.decodes * c.per_decode_s + s.prefill_tokens * c.per_prefill_token_s
        return (
            known + s.context_tokens * c.per_context_token_s + s.pairs * c.per_pair_s + n * c.rows_s(s.rows)
        )


class Fitted(NamedTuple):
    cost: StepCost
    error: float


def coefficients(cost: StepCost) -> tuple[float, ...]:
    return tuple(getattr(cost, name) for name in FIELDS)


def prefill_point(batch: int, prompt: int, seconds: float) -> Point:
    """A batch of prompts, computed in steps of at most PROFILE_STEP_TOKENS."""
    tokens, most = batch * prompt, PROFILE_STEP_TOKENS
    ends = [*range(most, prompt, most), prompt]
    pairs = sum((end - begin) * end for begin, end in zip([0, *ends], ends, strict=False))
    return Point(seconds, -(-tokens // most), 0, tokens, batch * sum(ends), batch * pairs)


def decode_point(batch: int, prompt: int, answer: int, tpot_s: float) -> Point:
    """The mean step of a batch that answers."""
    return Point(tpot_s, 1, batch, 0, batch * (prompt + answer / 2))


def error_of(cost: StepCost, points: Iterable[Point]) -> float:
    off = [abs(p.predicted(cost) / p.seconds - 1) for p in points]
    return float(np.mean(off)) if off else 0.0


def fit(points: Sequence[Point], knots: Sequence[float] = ()) -> Fitted:
    """The least squares of relative errors with nothing below 0; `knots`: the rows at which `StepCost.rows` may bend.

    ValueError without points, or with one that took no time.
    """
    if not points:
        raise ValueError("a step-time model needs at least one measured point, got none")
    if bad := [p for p in points if not 0 < p.seconds < np.inf]:
        raise ValueError(f"measured seconds must be above 0, got {bad[0]}")
    seconds = np.array([p.seconds for p in points])
    x = np.array([p[1:] for p in points], np.float64)
    if knots:
        steps, rows = x[:, :1], np.array([p.rows for p in points])
        x = np.hstack([x, steps * _hats(rows, np.asarray(knots, np.float64))])
    x /= seconds[:, None]
    scale = np.where((most := np.abs(x).max(0)) > 0, most, 1.0)
    x /= scale
    ridge = RIDGE * len(points) ** 0.5 * np.eye(len(knots), x.shape[1], len(FIELDS))
    target = np.concatenate([np.ones(len(points)), np.zeros(len(knots))])
    found = nonnegative(np.vstack([x, ridge]), target) / scale
    curve = tuple(zip(map(float, knots), found[len(FIELDS) :].tolist(), strict=True))
    cost = StepCost(**dict(zip(FIELDS, found.tolist(), strict=False)), rows=curve)
    return Fitted(cost, error_of(cost, points))


def best_fit(points: Sequence[Point]) -> Fitted:
    """With knots where the points tell and steps that were left out are predicted better for it; the error is theirs."""
    plain, knots = cross_validated(points), knots_of(points)
    curved = cross_validated(points, knots) if knots else np.inf
    if curved <= WORTH * plain:
        return Fitted(fit(points, knots).cost, curved)
    return Fitted(fit(points).cost, plain)


def cross_validated(points: Sequence[Point], knots: Sequence[float] = ()) -> float:
    """The mean error of points by fits of others, each of them left out once.  Neighbours by shape go to different fits, so
    a shape that was measured once is judged by a fit that has not seen it."""
    if len(points) < FOLDS:
        return error_of(fit(points, knots).cost, points)
    points = sorted(points, key=_shape)
    off = 0.0
    for i in range(FOLDS):
        judged = points[i::FOLDS]
        rest = [p for j, p in enumerate(points) if j % FOLDS != i]
        off += len(judged) * error_of(fit(rest, knots).cost, judged)
    return off / len(points)


def _shape(p: Point) -> tuple[float, ...]:
    return p.prefill_tokens, *p[1:]


def knots_of(points: Sequence[Point]) -> tuple[float, ...]:
    """Of KNOTS those with points around."""
    rows = np.array([p.rows for p in points])
    nearest, count = np.unique(np.abs(np.log(rows[:, None] / KNOTS)).argmin(1), return_counts=True)
    return tuple(KNOTS[nearest[count >= KNOT_POINTS]].tolist())


def _hats(rows: Floats, knots: Floats) -> Floats:
    """[points, knots]: how much of each knot a point has, on straight lines between them."""
    found, at = np.zeros((len(rows), len(knots))), np.arange(len(rows))
    if len(knots) == 1:
        return found + 1.0
    low = np.clip(np.searchsorted(knots, rows, side="right") - 1, 0, len(knots) - 2)
    part = np.clip((rows - knots[low]) / (knots[low + 1] - knots[low]), 0.0, 1.0)
    found[at, low], found[at, low + 1] = 1.0 - part, part
    return found


def nonnegative(a: Floats, b: Floats) -> Floats:
    """The x >= 0 of least |a x - b|, by active sets (Lawson and Hanson 1974, chapter 23)."""
    x, used = np.zeros(a.shape[1]), np.zeros(a.shape[1], bool)
    gradient = a.T @ b
    limit = 1e-12 * float(np.abs(gradient).max(initial=0.0))
    for _ in range(3 * a.shape[1]):
        j = int(np.where(used, -np.inf, gradient).argmax())
        if used[j] or gradient[j] <= limit:
            break
        used[j] = True
        while True:
            z = np.zeros(a.shape[1])
            z[used] = np.linalg.lstsq(a[:, used], b, rcond=None)[0]
            below = used & (z <= 0)
            if not below.any():
                break
            # as far towards z as nothing falls below 0; what reaches it is out
            part = x[below] / (x[below] - z[below])
            x += float(part.min()) * (z - x)
            used[np.flatnonzero(below)[part == part.min()]] = False
            x[~used] = 0.0
        x = z
        gradient = a.T @ (b - a @ x)
    return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What bounds a step.  `reach`: the part of bandwidth and speed that kernels reach; `floor_s`: a step of nothing."""

    bandwidth: float  # bytes a second
    flops: dict[str, float]  # a second, by the type that is multiplied
    reach: float = 0.7
    floor_s: float = 0.0015


# of the SMs, below which decodes become slower: the FineServe authors' profile of an H100 has TPOTs x 0.98 to 1.07 at 40 %
# and x 1.0 to 1.65 at 20 %, TTFTs x 1.8 to 4.3 at 20 %
BANDWIDTH_SHARE = 0.25
# published figures, dense
DEVICES = {
    "a100": Device(bandwidth=2.04e12, flops={"16": 312e12, "8": 624e12}),
    "h100": Device(bandwidth=3.35e12, flops={"16": 989e12, "8": 1979e12}),
    "h200": Device(bandwidth=4.8e12, flops={"16": 989e12, "8": 1979e12}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a model's steps move and compute.  Bytes of all weights; parameters that multiply each token; bytes of KV a
    token of context; `bits`: 16 or 8, of the rows that are multiplied; `pair_flops`: operations of attention for a token of
    a prompt and a position it sees, of all layers (4 x heads x head size x layers)."""

    weight_bytes: float
    parameters: float
    kv_token_bytes: float
    bits: int = 16
    pair_flops: float = 0.0


def roofline(work: Work, device: Device, share: float = 1.0) -> StepCost:
    """Launches + the longer of weights read and rows multiplied + contexts read + attention of prompts, on a `share` of the
    SMs: speed is theirs, bandwidth is reached by BANDWIDTH_SHARE of them.  ValueError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    rate = device.bandwidth * device.reach * min(1.0, share / BANDWIDTH_SHARE)
    speed = device.flops[str(work.bits)] * device.reach * share
    weights_s, per_token = work.weight_bytes / rate, 2 * work.parameters / speed
    return StepCost(
        base_s=device.floor_s,
        per_decode_s=per_token,
        per_prefill_token_s=per_token,
        per_context_token_s=work.kv_token_bytes / rate,
        # a causal mask leaves half of the pairs, and attention multiplies in 16 bits whatever the weights have
        per_pair_s=work.pair_flops / 2 / (device.flops["16"] * device.reach * share),
        # what is left of the weights' time beside the rows', down to the rows that take as long
        rows=((0.0, weights_s), (weights_s / per_token, 0.0)),
    )


class Corrected:
    """A cost model that follows the steps: least squares of relative errors with forgetting, solved once in BATCH points.

    Starts at `cost`, believed as if `trust` steps had shown it, less and less as steps come.  The curve over the rows is
    free at powers of two.  `error` is the running mean of what the prediction was off by before each step was known; 0
    until one is.
    """

    def __init__(self, cost: StepCost, trust: float = 50.0) -> None:
        self.cost, self.error, self.num_steps = cost, 0.0, 0
        self._trust = trust
        start = np.array([*coefficients(cost), *(cost.rows_s(k) for k in KNOTS)])
        self._start = start
        self._information = np.zeros((len(start), len(start)))
        self._target = np.zeros(len(start))
        self._most = np.zeros(len(start))
        self._count = 0.0
        self._pending: list[Point] = []
        self._room = 1

    def observe(self, point: Point) -> bool:
        """Steps that have run; whether `cost` is another now."""
        seconds, steps = point.seconds, point.steps
        if not seconds > 0:
            return False  # a clock that stood still says nothing
        off = abs(point.predicted(self.cost) / seconds - 1)
        self.num_steps += round(steps)
        self.error += (off - self.error) * min(1.0, max(ERROR_WEIGHT * steps, steps / self.num_steps))
        self._pending.append(point)
        if len(self._pending) < self._room:
            return False
        self._room = min(2 * self._room, BATCH)
        self._solve()
        return True

    def _solve(self) -> None:
        points, self._pending = self._pending, []
        told = np.array(points)
        x = np.hstack([told[:, 1:], told[:, 1:2] * _hats((told[:, 2] + told[:, 3]) / told[:, 1], KNOTS)])
        # k steps alike count as k of their mean
        weight = np.sqrt(told[:, 1])
        self._most = np.maximum(self._most, (x / told[:, :1]).max(0))
        x *= (weight / told[:, 0])[:, None]
        steps = float(told[:, 1].sum())
        faded = FORGET**steps
        self._count = faded * self._count + steps
        self._information = faded * self._information + x.T @ x
        self._target = faded * self._target + x.T @ weight
        # the start counts as so many mean steps; what no step tells stays as it was
        trust = max(self._trust * FORGET**self.num_steps, LEAST_TRUST) / self._count
        prior = trust * np.diag(self._information) + NOTHING
        # and what tokens can say is not for the knots, as in `fit`: prompts are weighed by their tokens
        prior[len(FIELDS) :] += RIDGE**2 * self._count * self._most[len(FIELDS) :] ** 2
        matrix = self._information + np.diag(prior)
        found = _solve_nonnegative(matrix, self._target + prior * self._start).tolist()
        rows = tuple(zip(KNOTS.tolist(), found[len(FIELDS) :], strict=True))
        self.cost = StepCost(**dict(zip(FIELDS, found, strict=False)), rows=rows)


def _solve_nonnegative(matrix: Floats, target: Floats) -> Floats:
    """The x >= 0 of matrix x = target, nearly: what comes out negative is 0, and the others are solved for again."""
    scale = 1 / np.sqrt(np.diag(matrix))
    matrix, target = matrix * np.outer(scale, scale), target * scale
    x = np.linalg.solve(matrix, target)
    used = x > 0
    while not (x >= 0).all():
        used &= x > 0
        x = np.zeros(len(target))
        x[used] = np.linalg.solve(matrix[np.ix_(used, used)], target[used])
    found: Floats = x * scale
    return found
