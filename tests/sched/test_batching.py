"""What the Batcher decides, one behaviour a test."""

import pytest

from sched.latency import StepCost
from sched.limits import QueueFull
from sched.slack import LATE_SHARE, MIN_PREFILL_TOKENS
from sched.step import Chunk, Grant, Request
from tests.sched.small import COST, build, step
from tests.sched.witness import requests


def test_life_of_a_request() -> None:
    b = build(max_chunk_tokens=5)
    b.add(Request(rid=7, prompt_tokens=8, max_tokens=3))
    plans = [step(b) for _ in range(5)]
    assert plans[0][0].grants == (Grant(7, (0, 1)),)
    assert [p.chunks for p, _ in plans] == [(Chunk(7, 0, 5, False),), (Chunk(7, 5, 3, True),), (), (), ()]
    assert [p.decode for p, _ in plans] == [(), (), (7,), (7,), ()]
    assert plans[2][0].grants == (Grant(7, (4096,)),), "position 8 begins a block"
    assert [e for _, e in plans] == [(), (), (), (7,), ()]
    assert plans[4][0].left == (7,)
    assert plans[4][0].empty
    assert not b.has_work


def test_one_token_needs_no_decode() -> None:
    b = build()
    b.add(Request(rid=1, prompt_tokens=8, max_tokens=1))
    assert step(b)[1] == (1,)
    assert step(b)[0].left == (1,)
    assert b.blocks.num_live == 0


def test_chunks_and_decodes_share_a_step() -> None:
    b = build(max_step_tokens=20)
    b.add(Request(rid=0, prompt_tokens=4, max_tokens=50))
    step(b)
    b.add(Request(rid=1, prompt_tokens=60, max_tokens=2))
    plans = [step(b)[0] for _ in range(4)]
    assert [p.decode for p in plans] == [(0,)] * 4
    assert [p.chunks[0].count for p in plans] == [19, 19, 19, 3]
    assert [p.num_tokens for p in plans] == [20, 20, 20, 4]


def test_the_next_plan_does_not_wait_for_the_last() -> None:
    b = build()
    b.add(Request(rid=0, prompt_tokens=4, max_tokens=3))
    a, c, d, e = (b.plan(0.0) for _ in range(4))
    assert [p.decode for p in (a, c, d, e)] == [(), (0,), (0,), ()]
    assert e.left == (0,)
    assert b.blocks.num_live == 2, "the last step still names them"
    assert [b.advance(p, 1, 0.0) for p in (a, c)] == [(), ()]
    assert b.blocks.num_live == 2
    assert b.advance(d, 1, 0.0) == (0,)
    assert b.blocks.num_live == 0
    assert not b.has_work


def test_a_stop_is_seen_one_step_late() -> None:
    b = build()
    b.add(Request(rid=0, prompt_tokens=4, max_tokens=30))
    first, second = b.plan(0.0), b.plan(0.0)
    assert second.decode == (0,), "planned before anyone could know"
    assert b.advance(first, 1, 0.0, {0}) == (0,)
    assert b.blocks.num_live == 2, "step 1 still names them"
    third = b.plan(0.0)
    assert third.empty
    assert third.left == (0,)
    assert b.advance(second, 1, 0.0) == (), "it ended before"
    assert b.blocks.num_live == 0


def test_a_stop_on_the_last_but_one_token_ends_once() -> None:
    b = build()
    b.add(Request(rid=0, prompt_tokens=4, max_tokens=2))
    first, second = b.plan(0.0), b.plan(0.0)
    assert b.advance(first, 1, 0.0, {0}) == (0,)
    assert b.advance(second, 1, 0.0) == ()
    assert b.plan(0.0).left == (0,)
    assert not b.has_work


def test_abort_in_every_state() -> None:
    b = build(
        num_sets=4, P=4, slots=2, max_running=3, max_step_tokens=16, max_chunk_tokens=8, max_model_len=32
    )
    for rid, (prompt, output) in enumerate([(8, 1), (12, 9), (4, 20), (4, 4)]):
        b.add(Request(rid=rid, prompt_tokens=prompt, max_tokens=output))
    plan = b.plan(0.0)
    assert [tuple(c) for c in plan.chunks] == [(0, 0, 8, True), (1, 0, 8, False)]
    states = {rid: seq.state.value for rid, seq in b._live.items()}
    assert states == {0: "ending", 1: "prefilling", 2: "waiting", 3: "waiting"}
    assert [b.abort(rid) for rid in (0, 1, 2, 9)] == [True, True, True, False]
    b.check()
    assert b.advance(plan, 1, 0.0) == ()
    assert b.blocks.num_live == 0
    assert b.plan(0.0).left == (0, 1), "the waiting one had no table"
    assert b._live[3].state.value == "running"
    assert b.abort(3)
    assert not b._live


def test_earliest_deadline_first_and_ties_by_arrival() -> None:
    b = build(cost=COST, max_running=1)
    # all can be in time, so the length of a prompt is no matter
    for rid, ttft, prompt in ((0, 5.0, 10), (1, 4.0, 10), (2, 5.0, 210)):
        b.add(Request(rid=rid, prompt_tokens=prompt, max_tokens=1, ttft_s=ttft))
    order = [rid for _ in range(12) for rid in step(b)[1]]
    assert order == [1, 0, 2]


def test_the_hopeless_give_way_but_do_not_starve() -> None:
    b = build(max_running=1)
    b.add(Request(rid=0, prompt_tokens=4, max_tokens=1, arrival_s=0.0, ttft_s=1.0))
    order: list[int] = []
    for rid in range(1, 12):
        # a timely request for each step: the queue never drains
        b.add(Request(rid=rid, prompt_tokens=4, max_tokens=1, arrival_s=9.0 + rid, ttft_s=3.0))
        order += step(b, now=9.0 + rid)[1]
    assert order.index(0) == LATE_SHARE - 1


@pytest.mark.parametrize("cost", [None, COST])
def test_no_request_waits_for_ever_under_overload(cost: StepCost | None) -> None:
    b = build(num_sets=30, P=4, slots=2, max_running=2, max_step_tokens=32, cost=cost)
    now, rid, waited = 0.0, 0, 0
    admitted: dict[int, int] = {}
    for turn in range(2000):
        if turn < 600 and turn % 2 == 0:  # twice what it can serve, ever more urgent
            b.add(
                Request(rid=rid, prompt_tokens=20, max_tokens=8, arrival_s=now, ttft_s=0.05 + (rid % 5) / 10)
            )
            rid += 1
        plan = b.plan(now)
        for c in plan.chunks:
            admitted.setdefault(c.rid, turn)
        now += 0.01
        b.advance(plan, 1, now)
        waited = max(waited, b.num_waiting)
    assert waited > 20, f"no overload: {waited=}"
    # late ones are served by arrival in one admission of four, so nobody is overtaken more than three times over
    for r, turn in admitted.items():
        ahead = sum(1 for other, t in admitted.items() if other > r and t < turn)
        assert ahead <= (LATE_SHARE - 1) * (r + 1) + 40, f"request {r} was overtaken by {ahead}"
    assert len(admitted) == rid
    assert not b.has_work


def test_prefill_takes_what_the_most_urgent_decode_leaves() -> None:
    b = build(cost=COST, debt=0, max_step_tokens=512, max_chunk_tokens=512)
    for rid in range(4):
        b.add(Request(rid=rid, prompt_tokens=4, max_tokens=50, tpot_s=0.022))
    step(b, now=0.0)  # first token at 0.0, the second due at 0.022
    b.add(Request(rid=4, prompt_tokens=380, max_tokens=2))
    plan, _ = step(b, now=0.0)
    assert plan.decode == (0, 1, 2, 3)
    assert plan.chunks[0].count in (199, 200), "20 ms of slack at 0.1 ms a token"
    assert plan.seconds == pytest.approx(0.022, abs=1e-4)
    plan, _ = step(b, now=0.2)
    assert plan.chunks[0].count == MIN_PREFILL_TOKENS, "late already: the floor"
    plan, _ = step(b, now=1.0)
    assert plan.chunks[0].count == 117, "over forty tokens behind: lost, and nobody is held back for it"


def test_few_decodes_hold_a_prompt_back_less_than_many() -> None:
    counts = []
    for decodes in (1, 2, 4):
        b = build(cost=COST, debt=0, max_step_tokens=512, max_chunk_tokens=512, max_model_len=600)
        for rid in range(decodes):
            b.add(Request(rid=rid, prompt_tokens=4, max_tokens=50, tpot_s=0.022))
        step(b, now=0.0)
        b.add(Request(rid=9, prompt_tokens=500, max_tokens=2))
        counts.append(step(b, now=0.1)[0].chunks[0].count)
    assert counts == [256, 128, MIN_PREFILL_TOKENS], "late already: half of a step, divided by them"


def test_a_plan_in_flight_delays_the_next() -> None:
    b = build(cost=COST, debt=0, max_step_tokens=512, max_chunk_tokens=512, max_model_len=600)
    b.add(Request(rid=0, prompt_tokens=4, max_tokens=50, tpot_s=0.022))
    step(b, now=0.0)
    b.plan(0.0)  # runs until 0.002; the token of the step after it is due at 0.044
    b.add(Request(rid=1, prompt_tokens=500, max_tokens=2))
    assert b.plan(0.0).chunks[0].count in (399, 400), "0.044 - 2 x 0.002 at 0.1 ms a token"


def test_what_can_never_run_is_refused() -> None:
    b = build(max_model_len=20, max_waiting=1)
    with pytest.raises(ValueError, match="max_model_len=20"):
        b.add(Request(rid=0, prompt_tokens=16, max_tokens=5))
    for bad in ({"prompt_tokens": 0, "max_tokens": 1}, {"prompt_tokens": 1, "max_tokens": 0}):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            b.add(Request(rid=0, **bad))
    b.add(Request(rid=0, prompt_tokens=16, max_tokens=4))
    with pytest.raises(ValueError, match="request 0 is already there"):
        b.add(Request(rid=0, prompt_tokens=1, max_tokens=1))
    with pytest.raises(QueueFull, match="max_waiting=1"):
        b.add(Request(rid=1, prompt_tokens=1, max_tokens=1))
    assert b.num_waiting == 1
    with pytest.raises(ValueError, match="max_step_tokens=4 must be at least max_running=8"):
        build(max_step_tokens=4)
    with pytest.raises(ValueError, match="max_chunk_tokens must be at least 1, got 0"):
        build(max_chunk_tokens=0)


def test_plans_are_advanced_in_order() -> None:
    b = build()
    b.add(requests([0])[0])
    first, second = b.plan(0.0), b.plan(0.0)
    with pytest.raises(AssertionError, match="step 1 is advanced before step 0"):
        b.advance(second, 1, 0.0)
    b = build()
    with pytest.raises(AssertionError, match="none is planned"):
        b.advance(first, 1, 0.0)


def test_the_longest_sequence_fits_the_smallest_pool() -> None:
    b = build(num_sets=5, P=4, slots=2, max_model_len=40)
    b.add(Request(rid=0, prompt_tokens=1, max_tokens=39))
    ended = [rid for _ in range(40) for rid in step(b)[1]]
    assert ended == [0]
    assert not b.has_work


def test_step_cost_is_linear() -> None:
    c = StepCost(base_s=1.0, per_decode_s=0.5, per_prefill_token_s=0.25, per_context_token_s=0.125)
    assert c.decode_s(2, 16) == 1 + 2 * 0.5 + 16 * 0.125
    assert c.chunk_s(8, 4) == 4 * 0.25 + 12 * 0.125
    with pytest.raises(ValueError, match="per_decode_s must be a finite number"):
        StepCost(base_s=1.0, per_decode_s=-1.0)
