"""Which replica takes a request: the one that serves it within the least part of its SLO, as far as can be predicted.

A router is called with a request and the states of those that could serve it, and returns one of these states, None where
none of them takes it.  Predicted are the first token (what is queued, its own prompt less what the replica has cached,
places that must come free first) and the time of each further one.  Whoever calls has the clock, the queues and the
measurements (`sched/observed.py`); a router has no more than its counter, its dice, or the tier it chose last.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from math import ceil, floor, inf, log2
from random import Random
from typing import Any, NamedTuple, Protocol
from zlib import crc32

# beginnings of prompts are told apart in steps of so many tokens, as blocks are cached
MARK_TOKENS = 32
MOST_MARKS = 256
MOST_KEPT = 1 << 14
LEAST_SLO_S = 1e-9
PACE = ("first_s", "prompt_token_s", "step_s", "decode_s", "end_s")
Marks = tuple[int, ...]


class RouteRequest(NamedTuple):
    """Tokens and seconds; `marks` of its prompt, none where nothing is to be found in a cache."""

    prompt_tokens: int
    ttft_s: float = inf
    tpot_s: float = inf
    marks: Marks = ()


class Prefixes(Protocol):
    """A bounded set of marks."""

    def __contains__(self, mark: object, /) -> bool: ...


NOTHING: Prefixes = frozenset()


class ReplicaState(NamedTuple):
    """A replica as a router sees it.  Requests, tokens, seconds.

    `queued_tokens`: of prompts, not computed yet and not cached.  A prompt of n tokens has its first token after
    `first_s` + n x `prompt_token_s`; a step of n decodes takes `step_s` + n x `decode_s`.  `silent_s`: for so long prompts
    wait and no first token has come.  At most `most_running` run; when they are full one ends every `end_s`.  `free_tokens`
    (None: not known) of memory are not held by requests, `held_tokens` are.  `takes`: it would not refuse the request.
    """

    name: str
    tier: int = 0
    open: int = 0
    queued_tokens: int = 0
    first_s: float = 0.0
    prompt_token_s: float = 0.0
    step_s: float = 0.0
    decode_s: float = 0.0
    silent_s: float = 0.0
    most_running: int = 1 << 30
    end_s: float = 0.0
    free_tokens: int | None = None
    held_tokens: int = 0
    recent: Prefixes = NOTHING
    takes: bool = True


Router = Callable[[RouteRequest, Sequence[ReplicaState]], ReplicaState | None]


def marks_of(tokens: Sequence[int], salt: str = "") -> Marks:
    """A number for each beginning of `tokens` (ids below 2^32) that is a multiple of MARK_TOKENS long, to 8,192 tokens.

    Hints: two beginnings may have the same one, once in billions; a wrong guess costs a prediction, nothing else.
    """
    whole = min(len(tokens) // MARK_TOKENS, MOST_MARKS)
    data, size = array("I", tokens[: whole * MARK_TOKENS]).tobytes(), 4 * MARK_TOKENS
    crc, found = crc32(salt.encode("utf-8", "surrogatepass")), []
    for i in range(whole):
        crc = crc32(data[i * size : (i + 1) * size], crc)
        found.append(crc << 16 | i)
    return tuple(found)


class Recent:
    """The marks that a replica saw last, at most `most` of them; those longest unseen go first."""

    __slots__ = ("_kept", "most")

    def __init__(self, most: int = MOST_KEPT) -> None:
        self.most = most
        self._kept: dict[int, None] = {}

    def __contains__(self, mark: object) -> bool:
        return mark in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, marks: Iterable[int]) -> None:
        kept = self._kept
        # the longest beginning goes first from the set as it does from the cache
        for mark in reversed(tuple(marks)):
            kept.pop(mark, None)
            kept[mark] = None
        while len(kept) > self.most:
            del kept[next(iter(kept))]

    def clear(self) -> None:
        self._kept.clear()


class Prediction(NamedTuple):
    """`cost`: the parts of its TTFT and TPOT that the request would use up, together.  `use`: the larger of the two, with what
    a silent queue shows even where its pace is not known; over 1 it misses."""

    ttft_s: float
    tpot_s: float
    cached_tokens: int
    use: float
    cost: float


def cached_tokens(request: RouteRequest, recent: Prefixes) -> int:
    """Of the prompt, what the replica is likely to have; at least one token is always computed."""
    marks = request.marks
    if not marks or marks[0] not in recent:
        return 0
    low, high = 0, len(marks)  # marks[low] is there, marks[high] is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if marks[middle] in recent else (low, middle)
    return min((low + 1) * MARK_TOKENS, request.prompt_tokens - 1)


def predict(request: RouteRequest, state: ReplicaState) -> Prediction:
    cached = cached_tokens(request, state.recent)
    own = request.prompt_tokens - cached
    ends_s = ends_before(own, state) * state.end_s
    queue_s = state.queued_tokens * state.prompt_token_s
    ttft = state.first_s + queue_s + ends_s + own * state.prompt_token_s
    tpot = state.step_s + state.decode_s * min(state.open + 1, state.most_running)
    ttft_slo, tpot_slo = max(request.ttft_s, LEAST_SLO_S), max(request.tpot_s, LEAST_SLO_S)
    # of two silent queues the younger one is no better: silence decides what is met, not who is preferred
    late = ttft + max(0.0, state.silent_s - queue_s)
    return Prediction(
        ttft, tpot, cached, max(late / ttft_slo, tpot / tpot_slo), ttft / ttft_slo + tpot / tpot_slo
    )


def ends_before(own: int, state: ReplicaState) -> int:
    """How many requests must end before one that computes `own` tokens can run."""
    ends = max(0, state.open + 1 - state.most_running)
    if state.free_tokens is not None and state.open:
        short = state.queued_tokens + own - state.free_tokens
        if short > 0:
            ends = max(ends, min(state.open, ceil(short * state.open / max(1, state.held_tokens))))
    return ends


def with_pace(states: Sequence[ReplicaState]) -> tuple[ReplicaState, ...]:
    """Those of which nothing is known yet are believed to be as slow as the slowest known one of their tier; a tier of which
    nothing is known is believed to be fast, so that it is tried."""
    if all(s.prompt_token_s or s.step_s for s in states):
        return tuple(states)
    slowest: dict[int, dict[str, Any]] = {}
    for s in states:
        if s.prompt_token_s or s.step_s:
            so_far = slowest.setdefault(s.tier, dict.fromkeys(PACE, 0.0))
            so_far |= {name: max(so_far[name], getattr(s, name)) for name in PACE}
    return tuple(s if s.prompt_token_s or s.step_s else s._replace(**slowest.get(s.tier, {})) for s in states)


def takers(states: Sequence[ReplicaState]) -> list[ReplicaState]:
    return [s for s in states if s.takes]


def least_ttft(request: RouteRequest, states: Sequence[ReplicaState]) -> ReplicaState | None:
    """The least part of the SLO used up, TTFT and TPOT together; of equals the least TTFT, the fewest requests, the first.

    Where all would miss, the fewest requests for its pace: what waits behind the hopeless does not wait for all of them.
    """
    best, least = None, (inf, inf, inf, inf)
    for state in states:
        if state.takes:
            found = predict(request, state)
            key = (0.0, found.cost, found.ttft_s, float(state.open))
            if found.ttft_s > request.ttft_s or found.tpot_s > request.tpot_s:
                key = (1.0, (state.open + 1) * (state.prompt_token_s or state.step_s), found.ttft_s, 0.0)
            if best is None or key < least:
                best, least = state, key
    return best


def shortest_queue(_: RouteRequest, states: Sequence[ReplicaState]) -> ReplicaState | None:
    """The fewest requests; of equals the first."""
    return min(takers(states), key=lambda s: s.open, default=None)


def least_tokens(_: RouteRequest, states: Sequence[ReplicaState]) -> ReplicaState | None:
    """The fewest queued tokens of prompts; of equals the fewest requests, the first."""
    return min(takers(states), key=lambda s: (s.queued_tokens, s.open), default=None)


class RoundRobin:
    """One after the other, in the order of the states; who takes nothing is passed over."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, _: RouteRequest, states: Sequence[ReplicaState]) -> ReplicaState | None:
        for i in range(len(states)):
            state = states[(self._next + i) % len(states)]
            if state.takes:
                self._next = (self._next + i + 1) % len(states)
                return state
        return None


class TwoChoices:
    """Of two drawn at random the one with fewer requests (Mitzenmacher 2001)."""

    def __init__(self, seed: int = 0) -> None:
        self._random = Random(seed)

    def __call__(self, _: RouteRequest, states: Sequence[ReplicaState]) -> ReplicaState | None:
        able = takers(states)
        drawn = self._random.sample(able, 2) if len(able) > 1 else able
        return min(drawn, key=lambda s: s.open, default=None)


# name to a maker of routers, from a seed
ROUTERS: dict[str, Callable[[int], Router]] = {
    "least-ttft": lambda seed: least_ttft,
    "round-robin": lambda seed: RoundRobin(),
    "shortest-queue": lambda seed: shortest_queue,
    "least-tokens": lambda seed: least_tokens,
    "two-choices": TwoChoices,
}

TIER_POLICIES = ("slo", "best", "cheapest")


class Tiers:
    """Precisions of one model behind one name; tier 0 is the best.

    slo: the best tier that is predicted to use at most `margin` of the request's TTFT and TPOT, else the tier with the least
    predicted miss.  A conversation stays on the tier that has the longest beginning of its prompt while that tier keeps
    the margin.  Once requests with like SLOs have gone to a tier, a better one must keep the margin less `hysteresis` of
    it to have them back.  best, cheapest: the lowest or highest tier that takes the request, whatever it is predicted.
    """

    def __init__(
        self, policy: str = "slo", margin: float = 0.7, hysteresis: float = 0.2, within: Router = least_ttft
    ) -> None:
        if policy not in TIER_POLICIES:
            raise ValueError(f"tier policy must be one of {', '.join(TIER_POLICIES)}, got {policy!r}")
        if not 0 < margin <= 1:
            raise ValueError(f"margin must be in (0, 1], got {margin!r}")
        if not 0 <= hysteresis < 1:
            raise ValueError(f"hysteresis must be in [0, 1), got {hysteresis!r}")
        self.policy, self.margin, self.hysteresis, self._within = policy, margin, hysteresis, within
        self._at: dict[tuple[int, int], int] = {}  # the tier chosen last, by the size of the SLO

    def __call__(self, request: RouteRequest, states: Sequence[ReplicaState]) -> ReplicaState | None:
        tiers: dict[int, list[ReplicaState]] = {}
        for state in states:
            if state.takes:
                tiers.setdefault(state.tier, []).append(state)
        if not tiers:
            return None
        order = sorted(tiers)
        if self.policy != "slo":
            return self._within(request, tiers[order[0 if self.policy == "best" else -1]])
        best = {tier: self._best_of(request, tiers[tier]) for tier in order}
        return self._home(best) or self._by_slo(request, best)

    def _best_of(self, request: RouteRequest, states: list[ReplicaState]) -> tuple[ReplicaState, Prediction]:
        """Of those that keep the margin where any does."""
        if len(states) == 1:
            return states[0], predict(request, states[0])
        found = {s.name: predict(request, s) for s in states}
        good = [s for s in states if found[s.name].use <= self.margin]
        chosen = self._within(request, good or states)
        assert chosen is not None, "all of them take the request"
        return chosen, found[chosen.name]

    def _home(self, best: dict[int, tuple[ReplicaState, Prediction]]) -> ReplicaState | None:
        """The one that alone has the longest beginning of the prompt, if it keeps the margin."""
        longest = max(p.cached_tokens for _, p in best.values())
        having = [(s, p) for s, p in best.values() if p.cached_tokens == longest]
        if not longest or len(having) > 1 or having[0][1].use > self.margin:
            return None
        return having[0][0]

    def _by_slo(
        self, request: RouteRequest, best: dict[int, tuple[ReplicaState, Prediction]]
    ) -> ReplicaState:
        like = _size(request.ttft_s), _size(request.tpot_s)
        at = self._at.get(like, 0)
        for tier, (state, found) in best.items():
            limit = self.margin * (1.0 if tier >= at else 1.0 - self.hysteresis)
            if found.use <= limit:
                self._at[like] = tier
                return state
        tier = min(best, key=lambda t: best[t][1].use)
        self._at[like] = tier
        return best[tier][0]


def _size(seconds: float) -> int:
    """SLOs of about the same size are one kind; there are few kinds whatever is asked for."""
    return floor(log2(min(max(seconds, 1e-4), 1e4)))


def named(router: str, seed: int = 0) -> Router:
    """ValueError where there is no router of that name."""
    if router not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {router!r}")
    return ROUTERS[router](seed)
