"""When blocks run out: who pauses, who is preempted, who may ask for the liveness reserve."""

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.limits import Limits
from sched.step import Chunk, Request
from tests.sched.small import COST, build, step
from tests.sched.witness import Sets, Witness, requests


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
    limits = Limits(
        max_running=4, max_step_tokens=256, max_chunk_tokens=256, max_model_len=128, max_waiting=9
    )
    b = Batcher(BlockPool(sets, 8, 16), limits)
    for request in requests([0, 1], prompt=80, output=48):
        b.add(request)
    step(b)
    assert b.num_waiting == 1
    assert b.blocks.num_free == 3, "it needs 5"
    sets.foreign = 0
    turns = 0
    while b.num_waiting and turns < 50:
        step(b)
        turns += 1
    assert turns <= 8, "the other model gave its sets back, and nothing of ours came free"


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
