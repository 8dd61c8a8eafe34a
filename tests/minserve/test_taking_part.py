"""Models that come and go: what a reserve withholds from the others, how it is asked for, and when it is there."""

from collections.abc import Iterator

import pytest

from minserve import slab_words as sw
from minserve.quota_writer import QuotaWriter
from minserve.slab_table import OwnershipError, SlabTable
from sched.quota import POLICIES
from tests.minserve.small_table import PLAN, leased, snapshot

DEEP, WIDE, POOR = range(3)


@pytest.fixture
def table() -> Iterator[SlabTable]:
    table = SlabTable.create(PLAN)
    yield table
    table.check()
    table.close()


def fill(table: SlabTable, owner: int) -> int:
    taken = 0
    while table.lease(owner, 1) is not None:
        taken += 1
    return taken


def test_who_leaves_withholds_nothing_any_more(table: SlabTable) -> None:
    assert fill(table, POOR) == 24 - 6 - 4 - 5
    table.leave(DEEP)
    assert not table.takes_part(DEEP)
    assert table.counts().models["deep"].reserve == 0
    # its 6 slabs, and one of the liveness reserve, which the others' longest sequences do not need
    assert fill(table, POOR) == 7
    table.leave(WIDE)
    assert fill(table, POOR) == 4
    assert table.counts().free == 4


def test_a_model_with_slabs_cannot_leave(table: SlabTable) -> None:
    lease = leased(table, DEEP, 3)
    table.drain(DEEP, lease)
    before = snapshot(table)
    with pytest.raises(OwnershipError, match="deep still holds 3 slabs"):
        table.leave(DEEP)
    assert snapshot(table) == before


def test_it_comes_back_when_its_reserve_is_there_and_claims_it_until_then(table: SlabTable) -> None:
    table.leave(DEEP)
    lease = leased(table, POOR, 16)
    before = snapshot(table)
    assert not table.enter(DEEP)
    assert table.quotas.wanted(DEEP) == 7
    # without quotas all beyond the own reserve gives way to it, and nothing more goes
    assert table.quotas.excess(POOR) == 7
    assert table.lease(POOR, 1) is None
    leased(table, WIDE, 4)  # its own reserve is its own
    table.free(POOR, lease)
    assert table.enter(DEEP)
    assert (table.quotas.wanted(DEEP), table.counts().models["deep"].reserve) == (0, 6)
    assert table.enter(DEEP), "who takes part may ask again"
    assert snapshot(table) != before


def test_who_gives_up_asking_claims_nothing(table: SlabTable) -> None:
    table.leave(DEEP)
    leased(table, POOR, 14)
    assert not table.enter(DEEP)
    table.leave(DEEP)
    assert table.quotas.claims() == table.quotas.excess(POOR) == 0
    assert fill(table, POOR) == 2


def test_nobody_comes_in_while_the_liveness_reserve_is_lent(table: SlabTable) -> None:
    table.leave(DEEP)
    common, drawn = leased(table, POOR, 16), leased(table, WIDE, 8, urgent=True)
    assert table.counts().liveness_holder == "wide"
    assert not table.enter(DEEP)
    table.free(POOR, common)
    assert table.enter(DEEP), "what is free now holds every promise"
    table.free(WIDE, drawn)


def test_a_model_that_begins_outside(table: SlabTable) -> None:
    other = SlabTable.create(PLAN, out={"deep", "wide"})
    other.check()
    assert [other.takes_part(o) for o in range(3)] == [False, False, True]
    assert fill(other, POOR) == 24 - 4
    assert not other.enter(WIDE)
    other.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_division_counts_those_that_take_part_or_ask_to(table: SlabTable, policy: str) -> None:
    writer = QuotaWriter(table, policy, {})
    table.leave(DEEP)
    lease = leased(table, POOR, 14)
    writer.tick(1.0)
    assert [n.name for n in writer.needs(0)] == ["wide", "poor"]
    if table.quotas.quota(POOR) is not None:
        assert table.quotas.quota(DEEP) == 0
    assert not table.enter(DEEP)
    writer.tick(1.2)
    assert [n.name for n in writer.needs(0)] == ["deep", "wide", "poor"]
    # who holds more than is left for it has to give way, so that deep can come in
    assert table.quotas.excess(POOR) >= 5
    table.free(POOR, lease)
    assert table.enter(DEEP)
    for owner in range(3):
        table.leave(owner)
    writer.tick(1.4)  # nobody is there
    assert writer.needs(0) == []


def a_reserve_of_no_plan(table: SlabTable) -> None:
    table._rows[sw.R_RESERVE] = 5
    table._rebuild()


def a_liveness_reserve_of_no_plan(table: SlabTable) -> None:
    table._head[sw.H_LIVENESS] -= 1


def a_claim_of_less_than_nothing(table: SlabTable) -> None:
    table._rows[sw.R_WANTED] = -1


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (a_reserve_of_no_plan, "deep has a reserve of 5 slabs, planned are 6"),
        (a_liveness_reserve_of_no_plan, "the liveness reserve is said to be 4 slabs"),
        (a_claim_of_less_than_nothing, "are asked for in a pool of 24"),
    ],
)
def test_the_checker_catches_impossible_words(plant, says: str) -> None:
    table = SlabTable.create(PLAN)
    plant(table)
    with pytest.raises(AssertionError, match=says):
        table.check()
