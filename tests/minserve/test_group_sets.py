"""A model on two GPUs leases on both or on neither, whatever others do to either pool and whenever a rank dies."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minserve.group_sets import GroupSets
from minserve.kv_share import KvShare
from minserve.shared_memory import create_memfd
from minserve.slab_table import Lease, SlabTable
from sched.blocks import BlockPool
from sched.pressure import Demand
from sched.slabs import LayerGroup, PoolPlan, SetShape
from tests.minserve.small_table import copy_of, snapshot

ROOT = Path(__file__).resolve().parents[2]


def shape(layers: int, reserve_sets: int, slots: int = 8, tokens: int = 16) -> SetShape:
    return SetShape(layers, (LayerGroup(0, layers, 512),), slots, tokens, reserve_sets, 2 * reserve_sets, 0.0)


# "g" and "h" have a rank on each, "a" and "b" are alone on theirs; the second pool is the tighter one
PLANS = (
    PoolPlan(4096, 260, {"a": shape(5, 3), "g": shape(8, 2), "h": shape(6, 2)}, 16),
    PoolPlan(4096, 230, {"g": shape(8, 2, slots=9), "h": shape(6, 2), "b": shape(7, 3)}, 21),
)


@pytest.fixture
def tables() -> Iterator[tuple[SlabTable, ...]]:
    tables = tuple(SlabTable.create(plan, timeout_s=10) for plan in PLANS)
    yield tables
    for table in tables:
        table.check()
        table.close()


def fill(table: SlabTable, name: str) -> list[Lease]:
    """All that `name` can have."""
    owner, found = table.owner_of(name), []
    while (lease := table.lease(owner, 1)) is not None:
        found.append(lease)
    return found


def test_a_set_has_one_id_and_slabs_of_its_own_on_each_rank(tables: tuple[SlabTable, ...]) -> None:
    sets = GroupSets(tables, "g")
    assert (sets.slots, sets.block_tokens, sets.layers) == (8, 16, 8)
    tables[1].lease(tables[1].owner_of("b"), 7)  # so that the ranks' slabs differ
    first, second = sets.lease(), sets.lease()
    assert sets.take_changed() == [first, second] == [0, 1]
    for rank, table in enumerate(tables):
        slabs = sets.rows[rank][[first, second]] // 4096
        assert len(set(slabs.ravel().tolist())) == 16
        assert table.held(table.owner_of("g")) == 16
        assert sets.inherited(second, rank).tolist() == slabs[1].tolist()
    assert (sets.rows[0][0] != sets.rows[1][0]).any()
    sets.check()
    sets.give_back(first)
    assert not sets.rows[0][0].any()
    assert sets.lease() == first, "the smallest id is used again"
    with pytest.raises(ValueError, match=r"set 7 is not leased by g; leased are \[0, 1\]"):
        sets.give_back(7)
    sets.close()


@pytest.mark.parametrize("full", [0, 1])
def test_one_full_pool_refuses_for_all_and_nothing_changes(tables: tuple[SlabTable, ...], full: int) -> None:
    sets = GroupSets(tables, "g")
    while sets.lease() is not None:
        pass
    held = sets.num_leased
    filled = fill(tables[full], "ab"[full])
    sets.give_back(0)
    more = fill(tables[full], "ab"[full])
    before = [snapshot(table) for table in tables]
    refused = [table.counts().models["g"].refused for table in tables]
    assert held > 2
    assert more
    assert sets.lease() is None
    assert [snapshot(table) for table in tables] == before
    after = [table.counts().models["g"].refused for table in tables]
    assert after[full] == refused[full] + 1
    assert after[1 - full] == refused[1 - full], "the pool with room has refused nobody"
    owner = tables[full].owner_of("ab"[full])
    for lease in filled + more:
        tables[full].free(owner, lease)
    assert sets.lease() is not None
    sets.close()


def test_a_set_drains_on_all_ranks_behind_one_fence(tables: tuple[SlabTable, ...]) -> None:
    reached = [False]
    sets = GroupSets(tables, "g", fence=lambda: lambda: reached[0])
    set_id = sets.lease()
    assert set_id is not None
    sets.give_back(set_id)
    assert [table.counts().models["g"].draining for table in tables] == [8, 8]
    assert sets.lease() == 1, "an id that drains is nobody's"
    sets.check()
    reached[0] = True
    sets.poll()
    assert [table.counts().models["g"].draining for table in tables] == [0, 0]
    assert sets.lease() == 0
    sets.close()


def test_quotas_bind_by_the_tightest_rank(tables: tuple[SlabTable, ...]) -> None:
    sets = GroupSets(tables, "g")
    while sets.lease() is not None:
        pass
    sets.publish(demand=3, used=2)
    assert [table.status(table.owner_of("g"))["demand"] for table in tables] == [3, 3]
    assert sets.excess == 0
    # of the first pool it may keep all, of the second half of what it has
    half = sets.num_leased // 2
    tables[0].quotas.write([0, sets.num_leased, 0])
    tables[1].quotas.write([half, 0, 10])
    tables[1].publish(tables[1].owner_of("b"), demand=10)
    missing = sets.excess
    assert 0 < missing <= sets.num_leased - half
    for set_id in range(missing):
        sets.give_back(set_id)
    assert sets.excess == 0
    tables[1].publish(tables[1].owner_of("b"), demand=0)
    sets.close()


def test_a_group_gives_way_on_all_ranks_when_one_is_short(tables: tuple[SlabTable, ...]) -> None:
    sets = GroupSets(tables, "g")
    blocks = BlockPool(sets, sets.slots, sets.block_tokens)
    held = []
    while (found := blocks.allocate(sets.slots)) is not None:
        held.append(found)
    # cached, and of no request any more
    for i, found in enumerate(held):
        blocks.publish(found, [bytes([i, k]) for k in range(len(found))])
        blocks.release(found)
    share = KvShare(sets, blocks, lambda steps: Demand())
    share.turn()
    before = sets.num_leased
    assert before == blocks.num_spare_sets > 4
    rows = [table.status(table.owner_of("g")) for table in tables]
    assert rows[0] == rows[1]
    assert rows[0]["cached_blocks"] == before * sets.slots
    tables[1].quotas.write([2, 0, 20])
    tables[1].publish(tables[1].owner_of("b"), demand=10)
    share.turn()
    assert sets.num_leased < before
    sets.check()
    assert [table.held(table.owner_of("g")) for table in tables] == [8 * sets.num_leased] * 2
    assert tables[1].lease(tables[1].owner_of("b"), 70) is not None
    blocks.forget()
    blocks.trim()
    tables[1].reclaim(tables[1].owner_of("b"))
    sets.close()


def test_two_groups_never_hold_one_liveness_reserve_each() -> None:
    """Each would wait for the other's for ever."""
    # on the first pool h has a reserve, so there it needs nothing of the liveness reserve
    plans = (
        PoolPlan(4096, 260, {"a": shape(5, 3), "g": shape(8, 2), "h": shape(6, 4)}, 16),
        PoolPlan(4096, 260, {"g": shape(8, 2), "h": shape(6, 0), "b": shape(7, 3)}, 16),
    )
    tables = tuple(SlabTable.create(plan) for plan in plans)
    g, h = GroupSets(tables, "g"), GroupSets(tables, "h")
    fill(tables[0], "a")
    assert [g.lease(), g.lease(), g.lease()] == [0, 1, None]
    assert g.lease(urgent=True) == 2
    assert [table.counts().liveness_holder for table in tables] == ["g", None]
    left = fill(tables[1], "b")
    owners = [table.owner_of("h") for table in tables]
    assert [t.rule.draws(o, 6, True) for t, o in zip(tables, owners, strict=True)] == [False, True]
    assert h.lease(urgent=True) is None
    assert g.lease(urgent=True) == 3, "who holds one goes on to its longest sequence, on all its ranks"
    g.close()
    # nothing is missing any more, on either pool
    for lease in left[:6]:
        tables[1].free(tables[1].owner_of("b"), lease)
    assert h.lease(urgent=True) is not None
    h.close()
    for table in tables:
        table.check()
        table.close()


def test_what_ranks_must_agree_on() -> None:
    table = SlabTable.create(PLANS[0])
    for wrong, says in (
        ({"g": shape(7, 2)}, r"g must have the same layers on all ranks, got \[8, 7\]"),
        ({"g": shape(8, 2, tokens=32)}, r"the same block_tokens on all ranks, got \[16, 32\]"),
    ):
        other = SlabTable.create(PoolPlan(4096, 100, wrong, 16))
        with pytest.raises(ValueError, match=says):
            GroupSets((table, other), "g")
        other.close()
    again = SlabTable.attach(table.fd)
    with pytest.raises(ValueError, match="each rank must have a pool of its own"):
        GroupSets((table, again), "g")
    with pytest.raises(ValueError, match="model 'b' has no place"):
        GroupSets((table,), "b")
    again.close()
    table.close()


@pytest.mark.parametrize("seed", range(4))
def test_under_contention_it_has_a_set_exactly_when_both_pools_can_give_it(
    tables: tuple[SlabTable, ...], seed: int
) -> None:
    rng, refusals = random.Random(seed), 0
    groups = [GroupSets(tables, name) for name in "gh"]
    pools = [BlockPool(group, group.slots, group.block_tokens) for group in groups]
    held: list[list[list[int]]] = [[], []]
    others: list[list[Lease]] = [[], []]

    def could(group: GroupSets) -> bool:
        copies = [copy_of(table) for table in tables]
        found = [
            c.lease(owner, group.layers) is not None for c, owner in zip(copies, group.owners, strict=True)
        ]
        for copy in copies:
            copy.close()
        return all(found)

    for _ in range(400):
        which, act = rng.randrange(2), rng.random()
        table, owner = tables[which], tables[which].owner_of("ab"[which])
        if act < 0.3:
            lease = table.lease(owner, rng.randrange(1, 30))
            others[which] += [] if lease is None else [lease]
        elif act < 0.45 and others[which]:
            table.free(owner, others[which].pop(rng.randrange(len(others[which]))))
        elif act < 0.6 and held[which]:
            pools[which].release(held[which].pop(rng.randrange(len(held[which]))))
        else:
            group, free = groups[which], pools[which].num_free
            n = rng.randrange(free + 1, free + group.slots + 1)  # one set is missing
            expected = could(group)
            blocks = pools[which].allocate(n)
            assert (blocks is not None) == expected, f"{n} blocks of {group.model}"
            held[which] += [blocks] if blocks else []
            refusals += blocks is None
        for group in groups:
            group.check()
    assert refusals > 20, "nobody was short"
    for blocks, pool, group in zip(held, pools, groups, strict=True):
        for taken in blocks:
            pool.release(taken)
        pool.trim()
        group.close()
    for which, leases in enumerate(others):
        for lease in leases:
            tables[which].free(tables[which].owner_of("ab"[which]), lease)
    assert [t.counts().free for t in tables] == [plan.num_slabs for plan in PLANS]


def nursery(*args: str, fault: str = "") -> dict[str, float]:
    """The report of tests/minserve/group_nursery.py over the two pools, which must be whole; `fault`: what it must say."""
    tables = [SlabTable.create(plan, timeout_s=10) for plan in PLANS]
    pools = [create_memfd("test-pool", plan.pool_bytes) for plan in PLANS]
    fds = [fd for pair in zip((t.fd for t in tables), pools, strict=True) for fd in pair]
    command = [sys.executable, "-m", "tests.minserve.group_nursery", args[0], *map(str, fds), *args[1:]]
    # numpy's own threads would make the fork unsafe
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, pass_fds=fds, capture_output=True, text=True, timeout=570, check=False
    )
    assert fault in done.stderr, done.stderr
    assert (done.returncode == 0) == (not fault), done.stderr
    print(done.stdout)
    for table, pool in zip(tables, pools, strict=True):
        table.check()
        table.close()
        os.close(pool)
    found: dict[str, float] = json.loads(done.stdout or "{}")
    return found


@pytest.mark.parametrize("kills", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_ranks_killed_at_random_moments_leave_both_pools_whole(kills: int) -> None:
    report = nursery("random", "--kills", str(kills), "--seed", "1")
    assert report["kills"] >= kills
    assert report["leaked"] == 0, report
    assert report["steps"] > 2 * kills, f"few steps were compared: {report}"
    assert report["refused"] > 0, f"the group was never short: {report}"
    if kills >= 1000:
        assert report["between"] > 0, f"nobody died between the two pools: {report}"
        assert report["repairs"] > 0, report


def test_ranks_that_do_not_agree_are_found_by_the_same_check() -> None:
    nursery("random", "--kills", "1000", "--seed", "1", "--plant", fault="worker left with status 5")


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_before_every_instruction_on_two_pools(stride: int) -> None:
    report = nursery("instructions", "--stride", str(stride))
    assert all(report[name] * stride > 100 for name in ("lease", "lease_urgent", "free", "drain", "poll")), (
        report
    )
    assert report["between"] > 10, f"hardly any was between the two pools: {report}"
    assert report["repairs"] > 10, report
