"""Makes workloads: when each model is asked, how long its prompts and answers are, and what they share.

Every model draws from a generator of its own, made of the seed and its place, so that another model's rate moves none of
its requests.  What was drawn by which law stands in the workload's `info`, in words and formulas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sched.arrivals import (
    ANSWER_SKEW,
    MOST_TOKENS,
    PROMPT_SKEW,
    GroupBursts,
    Rows,
    lognormal,
    popularity,
    renewal,
)
from sched.metrics import Slo
from sched.workload import MOST_S, Request, Workload, ordered

MOST_REQUESTS = 10_000_000
MOST_TURNS = 10_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens: lognormal with these means and medians, or rows of a source; a prompt and its answer fit `max_len`."""

    prompt_mean: float = 512.0
    output_mean: float = 128.0
    prompt_median: float | None = None
    output_median: float | None = None
    rows: Rows | None = None
    max_len: int = MOST_TOKENS

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompts and answers, [n] each."""
        if self.rows is not None:
            chosen = rng.integers(len(self.rows), size=n)
            return self.clipped(self.rows.prompts[chosen], self.rows.outputs[chosen])
        prompts = lognormal(rng, n, self.prompt_median or self.prompt_mean / PROMPT_SKEW, self.prompt_mean)
        outputs = lognormal(rng, n, self.output_median or self.output_mean / ANSWER_SKEW, self.output_mean)
        return self.clipped(prompts, outputs)

    def clipped(self, prompts: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An answer takes at most a quarter of the window where its prompt needs the rest."""
        outputs = np.minimum(outputs, np.maximum(self.max_len // 4, self.max_len - prompts))
        return np.clip(prompts, 1, self.max_len - outputs), outputs

    def law(self) -> str:
        if self.rows is not None:
            return f"{len(self.rows)} pairs of a source, drawn with replacement"
        medians = (
            self.prompt_median or self.prompt_mean / PROMPT_SKEW,
            self.output_median or self.output_mean / ANSWER_SKEW,
        )
        means = (self.prompt_mean, self.output_mean)
        said = [f"median {a:.4g} and mean {b:.4g}" for a, b in zip(medians, means, strict=True)]
        return f"lognormal, prompts of {said[0]}, answers of {said[1]}"


@dataclass(frozen=True, slots=True)
class Model:
    """`rate`: requests a second in the mean."""

    name: str
    rate: float
    lengths: Lengths = Lengths()
    slo: Slo | None = None


@dataclass(frozen=True, slots=True)
class Laws:
    """What holds for all models.

    `cv`: of the gaps, 1 is Poisson's.  `groups` > 1: bursts, see `GroupBursts`.  `prefix_share` of the requests begin
    with one of `prefixes` common ones of `prefix_tokens`, put before the drawn prompt.  `turns`: mean turns of a session
    (geometric), `think_s` apart in the mean (exponential); a turn's prompt is all that was said before and new tokens.
    """

    cv: float = 1.0
    groups: int = 1
    on_s: float = 30.0
    quiet: float = 0.1
    prefix_share: float = 0.0
    prefixes: int = 1
    prefix_tokens: int = 256
    turns: float = 1.0
    think_s: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.prefix_share <= 1:
            raise ValueError(f"prefix_share must be in [0, 1], got {self.prefix_share!r}")
        for name, least, most in (
            ("prefixes", 1, 1 << 31),
            ("prefix_tokens", 1, MOST_TOKENS),
            ("turns", 1, MOST_TURNS),
            ("think_s", 0, MOST_S),
            ("groups", 1, 1 << 31),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name} must be a number in [{least}, {most:.10g}], got {getattr(self, name)!r}"
                )

    def words(self) -> dict[str, str]:
        found = {
            "gaps": "Gamma with shape 1/CV^2 and mean 1/rate, CV "
            + f"{self.cv:g}"
            + (", Poisson" if self.cv == 1 else "")
        }
        if self.groups > 1:
            found["bursts"] = (
                f"{self.groups} groups of models in turn active for {self.on_s:g} s, the others at {self.quiet:g} of that rate; "
                "means as given"
            )
        if self.prefix_share > 0:
            found["prefixes"] = (
                f"{self.prefix_share:.0%} of first turns begin with one of {self.prefixes} prefixes of {self.prefix_tokens} tokens"
            )
        if self.turns > 1:
            found["sessions"] = (
                f"{self.turns:g} turns in the mean (geometric), {self.think_s:g} s apart (exponential); prompt = prompt + answer before it + new"
            )
        return found


def power_law(names: Sequence[str], total: float, alpha: float, seed: int) -> dict[str, float]:
    """A rate for each model, `total` together, by k^-alpha over an order that the seed draws."""
    if not (0 < total < math.inf and 0 <= alpha < 100):
        raise ValueError(f"a total rate must be > 0 and alpha in [0, 100), got {total!r} and {alpha!r}")
    weights = popularity(np.random.default_rng((seed, 2)), len(names), alpha)
    return dict(zip(names, (total * weights / weights.sum()).tolist(), strict=True))


def synthetic(models: Sequence[Model], laws: Laws, *, seconds: float, seed: int) -> Workload:
    """Requests of all models in [0, seconds).  ValueError where more than MOST_REQUESTS would come of it."""
    total = sum(model.rate for model in models)
    if not total * seconds <= MOST_REQUESTS:
        raise ValueError(
            f"rate x duration must make at most {MOST_REQUESTS} requests, got {total:g} a second for {seconds:g} s"
        )
    bursts = None
    if laws.groups > 1:
        rng = np.random.default_rng((seed, 3))
        bursts = GroupBursts(
            rng, len(models), groups=laws.groups, on_s=laws.on_s, quiet=laws.quiet, seconds=seconds
        )
    found: list[Request] = []
    sessions = 0
    for i, model in enumerate(models):
        rng = np.random.default_rng((seed, 4, i))
        starts = renewal(rng, model.rate / laws.turns, laws.cv, seconds)
        if bursts is not None:
            starts = bursts.warp(starts, i)
        found += _requests(rng, model, laws, starts, seconds, sessions)
        sessions += len(starts)
    return finished(found, models, seconds, seed, laws.words())


def _requests(
    rng: np.random.Generator, model: Model, laws: Laws, starts: np.ndarray, seconds: float, first_session: int
) -> list[Request]:
    # all draws of a kind at once, so that one kind moves no other
    turns = rng.geometric(1 / laws.turns, len(starts))
    prompts, outputs = model.lengths.draw(rng, int(turns.sum()))
    thinks = rng.exponential(laws.think_s, int(turns.sum()))
    shared = rng.random(len(starts)) < laws.prefix_share
    prefixes = rng.integers(laws.prefixes, size=len(starts))
    found: list[Request] = []
    for k, ends in enumerate(np.cumsum(turns).tolist()):
        at, said = float(starts[k]), laws.prefix_tokens if shared[k] else 0
        for turn, row in enumerate(range(ends - int(turns[k]), ends)):
            at += float(thinks[row]) if turn else 0.0
            prompt, output = said + int(prompts[row]), int(outputs[row])
            # a later turn that no window holds ends the session; a first one has its prompt cut
            if at >= seconds or (turn and prompt + output > model.lengths.max_len):
                break
            prompt = min(prompt, model.lengths.max_len - output)
            prefix = min(laws.prefix_tokens, prompt - 1) if shared[k] else 0
            found.append(
                Request(
                    0, model.name, at, prompt, output, session=first_session + k, turn=turn,
                    prefix=int(prefixes[k]) if prefix else -1, prefix_tokens=prefix,
                )
            )  # fmt: skip
            said = prompt + output
    return found


def finished(
    requests: Sequence[Request], models: Sequence[Model], seconds: float, seed: int, laws: dict[str, str]
) -> Workload:
    """In order, with the laws, rates and SLOs that `models` were to have."""
    lengths = {m.name: m.lengths.law() for m in models}
    same = set(lengths.values())
    said = next(iter(same)) if len(same) == 1 else "; ".join(f"{m}: {law}" for m, law in lengths.items())
    info: dict[str, Any] = {
        "seed": seed,
        "laws": {"lengths": said} | laws,
        "rates": {m.name: m.rate for m in models},
        "rate_min": min(m.rate for m in models),
        "rate_max": max(m.rate for m in models),
    }
    slos = {m.name: m.slo for m in models if m.slo is not None}
    return Workload(ordered(requests), seconds, seed, slos, info)


def replayed(rows: Rows, models: Sequence[Model], names: dict[str, str], *, seed: int) -> Workload:
    """A source's own arrivals and lengths.  `names`: its names of models to ours; "" where it has none.

    Rows without a name go to a model with a chance in proportion to its rate.  ValueError where a name has no model.
    """
    if rows.times_s is None:
        raise ValueError("the source must have times to keep its arrivals, got lengths alone")
    by_name = {m.name: m for m in models}
    given = np.array([m.rate for m in models])
    rng = np.random.default_rng((seed, 5))
    if rows.names:
        unknown = sorted(set(rows.names) - set(names))
        if unknown:
            raise ValueError(
                f"a model must be named for each of the source's, got none for {', '.join(unknown)[:80]}"
            )
        chosen = [by_name[names[name]] for name in rows.names]
    else:
        if not given.sum() > 0:
            raise ValueError("a source without models needs rates to share its requests by, got none above 0")
        chosen = [models[i] for i in rng.choice(len(models), len(rows), p=given / given.sum())]
    sessions: dict[str, int] = {}
    turns: dict[int, int] = {}
    last = float(rows.times_s[-1])
    # the last request ends a gap, too
    seconds = last * len(rows) / (len(rows) - 1) if last > 0 else 1.0
    found = []
    for i, model in enumerate(chosen):
        p, o = model.lengths.clipped(rows.prompts[i : i + 1], rows.outputs[i : i + 1])
        key = rows.sessions[i] if rows.sessions and rows.sessions[i] else f"\0{i}"
        session = sessions.setdefault(f"{model.name}\0{key}", len(sessions))
        turn = turns.get(session, -1) + 1
        turns[session] = turn
        at = float(rows.times_s[i])
        found.append(Request(0, model.name, at, int(p[0]), int(o[0]), session=session, turn=turn))
    counts = {m.name: sum(r.model == m.name for r in found) / seconds for m in models}
    laws = {"gaps": "the source's own", "lengths": "the source's own, row by row"}
    kept = [Model(m.name, counts[m.name], m.lengths, m.slo) for m in models]
    return finished(found, kept, seconds, seed, laws)
