"""Blocks that outlive their request: found by their keys, evicted in order, and never in the way of anybody."""

import random

import pytest

from sched.blocks import BlockPool
from tests.sched.witness import Sets


def key(i: int) -> bytes:
    return b"key %d" % i


def cached(pool: BlockPool, first: int, n: int) -> list[int]:
    """`n` blocks that nobody refers to, under the keys from `first` on."""
    blocks = pool.allocate(n)
    assert blocks is not None
    pool.publish(blocks, [key(first + i) for i in range(n)])
    pool.release(reversed(blocks))
    pool.check()
    return blocks


def found(pool: BlockPool, first: int, n: int) -> list[int]:
    return pool.match([key(first + i) for i in range(n)])


def test_a_released_block_is_found_again() -> None:
    pool = BlockPool(Sets(4), slots=4, block_tokens=16)
    blocks = cached(pool, 0, 3)
    assert (pool.num_live, pool.num_idle, pool.num_cached, pool.num_free) == (0, 3, 3, 1)
    assert found(pool, 0, 5) == blocks, "as far as it is known"
    assert found(pool, 1, 2) == blocks[1:]
    assert found(pool, 3, 2) == []
    pool.share(blocks)
    assert (pool.num_live, pool.num_idle, pool.num_cached) == (3, 0, 3)
    pool.share(blocks[:1])
    assert pool.references() == {blocks[0]: 2, blocks[1]: 1, blocks[2]: 1}
    pool.release(blocks)
    assert (pool.num_live, pool.num_idle) == (1, 2)
    pool.check()


def test_a_block_without_a_key_is_free_at_once() -> None:
    pool = BlockPool(Sets(4), slots=4, block_tokens=16)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[:1], [key(0)])
    pool.release(blocks)
    assert (pool.num_idle, pool.num_free) == (1, 3)
    pool.check()


def test_the_first_block_under_a_key_stays() -> None:
    pool = BlockPool(Sets(4), slots=4, block_tokens=16)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[:1], [key(0)])
    pool.publish(blocks[1:], [key(0)])
    pool.publish(blocks[:1], [key(1)])
    assert found(pool, 0, 1) == blocks[:1]
    assert found(pool, 1, 1) == [], "a block has one key"
    pool.release(blocks)
    assert (pool.num_idle, pool.num_free) == (1, 3)
    pool.check()


def test_sets_are_leased_before_anything_is_forgotten() -> None:
    sets = Sets(3)
    pool = BlockPool(sets, slots=2, block_tokens=16)
    cached(pool, 0, 2)
    held = pool.allocate(4)
    assert held is not None
    assert (sets.num_leased, pool.num_idle, pool.num_evicted) == (3, 2, 0)
    assert pool.num_available == 2
    assert len(pool.allocate(1) or ()) == 1
    assert (pool.num_idle, pool.num_evicted) == (1, 1)
    assert pool.allocate(2) is None
    assert found(pool, 0, 2) == found(pool, 0, 1), (
        "the end of the chain went first, and a refusal takes nothing"
    )
    assert len(found(pool, 0, 1)) == 1
    pool.check()


def test_the_one_longest_out_of_use_is_evicted_first() -> None:
    pool = BlockPool(Sets(1), slots=4, block_tokens=16)
    for i in range(4):
        cached(pool, i, 1)
    again = found(pool, 0, 1)
    pool.share(again)
    pool.release(again)
    held: list[int] = []
    for survivors in ([0, 2, 3], [0, 3], [0], []):
        held += pool.allocate(1) or []
        assert [i for i in range(4) if found(pool, i, 1)] == survivors
    assert len(held) == 4


def test_headroom_may_be_idle() -> None:
    pool = BlockPool(Sets(2), slots=2, block_tokens=16)
    cached(pool, 0, 4)
    assert pool.allocate(2, headroom=3) is None
    assert len(pool.allocate(2, headroom=2) or ()) == 2
    assert pool.num_idle == 2, "only what is taken is evicted"


def test_a_full_pool_is_not_asked_for_every_block() -> None:
    sets = Sets(8)
    pool = BlockPool(sets, slots=16, block_tokens=16)
    cached(pool, 0, 128)
    sets.num_asked = 0
    for _ in range(64):
        assert pool.allocate(1)
    assert pool.num_evicted == 64
    assert sets.num_asked <= 64 // 16 + 1


def test_what_is_idle_goes_before_the_reserve_is_touched() -> None:
    sets = Sets(2, reserve=1)
    pool = BlockPool(sets, slots=2, block_tokens=16)
    cached(pool, 0, 2)
    first = pool.allocate(2, urgent=True)
    assert (pool.num_evicted, sets.num_urgent) == (2, 0)
    second = pool.allocate(1, urgent=True)
    assert sets.num_urgent == 1
    assert first is not None
    assert second is not None
    pool.publish(second, [key(9)])
    pool.release(second)
    assert sets.num_leased == 1, "an urgent set goes back at once, whatever is cached in it"
    assert found(pool, 9, 1) == []
    pool.check()


def test_sets_that_no_request_needs_are_given_up_oldest_first() -> None:
    sets = Sets(6)
    pool = BlockPool(sets, slots=2, block_tokens=16)
    blocks = [cached_block for i in range(4) for cached_block in cached(pool, 2 * i, 2)]
    pool.share(blocks[2:3])  # the second set is in use
    assert (pool.num_sets, pool.num_spare_sets) == (4, 3)
    assert pool.give_up(1) == 1
    assert [i for i in range(8) if found(pool, i, 1)] == [2, 3, 4, 5, 6, 7]
    pool.check()
    assert pool.give_up(9) == 2
    assert sets.num_leased == pool.num_sets == 1
    assert found(pool, 2, 2) == blocks[2:4], "what shares a set with a live block stays"
    pool.release(blocks[2:3])
    assert pool.give_up(9) == 1
    assert (sets.num_leased, pool.num_cached) == (0, 0)
    pool.check()


def test_empty_sets_are_given_up_first() -> None:
    pool = BlockPool(Sets(6), slots=2, block_tokens=16)
    cached(pool, 0, 2)
    empty = pool.allocate(2)
    assert empty is not None
    pool.release(empty)
    assert pool.num_spare_sets == 2
    assert pool.give_up(1) == 1
    assert len(found(pool, 0, 2)) == 2


def test_forget_drops_what_a_step_was_to_write() -> None:
    pool = BlockPool(Sets(6), slots=2, block_tokens=16)
    blocks = pool.allocate(5)
    assert blocks is not None
    pool.publish(blocks[:2], [key(0), key(1)])
    pool.publish(blocks[2:3], [key(2)], 7)
    pool.publish(blocks[3:], [key(3), key(4)], 8)
    assert pool.written(blocks[:2]) == -1
    assert pool.written(blocks[:3]) == 7
    assert pool.written([]) == -1
    pool.release(blocks[2:4])
    pool.forget(since=8)
    assert found(pool, 0, 5) == blocks[:3]
    assert (pool.num_live, pool.num_idle) == (3, 1)
    pool.check()
    pool.forget()
    assert (pool.num_cached, pool.num_idle, pool.num_live) == (0, 0, 3)
    pool.release([*blocks[:2], blocks[4]])
    assert pool.num_sets <= 1
    pool.check()


def test_only_live_blocks_are_published() -> None:
    pool = BlockPool(Sets(1), slots=2, block_tokens=16)
    with pytest.raises(ValueError, match=r"block 0 .* not allocated"):
        pool.publish([0], [key(0)])
    blocks = cached(pool, 0, 1)
    with pytest.raises(ValueError, match="freed twice"):
        pool.release(blocks)


def test_check_sees_a_key_that_leads_elsewhere() -> None:
    pool = BlockPool(Sets(1), slots=4, block_tokens=16)
    cached(pool, 0, 2)
    pool._by_key[key(0)], pool._by_key[key(1)] = pool._by_key[key(1)], pool._by_key[key(0)]
    with pytest.raises(AssertionError, match="keys are mixed up"):
        pool.check()


class Clerk:
    """A pool under random operations, and what must be true of it, kept apart."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        num_sets, self.slots = rng.randint(1, 6), rng.randint(1, 5)
        self.sets = Sets(num_sets, rng.randint(0, min(2, num_sets - 1)))
        self.pool = BlockPool(self.sets, self.slots, 16)
        self.refs: dict[int, int] = {}
        self.keys: dict[int, bytes] = {}  # of live and idle blocks
        self.idle: list[int] = []  # longest out of use first
        self.num_keys = self.hits = self.evictions = self.refusals = 0

    def allocate(self) -> None:
        n, headroom, urgent = self.rng.randint(1, 6), self.rng.choice((0, 0, 2)), self.rng.random() < 0.2
        usable = max(0, len(self.sets.free) - self.sets.foreign - (0 if urgent else self.sets.reserve))
        could = self.pool.num_available + usable * self.slots
        blocks = self.pool.allocate(n, headroom=headroom, urgent=urgent)
        assert (blocks is None) == (could < n + headroom), (
            f"{blocks=} with {could} to be had for {n + headroom}"
        )
        if blocks is None:
            self.refusals += 1
            return
        assert len({*blocks}) == n
        assert not self.refs.keys() & {*blocks}, "a live block was given"
        gone = [b for b in self.idle if b not in self.pool._idle]
        assert gone == self.idle[: len(gone)], "evicted out of order"
        for block in gone:
            del self.keys[block]
        self.evictions += len(gone)
        self.idle = self.idle[len(gone) :]
        self.refs |= dict.fromkeys(blocks, 1)

    def release(self) -> None:
        for block in self.rng.sample(sorted(self.refs), min(len(self.refs), self.rng.randint(1, 5))):
            self.pool.release([block])
            self.refs[block] -= 1
            if not self.refs[block]:
                del self.refs[block]
                if block in self.keys:
                    self.idle.append(block)
        self._drop_given_back()

    def publish(self) -> None:
        for block in self.rng.sample(sorted(self.refs), min(len(self.refs), 2)):
            if block not in self.keys:
                self.keys[block] = key(self.num_keys)
                self.pool.publish([block], [key(self.num_keys)], self.num_keys)
                self.num_keys += 1

    def hit(self) -> None:
        wanted = self.rng.sample(sorted(self.keys), min(len(self.keys), 3))
        blocks = self.pool.match([self.keys[b] for b in wanted])
        assert blocks == wanted
        self.pool.share(blocks)
        for block in blocks:
            self.hits += block not in self.refs
            self.refs[block] = self.refs.get(block, 0) + 1
        self.idle = [b for b in self.idle if b not in blocks]

    def give_up(self) -> None:
        n, before = self.rng.randint(1, 3), self.pool.num_spare_sets
        used = {b >> 12 for b in self.refs}
        assert self.pool.num_sets - len(used) == before
        assert self.pool.give_up(n) == min(n, before)
        self._drop_given_back()

    def forget(self) -> None:
        since = self.num_keys - self.rng.randint(0, 3)
        self.pool.forget(since)
        gone = {b for b, k in self.keys.items() if int(k[4:]) >= since}
        self.keys = {b: k for b, k in self.keys.items() if b not in gone}
        self.idle = [b for b in self.idle if b not in gone]

    def _drop_given_back(self) -> None:
        gone = {b for b in self.idle if b >> 12 not in self.pool._free}
        self.idle = [b for b in self.idle if b not in gone]
        for block in gone:
            del self.keys[block]

    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.references() == self.refs
        assert list(self.pool._idle) == self.idle
        assert {b: k for b, (k, _) in self.pool.cached().items()} == self.keys
        assert self.pool.num_sets == self.sets.num_leased


@pytest.mark.parametrize("pools", [50, pytest.param(400, marks=pytest.mark.slow)])
def test_random_operations_five_hundred_a_pool(pools: int) -> None:
    rng = random.Random(5)
    seen = dict.fromkeys(("hits", "evictions", "refusals"), 0)
    for _ in range(pools):
        clerk = Clerk(rng)
        kinds = [clerk.allocate] * 6 + [clerk.release] * 5 + [clerk.publish] * 5 + [clerk.hit] * 3
        kinds += [clerk.give_up] if rng.random() < 0.5 else []
        kinds += [clerk.forget] if rng.random() < 0.2 else []
        for i in range(500):
            if i % 50 == 0:
                clerk.sets.foreign = rng.choice((0, 0, rng.randint(0, clerk.sets.num_sets)))
            rng.choice(kinds)()
            clerk.agrees()
        for block, count in clerk.refs.items():
            clerk.pool.release([block] * count)
        clerk.pool.give_up(99)
        clerk.pool.check()
        assert clerk.sets.num_leased == clerk.pool.num_cached == 0
        assert clerk.pool.num_revived == clerk.hits
        for name in seen:
            seen[name] += getattr(clerk, name)
    assert all(count > 5 * pools for count in seen.values()), (
        f"the runs did not visit what they are for: {seen}"
    )
