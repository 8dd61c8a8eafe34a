"""The slab table: who owns what, what is refused, what the check must catch."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest

from minserve import slab_words as sw
from minserve.slab_table import Lease, OwnershipError, SlabTable
from sched.slabs import PoolPlan
from tests.minserve.small_table import PLAN, RESERVES, leased, snapshot


@pytest.fixture
def table() -> Iterator[SlabTable]:
    table = SlabTable.create(PLAN)
    yield table
    table.close()


# ---- ownership


def test_leases_are_disjoint_and_named_by_rising_generations(table: SlabTable):
    leases = [leased(table, owner, 4) for owner in (0, 1, 0)]
    slabs = np.concatenate([lease.slabs for lease in leases])
    assert len(set(slabs.tolist())) == 12
    assert all(a.generation < b.generation for a, b in pairwise(leases))
    table.check()


def test_an_attached_table_sees_the_plan_and_the_leases(table: SlabTable):
    other = SlabTable.attach(table.fd)
    lease = leased(table, 1, 3)
    assert other.plan == PLAN
    assert other.holds(1, lease)
    assert not other.holds(0, lease)
    assert other.counts() == table.counts()
    other.free(1, lease)
    assert not table.holds(1, lease)


def test_draining_slabs_are_not_leased_again_until_freed(table: SlabTable):
    everything = PLAN.num_slabs - PLAN.reserved_slabs
    lease = leased(table, 2, everything)
    table.drain(2, lease)
    assert table.lease(2, 1) is None
    assert table.counts().draining == everything
    table.free(2, lease)
    assert set(leased(table, 2, everything).slabs.tolist()) == set(lease.slabs.tolist())


def test_reclaim_takes_live_and_draining_slabs_of_that_owner_alone(table: SlabTable):
    mine, drained, others = leased(table, 0, 3), leased(table, 0, 2), leased(table, 1, 4)
    table.drain(0, drained)
    table.publish(0, demand=7, heartbeat_ns=9)
    assert table.reclaim(0) == 5
    assert table.holds(1, others)
    assert not table.holds(0, mine)
    assert set(table.status(0).values()) == {0}
    assert table.reclaim(0) == 0
    table.check()


def give_back_twice(table: SlabTable, lease: Lease) -> None:
    table.free(0, lease)
    table.free(0, lease)


def drain_after_free(table: SlabTable, lease: Lease) -> None:
    table.free(0, lease)
    table.drain(0, lease)


def drain_twice(table: SlabTable, lease: Lease) -> None:
    table.drain(0, lease)
    table.drain(0, lease)


def slab_named_twice(table: SlabTable, lease: Lease) -> None:
    table.free(0, Lease(lease.generation, 0, lease.slabs[[0, 0]], lease.before[[0, 0]]))


def freed_by_another(table: SlabTable, lease: Lease) -> None:
    table.free(1, lease)


def leased_again_by_another(table: SlabTable, lease: Lease) -> None:
    table.free(0, lease)
    assert set(leased(table, 1, 3).slabs.tolist()) == set(lease.slabs.tolist())
    table.free(0, lease)


def leased_again_by_the_same(table: SlabTable, lease: Lease) -> None:
    """A worker that was taken for dead: its slabs were reclaimed, its successor leased them."""
    table.reclaim(0)
    assert set(leased(table, 0, 3).slabs.tolist()) == set(lease.slabs.tolist())
    table.free(0, lease)


def outside_the_pool(table: SlabTable, lease: Lease) -> None:
    table.free(0, Lease(lease.generation, 0, lease.slabs + 1000, lease.before))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (give_back_twice, "double free"),
        (drain_after_free, "double free"),
        (drain_twice, "draining"),
        (slab_named_twice, "double free"),
        (freed_by_another, "foreign free"),
        (leased_again_by_another, "stale generation"),
        (leased_again_by_the_same, "stale generation"),
        (outside_the_pool, "outside the pool"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_not_the_callers_is_refused_and_nothing_changes(
    table: SlabTable, fault: Callable[[SlabTable, Lease], None], message: str
):
    lease = leased(table, 0, 3)
    states: list[bytes] = []
    expect = table._expect

    def spy(*args):
        states.append(snapshot(table))
        return expect(*args)

    table._expect = spy
    with pytest.raises(OwnershipError, match=message):
        fault(table, lease)
    assert snapshot(table) == states[-1], "the refused call left a trace"
    table.check()


@pytest.mark.parametrize("owner", [-1, 3])
def test_owners_outside_the_plan_are_refused(table: SlabTable, owner: int):
    with pytest.raises(ValueError, match=r"owner must be in \[0, 3\)"):
        table.lease(owner, 1)
    with pytest.raises(ValueError, match="deep, wide, poor"):
        table.owner_of("other")


def test_empty_leases_unknown_status_and_impossible_plans_are_refused(table: SlabTable):
    with pytest.raises(ValueError, match="at least 1 slab, got 0"):
        table.lease(0, 0)
    with pytest.raises(ValueError, match="demand, used, live_blocks"):
        table.publish(0, hearbeat_ns=1)
    with pytest.raises(ValueError, match="at least the 15 slabs reserved, got 14"):
        SlabTable.create(PoolPlan(4096, 14, PLAN.models, 5))


def test_status_words_reach_other_processes(table: SlabTable):
    SlabTable.attach(table.fd).publish(2, used=5, heartbeat_ns=2**62, slack_us=-3)
    said = {name: value for name, value in table.status(2).items() if value}
    assert said == {"used": 5, "heartbeat_ns": 2**62, "slack_us": -3}
    assert set(table.status(1).values()) == {0}


def test_counters_count(table: SlabTable):
    a, b = leased(table, 0, 3), leased(table, 1, 2)
    table.drain(1, b)
    assert table.lease(2, 20) is None
    table.free(0, a)
    counts = table.counts()
    assert (counts.mapped, counts.leased, counts.draining, counts.free) == (24, 0, 2, 22)
    assert (counts.leases, counts.refused, counts.repairs, counts.liveness_holder) == (2, 1, 0, None)
    assert counts.models["deep"].returns == 1
    assert counts.models["wide"].draining == 2
    assert counts.models["poor"].refused == 1
    assert [m.reserve for m in counts.models.values()] == list(RESERVES)


# ---- planted corruption


def own_twice(table: SlabTable) -> None:
    table._words[table._stack[0]] = sw.pack(0, 1, sw.LIVE)


def stack_twice(table: SlabTable) -> None:
    table._stack[0] = table._stack[1]


def stack_of_a_neighbour(table: SlabTable) -> None:
    table._stack[0] = 10**6


def lose_one(table: SlabTable) -> None:
    table._head[sw.H_TOP] -= 1


def two_owners_of_a_lease(table: SlabTable) -> None:
    held = np.flatnonzero(sw.state_of(table._words) == sw.LIVE)
    table._words[held[0]] = sw.pack(1, 1, sw.LIVE)


def unknown_owner(table: SlabTable) -> None:
    table._words[np.flatnonzero(sw.state_of(table._words) == sw.LIVE)[0]] = sw.pack(1, 9, sw.LIVE)


def live_for_nobody(table: SlabTable) -> None:
    table._words[np.flatnonzero(sw.state_of(table._words) == sw.LIVE)[0]] = sw.pack(1, sw.NOBODY, sw.LIVE)


def future_generation(table: SlabTable) -> None:
    table._head[sw.H_SERIAL] = 0


def wrong_count(table: SlabTable) -> None:
    table._rows[sw.R_LIVE] += 1


def wrong_promise(table: SlabTable) -> None:
    table._head[sw.H_UNFILLED] += 1


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (own_twice, "owned twice"),
        (stack_twice, "on the free stack twice"),
        (stack_of_a_neighbour, "outside the pool"),
        (lose_one, "lost"),
        (two_owners_of_a_lease, "belongs to two models"),
        (unknown_owner, "impossible word"),
        (live_for_nobody, "belongs to nobody"),
        (future_generation, "never given"),
        (wrong_count, "said to hold"),
        (wrong_promise, "said to be unfilled"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_check_catches_a_planted_corruption(
    table: SlabTable, plant: Callable[[SlabTable], None], message: str
):
    leased(table, 0, 4)
    table.check()
    plant(table)
    with pytest.raises(AssertionError, match=message):
        table.check()


def test_a_torn_table_is_repaired_by_the_next_holder_and_counted(table: SlabTable):
    lease = leased(table, 0, 4)
    table._head[sw.H_DIRTY] = 1
    table._words[lease.slabs[:2]] = sw.pack(lease.generation, 0, sw.FREE)  # died half-way through a return
    other = SlabTable.attach(table.fd)
    counts = other.counts()
    assert (counts.leased, counts.free, counts.repairs) == (2, 22, 1)
    other.check()
    with pytest.raises(OwnershipError, match="double free"):
        other.free(0, lease)
    assert other.reclaim(0) == 2
