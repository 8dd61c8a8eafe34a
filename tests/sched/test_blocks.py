"""BlockPool against a set of ints: what is allocated is unique, counted, and its sets go back."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sched.blocks import BlockPool
from sched.step import MAX_SLOTS, SLOT_BITS
from tests.sched.witness import Sets


def test_ids_name_set_and_slot() -> None:
    pool = BlockPool(Sets(3), slots=2, block_tokens=16)
    assert pool.allocate(1) == [0]
    assert pool.allocate(2) == [1, 1 << SLOT_BITS]
    assert (pool.num_sets, pool.num_live, pool.num_free) == (2, 3, 1)


def test_a_refused_allocation_changes_nothing() -> None:
    sets = Sets(3)
    pool = BlockPool(sets, slots=2, block_tokens=16)
    held = pool.allocate(1)
    assert pool.allocate(6) is None
    assert pool.allocate(5, headroom=1) is None
    assert (sets.num_leased, pool.num_live, pool.num_free) == (1, 1, 1)
    pool.check()
    assert held == [0]
    assert sorted(pool.allocate(5) or ()) == [1, 4096, 4097, 8192, 8193]


def test_headroom_is_left_over() -> None:
    pool = BlockPool(Sets(3), slots=2, block_tokens=16)
    assert pool.allocate(2, headroom=2) == [4096, 4097]
    assert pool.num_free == 2


def test_one_empty_set_is_kept() -> None:
    sets = Sets(9)
    pool = BlockPool(sets, slots=2, block_tokens=16)
    blocks = pool.allocate(8)
    assert blocks is not None
    pool.release(blocks)
    assert sets.num_leased == pool.num_sets == 1
    asked = sets.num_asked
    for _ in range(5):
        again = pool.allocate(2)
        assert again is not None
        pool.release(again)
    assert sets.num_asked == asked, "the kept set serves without a lease"
    pool.trim()
    assert sets.num_leased == 0


def test_an_urgent_set_is_not_kept() -> None:
    sets = Sets(2, reserve=1)
    pool = BlockPool(sets, slots=2, block_tokens=16)
    first = pool.allocate(2)
    assert pool.allocate(1) is None
    second = pool.allocate(1, urgent=True)
    assert first is not None
    assert second is not None
    assert sets.num_urgent == 1
    pool.release(second)
    assert sets.num_leased == 1, "back to the reserve at once"
    pool.release(first)
    assert sets.num_leased == 1, "kept"
    pool.check()


def test_urgent_asks_for_the_reserve_last() -> None:
    sets = Sets(3, reserve=1)
    pool = BlockPool(sets, slots=1, block_tokens=16)
    assert pool.allocate(2, urgent=True) is not None
    assert sets.num_urgent == 0


def test_partly_used_sets_fill_before_empty_ones() -> None:
    sets = Sets(4)
    pool = BlockPool(sets, slots=4, block_tokens=16)
    blocks = pool.allocate(12)
    assert blocks is not None
    pool.release(blocks[:4])  # the first set is empty and kept
    pool.release(blocks[5:6])
    assert pool.allocate(1) == blocks[5:6]
    assert (pool.allocate(1) or blocks)[0] in blocks[:4]


def test_shared_blocks_are_free_after_their_last_release() -> None:
    pool = BlockPool(Sets(1), slots=2, block_tokens=16)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.share(blocks[:1])
    pool.release(blocks)
    assert (pool.num_live, pool.num_released) == (1, 1)
    pool.release(blocks[:1])
    assert pool.num_live == 0


@pytest.mark.parametrize("block", [0, 1, 2, MAX_SLOTS - 1, 1 << SLOT_BITS])
def test_freed_twice_or_foreign_raises(block: int) -> None:
    pool = BlockPool(Sets(1), slots=2, block_tokens=16)
    held = pool.allocate(1)
    assert held == [0]
    if block == 0:
        pool.release(held)
    for operation in (pool.release, pool.share):
        with pytest.raises(ValueError, match=rf"block {block} .* freed twice or foreign"):
            operation([block])
    pool.check()


def test_bad_shapes_raise() -> None:
    for slots in (0, MAX_SLOTS + 1):
        with pytest.raises(ValueError, match="slots must be in"):
            BlockPool(Sets(1), slots, 16)
    with pytest.raises(ValueError, match="block_tokens must be at least 1, got 0"):
        BlockPool(Sets(1), 1, 0)


def test_check_sees_a_torn_count() -> None:
    pool = BlockPool(Sets(1), slots=4, block_tokens=16)
    pool.allocate(2)
    del pool._live[0]
    with pytest.raises(AssertionError, match=r"\{0\} are lost"):
        pool.check()


class BlockMachine(RuleBasedStateMachine):
    @initialize(num_sets=st.integers(1, 8), slots=st.integers(1, 5), reserve=st.integers(0, 2))
    def start(self, num_sets: int, slots: int, reserve: int) -> None:
        self.sets = Sets(num_sets, min(reserve, num_sets))
        self.slots = slots
        self.pool = BlockPool(self.sets, slots, 16)
        self.live: dict[int, int] = {}  # block -> references

    @rule(n=st.integers(1, 12), headroom=st.integers(0, 3), urgent=st.booleans())
    def allocate(self, n: int, headroom: int, urgent: bool) -> None:
        before = (self.sets.num_leased, self.pool.num_free, sorted(self.sets.free))
        blocks = self.pool.allocate(n, headroom=headroom, urgent=urgent)
        usable = len(self.sets.free) - self.sets.foreign - (0 if urgent else self.sets.reserve)
        if blocks is None:
            assert before == (self.sets.num_leased, self.pool.num_free, sorted(self.sets.free))
            assert self.pool.num_free + max(0, usable) * self.slots < n + headroom, "refused without need"
            return
        assert len(blocks) == len(set(blocks)) == n
        assert not self.live.keys() & set(blocks)
        assert self.pool.num_free >= headroom
        self.live |= dict.fromkeys(blocks, 1)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release_some(self, data: st.DataObject) -> None:
        for block in data.draw(st.lists(st.sampled_from(sorted(self.live)), max_size=8)):
            if block in self.live:
                self.pool.release([block])
                self.live[block] -= 1
                if not self.live[block]:
                    del self.live[block]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.live)))
        self.pool.share([block])
        self.live[block] += 1

    @rule(foreign=st.integers(0, 8))
    def other_model(self, foreign: int) -> None:
        self.sets.foreign = foreign

    @rule()
    def trim(self) -> None:
        self.pool.trim()
        assert self.pool.num_sets == len({b >> SLOT_BITS for b in self.live})

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert self.pool.num_live == len(self.live)
        assert self.pool.num_sets == self.sets.num_leased
        assert not {b >> SLOT_BITS for b in self.live} & set(self.sets.free)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for block, count in self.live.items():
                self.pool.release([block] * count)
            assert self.pool.num_sets <= 1
            self.pool.trim()
            assert self.sets.num_leased == 0


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
