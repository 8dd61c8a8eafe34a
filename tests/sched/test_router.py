"""Routers: only who takes a request gets it, ties are stable, caches and loads count, and tiers follow the load."""

from itertools import pairwise
from math import inf
from random import Random
from typing import Any

import pytest

from sched.observed import HALF_LIFE_S, Line, Observed
from sched.router import (
    MARK_TOKENS,
    ROUTERS,
    Recent,
    ReplicaState,
    RouteRequest,
    Tiers,
    cached_tokens,
    least_ttft,
    marks_of,
    named,
    predict,
    with_pace,
)

ASK = RouteRequest(100, ttft_s=1.0, tpot_s=0.1)


def state(name: str, **given: Any) -> ReplicaState:
    return ReplicaState(**{"name": name, "first_s": 0.01, "prompt_token_s": 0.001, "step_s": 0.01, **given})


def drawn(rng: Random, number: int) -> ReplicaState:
    """Any state, often one that equals another or takes nothing."""
    return state(
        f"r{number}", tier=rng.randrange(3), open=rng.choice((0, 1, 8)), queued_tokens=rng.choice((0, 500, 5000)),
        decode_s=rng.choice((0.0, 0.01)), most_running=rng.choice((4, 256)), end_s=rng.choice((0.0, 0.3)),
        free_tokens=rng.choice((None, 0, 10_000)), held_tokens=rng.choice((0, 800)), takes=rng.random() < 0.7,
    )  # fmt: skip


@pytest.mark.parametrize("name", [*ROUTERS, "slo", "best", "cheapest"])
def test_only_who_takes_it_gets_it_and_the_same_again(name: str) -> None:
    def made() -> Any:
        return named(name, 5) if name in ROUTERS else Tiers(name)

    rng, first, second = Random(7), made(), made()
    nobody = 0
    for _ in range(300):
        states = [drawn(rng, i) for i in range(rng.randrange(1, 5))]
        chosen = first(ASK, states)
        assert chosen == second(ASK, states)
        assert chosen in states if chosen is not None else not any(s.takes for s in states)
        assert chosen is None or chosen.takes
        nobody += chosen is None
    assert 0 < nobody < 300


@pytest.mark.parametrize("name", ["least-ttft", "shortest-queue", "least-tokens"])
def test_of_equals_the_first(name: str) -> None:
    states = [state("a", takes=False), state("b"), state("c")]
    assert named(name)(ASK, states) is states[1]


def test_round_robin_passes_over_who_takes_nothing() -> None:
    states = [state("a"), state("b", takes=False), state("c")]
    turn = named("round-robin")
    assert [getattr(turn(ASK, states), "name", None) for _ in range(4)] == ["a", "c", "a", "c"]


def test_two_choices_takes_the_shorter_of_two() -> None:
    states = [state(str(i), open=i) for i in range(4)]
    choose = named("two-choices", 1)
    found = [getattr(choose(ASK, states), "open", None) for _ in range(200)]
    assert set(found) == {0, 1, 2}, "the longest queue never wins, all others do"


def test_what_counts_in_a_prediction() -> None:
    """Queue, own prompt, silence, places, memory and decodes, each as its seconds."""
    assert predict(ASK, state("a")).ttft_s == pytest.approx(0.01 + 0.1)
    assert predict(ASK, state("a", queued_tokens=50)).ttft_s == pytest.approx(0.01 + 0.15)
    silent = predict(ASK, state("a", queued_tokens=100, silent_s=0.3))
    assert (silent.ttft_s, silent.use) == (pytest.approx(0.01 + 0.2), pytest.approx(0.01 + 0.4))
    full = state("a", open=5, most_running=4, end_s=0.5)
    assert predict(ASK, full).ttft_s == pytest.approx(0.11 + 2 * 0.5)
    # 100 tokens are wanted, 40 are free, and each of the five holds 20
    short = state("a", open=5, free_tokens=40, held_tokens=100, end_s=0.5)
    assert predict(ASK, short).ttft_s == pytest.approx(0.11 + 3 * 0.5)
    found = predict(ASK, state("a", open=3, decode_s=0.02))
    assert found.tpot_s == pytest.approx(0.01 + 4 * 0.02)
    assert found.use == pytest.approx(0.9)


def test_the_unknown_are_as_slow_as_the_slowest_that_is_known() -> None:
    known = [state("a", prompt_token_s=0.002), state("b", step_s=0.05)]
    unknown, other = ReplicaState(name="c", open=3), ReplicaState(name="d", tier=1)
    found = with_pace([*known, unknown, other])
    assert found[:2] == tuple(known)
    assert found[2] == ReplicaState(name="c", open=3, first_s=0.01, prompt_token_s=0.002, step_s=0.05)
    assert found[3] == other, "another precision is another model: it is tried"
    assert with_pace([unknown]) == (unknown,)
    # where nothing is known of anybody, a burst is spread by its requests
    opens = [0, 0]
    for i in range(10):
        states = [ReplicaState(name=str(k), open=n, silent_s=i - k) for k, n in enumerate(opens)]
        opens[states.index(least_ttft(ASK, states))] += 1  # type: ignore[arg-type]
    assert opens == [5, 5]


def test_a_cached_beginning_outweighs_a_queue_of_its_length_and_no_more() -> None:
    marks = marks_of(range(96))
    recent = Recent()
    recent.add(marks)
    ask = ASK._replace(marks=marks)
    idle = state("idle")
    for queued, chosen in ((0, "has"), (95, "has"), (97, "idle")):
        assert least_ttft(ask, [idle, state("has", recent=recent, queued_tokens=queued)]).name == chosen  # type: ignore[union-attr]


def test_marks_know_beginnings() -> None:
    tokens = [Random(3).randrange(1 << 17) for _ in range(400)]
    recent = Recent()
    recent.add(marks_of(tokens))
    for shared in (0, 31, 32, 33, 200, 399):
        other = tokens[:shared] + [5] * 300
        found = cached_tokens(RouteRequest(len(other), marks=marks_of(other)), recent)
        assert found == shared // MARK_TOKENS * MARK_TOKENS
    assert cached_tokens(RouteRequest(64, marks=marks_of(tokens[:64])), recent) == 63, "one token is computed"
    assert cached_tokens(RouteRequest(400, marks=marks_of(tokens, "salt")), recent) == 0
    assert marks_of(tokens[:31]) == ()
    assert len(marks_of(range(1 << 20))) == 256


def test_a_set_of_marks_is_bounded_and_forgets_the_oldest_from_its_end() -> None:
    old, new = (tuple(range(i, i + 6)) for i in (0, 100))
    recent = Recent(most=8)
    recent.add(old)
    recent.add(new)
    assert len(recent) == 8
    assert [m in recent for m in old] == [True, True, False, False, False, False]
    assert all(m in recent for m in new)
    recent.add(old[:2])  # seen again
    recent.add((7, 8))
    assert old[0] in recent
    recent.clear()
    assert len(recent) == 0


# -- tiers


def tiers(load: int, *, others: int = 0) -> list[ReplicaState]:
    """Three precisions; the best one is slowest and has `load` tokens queued."""
    return [
        state("fp16", tier=0, prompt_token_s=0.002, queued_tokens=load),
        state("w8", tier=1, prompt_token_s=0.001, queued_tokens=others),
        state("w4", tier=2, prompt_token_s=0.0005, queued_tokens=others),
    ]


def chosen(router: Tiers, states: list[ReplicaState], ask: RouteRequest = ASK) -> int:
    found = router(ask, states)
    assert found is not None
    return found.tier


def test_the_best_tier_that_keeps_the_slo() -> None:
    assert chosen(Tiers(), tiers(0)) == 0
    assert chosen(Tiers(), tiers(400)) == 1, "1.01 s of 1 s"
    assert chosen(Tiers(), tiers(400, others=800)) == 2
    assert chosen(Tiers(margin=1.0), tiers(390)) == 0
    assert chosen(Tiers("best"), tiers(10_000)) == 0
    assert chosen(Tiers("cheapest"), tiers(0)) == 2
    # all miss: the least miss, and of equal ones the best precision
    assert chosen(Tiers(), tiers(3000, others=20_000)) == 0
    assert chosen(Tiers(), [s._replace(queued_tokens=10_000, prompt_token_s=0.1) for s in tiers(0)]) == 0


def test_tpot_alone_moves_a_request() -> None:
    slow = [s._replace(step_s=step) for s, step in zip(tiers(0), (0.09, 0.09, 0.03), strict=True)]
    assert chosen(Tiers(), slow) == 2
    assert chosen(Tiers(), slow, ASK._replace(tpot_s=1.0)) == 0


def test_more_load_never_makes_the_precision_better() -> None:
    for others in (0, 400, 1500):
        found = [chosen(Tiers(), tiers(load, others=others)) for load in range(0, 3000, 50)]
        assert all(a <= b for a, b in pairwise(found)), found
        assert found[0] == 0 < found[-1]


def test_one_that_cannot_take_it_is_no_tier() -> None:
    states = tiers(0)
    assert chosen(Tiers(), [states[0]._replace(takes=False), *states[1:]]) == 1
    assert Tiers()(ASK, [s._replace(takes=False) for s in states]) is None


def test_a_load_about_the_limit_does_not_flap() -> None:
    """Between the margin and the margin less the hysteresis nothing moves, from either side."""
    inside = [*range(270, 340, 10), *range(340, 270, -10)] * 5

    def switches(hysteresis: float) -> int:
        router = Tiers(margin=0.8, hysteresis=hysteresis)
        found = [chosen(router, tiers(load)) for load in inside]
        return sum(a != b for a, b in pairwise(found))

    assert switches(0.0) >= 10
    assert switches(0.3) == 1
    router = Tiers(margin=0.8, hysteresis=0.3)
    assert [chosen(router, tiers(load)) for load in (0, 340, 250, 200, 150, 340)] == [0, 1, 1, 1, 0, 1]


def test_strict_requests_leave_and_patient_ones_stay() -> None:
    """Each kind of SLO has a hysteresis of its own: one that moved takes no other along."""
    router, patient = Tiers(), ASK._replace(ttft_s=10.0)
    for _ in range(3):
        assert chosen(router, tiers(400)) == 1
        assert chosen(router, tiers(400), patient) == 0


def test_a_conversation_stays_with_its_cache_while_that_keeps_the_slo() -> None:
    marks = marks_of(range(96))
    recent = Recent()
    recent.add(marks)
    ask = ASK._replace(marks=marks)
    states = tiers(0)
    on_w8 = [states[0], states[1]._replace(recent=recent), states[2]]
    assert chosen(Tiers(), on_w8, ask) == 1
    assert chosen(Tiers(), on_w8) == 0
    late = [states[0], on_w8[1]._replace(queued_tokens=5000), states[2]]
    assert chosen(Tiers(), late, ask) == 0, "it would miss there"
    everywhere = [s._replace(recent=recent) for s in states]
    assert chosen(Tiers(), everywhere, ask) == 0, "a beginning that all have binds nobody"


def test_within_a_tier_the_replica_that_keeps_the_slo() -> None:
    """The cheaper one in sum may miss one of the two."""
    fast = state("fast", step_s=0.099)
    even = state("even", queued_tokens=500, step_s=0.05)
    found = Tiers()(ASK, [fast, even])
    assert found is even


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"policy": "fast"}, "slo, best, cheapest.*'fast'"),
        ({"margin": 0}, "margin.*0"),
        ({"margin": 1.1}, "margin.*1.1"),
        ({"hysteresis": 1}, "hysteresis.*1"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Tiers(**given)
    with pytest.raises(ValueError, match=r"least-ttft.*'nearest'"):
        named("nearest")


# -- what the states are made of


def test_a_line_is_found_and_never_falls() -> None:
    line = Line()
    assert line.fit(inf) == (0.0, 0.0)
    for x in range(1, 40):
        line.add(x, 0.3 + 0.02 * x)
    assert line.fit(0.0) == pytest.approx((0.3, 0.02))
    same = Line()
    for _ in range(5):
        same.add(10, 0.5)
    for flat, want in ((inf, (0.5, 0.0)), (0.0, (0.0, 0.05)), (0.2, (0.2, 0.03))):
        assert same.fit(flat) == pytest.approx(want)
    down, below = Line(), Line()
    for x in range(1, 20):
        down.add(x, 1 - 0.01 * x)
        below.add(x, 0.1 * x - 0.05)
    assert down.fit(inf)[1] == 0
    assert down.fit(inf)[0] > 0.8
    assert below.fit(inf)[0] == 0


def observe(prompts: list[int], token_s: float, first_s: float) -> ReplicaState:
    """A replica that computes one prompt after the other, and 3 tokens of each."""
    seen, now = Observed(), 0.0
    for tokens in prompts:
        seen.came(tokens, now)
        now += first_s + tokens * token_s
        seen.first(tokens, now)
        for _ in range(3):
            now += 0.02
            seen.stepped(now)
        seen.ended(now)
        now += 1e-6
    return seen.state("a", 0, now, open_=0, most_running=8, recent=frozenset(), memory=None)


def test_the_pace_is_that_of_the_tokens_that_came() -> None:
    rng = Random(2)
    found = observe([rng.randrange(10, 2000) for _ in range(60)], 0.0007, 0.013)
    assert (found.first_s, found.prompt_token_s) == pytest.approx((0.013, 0.0007))
    assert found.step_s == pytest.approx(0.02)
    assert (found.queued_tokens, found.silent_s) == (0, 0.0)


def test_prompts_of_one_step_are_one_measurement() -> None:
    seen, now = Observed(), 0.0
    for _ in range(30):
        for tokens in (100, 200, 300):
            seen.came(tokens, now)
        now += 0.6
        for tokens in (100, 200, 300):
            seen.first(tokens, now)
        for _ in range(3):
            seen.ended(now)
        now += 1e-6
    found = seen.state("a", 0, now, open_=0, most_running=8, recent=frozenset(), memory=None)
    assert found.prompt_token_s == pytest.approx(0.001)


def test_what_waits_is_known_and_so_is_silence() -> None:
    seen = Observed()
    seen.came(500, 10.0)
    seen.came(300, 11.0)

    def at(now: float) -> ReplicaState:
        return seen.state("a", 0, now, open_=2, most_running=8, recent=frozenset(), memory=(5, 7))

    assert (at(12.5).queued_tokens, at(12.5).silent_s) == (800, 2.5)
    assert (at(12.5).free_tokens, at(12.5).held_tokens) == (5, 7)
    seen.first(500, 13.0)
    assert (at(13.5).queued_tokens, at(13.5).silent_s) == (300, 0.5)
    seen.gone(300, 13.5)
    assert (at(14.0).queued_tokens, at(14.0).silent_s) == (0, 0.0)
    assert seen.decoding == 1


def test_a_replica_that_was_slow_is_tried_again() -> None:
    """Nothing comes to one that is believed to be too slow, so nothing would ever show that it is not."""
    seen, now = Observed(), 0.0

    def serve(token_s: float) -> None:
        nonlocal now
        seen.came(100, now)
        now += 100 * token_s
        seen.first(100, now)
        now += 0.01
        seen.ended(now)

    def believed(at: float) -> float:
        return seen.state("a", 0, at, open_=0, most_running=8, recent=frozenset(), memory=None).prompt_token_s

    for _ in range(50):
        serve(0.01)
    assert believed(now) == pytest.approx(0.01)
    assert believed(now + 2 * HALF_LIFE_S) == pytest.approx(0.0025)
    now += 2 * HALF_LIFE_S
    serve(0.01)
    assert believed(now) == pytest.approx(0.01), "it is as slow as it was"
    for _ in range(4):
        now += 2 * HALF_LIFE_S
        serve(0.001)
    assert believed(now) < 0.002, "a few good ones count for more than many from long ago"
