"""Quotas in the slab table: whom they stop, whom they leave alone, and who has to give back how much."""

import random
from collections.abc import Iterator

import pytest

from minserve import slab_words as sw
from minserve.slab_counts import PLACES, bytes_by_place
from minserve.slab_table import SlabTable
from sched.slabs import LayerGroup, PoolPlan, SetShape
from tests.minserve.small_table import leased


def shape(layers: int, reserve_sets: int, slots: int = 3) -> SetShape:
    return SetShape(layers, (LayerGroup(0, layers, 1300),), slots, 16, reserve_sets, reserve_sets, 0.05)


# reserves of 6, 4 and 0 slabs and a liveness reserve of 5: 85 of 100 slabs are anybody's
PLAN = PoolPlan(4096, 100, {"deep": shape(3, 2), "wide": shape(2, 2), "poor": shape(1, 0)}, 5)
DEEP, WIDE, POOR = range(3)


@pytest.fixture
def table() -> Iterator[SlabTable]:
    table = SlabTable.create(PLAN)
    yield table
    table.check()
    table.close()


def fill(table: SlabTable, owner: int, step: int) -> int:
    """Leases until refused; how many slabs that were."""
    taken = 0
    while table.lease(owner, step) is not None:
        taken += step
    return taken


def test_without_a_claim_a_quota_stops_nobody(table: SlabTable) -> None:
    table.quotas.write((10, 15, 20))
    assert fill(table, POOR, 1) == 85
    # the reserves of the others are there as ever, and a demand within them is no claim to more
    table.publish(DEEP, demand=2)
    assert table.quotas.claims() == 0
    assert table.quotas.excess(POOR) == 0
    assert fill(table, DEEP, 3) == 6


def test_quotas_that_change_while_they_are_read_are_no_fault(
    table: SlabTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.quotas.write((10, 15, 20))
    leased(table, POOR, 85)
    table.publish(DEEP, demand=6)
    before = table.quotas.excess(POOR)
    claims = table.quotas.claims

    def in_between(but: int = -1) -> int:
        found = claims(but)
        table.quotas.write((0, 0, 100))
        return found

    monkeypatch.setattr(table.quotas, "claims", in_between)
    assert table.quotas.excess(POOR) == before > 0
    assert table.quotas.excess(POOR) == 0


def test_a_claim_stops_leases_beyond_a_quota_and_only_as_far_as_it_goes(table: SlabTable) -> None:
    table.quotas.write((10, 15, 20))
    leased(table, POOR, 20)
    table.publish(DEEP, demand=6)  # 18 slabs, of which 6 are its reserve
    assert table.quotas.claims() == 12
    assert fill(table, POOR, 1) == 85 - 20 - 12
    # beyond its own quota it has no claim: 30 slabs less the reserve
    table.publish(DEEP, demand=999)
    assert table.quotas.claims() == 24
    # who is within its quota is not stopped by the claims of others
    assert fill(table, WIDE, 2) == 4 + 12
    # and the last of them are for the one that claims them: 0 are left
    assert fill(table, DEEP, 3) == 6


def test_urgent_leases_know_no_quota(table: SlabTable) -> None:
    table.quotas.write((0, 0, 0))
    table.publish(DEEP, demand=9)
    table.quotas.write((28, 0, 0))
    taken = fill(table, POOR, 1)
    assert taken == 85 - (27 - 6)
    assert leased(table, POOR, 85 - taken + 5, urgent=True)
    assert table.counts().liveness_holder == "poor"


def test_strict_quotas_stop_everybody_though_slabs_lie_idle(table: SlabTable) -> None:
    table.quotas.write((10, 15, 20), strict=True)
    assert [fill(table, o, n) for o, n in ((DEEP, 3), (WIDE, 2), (POOR, 1))] == [30, 30, 20]
    assert table.counts().free == 20
    table.quotas.write((10, 10, 20), strict=True)
    assert [table.quotas.excess(o) for o in range(3)] == [0, 10, 0]
    table.quotas.write(None)
    assert table.quotas.excess(WIDE) == 0
    assert fill(table, POOR, 1) == 15


def test_a_reserve_is_a_quota_too(table: SlabTable) -> None:
    table.quotas.write((0, 0, 0), strict=True)
    assert [table.quotas.quota(o) for o in range(3)] == [6, 4, 0]
    assert [fill(table, o, n) for o, n in ((DEEP, 3), (WIDE, 2), (POOR, 1))] == [6, 4, 0]


def test_those_over_quota_give_back_what_is_missing_in_proportion(table: SlabTable) -> None:
    table.quotas.write((14, 4, 3))
    wide, poor = leased(table, WIDE, 28), leased(table, POOR, 61)
    assert table.counts().free == 11
    assert table.quotas.excess(WIDE) == table.quotas.excess(POOR) == 0
    table.publish(DEEP, demand=8)  # 24 slabs: 6 reserved, 18 claimed, none of them free
    assert table.quotas.excess(DEEP) == 0
    # wide is 20 over, poor 58: their parts of 18
    assert [table.quotas.excess(o) for o in (WIDE, POOR)] == [5, 14]
    # what drains will be there
    table.drain(POOR, poor)
    assert [table.quotas.excess(o) for o in (WIDE, POOR)] == [0, 0]
    table.free(POOR, poor)
    assert fill(table, DEEP, 3) >= 24
    table.free(WIDE, wide)


def test_what_a_dead_model_wanted_is_claimed_no_more(table: SlabTable) -> None:
    table.quotas.write((20, 4, 3))
    leased(table, POOR, 85)
    table.publish(DEEP, demand=18)
    assert table.quotas.excess(POOR) > 0
    table.reclaim(DEEP)
    assert table.quotas.excess(POOR) == table.quotas.claims() == 0
    assert table.quotas.quota(DEEP) == 60, "a quota is the agent's word and outlives a worker"


@pytest.mark.parametrize("demand", [-1, -(2**63), 2**40, 2**63 - 1])
def test_no_word_that_a_worker_can_write_breaks_a_promise(table: SlabTable, demand: int) -> None:
    table.quotas.write((10, 15, 20))
    for owner in range(3):
        table.publish(owner, demand=demand)
    assert 0 <= table.quotas.claims() <= 100
    fill(table, POOR, 1)
    assert fill(table, DEEP, 3) >= 6
    assert fill(table, WIDE, 2) >= 4


@pytest.mark.parametrize("sets", [(-1, 0, 0), (33, 1, 0), (0, 0, 101), (2**61, 2**61, 0)])
def test_impossible_quotas_are_refused_and_nothing_changes(table: SlabTable, sets: tuple[int, ...]) -> None:
    table.quotas.write((10, 15, 20))
    with pytest.raises(ValueError, match="quotas must be sets of together at most 100 slabs"):
        table.quotas.write(sets)
    assert [table.quotas.quota(o) for o in range(3)] == [30, 30, 20]


def mode_of_no_kind(table: SlabTable) -> None:
    table._head[sw.H_QUOTAS] = 7


def more_than_there_is(table: SlabTable) -> None:
    table._rows[sw.R_QUOTA] = 99


def less_than_nothing(table: SlabTable) -> None:
    table._rows[sw.R_QUOTA] = -1


@pytest.mark.parametrize("plant", [mode_of_no_kind, more_than_there_is, less_than_nothing])
def test_the_checker_catches_impossible_quotas(plant) -> None:
    table = SlabTable.create(PLAN)
    table.quotas.write((10, 15, 20))
    plant(table)
    with pytest.raises(AssertionError, match="quotas"):
        table.check()


def test_random_leases_against_counting_by_hand() -> None:
    """Every answer of the table is that of a few lines over plain lists, and no slab that nobody claims is stranded."""
    rng, table = random.Random(5), SlabTable.create(PLAN)
    layers, reserves = (3, 2, 1), (6, 4, 0)
    held: list[list] = [[], [], []]
    for _ in range(4000):
        if rng.random() < 0.05:
            cut = sorted(rng.randint(0, 100) for _ in range(2))
            table.quotas.write(
                [n // l for n, l in zip((cut[0], cut[1] - cut[0], 100 - cut[1]), layers, strict=True)]
            )
        owner = rng.randrange(3)
        table.publish(owner, demand=rng.choice((0, 0, rng.randint(0, 40))))
        if held[owner] and rng.random() < 0.45:
            table.free(owner, held[owner].pop(rng.randrange(len(held[owner]))))
            continue
        n = rng.randint(1, 6)
        have = [sum(len(lease.slabs) for lease in leases) for leases in held]
        quota = [table.quotas.quota(o) or 0 if table._head[sw.H_QUOTAS] else 100 for o in range(3)]
        after = [h + n * (o == owner) for o, h in enumerate(have)]
        spare = 100 - sum(after) - sum(max(0, r - h) for r, h in zip(reserves, after, strict=True)) - 5
        claims = sum(
            max(0, min(quota[o], have[o] + table.status(o)["demand"] * layers[o]) - max(have[o], reserves[o]))
            for o in range(3)
            if o != owner and table._head[sw.H_QUOTAS]
        )
        allowed = after[owner] <= reserves[owner] or spare >= (0 if after[owner] <= quota[owner] else claims)
        lease = table.lease(owner, n)
        assert (lease is not None) == allowed, f"{have=} {quota=} {claims=} {spare=} {owner=} {n=}"
        if lease is not None:
            held[owner].append(lease)
        table.check()
    assert table.counts().refused > 100


def test_every_byte_of_a_models_slabs_is_in_one_place(table: SlabTable) -> None:
    a, b = leased(table, DEEP, 9), leased(table, DEEP, 3)
    table.drain(DEEP, b)
    table.publish(DEEP, live_blocks=4, cached_blocks=3)
    model = table.counts().models["deep"]
    found = bytes_by_place(PLAN, "deep", model)
    # 3 sets of 3 slots are 9 blocks of 3 layers; of each slab 4096 - 3 * 1300 bytes are tail
    block = 3 * 1300
    assert found == {
        "live": 4 * block, "prefix": 3 * block, "partial": 2 * block, "tail": 9 * 196, "draining": 3 * 4096,
    }  # fmt: skip
    assert tuple(found) == PLACES
    assert sum(found.values()) == (model.live + model.draining) * 4096
    # what a worker said before it gave sets back cannot make bytes out of nothing
    table.publish(DEEP, live_blocks=2**40, cached_blocks=-5)
    assert sum(bytes_by_place(PLAN, "deep", model).values()) == 12 * 4096
    table.free(DEEP, a)
    table.free(DEEP, b)
