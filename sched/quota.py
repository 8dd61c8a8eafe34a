"""Quotas: how many slab sets each model of a pool may hold while another is short of memory.

`Marginal` gives every model its reserve and divides the rest by tokens gained per byte, times urgency.  Tokens gained
per byte is FineServe's marginal memory efficiency (arXiv 2509.06261), there a constant of the model, here measured
while it serves.  The baselines: FineServe's static split by rate x layers, ADBS of MuxServe (arXiv 2404.02015), an
equal split, and first come.  Slabs of a pool have one size, so a value per slab is a value per byte.  A division costs
O(n log n) of n models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import exp, log
from typing import Protocol

# value: how fast measured values are followed, and how far a division may be off before it is made anew
SMOOTH_S = 2.0
BAND, PATIENCE_S = 1 / 8, 5.0
MAX_URGENCY = 8.0
# ADBS as released: every 8 s, models in use above 90 % with more than 1.1 x the mean queue gain up to 10 %, from
# models that are used less, of which 5 % stay free
ADBS_EVERY_S, ADBS_BUSY, ADBS_QUEUE, ADBS_GAIN, ADBS_KEEP = 8.0, 0.9, 1.1, 0.1, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One model as it stands.  A set is `set_slabs` slabs and holds `set_tokens` tokens.

    `held_sets` are leased; in `used_sets` of them are blocks of requests; `unmet_sets` more would be filled by requests
    that wait.  `waiting` counts those, `rate` is requests a second as configured.  `step_s`: seconds of a step, which
    gives each running sequence a token; `sequence_tokens`: mean tokens of a sequence; 0 where not known yet.
    """

    name: str
    set_slabs: int
    set_tokens: int
    reserve_sets: int
    held_sets: int = 0
    used_sets: int = 0
    unmet_sets: int = 0
    waiting: int = 0
    rate: float = 1.0
    step_s: float = 0.0
    sequence_tokens: float = 0.0
    urgency: float = 1.0

    @property
    def wanted_sets(self) -> int:
        return self.used_sets + self.unmet_sets


class Policy(Protocol):
    """`strict`: nobody leases beyond its quota; else only while another has a claim to what is free."""

    strict: bool

    def divide(self, needs: Sequence[Need], slabs: int, now_s: float) -> tuple[int, ...] | None:
        """Sets of each model, at least its reserve, together at most `slabs` slabs; None: no quotas at all.

        `slabs` are those of the pool without its liveness reserve; they hold all reserves.  `now_s` never goes back.
        """


def urgency(slack_s: float, budget_s: float) -> float:
    """1 when all of the time that a request has is left, 2 when half of it is, at most MAX_URGENCY.

    `slack_s`: seconds until it must be begun to be in time; `budget_s`: what it had when it came.
    """
    if budget_s <= 0:
        return MAX_URGENCY
    return max(1 / MAX_URGENCY, min(MAX_URGENCY, budget_s / max(slack_s, budget_s / MAX_URGENCY)))


def token_values(needs: Sequence[Need]) -> list[float]:
    """Tokens a second that the first slab gains for each model: one more sequence is one more token a step, and takes
    its tokens' part of a set.  What is not known yet is taken to be as the others' mean."""
    steps = _known([n.step_s for n in needs])
    parts = _known([n.sequence_tokens / n.set_tokens for n in needs])
    return [n.urgency / (t * p * n.set_slabs) for n, t, p in zip(needs, steps, parts, strict=True)]


def water_fill(needs: Sequence[Need], values: Sequence[float], slabs: int) -> tuple[int, ...]:
    """Reserves, then what is wanted where it is worth most; sets as in `Policy.divide`.

    The value of a slab falls with the slabs x that its model has beyond its reserve, as v / (1 + x / h): a larger batch
    makes slower steps, and the most urgent request is served first.  h is an n-th of the room, so that of two models
    one takes all when it is worth three times the other.  The best division has one value at every margin.
    """
    base = [n.reserve_sets * n.set_slabs for n in needs]
    room = slabs - sum(base)
    _check_room(needs, room, slabs)
    asked = [max(0, n.wanted_sets * n.set_slabs - b) for n, b in zip(needs, base, strict=True)]
    asked = [min(a, room - room % n.set_slabs) for a, n in zip(asked, needs, strict=True)]
    if sum(asked) <= room:
        # everybody gets what it wants; an equal part of the rest is room to ask for more at once
        part = (room - sum(asked)) // max(1, len(needs))
        extra = [a + part for a in asked]
    else:
        extra = _fill(asked, values, room)
    sets = [e // n.set_slabs for e, n in zip(extra, needs, strict=True)]
    left = room - sum(s * n.set_slabs for s, n in zip(sets, needs, strict=True))
    h = max(1.0, room / len(needs))
    # what whole sets leave over goes where the next set is worth most
    margin = [v / (1 + s * n.set_slabs / h) for v, s, n in zip(values, sets, needs, strict=True)]
    for i in sorted(range(len(needs)), key=lambda i: -margin[i]):
        more = max(0, min(left, asked[i] - sets[i] * needs[i].set_slabs)) // needs[i].set_slabs
        sets[i] += more
        left -= more * needs[i].set_slabs
    return tuple(n.reserve_sets + s for n, s in zip(needs, sets, strict=True))


def _fill(asked: Sequence[int], values: Sequence[float], room: int) -> list[int]:
    """Slabs beyond the reserves, in all at most `room`, where `asked` together are more.

    At a common margin 1 / m a model has h (v m - 1) slabs, between 0 and what it asked: the total is linear in m between
    the points where a model starts and where it has all.
    """
    h = max(1.0, room / len(asked))
    points = sorted(
        [(1 / v, v * h, h) for a, v in zip(asked, values, strict=True) if a]
        + [((1 + a / h) / v, -v * h, -h - a) for a, v in zip(asked, values, strict=True) if a]
    )
    slope = minus = 0.0
    m = points[0][0]
    for at, rise, fixed in points:
        if slope * at - minus >= room:
            break
        slope, minus, m = slope + rise, minus + fixed, at
    if slope > 0:
        m = max(m, (room + minus) / slope)
    # rounding must not give out more than there is
    filled = [
        min(a, max(0, int(h * (v * m - 1) + 1e-6))) if a else 0 for a, v in zip(asked, values, strict=True)
    ]
    over = sum(filled) - room
    for i in range(len(filled)):
        cut = max(0, min(over, filled[i]))
        filled[i] -= cut
        over -= cut
    return filled


def _known(figures: Sequence[float]) -> list[float]:
    """With the mean of the known ones, or 1, in place of the unknown."""
    known = [f for f in figures if f > 0]
    mean = exp(sum(map(log, known)) / len(known)) if known else 1.0
    return [f if f > 0 else mean for f in figures]


def _check_room(needs: Sequence[Need], room: int, slabs: int) -> None:
    if room < 0:
        raise ValueError(f"slabs must hold the reserves of {len(needs)} models, {slabs - room}, got {slabs}")


class Marginal:
    """By marginal value, live.  Against flutter values are smoothed, and a division stays while it serves as many of
    the wanted slabs as the best one and is near it: a set that moves is a prompt computed again."""

    strict = False

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._last: dict[str, int] = {}
        self._now_s = self._changed_s = 0.0

    def divide(self, needs: Sequence[Need], slabs: int, now_s: float) -> tuple[int, ...] | None:
        values = self._smoothed(needs, now_s)
        best = water_fill(needs, values, slabs)
        if not self._stays(needs, best, slabs, now_s):
            self._last = {n.name: q for n, q in zip(needs, best, strict=True)}
            self._changed_s = now_s
        return tuple(self._last[n.name] for n in needs)

    def _smoothed(self, needs: Sequence[Need], now_s: float) -> list[float]:
        keep = exp(-max(0.0, now_s - self._now_s) / SMOOTH_S)
        self._now_s = now_s
        fresh = {n.name: log(v) for n, v in zip(needs, token_values(needs), strict=True)}
        self._values = {m: v + keep * (self._values.get(m, v) - v) for m, v in fresh.items()}
        return [exp(self._values[n.name]) for n in needs]

    def _stays(self, needs: Sequence[Need], best: Sequence[int], slabs: int, now_s: float) -> bool:
        if self._last.keys() != {n.name for n in needs}:
            return False
        last = [self._last[n.name] for n in needs]
        if any(q < n.reserve_sets for q, n in zip(last, needs, strict=True)):
            return False
        if sum(q * n.set_slabs for q, n in zip(last, needs, strict=True)) > slabs:
            return False
        if _served(needs, last) < _served(needs, best):
            return False
        near = all(abs(b - q) <= BAND * q for b, q in zip(best, last, strict=True))
        return near and now_s - self._changed_s < PATIENCE_S


def _served(needs: Sequence[Need], sets: Sequence[int]) -> int:
    """Wanted slabs that these quotas cover."""
    return sum(min(q, n.wanted_sets) * n.set_slabs for q, n in zip(sets, needs, strict=True))


class FirstCome:
    """No quotas: whoever asks first has it, down to the reserves of the others."""

    strict = False

    def divide(self, needs: Sequence[Need], slabs: int, now_s: float) -> tuple[int, ...] | None:
        return None


class Equal:
    """The same bytes for every model, and its reserve where that is more."""

    strict = True

    def divide(self, needs: Sequence[Need], slabs: int, now_s: float) -> tuple[int, ...] | None:
        floors = [n.reserve_sets * n.set_slabs for n in needs]
        _check_room(needs, slabs - sum(floors), slabs)
        left, share = slabs, 0
        # models whose reserve is above the share keep it, and the rest is shared by the others
        for i, floor in enumerate(sorted(floors, reverse=True)):
            share = left // (len(floors) - i)
            if floor <= share:
                break
            left -= floor
        return tuple(
            max(n.reserve_sets, min(share, slabs) // n.set_slabs) if f <= share else n.reserve_sets
            for n, f in zip(needs, floors, strict=True)
        )


class StaticRate:
    """FineServe's: a region for each depth of model, its reserves and a part by rate x layers of the rest, fixed by the
    configured rates; inside a region first come, so what is free there is everybody's."""

    strict = True

    def divide(self, needs: Sequence[Need], slabs: int, now_s: float) -> tuple[int, ...] | None:
        room = slabs - sum(n.reserve_sets * n.set_slabs for n in needs)
        _check_room(needs, room, slabs)
        total = sum(n.rate * n.set_slabs for n in needs)
        quotas: dict[str, int] = {}
        for depth, group in groupby(sorted(needs, key=lambda n: n.set_slabs), key=lambda n: n.set_slabs):
            members = list(group)
            weight = sum(n.rate * n.set_slabs for n in members)
            part = int(room * weight / total) if total else room * len(members) // len(needs)
            quotas |= _region(members, part // depth)
        return tuple(quotas[n.name] for n in needs)


def _region(members: Sequence[Need], sets: int) -> dict[str, int]:
    """`sets` beyond the reserves: what each holds, and an equal part of what is free."""
    held = [max(0, n.held_sets - n.reserve_sets) for n in members]
    free = sets - sum(held)
    if free < 0:  # they took it under another policy: each gives back in proportion
        held = [h * sets // sum(held) for h in held]
        free = 0
    # the odd ones go to those that wait
    first = sorted(range(len(members)), key=lambda i: -members[i].unmet_sets)
    for place, i in enumerate(first):
        held[i] += free // len(members) + (place < free % len(members))
    return {n.name: n.reserve_sets + h for n, h in zip(members, held, strict=True)}


class Adbs:
    """MuxServe's: begins by rate x bytes of a token and, every 8 s, moves up to a tenth to models that are full and
    have more than the mean waiting, from models that are not."""

    strict = True

    def __init__(self) -> None:
        self._quotas: dict[str, float] = {}
        self._used: dict[str, float] = {}
        self._samples = 0
        self._since_s = 0.0

    def divide(self, needs: Sequence[Need], slabs: int, now_s: float) -> tuple[int, ...] | None:
        if self._quotas.keys() != {n.name for n in needs}:
            self._begin(needs, slabs, now_s)
        self._samples += 1
        for n in needs:
            self._used[n.name] = self._used.get(n.name, 0.0) + n.held_sets * n.set_slabs
        if now_s - self._since_s >= ADBS_EVERY_S:
            self._adapt(needs)
            self._used, self._samples, self._since_s = {}, 0, now_s
        return tuple(max(n.reserve_sets, int(self._quotas[n.name] + 1e-6) // n.set_slabs) for n in needs)

    def _begin(self, needs: Sequence[Need], slabs: int, now_s: float) -> None:
        room = slabs - sum(n.reserve_sets * n.set_slabs for n in needs)
        _check_room(needs, room, slabs)
        weights = [n.rate * n.set_slabs / n.set_tokens for n in needs]
        total = sum(weights)
        self._quotas = {
            n.name: n.reserve_sets * n.set_slabs + (room * w / total if total else room / len(needs))
            for n, w in zip(needs, weights, strict=True)
        }
        self._used, self._samples, self._since_s = {}, 0, now_s

    def _adapt(self, needs: Sequence[Need]) -> None:
        quotas = self._quotas
        use = {n.name: self._used[n.name] / self._samples / max(1e-9, quotas[n.name]) for n in needs}
        mean = sum(n.waiting for n in needs) / len(needs)
        takers = [n for n in needs if use[n.name] >= ADBS_BUSY and n.waiting > ADBS_QUEUE * mean]
        spare = {
            n.name: min(
                quotas[n.name] * max(0.0, 1 - use[n.name] - ADBS_KEEP),
                quotas[n.name] - n.reserve_sets * n.set_slabs,
            )
            for n in needs
            if use[n.name] < ADBS_BUSY
        }
        asked = sum(ADBS_GAIN * quotas[n.name] for n in takers)
        moved = min(asked, sum(spare.values()))
        if moved <= 0:
            return
        total = sum(spare.values())
        for name, room in spare.items():
            quotas[name] -= moved * room / total
        for n in takers:
            quotas[n.name] *= 1 + ADBS_GAIN * moved / asked


POLICIES: dict[str, Callable[[], Policy]] = {
    "marginal": Marginal,
    "first-come": FirstCome,
    "equal": Equal,
    "static": StaticRate,
    "adbs": Adbs,
}
