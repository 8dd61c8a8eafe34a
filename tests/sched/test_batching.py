"""What the Batcher decides, one behaviour a test."""

import pytest

from sched.batching import MIN_PREFILL_TOKENS, Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits, QueueFull
from sched.step import Chunk, Grant, Request, StepPlan
from sched.waiting import LATE_SHARE
from tests.sched.witness import Sets, Witness, requests

COST = StepCost(base_s=2e-3, per_prefill_token_s=1e-4)


def build(
    num_sets: int = 100,
    *,
    P: int = 4,
    slots: int = 2,
    cost: StepCost | None = None,
    reserve: int = 0,
    **limits: int,
) -> Batcher:
    defaults = {
        "max_running": 8,
        "max_step_tokens": 64,
        "max_chunk_tokens": 32,
        "max_model_len": 400,
        "max_waiting": 1000,
    }
    return Batcher(BlockPool(Sets(num_sets, reserve), slots, P), Limits(**defaults | limits), cost)


def step(b: Batcher, now: float = 0.0, stopped: tuple[int, ...] = ()) -> tuple[StepPlan, tuple[int, ...]]:
    plan = b.plan(now)
    ended = b.advance(plan, 1, now, stopped)
    b.check()
    return plan, ended


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


def test_the_youngest_is_preempted_for_an_elder() -> None:
    b = build(num_sets=4, P=4, slots=1, max_model_len=16)
    for request in requests([0, 1], prompt=7, output=9):
        b.add(request)
    step(b)  # 2 blocks each: full
    step(b)
    plan, _ = step(b)  # position 8 of both
    assert plan.decode == (0,)
    assert plan.left == (1,)
    assert (b.num_preemptions, b.num_running, b.num_waiting) == (1, 1, 1)
    plans = [plan]
    while not plans[-1].chunks and len(plans) < 20:
        plans.append(step(b)[0])
    # its two tokens are part of the prompt now: 7 + 2, and the step samples the third
    assert plans[-1].chunks == (Chunk(1, 0, 9, True),)
    assert sum(len(p.decode) for p in plans) == 7, "request 0 decoded to its end"


def test_with_a_step_in_flight_the_needy_one_pauses_until_blocks_are_free() -> None:
    b = build(num_sets=4, P=4, slots=1, max_model_len=16)
    for request in requests([0, 1], prompt=7, output=9):
        b.add(request)
    one, two, three = b.plan(0.0), b.plan(0.0), b.plan(0.0)
    assert two.decode == (0, 1)
    assert three.empty
    assert three.left == (1,), "preempted, but steps in flight name its blocks"
    b.advance(one, 1, 0.0)
    assert b.plan(0.0).empty
    b.advance(two, 1, 0.0)
    four = b.plan(0.0)
    assert four.decode == (0,)
    assert four.grants[0].blocks[0] in (4096 * 2, 4096 * 3), "a block that request 1 held"


def test_no_more_are_preempted_than_free_enough() -> None:
    b = build(num_sets=6, P=4, slots=1, max_model_len=24)
    b.add(Request(rid=0, prompt_tokens=7, max_tokens=9))
    for request in requests([1, 2], prompt=5, output=9):
        b.add(request)
    one, two, three = b.plan(0.0), b.plan(0.0), b.plan(0.0)
    assert two.decode == (0, 1, 2)
    assert (three.decode, three.left) == ((1,), (2,)), "0 pauses for what 2 will free, 1 goes on"
    for plan in (one, two):
        b.advance(plan, 1, 0.0)
    assert b.plan(0.0).decode == (1, 0)
    b.check()


def test_a_preempted_one_waits_until_its_tokens_are_known() -> None:
    sets = Sets(20)
    sets.foreign = 16
    limits = Limits(max_running=4, max_step_tokens=64, max_chunk_tokens=64, max_model_len=16, max_waiting=9)
    w = Witness(Batcher(BlockPool(sets, 1, 4), limits))
    for request in requests([0, 1], prompt=7, output=9):
        w.add(request)
    plans = [w.plan(0.0) for _ in range(3)]
    assert plans[2].left == (1,)
    sets.foreign = 0
    assert w.plan(0.0).decode == (0,)
    assert w.batcher.num_waiting == 1, "there is room, but its second token is in step 1, not advanced"
    w.advance(0.0)
    assert not w.plan(0.0).chunks
    w.advance(0.0)
    assert w.plan(0.0).chunks == (Chunk(1, 0, 9, True),)


def test_nobody_is_admitted_past_a_paused_one() -> None:
    sets = Sets(3)
    limits = Limits(max_running=4, max_step_tokens=64, max_chunk_tokens=64, max_model_len=12, max_waiting=9)
    b = Batcher(BlockPool(sets, 1, 4), limits)
    b.add(Request(rid=0, prompt_tokens=8, max_tokens=4))
    step(b)
    b.add(Request(rid=1, prompt_tokens=4, max_tokens=1))
    refusals = iter(
        [True] * 3
    )  # request 0 asks, asks again as it is alone, and urgently; then one set is there
    sets.refuses = lambda: next(refusals, False)
    assert b.plan(0.0).empty
    assert b.plan(0.0).decode == (0,)


def test_urgent_when_alone() -> None:
    sets = Sets(4, reserve=2)
    limits = Limits(max_running=4, max_step_tokens=64, max_chunk_tokens=64, max_model_len=16, max_waiting=9)
    b = Batcher(BlockPool(sets, 1, 4), limits)
    b.add(Request(rid=0, prompt_tokens=8, max_tokens=8))
    plan = b.plan(0.0)
    assert sets.num_urgent == 0
    following = b.plan(0.0)
    assert following.empty, "a step is in flight: not yet urgent"
    b.advance(plan, 1, 0.0)
    assert b.plan(0.0).decode == (0,)
    assert sets.num_urgent == 1
    b.check()


def test_urgent_for_the_head_when_nothing_runs() -> None:
    sets = Sets(4, reserve=3)
    limits = Limits(max_running=4, max_step_tokens=64, max_chunk_tokens=64, max_model_len=16, max_waiting=9)
    b = Batcher(BlockPool(sets, 1, 4), limits)
    b.add(Request(rid=0, prompt_tokens=12, max_tokens=1))
    assert b.plan(0.0).chunks
    assert sets.num_urgent == 2


def test_refused_then_given() -> None:
    sets = Sets(4)
    sets.foreign = 4
    limits = Limits(max_running=4, max_step_tokens=64, max_chunk_tokens=64, max_model_len=16, max_waiting=9)
    w = Witness(Batcher(BlockPool(sets, 1, 4), limits))
    for request in requests(range(3), prompt=6, output=10):
        w.add(request)
    for _ in range(5):
        assert w.plan(0.0).empty
    sets.foreign = 2
    assert w.plan(0.0).chunks[0] == (0, 0, 6, True)
    w.advance(0.0)
    sets.foreign = 3
    for _ in range(30):
        w.plan(0.0)
        while w.planned:
            w.advance(0.0)
    assert w.batcher.num_running == 1, "paused: two blocks for 8 positions, and no third"
    sets.foreign = 0
    w.finish(0.0, 100)


def test_a_refused_newcomer_does_not_ask_at_every_step() -> None:
    b = build(num_sets=2, P=4, slots=8, max_model_len=64)
    for request in requests([0, 1], prompt=30, output=30):
        b.add(request)
    step(b)
    sets = b.blocks.source
    asked = sets.num_asked
    for _ in range(16):
        step(b)
    assert b.num_waiting == 1
    assert sets.num_asked - asked <= 4


def test_a_refused_newcomer_asks_again_soon() -> None:
    sets = Sets(4)
    sets.foreign = 3
    limits = Limits(max_running=4, max_step_tokens=64, max_chunk_tokens=64, max_model_len=128, max_waiting=9)
    b = Batcher(BlockPool(sets, 8, 16), limits)
    for request in requests([0, 1], prompt=64, output=60):
        b.add(request)
    step(b)
    assert b.num_waiting == 1
    sets.foreign = 0
    turns = 0
    while b.num_waiting and turns < 50:
        step(b)
        turns += 1
    assert turns <= 8, "the other model gave its sets back, and nothing of ours came free"


def test_slack_order() -> None:
    b = build(cost=COST, max_running=1)
    # deadlines 5.0, 4.0 and 5.0, the last with 20 ms more of prompt to compute
    for rid, ttft, prompt in ((0, 5.0, 10), (1, 4.0, 10), (2, 5.0, 210)):
        b.add(Request(rid=rid, prompt_tokens=prompt, max_tokens=1, ttft_s=ttft))
    order = [rid for _ in range(12) for rid in step(b)[1]]
    assert order == [1, 2, 0]


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
    b = build(cost=COST, max_step_tokens=512, max_chunk_tokens=512)
    b.add(Request(rid=0, prompt_tokens=4, max_tokens=50, tpot_s=0.022))
    step(b, now=0.0)  # first token at 0.0, the second due at 0.022
    b.add(Request(rid=1, prompt_tokens=380, max_tokens=2))
    plan, _ = step(b, now=0.0)
    assert plan.decode == (0,)
    assert plan.chunks[0].count in (199, 200), "20 ms of slack at 0.1 ms a token"
    assert plan.seconds == pytest.approx(0.022, abs=1e-4)
    plan, _ = step(b, now=1.0)
    assert plan.chunks[0].count == MIN_PREFILL_TOKENS, "late already: the floor"


def test_a_plan_in_flight_delays_the_next() -> None:
    b = build(cost=COST, max_step_tokens=512, max_chunk_tokens=512, max_model_len=600)
    b.add(Request(rid=0, prompt_tokens=4, max_tokens=50, tpot_s=0.022))
    step(b, now=0.0)
    b.plan(0.0)  # runs until 0.002; the token of the step after it is due at 0.044
    b.add(Request(rid=1, prompt_tokens=500, max_tokens=2))
    assert b.plan(0.0).chunks[0].count in (399, 400), "0.044 - 2 x 0.002 at 0.1 ms a token"


def test_a_resumed_request_keeps_its_pace() -> None:
    """A request that was preempted is late: its deadline does not start again."""
    b = build(num_sets=4, P=4, slots=1, cost=COST, max_model_len=16)
    for request in requests([0, 1], prompt=7, output=9):
        b.add(request)
    now = 0.0
    for _ in range(40):
        for seq in list(b._active.values()):
            if seq.state.value == "running" and seq.first_s is not None:
                produced = seq.produced + b._step - 1 - seq.base
                due = seq.first_s + produced * seq.request.tpot_s
                assert b._running.deadline(b._step) <= due + 1e-9
        step(b, now)
        now += 0.1
    assert b.num_preemptions == 1
    assert not b.has_work


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
