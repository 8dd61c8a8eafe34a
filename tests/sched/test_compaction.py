"""Compaction: which sets are emptied, where their blocks go, and who compacts for whom."""

import random

import pytest

from sched.blocks import BlockPool
from sched.compaction import NO_OFFER, Offer, choose, sets_to_vacate, watermark
from sched.limits import Limits
from sched.pressure import offer
from sched.slabs import SetShape
from tests.sched.content import Content
from tests.sched.witness import Sets

SLOTS = 4


def held(live: dict[int, int], num_sets: int = 0) -> tuple[BlockPool, Sets]:
    """A pool with so many live blocks in each of its sets."""
    sets = Sets(num_sets or len(live))
    pool = BlockPool(sets, SLOTS, 16)
    blocks = pool.allocate(SLOTS * len(live))
    assert blocks is not None
    for set_id, count in live.items():
        pool.release([b for b in blocks if b >> 12 == set_id][: SLOTS - count])
    return pool, sets


@pytest.mark.parametrize(
    ("live", "most_sets", "most_blocks", "headroom", "chosen"),
    [
        ({0: 1, 1: 3, 2: 4}, 8, 99, 0, [0]),
        ({0: 1, 1: 3, 2: 4}, 8, 99, 1, []),  # the room that is left would be less than the headroom
        ({0: 2, 1: 1, 2: 1, 3: 2}, 8, 99, 0, [1, 2]),
        ({0: 2, 1: 1, 2: 1, 3: 2}, 1, 99, 0, [1]),
        ({0: 2, 1: 1, 2: 1, 3: 2}, 8, 1, 0, [1]),
        ({0: 3, 1: 2, 2: 3}, 8, 0, 0, [1]),  # one set may exceed the budget
        ({0: 3, 1: 3, 2: 3}, 8, 99, 0, []),
        ({0: 4, 1: 4}, 8, 99, 0, []),
    ],
)
def test_the_emptiest_sets_are_chosen(
    live: dict[int, int], most_sets: int, most_blocks: int, headroom: int, chosen: list[int]
) -> None:
    pool, _ = held(live)
    assert choose(pool, most_sets, most_blocks, headroom) == chosen


def test_a_set_whose_blocks_are_leaving_is_not_chosen() -> None:
    pool, _ = held({0: 1, 1: 2, 2: 2})
    assert choose(pool, 8, 99, but={0}) == [1]


def test_blocks_go_to_the_fullest_sets_and_the_emptied_come_back_with_their_release() -> None:
    pool, sets = held({0: 1, 1: 3, 2: 1, 3: 2})
    live = set(pool.references())
    moved, leaving = pool.evacuate([0, 2], step=5)
    pool.check()
    assert {a >> 12 for a in moved} == {0, 2}
    assert sorted(b >> 12 for b in moved.values()) == [1, 3], (
        "the one free place of the fullest, then the next"
    )
    assert sorted(leaving) == sorted(s << 12 | slot for s in (0, 2) for slot in range(SLOTS))
    assert not set(moved.values()) & live
    # the last free block of the others, and no more: those of the emptied sets are nobody's to take
    assert pool.allocate(1) is not None
    assert pool.allocate(1) is None
    assert sets.num_leased == 4
    pool.release(leaving)
    pool.check()
    pool.trim()
    assert sets.num_leased == 2
    assert set(pool.references()) >= live - set(moved) | set(moved.values())


def test_a_shared_and_cached_block_keeps_its_references_and_its_key() -> None:
    pool, _ = held({0: 1, 1: 3})
    (block,) = (b for b in pool.references() if b >> 12 == 0)
    pool.share([block, block])
    pool.publish([block], [b"key"], step=2)
    moved, leaving = pool.evacuate([0], step=7)
    target = moved[block]
    assert pool.references()[target] == 3
    assert pool.match([b"key"]) == [target]
    assert pool.written([target]) == 7, "the copy writes it"
    pool.release(leaving)
    pool.release([target] * 3)
    assert pool.num_idle == 1
    pool.check()


def test_idle_blocks_make_room_those_longest_out_of_use_first() -> None:
    pool, _ = held({0: 1, 1: 4, 2: 4})
    for i, block in enumerate(b for b in sorted(pool.references()) if b >> 12):
        pool.publish([block], [bytes([i])])
        if i in (2, 5):
            pool.release([block])
    assert choose(pool, 8, 99) == [0]
    moved, _ = pool.evacuate([0], step=1)
    assert [b >> 12 for b in moved.values()] == [1]
    assert (pool.num_idle, pool.num_evicted) == (1, 1)
    assert pool.match([bytes([2])]) == []
    pool.check()


def test_a_step_moves_what_was_asked_for_and_the_next_one_nothing() -> None:
    limits = Limits(
        max_running=30, max_step_tokens=300, max_chunk_tokens=300, max_model_len=40, max_waiting=99
    )
    sets = Sets(20)
    c = Content(sets, SLOTS, 4, limits)
    for rid in range(24):
        c.add(rid, list(range(rid, rid + 6)), 6 if rid % 4 else 30)
    while c.batcher.num_running > 6 or not c.batcher.num_running:
        c.step()
    before, live = sets.num_leased, c.pool.num_live
    c.batcher.compactor.ask(2, 99)
    assert c.step().moves
    c.pool.give_up(1)  # one that is empty is kept
    assert sets.num_leased == before - 2
    assert c.pool.num_live == live
    assert not c.plan().moves
    c.advance()
    c.finish()
    assert c.sequences[0].ended == "end"


def test_who_is_aborted_while_his_blocks_are_copied_keeps_them_until_the_step_is_over() -> None:
    """The target is written by a step under way: to lease its slab to another model now would corrupt it."""
    rng = random.Random(0)
    limits = Limits(max_running=9, max_step_tokens=99, max_chunk_tokens=99, max_model_len=60, max_waiting=99)
    sets = Sets(40)
    c = Content(sets, SLOTS, 4, limits)
    for rid in range(9):
        c.add(rid, [rng.randrange(5) for _ in range(20)], 39)
    c.step()
    c.step()
    for rid in range(0, 9, 2):
        c.abort(rid)
    c.batcher.compactor.ask(8, 99)
    plan = c.plan()
    targets = {b for _, b in plan.moves}
    assert targets
    for rid in range(1, 9, 2):
        c.abort(rid)
    assert targets <= set(c.pool.references()), "released before the copy was made"
    c.advance()
    assert not targets & set(c.pool.references())
    c.finish()


@pytest.mark.parametrize(
    ("own", "others", "missing", "sets"),
    [
        (Offer(3, 0.5), [], 10, 3),  # as many as it can
        (Offer(3, 0.5), [], 2, 2),
        (Offer(3, 0.5), [], 0, 0),
        (Offer(3, 0.5), [], -4, 0),
        (NO_OFFER, [], 10, 0),
        (Offer(3, 0.5), [Offer(1, 0.4)], 10, 0),  # another frees a byte for less
        (Offer(3, 0.5), [Offer(1, 0.6), NO_OFFER], 10, 3),
        (Offer(3, 0.5), [Offer(0, 0.1)], 10, 3),  # what nobody can give costs nothing
        (Offer(3, 0.5), [Offer(3, 0.5)], 10, 3),
    ],
)
def test_the_cheapest_compacts_for_what_the_others_want(
    own: Offer, others: list[Offer], missing: int, sets: int
) -> None:
    assert sets_to_vacate(own, others, missing) == sets


def test_an_empty_set_is_no_room_for_others_blocks() -> None:
    """To fill it would take a set for each that comes free, for ever."""
    pool, _ = held({0: 0, 1: 3, 2: 4, 3: 4})
    assert pool.num_empty_sets == 1
    assert choose(pool, 8, 99) == []


def test_what_is_published_while_a_copy_is_under_way_is_forgotten_if_it_fails() -> None:
    """A block may become known as full, and written, after the step was planned that moves it."""
    pool, _ = held({0: 1, 1: 3, 2: 3})
    (block,) = (b for b in pool.references() if b >> 12 == 0)
    moved, _ = pool.evacuate([0], step=7)
    pool.publish([moved[block]], [b"key"], step=-1)
    assert pool.match([b"key"]) == [moved[block]]
    pool.forget(since=8)
    assert pool.match([b"key"]) == [moved[block]]
    pool.forget(since=7)
    assert pool.match([b"key"]) == []
    pool.check()


def test_the_next_steps_of_others_find_slabs_without_having_asked() -> None:
    def shape(layers: int, slots: int) -> SetShape:
        return SetShape(layers, (), slots, 16, 0, 1, 0.0)

    # 2,048 tokens are 8 sets of 4 layers of the one, 4 of 2 of the other; and a set of each
    assert watermark([shape(4, 16), shape(2, 32)], 10_000) == 8 * 4 + 4 + 2
    assert watermark([shape(4, 16), shape(2, 32)], 160) == 10, "at most a sixteenth of the pool"
    assert watermark([], 10_000) == 0


def test_what_steps_under_way_are_emptying_is_counted_until_they_have_run() -> None:
    limits = Limits(max_running=9, max_step_tokens=99, max_chunk_tokens=99, max_model_len=60, max_waiting=99)
    c = Content(Sets(40), SLOTS, 4, limits)
    for rid in range(9):
        c.add(rid, [rid] * 20, 39)
    c.step()
    assert offer(c.batcher) == NO_OFFER, "all are full"
    for rid in range(0, 9, 2):
        c.abort(rid)
    c.step()
    assert offer(c.batcher).sets >= 2
    c.batcher.compactor.ask(2, 99)
    c.plan()
    assert (c.batcher.compactor.num_leaving, c.batcher.compactor.num_vacated) == (2, 2)
    c.advance()
    assert c.batcher.compactor.num_leaving == 0
    c.finish()
    assert offer(c.batcher) == NO_OFFER
