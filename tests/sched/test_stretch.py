"""advance(k) on a stretch of decodes is k single steps: same ends, same tables, same seconds."""

import random

import pytest

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.step import Request
from tests.sched.witness import Sets, requests

COST = StepCost(base_s=3e-3, per_decode_s=6e-6, per_prefill_token_s=2.2e-5, per_context_token_s=1.6e-7)


def build(num_sets: int = 40, P: int = 8, slots: int = 5, max_running: int = 6) -> Batcher:
    limits = Limits(
        max_running=max_running, max_step_tokens=64, max_chunk_tokens=48, max_model_len=200, max_waiting=1000
    )
    return Batcher(BlockPool(Sets(num_sets), slots, P), limits, COST)


def tables(b: Batcher) -> dict[int, list[int]]:
    return {rid: list(seq.blocks) for rid, seq in b._active.items()}


def twin_run(seed: int) -> tuple[int, int]:
    """The same stream through one Batcher with stretches and one without; returns steps and plans of the first."""
    rng = random.Random(seed)
    shape = {"num_sets": rng.choice((6, 12, 40)), "P": rng.choice((4, 8, 16)), "slots": rng.choice((3, 10))}
    if shape["num_sets"] * shape["P"] * shape["slots"] < 200:
        shape["num_sets"] = 200 // (shape["P"] * shape["slots"]) + 1
    stretched, single = build(**shape), build(**shape)
    now, rid, steps, plans = 0.0, 0, 0, 0
    for _ in range(60):
        for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 3))):
            prompt = rng.randint(1, 90)
            request = Request(
                rid=rid, prompt_tokens=prompt, max_tokens=rng.randint(1, 100), arrival_s=now, tpot_s=0.02
            )
            stretched.add(request)
            single.add(request)
            rid += 1
        if rng.random() < 0.1 and rid:
            victim = rng.randrange(rid)
            assert stretched.abort(victim) == single.abort(victim)
        plan = stretched.plan(now)
        assert single.plan(now) == plan
        if plan.empty:
            continue
        k = stretched.horizon() if rng.random() < 0.7 else rng.randint(1, stretched.horizon())
        end = now + plan.seconds * k + COST.per_context_token_s * len(plan.decode) * k * (k - 1) / 2
        ended = stretched.advance(plan, k, end)
        t, last = now + plan.seconds, plan
        for _ in range(1, k):
            assert single.advance(last, 1, t) == (), "a request ended inside the stretch"
            last = single.plan(t)
            assert last.decode == plan.decode
            assert not last.chunks
            t += last.seconds
        assert single.advance(last, 1, end) == ended
        assert t == pytest.approx(end, abs=1e-9)
        assert tables(stretched) == tables(single)
        stretched.check()
        single.check()
        now, steps, plans = end, steps + k, plans + 1
    return steps, plans


def test_a_stretch_equals_single_steps() -> None:
    steps = plans = 0
    for seed in range(60):
        s, p = twin_run(seed)
        steps, plans = steps + s, plans + p
    assert steps > 2 * plans, f"{steps} steps in {plans} plans: nothing was stretched"


def test_horizon_reaches_the_first_end() -> None:
    b = build()
    for request in requests([0, 1], prompt=10, output=30) + requests([2], prompt=10, output=12):
        b.add(request)
    plan = b.plan(0.0)
    assert b.horizon() == 1, "a step with chunks is not repeated"
    b.advance(plan, 1, 0.0)
    plan = b.plan(0.0)
    assert b.horizon() == 11  # request 2 has its first of 12 tokens
    assert b.advance(plan, 11, 1.0) == (2,)
    plan = b.plan(1.0)
    assert plan.left == (2,)
    assert b.horizon() == 18
    assert b.advance(plan, 18, 2.0) == (0, 1)
    assert b.plan(2.0).left == (0, 1)


def test_horizon_ends_where_blocks_run_short() -> None:
    b = build(num_sets=40, P=8, slots=5)
    for request in requests([0, 1], prompt=16, output=100):
        b.add(request)
    b.advance(b.plan(0.0), 1, 0.0)
    plan = b.plan(0.0)
    # 2 x 2 blocks of the prompt and 2 of this step: 4 of the 10 are free, each lasts a request 8 steps
    assert (b.blocks.num_sets, b.blocks.num_free) == (2, 4)
    assert b.horizon() == 24
    b.advance(plan, 24, 1.0)
    assert b.blocks.num_free == 0
    assert [g.rid for g in b.plan(1.0).grants] == [0, 1]
    assert b.blocks.num_sets == 3


def test_horizon_is_one_while_an_arrival_could_join() -> None:
    b = build(max_running=2, slots=20)
    b.add(requests([0], output=50)[0])
    b.advance(b.plan(0.0), 1, 0.0)
    plan = b.plan(0.0)
    assert b.horizon() == 49
    for request in requests([1, 2], output=50):
        b.add(request)
    assert b.horizon() == 1
    b.advance(plan, 1, 0.0)
    b.advance(b.plan(0.0), 1, 0.0)
    b.plan(0.0)
    assert b.num_waiting == 1
    assert b.horizon() > 1, "the one that waits has no room to join"


def test_an_arrival_in_a_stretch_does_not_undo_it() -> None:
    b = build()
    b.add(requests([0], output=50)[0])
    b.advance(b.plan(0.0), 1, 0.0)
    plan = b.plan(0.0)
    b.add(requests([1])[0])
    b.advance(plan, 20, 1.0)
    assert [c.rid for c in b.plan(1.0).chunks] == [1]
    b.check()


def test_a_stretch_past_an_end_is_refused() -> None:
    b = build()
    b.add(requests([0], output=5)[0])
    b.advance(b.plan(0.0), 1, 0.0)
    plan = b.plan(0.0)
    with pytest.raises(AssertionError, match="one ended in step"):
        b.advance(plan, 5, 1.0)
