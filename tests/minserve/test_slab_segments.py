"""Segments whose memory is given back: no slab of one is ever anybody's, and none is lost on the way out or back."""

import random
from collections.abc import Iterator

import pytest

from minserve import slab_words as sw
from minserve.quota_writer import QuotaWriter
from minserve.slab_segments import SlabSegments, gone_segments, num_away
from minserve.slab_table import Lease, SlabTable
from tests.minserve.small_table import PLAN, copy_of, leased

# slabs of 4 KiB; a segment of five and a half, so that every second one begins within a slab
SEGMENT = 5 * 4096 + 2048


@pytest.fixture
def table() -> Iterator[SlabTable]:
    table = SlabTable.create(PLAN)
    yield table
    table.close()


def give_back(segments: SlabSegments, segment: int) -> None:
    assert segments.withdraw(segment) == 0
    segments.leave(segment)


def test_a_segment_goes_when_its_slabs_are_nobodys_and_comes_back_whole(table: SlabTable) -> None:
    segments = SlabSegments(table, SEGMENT)
    assert segments.num == 5
    assert [segments.slabs(i) for i in range(5)] == [(0, 6), (5, 11), (11, 17), (16, 22), (22, 24)]
    lease = leased(table, 0, 8)  # the low slabs
    assert (segments.held(1), segments.emptiest()) == (3, 4)
    assert segments.withdraw(1) == 3, "three are somebody's"
    assert num_away(table) == 3
    with pytest.raises(ValueError, match="segment 1 must be empty to be given back, 3 slabs are not away"):
        segments.leave(1)
    table.check()
    table.free(0, lease)
    give_back(segments, 1)
    assert gone_segments(table) == {1}
    assert table.counts().mapped == 24 - 6
    table.check()
    taken = leased(table, 1, 7)
    assert not {5, 6, 7, 8, 9, 10} & set(taken.slabs.tolist()), "none of the slabs that are away"
    segments.restore(1)
    assert (num_away(table), gone_segments(table)) == (0, frozenset())
    assert table.counts().mapped == 24
    table.check()
    with pytest.raises(ValueError, match=r"must be in \[1, 5\) to be given back, got 0: the first one stays"):
        segments.withdraw(0)


def test_a_slab_between_two_segments_comes_back_with_the_second(table: SlabTable) -> None:
    segments = SlabSegments(table, SEGMENT)
    give_back(segments, 4)
    give_back(segments, 3)
    segments.restore(4)
    assert num_away(table) == 6, "slabs 16 to 21"
    give_back(segments, 4)
    segments.restore(3)
    segments.restore(4)
    assert num_away(table) == 0
    table.check()
    other = SlabSegments(table, 5 * 4096 - 2048)
    give_back(other, 5)
    give_back(other, 4)
    other.restore(4)
    assert sw.state_of(table._words)[18:].tolist() == [0, 0, 0, 0, sw.AWAY, sw.AWAY], "slab 22 lies in both"
    table.check()


def test_reserves_are_kept(table: SlabTable) -> None:
    """24 slabs, 15 of them promised."""
    segments = SlabSegments(table, SEGMENT)
    give_back(segments, 4)
    give_back(segments, 3)
    before = copy_of(table)
    with pytest.raises(
        ValueError, match="segment 2 must stay: without it 11 slabs would be left, 15 are reserved"
    ):
        segments.withdraw(2)
    assert before._map[:] == table._map[:]
    before.close()
    for owner, n in ((0, 6), (1, 4)):
        leased(table, owner, n)
    assert table.lease(2, 2, urgent=True) is not None, "and the liveness reserve is there"
    table.check()


def test_what_is_promised_stays_free_while_a_segment_empties(table: SlabTable) -> None:
    segments = SlabSegments(table, 8 * 4096)
    leased(table, 0, 9)
    assert segments.withdraw(2) == 2, "of eight free slabs two are needed for the reserves"
    table.check()
    assert table.lease(1, 4) is not None, "what it was promised"
    table.check()


def test_quotas_divide_what_is_there(table: SlabTable) -> None:
    writer = QuotaWriter(table, "equal", {})
    room = writer._room()
    segments = SlabSegments(table, SEGMENT)
    give_back(segments, 4)
    assert writer._room() == room - 2


def test_a_writer_that_dies_in_a_change_leaves_a_whole_table(table: SlabTable) -> None:
    """At every store of a withdrawal and of a return."""

    class Died(Exception):
        pass

    class Head:
        def __init__(self, head: "memoryview[int]", stores: int) -> None:
            self.head, self.stores = head, stores

        def __getitem__(self, i: int) -> int:
            return self.head[i]

        def __setitem__(self, i: int, value: int) -> None:
            if self.stores == 0:
                raise Died
            self.stores -= 1
            self.head[i] = value

    died = 0
    for stores in range(40):
        for back in (False, True):
            other = copy_of(table)
            segments = SlabSegments(other, SEGMENT)
            leased(other, 0, 3)
            if back:
                give_back(segments, 4)
            whole = other._head
            other._head = Head(whole, stores)  # type: ignore[assignment]
            try:
                segments.restore(4) if back else give_back(segments, 4)
            except Died:
                died += 1
            other._head = whole
            other.check()
            states = sw.state_of(other._words)
            for segment in gone_segments(other):
                first, last = segments.slabs(segment)
                assert (states[first:last] == sw.AWAY).all(), "gone, and some of its slabs are not away"
            other.close()
    assert died > 10


def test_random_leases_beside_segments_that_come_and_go() -> None:
    rng = random.Random(9)
    table = SlabTable.create(PLAN)
    segments = SlabSegments(table, SEGMENT)
    held: list[tuple[int, Lease]] = []
    closing: int | None = None
    went = 0
    for _ in range(4000):
        act = rng.random()
        if act < 0.45:
            owner = rng.randrange(3)
            lease = table.lease(owner, rng.randint(1, 3), urgent=rng.random() < 0.2)
            held += [(owner, lease)] if lease is not None else []
        elif act < 0.85 and held:
            owner, lease = held.pop(rng.randrange(len(held)))
            table.free(owner, lease)
        elif act < 0.95:
            closing = segments.emptiest() if closing is None else closing
            try:
                if closing is not None and segments.withdraw(closing) == 0:
                    segments.leave(closing)
                    closing, went = None, went + 1
            except ValueError:
                assert closing is not None
                segments.restore(closing)
                closing = None
        else:
            for segment in gone_segments(table):
                segments.restore(segment)
        table.check()
        away = sw.state_of(table._words) == sw.AWAY
        for _, lease in held:
            assert not away[lease.slabs].any(), "a leased slab has no memory"
        assert num_away(table) == away.sum()
    assert went > 50
    table.close()


def test_too_many_segments_are_refused(table: SlabTable) -> None:
    with pytest.raises(ValueError, match="segment_bytes must be at least a 300th of the pool, got 128"):
        SlabSegments(table, 128)
    with pytest.raises(ValueError, match=r"segment must be in \[0, 5\), got 5"):
        SlabSegments(table, SEGMENT).slabs(5)
