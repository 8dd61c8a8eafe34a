"""What a Batcher says that it lacks, and whom it preempts so that sets come free."""

import random

import pytest

from sched.pressure import demand, preempt_for
from sched.step import Request
from tests.sched.small import build, step

P, SLOTS = 4, 2


def request(rid: int, prompt: int, *, answer: int = 8, arrival: float = 0.0, **keys: object) -> Request:
    return Request(rid=rid, prompt_tokens=prompt, max_tokens=answer, arrival_s=arrival, **keys)  # type: ignore[arg-type]


def test_demand_is_what_waiting_requests_would_fill_beyond_what_is_there() -> None:
    b = build(4, P=P, slots=SLOTS)
    assert demand(b, 0.0) == (0, 0, 0.0, 0.0, 0.0)
    b.add(request(0, 24, ttft_s=10.0))
    b.add(request(1, 20, ttft_s=4.0))
    # 6 and 5 blocks, and one more each when they go on; 4 seconds less 1 until the second is due
    assert demand(b, 1.0)[:4] == (13, 2, 3.0, 4.0)
    assert demand(b, 1.0).sequence_tokens == 22
    step(b, 1.0)
    # the second runs; the first wants 6 blocks and one more, less what is free in the sets that are here
    waiting = demand(b, 1.0)
    assert (waiting.waiting, waiting.slack_s, waiting.budget_s) == (1, 9.0, 10.0)
    assert waiting.blocks == 7 - b.blocks.num_available < 7
    # who is late is more than urgent
    assert demand(b, 50.0).slack_s < 0


def test_who_waits_only_for_a_row_wants_no_memory() -> None:
    b = build(100, P=P, slots=SLOTS, max_running=1)
    for rid in range(5):
        b.add(request(rid, 8))
    step(b)
    assert (b.num_running, b.num_waiting) == (1, 4)
    assert demand(b, 0.0).blocks == 0
    assert demand(b, 0.0).waiting == 4


@pytest.mark.parametrize("seed", range(4))
def test_who_runs_wants_beforehand_what_the_next_steps_take(seed: int) -> None:
    rng = random.Random(seed)
    b = build(1000, P=P, slots=SLOTS)
    for rid in range(8):
        b.add(request(rid, rng.randrange(1, 30), answer=rng.randrange(8, 60)))
    while b.num_running < 8 or b.num_waiting:
        step(b)
    for ahead in (1, 3, P, 2 * P + 1, 30):
        assert demand(b, 0.0, ahead).blocks == max(
            0, b._running.growth(b._step - 1, ahead) - b.blocks.num_available
        )
        wanted = b._running.growth(b._step - 1, ahead)
        taken = ended = 0
        for _ in range(ahead):
            plan, gone = step(b)
            taken += sum(len(grant.blocks) for grant in plan.grants)
            ended += len(gone)
        # who ends may be counted with a block too much
        assert taken <= wanted <= taken + ended, f"{ahead=} {ended=}"


def test_the_youngest_go_as_many_as_it_takes_and_the_eldest_stays() -> None:
    b = build(100, P=P, slots=SLOTS)
    for rid in range(5):
        b.add(request(rid, 16))  # 4 blocks, 2 sets each
        step(b)
    before = b.blocks.num_sets
    assert preempt_for(b, 3) == 2
    assert sorted(b._active) == [0, 1, 2]
    b.blocks.give_up(100)
    assert b.blocks.num_sets <= before - 3
    b.check()
    assert preempt_for(b, 100) == 2
    assert sorted(b._active) == [0]
    assert preempt_for(b, 1) == 0
    # all of them are computed again, and end
    for _ in range(100):
        step(b)
    assert not b.has_work


def test_nobody_is_preempted_where_few_sets_would_come_of_it() -> None:
    """A block of the eldest in every set pins them all."""
    b = build(100, P=P, slots=8)
    b.add(request(0, 4, answer=60))
    for rid in range(1, 7):
        b.add(request(rid, 4))
    step(b)
    assert b.blocks.num_sets == 1 + (b.blocks.num_live > 8)
    assert preempt_for(b, 1) == 0
    assert b.num_preemptions == 0


def test_blocks_of_the_cache_that_others_refer_to_empty_no_set() -> None:
    b = build(100, P=P, slots=SLOTS)
    keys = tuple(bytes([i]) for i in range(4))
    for rid in range(3):
        b.add(request(rid, 17, keys=keys))
        step(b)
    shared = {block for seq in b._active.values() for block in seq.blocks[:4]}
    assert len(shared) == 4, "the three do not share their beginning"
    # each has one block or two of its own, so of the youngest one set may come, of the shared ones none
    preempt_for(b, 100)
    assert all(b.blocks.references()[block] >= 1 for block in shared)
    assert 0 in b._active
    b.check()


def test_while_a_step_will_free_blocks_nobody_is_preempted() -> None:
    b = build(100, P=P, slots=SLOTS)
    for rid in range(3):
        b.add(request(rid, 16))
        step(b)
    plan = b.plan(0.0)
    b.abort(2)
    assert b._flights.pending
    assert preempt_for(b, 1) == 0
    b.advance(plan, 1, 0.0)
    assert preempt_for(b, 1) == 1
