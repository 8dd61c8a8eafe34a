"""Random draws that workloads are made of: who is asked how often, when requests come, how long they are.

All take a numpy Generator, so the same seed draws the same.  Rates are requests a second, times seconds from 0.
"""

import math
from dataclasses import dataclass

import numpy as np

# of Azure's conversations of 2023: the mean over the median, of prompts (1,155 / 1,020 tokens) and answers (211 / 129)
PROMPT_SKEW, ANSWER_SKEW = 1155 / 1020, 211 / 129
MOST_TOKENS = 1 << 24  # of a prompt or an answer
LEAST_ON_S, MOST_BURSTS = 1e-3, 1_000_000
POPULARITY = "rate_k ~ k^-alpha, k = 1..n over a shuffled order"


def popularity(rng: np.random.Generator, n: int, alpha: float) -> np.ndarray:
    """Weights k^-alpha of n models; which model is the k-th most popular is drawn."""
    order = rng.permutation(n)
    weights = np.empty(n)
    weights[order] = np.arange(1, n + 1) ** -alpha
    return weights


def busy(times_s: np.ndarray, n: int, on_s: float) -> np.ndarray:
    """[times, n]: each of n models is busy for `on_s` and quiet for `on_s`, their beginnings spread over the period."""
    phase = (times_s[:, None] / on_s - 2 * np.arange(n) / n) % 2
    found: np.ndarray = phase < 1
    return found


def pick(rng: np.random.Generator, odds: np.ndarray) -> np.ndarray:
    """For each row of `odds` [times, n] one column, with a chance in proportion."""
    edges = np.cumsum(odds / odds.sum(1, keepdims=True), axis=1)
    found: np.ndarray = np.minimum((rng.random(len(odds))[:, None] > edges).sum(1), odds.shape[1] - 1)
    return found


def lognormal(rng: np.random.Generator, n: int, median: float, mean: float) -> np.ndarray:
    """n whole numbers in [1, MOST_TOKENS] of the lognormal law with that median and mean (before they are cut to them)."""
    if not 0 < median <= mean < math.inf:
        raise ValueError(f"a lognormal law needs 0 < median <= mean, got median {median!r} and mean {mean!r}")
    sigma = (2 * np.log(mean / median)) ** 0.5
    # a float beyond the integers would come out as a negative one
    found: np.ndarray = np.clip(rng.lognormal(np.log(median), sigma, n), 1, MOST_TOKENS).astype(int)
    return found


def consecutive(rng: np.random.Generator, length: int, n: int) -> np.ndarray:
    """n row numbers of a trace of `length` rows: from a row that is drawn on, beginning anew behind the last."""
    found: np.ndarray = (int(rng.integers(length)) + np.arange(n)) % length
    return found


def renewal(rng: np.random.Generator, rate: float, cv: float, seconds: float) -> np.ndarray:
    """Times in [0, seconds) with Gamma gaps of mean 1 / rate and coefficient of variation `cv`: 1 is Poisson's."""
    if not (0 <= rate < math.inf and 0 < seconds < math.inf):
        raise ValueError(f"a rate must be >= 0 and a duration > 0 seconds, got {rate!r} and {seconds!r}")
    if not 0.01 <= cv <= 100:
        raise ValueError(f"the CV of gaps must be in [0.01, 100], got {cv!r}")
    times, last = [np.empty(0)], 0.0
    while rate > 0 and last < seconds:
        count = int((seconds - last) * rate * 1.1) + 64
        gaps = rng.gamma(cv**-2, cv**2 / rate, count)
        times.append(last + np.cumsum(gaps))
        last = float(times[-1][-1])
    found = np.concatenate(times)
    return found[found < seconds]


class GroupBursts:
    """Sets of models that are active together, one set at a time for `on_s`; the others go on at `quiet` of that rate.

    Model i (in an order that is drawn) belongs to set i mod groups, and every cycle has the sets in a new order.  Over
    the whole duration each model has the mean rate that it was given.  ValueError where a set would never be active.
    """

    def __init__(
        self, rng: np.random.Generator, n: int, *, groups: int, on_s: float, quiet: float, seconds: float
    ) -> None:
        if not 2 <= groups <= n:
            raise ValueError(f"bursts need 2 groups or more, and at most the {n} models, got {groups}")
        least_s = max(LEAST_ON_S, seconds / MOST_BURSTS)
        if not (least_s <= on_s and groups * on_s <= seconds):
            raise ValueError(
                f"on_s must be at least {least_s:g} s, and {groups} of it at most the {seconds:g} s, got {on_s!r}"
            )
        if not 0 <= quiet < 1:
            raise ValueError(f"the rate between bursts must be in [0, 1) of that within, got {quiet!r}")
        order = rng.permutation(n)
        self.group = np.empty(n, int)
        self.group[order] = np.arange(n) % groups
        slots = math.ceil(seconds / on_s)
        cycles = [rng.permutation(groups) for _ in range(math.ceil(slots / groups))]
        self.active = np.concatenate(cycles)[:slots]
        self._ends = np.minimum(np.arange(slots + 1) * on_s, seconds)
        self._quiet = quiet

    def warp(self, times_s: np.ndarray, model: int) -> np.ndarray:
        """Where times that know nothing of bursts come to lie, in the same order and the same duration."""
        weight = np.where(self.active == self.group[model], 1.0, self._quiet)
        work = np.concatenate([[0.0], np.cumsum(weight * np.diff(self._ends))])
        found: np.ndarray = np.interp(times_s, work * (self._ends[-1] / work[-1]), self._ends)
        return found


@dataclass(frozen=True, slots=True)
class Rows:
    """Requests of a source, in its order: tokens of prompts and answers >= 1, and what else it knows of them.

    `times_s`: arrivals from 0 on, sorted.  `names`: the source's names of models.  `sessions`: "" is a request alone.
    """

    prompts: np.ndarray
    outputs: np.ndarray
    times_s: np.ndarray | None = None
    names: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)
