"""What the structures of blocks and requests must agree on, counted anew: AssertionError, with the numbers, where not."""

from collections.abc import Collection, Mapping, Sequence

from sched.sequence import Seq, State
from sched.step import SLOT_BITS


def check_blocks(free: Mapping[int, list[int]], slots: int, num_free: int, held: Collection[int]) -> None:
    """Every block of a set is free or held, and none is both."""
    free_blocks, held = {block for blocks in free.values() for block in blocks}, set(held)
    all_blocks = {s << SLOT_BITS | slot for s in free for slot in range(slots)}
    assert num_free == sum(map(len, free.values())) == len(free_blocks), f"{num_free=}"
    assert not free_blocks & held, f"{free_blocks & held} are both free and held"
    assert free_blocks | held == all_blocks, f"{free_blocks ^ held ^ all_blocks} are lost or foreign"


def check_sets(
    free: Mapping[int, list[int]],
    slots: int,
    current: int | None,
    partly: Mapping[int, list[int]],
    empty: Sequence[int],
    urgent: Collection[int],
) -> None:
    """Where the sets of a BlockPool are: one is current, some are open, some empty, the rest is full."""
    for set_id, blocks in free.items():
        assert {block >> SLOT_BITS for block in blocks} <= {set_id}, (
            f"foreign blocks in set {set_id}: {blocks}"
        )
        places = [set_id == current, set_id in partly, set_id in empty]
        assert sum(places) == 1 or not (blocks or any(places)), f"set {set_id}: {len(blocks)=} {places=}"
        assert (len(blocks) == slots) == places[2], f"set {set_id}: {len(blocks)=} {places=}"
    assert all(free[s] is blocks and blocks for s, blocks in partly.items()), "a full set is open"
    assert len(set(empty)) == len(empty), f"{empty=}"
    assert set(urgent) <= free.keys(), f"{urgent=} not held"
    assert set(partly) <= free.keys(), "open sets not held"


def check_cache(
    by_key: Mapping[bytes, int],
    cached: Mapping[int, tuple[bytes, int]],
    live: Collection[int],
    idle: Collection[int],
    idle_in: Mapping[int, int],
) -> None:
    """What a BlockPool has published, and which of it nobody refers to."""
    both = set(live) & set(idle)
    assert not both, f"{both} are both live and idle"
    assert set(idle) <= cached.keys() <= {*live, *idle}, "a free block is cached, or an idle one is not"
    assert len(by_key) == len(cached), f"{len(by_key)=} {len(cached)=}"
    assert all(by_key[key] == block for block, (key, _) in cached.items()), "keys are mixed up"
    counts: dict[int, int] = {}
    for block in idle:
        counts[block >> SLOT_BITS] = counts.get(block >> SLOT_BITS, 0) + 1
    assert counts == {s: n for s, n in idle_in.items() if n}, f"{counts=} {idle_in=}"


def check_active(seq: Seq, block_tokens: int, prefilling: bool, paused: bool) -> None:
    """A request that holds blocks is in one place, and has as many as its tokens need."""
    in_one = [prefilling, seq.state is State.RUNNING, paused]
    assert sum(in_one) == 1, f"request {seq.rid} is {seq.state}, {in_one=}"
    rid, held, total = seq.rid, len(seq.blocks), seq.total
    if seq.state is State.PREFILLING:
        assert held == -(-total // block_tokens), f"request {rid} holds {held} blocks, {total=}"
        assert seq.keyed * block_tokens <= seq.computed < total, f"{rid=} {seq.computed=} {total=}"
    if seq.state is State.PAUSED:
        assert held * block_tokens == total - 1, f"request {rid} holds {held} blocks, {total=}"


def check_states(
    live: Mapping[int, Seq],
    active: Mapping[int, Seq],
    prefilling: Mapping[int, Seq],
    paused: Mapping[int, Seq],
    block_tokens: int,
) -> None:
    """AssertionError unless all that are active live, and hold what their state says; the others hold nothing."""
    assert active.keys() <= live.keys(), "an active request does not live"
    for rid, seq in live.items():
        if rid in active:
            check_active(seq, block_tokens, rid in prefilling, rid in paused)
        else:
            idle = seq.state in (State.WAITING, State.ENDING) and not seq.blocks
            assert idle, f"request {rid} is {seq.state} with blocks {seq.blocks}"
