"""Models that share a pool under quotas: real table, real Batchers, a clock of the test's own, no tensors.

Each model is what a worker is without its engine, and one more thread of the same story writes the quotas.
"""

import random
from collections.abc import Callable, Iterator

import pytest

from minserve.kv_moves import KvMoves
from minserve.kv_share import PREEMPT_AFTER_S, KvShare
from minserve.pool import LeasedSets, SlabPool
from minserve.quota_writer import SILENT_S, TICK_S, QuotaWriter
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.compaction import NO_OFFER, Offer
from sched.limits import Limits
from sched.pressure import demand, offer, preempt_for
from sched.quota import POLICIES
from sched.slabs import LayerGroup, PoolPlan, SetShape
from sched.step import Request

P, SLOTS, LENGTH = 4, 4, 64


def shape(layers: int, reserve_sets: int) -> SetShape:
    return SetShape(
        layers, (LayerGroup(0, layers, 900),), SLOTS, P, reserve_sets, LENGTH // (P * SLOTS), 0.12
    )


# a sequence of 64 tokens takes 4 sets; 200 slabs, of which 10 are reserved and 6 the liveness reserve
PLAN = PoolPlan(4096, 200, {"a": shape(3, 1), "b": shape(2, 2), "c": shape(3, 1)}, 9)
UNRESERVED = 200 - 10 - 9


class Model:
    def __init__(self, pool: SlabPool, name: str, clock: Callable[[], float]) -> None:
        self.name, self.clock = name, clock
        self.sets = LeasedSets(pool, name)
        self.blocks = BlockPool(self.sets, SLOTS, P)
        limits = Limits(
            max_running=64, max_step_tokens=512, max_chunk_tokens=256, max_model_len=LENGTH, max_waiting=10**6
        )
        self.batcher = Batcher(self.blocks, limits)
        self.compacts, self.moved = True, 0
        compactor = self.batcher.compactor
        moves = KvMoves(
            pool.table,
            self.sets.owner,
            compactor,
            self._offer,
            lambda n: compactor.ask(n, 8),
            lambda: self.moved,
            clock,
        )
        self.share = KvShare(
            self.sets, self.blocks, lambda ahead: demand(self.batcher, clock(), ahead), lambda n: preempt_for(self.batcher, n), clock, moves
        )  # fmt: skip
        self.added = 0
        self.ended: set[int] = set()

    def _offer(self) -> Offer:
        return offer(self.batcher) if self.compacts else NO_OFFER

    @property
    def row(self) -> dict[str, int]:
        return self.sets.pool.table.status(self.sets.owner)

    @property
    def held(self) -> int:
        return self.sets.pool.table.held(self.sets.owner)

    def add(self, count: int = 1, prompt: int = 40, answer: int = 24) -> None:
        for _ in range(count):
            rid = self.added
            keys = tuple(f"{self.name} {rid} {i}".encode() for i in range(prompt // P))
            self.batcher.add(
                Request(rid=rid, prompt_tokens=prompt, max_tokens=answer, arrival_s=self.clock(), keys=keys)
            )
            self.added += 1

    def turn(self) -> None:
        plan = self.batcher.plan(self.clock())
        self.moved += len(plan.moves)
        if not plan.empty:
            self.ended |= set(self.batcher.advance(plan, 1, self.clock()))
            self.share.stepped(0.01)
        self.share.turn()
        self.batcher.check()
        self.sets.check()


class Site:
    """A turn of all models takes a hundredth of a second; the pool is divided every TICK_S."""

    def __init__(self, policy: str = "marginal") -> None:
        self.now, self.ticked = 1000.0, 0.0
        self.pool = SlabPool.create(PLAN)
        self.writer = QuotaWriter(self.pool.table, policy, {"a": 3.0})
        self.models = {name: Model(self.pool, name, lambda: self.now) for name in PLAN.models}
        # what was published on the machine's clock is heard on the test's
        for model in self.models.values():
            publish = model.sets.publish
            model.sets.publish = lambda publish=publish, **said: publish(
                **said | {"heartbeat_ns": int(self.now * 1e9)}
            )

    def turn(self, *names: str) -> None:
        """Of those named, or of all."""
        if self.now - self.ticked >= TICK_S:
            self.ticked = self.now
            self.writer.tick(self.now)
        for name in names or self.models:
            self.models[name].turn()
        self.pool.table.check()
        self.now += 0.01

    def until(self, condition: Callable[[], bool], within_s: float) -> float:
        began = self.now
        while not condition():
            assert self.now - began < within_s, f"not within {within_s} s: {self.pool.table.counts()}"
            self.turn()
        return self.now - began


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.pool.close()


def fill_and_rest(site: Site, name: str) -> None:
    """The model fills what nobody has a reserve in, and then has only its cache."""
    model = site.models[name]
    model.add(30)
    site.until(lambda: len(model.ended) == model.added and not model.batcher.has_work, 20)
    assert model.held > 0.6 * UNRESERVED, (
        f"{name} keeps {model.held} slabs as a cache, so this proves nothing"
    )


def test_an_idle_model_keeps_its_cache_while_nobody_asks(site: Site) -> None:
    fill_and_rest(site, "a")
    kept = site.models["a"].held
    site.models["b"].add(1)  # fits into what is free
    site.until(lambda: bool(site.models["b"].ended), 5)
    assert site.models["a"].held == kept
    assert site.models["a"].row["given_up"] == site.models["a"].row["reclaims"] == 0
    assert site.models["a"].share.idle_wait_s is not None


def test_an_idle_model_gives_way_within_a_second_and_the_other_is_refused_nothing_after(site: Site) -> None:
    fill_and_rest(site, "a")
    for taker, giver in (("b", "a"), ("a", "b"), ("b", "a")):
        model = site.models[taker]
        model.add(200)
        most = UNRESERVED + model.sets.shape.reserve_sets * model.sets.shape.layers
        took = site.until(lambda: model.held >= 0.95 * most, 1.0)  # noqa: B023
        print(f"{taker} holds {model.held} of {most} slabs after {took:.2f} s")
        # the rest of the queue is taken back: what runs now has the memory that it asked for
        for rid in range(model.added):
            if model.batcher._live.get(rid) in set(model.batcher.policy.waiting()):
                model.batcher.abort(rid)
        row = site.models[giver].row
        assert row["reclaims"] >= 1
        assert row["reclaim_max_us"] < 1e6
        assert site.models[giver].held <= site.models[giver].sets.shape.reserve_sets * 3 + 3
        for rid in range(model.added):
            model.batcher.abort(rid)
        site.until(lambda: not model.batcher.has_work, 5)  # noqa: B023


def test_sets_without_requests_go_first_and_nobody_is_preempted_for_what_a_cache_can_give(site: Site) -> None:
    a, b = site.models["a"], site.models["b"]
    a.add(6)
    site.until(lambda: len(a.ended) == 6, 10)
    a.add(4, prompt=20, answer=44)
    site.turn()
    cached = a.blocks.num_spare_sets
    assert cached
    b.add(200)
    site.until(lambda: a.row["given_up"] > 0, 1.0)
    assert a.batcher.num_preemptions == 0
    site.until(lambda: len(a.ended) == 10, 20)


def test_a_model_over_quota_preempts_only_after_a_moment_and_never_its_eldest(site: Site) -> None:
    a, b = site.models["a"], site.models["b"]
    a.add(16, prompt=48, answer=16)
    for _ in range(2):
        site.turn("a")
    eldest, held = min(a.batcher._active), a.held
    assert held > 0.7 * UNRESERVED
    b.add(300)
    first = None
    while a.batcher.num_preemptions < 3:
        # a plans no step, so nothing of it ends or grows by itself
        a.share.turn()
        site.turn("b")
        if first is None and a.sets.excess:
            first = site.now
        before = first is None or site.now - first < PREEMPT_AFTER_S
        assert not (a.batcher.num_preemptions and before), "preempted at once"
        assert first is None or site.now - first < 0.5, site.pool.table.counts()
    assert a.held < held
    assert eldest in a.batcher._active
    a.batcher.check()
    site.until(lambda: len(a.ended) == 16, 60)


def test_a_silent_model_has_no_claim_and_the_others_go_on(site: Site) -> None:
    a, b = site.models["a"], site.models["b"]
    a.add(200)
    for _ in range(10):
        site.turn("a", "b", "c")
    assert a.row["demand"] > 0
    stopped = a.held
    # a is stopped with all its demand in its row; its own sets stay its own
    b.add(3)
    end = site.now + SILENT_S + 3 * TICK_S
    while site.now < end or len(b.ended) < 3:
        site.turn("b", "c")
        assert site.now < end + 10
    assert a.held == stopped
    assert site.pool.table.quotas.claims() == 0
    # it goes on where it was
    site.until(lambda: len(a.ended) > 20, 30)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_bursts_end_well_under_every_policy(policy: str, seed: int) -> None:
    """Every request ends, whatever the quotas say: reserves and the liveness reserve see to that."""
    rng, site = random.Random(seed), Site(policy)
    for turn in range(400):
        if turn < 250 and rng.random() < 0.1:
            site.models[rng.choice("abc")].add(
                rng.randint(1, 25), prompt=rng.randint(1, 60), answer=rng.randint(1, 4)
            )
        # some are slow, one may be stopped for a while
        site.turn(*(n for n in site.models if rng.random() < 0.8))
    for model in site.models.values():
        site.until(lambda: not model.batcher.has_work, 120)  # noqa: B023
        assert len(model.ended) == model.added > 0
    counts = site.pool.table.counts()
    assert counts.mapped == counts.leased + counts.draining + counts.free
    assert site.writer.changes > 5 or policy != "marginal"
    for model in site.models.values():
        model.blocks.give_up(10**6)
    assert site.pool.table.counts().free == PLAN.num_slabs
    site.pool.close()


def in_fragments(site: Site, name: str) -> Model:
    """A model that decodes, with few live blocks in each of its many sets."""
    model = site.models[name]
    model.add(24, prompt=20, answer=44)
    site.until(lambda: len(model.batcher._active) == 24, 2)
    for rid in range(24):
        if rid % 3:
            model.batcher.abort(rid)
    site.turn(name)
    return model


@pytest.mark.parametrize("policy", ["first-come", "marginal"])
def test_half_empty_sets_are_moved_together_when_another_is_short(policy: str) -> None:
    """Nobody of the owner is preempted, and it keeps running: its own free blocks become the other's sets."""
    held = {}
    for compacts in (True, False):
        site = Site(policy)
        a, b = in_fragments(site, "a"), site.models["b"]
        a.compacts = compacts
        before, live = a.held, a.blocks.num_live
        b.add(60, prompt=40, answer=24)
        for _ in range(4):
            site.turn()
        held[compacts] = a.held
        assert (a.moved > 0) == compacts
        assert a.batcher.num_preemptions == 0
        if compacts:
            assert a.held < before, f"{live} blocks in {before} slabs"
            assert a.row["moved_bytes"] == a.moved
            assert a.row["vacated"] == a.batcher.compactor.num_vacated > 0
        site.until(lambda: not a.batcher.has_work, 60)  # noqa: B023
        assert len(a.ended) == 8
        site.pool.close()
    assert held[True] < held[False]


@pytest.mark.parametrize("policy", ["first-come", "marginal"])
def test_what_is_moved_comes_back_as_sets(policy: str) -> None:
    """Demand that is never met: no set is emptied to be filled again."""
    site = Site(policy)
    a = in_fragments(site, "a")
    site.models["b"].add(300)
    returned = site.pool.table.counts().models["a"].returns
    for _ in range(40):
        site.turn()
    vacated = a.batcher.compactor.num_vacated
    assert 0 < vacated <= site.pool.table.counts().models["a"].returns - returned
    # what is live in them is at most what it moved, and a set cannot be emptied twice for the same
    assert a.moved <= vacated * SLOTS
    for _ in range(40):
        site.turn()
    assert a.batcher.compactor.num_vacated - vacated <= site.pool.table.counts().models["a"].returns
    site.pool.close()


def test_a_demand_that_is_no_longer_heard_moves_nothing(site: Site) -> None:
    a, b = in_fragments(site, "a"), site.models["b"]
    b.add(60)
    for _ in range(3):
        site.turn()
    b.sets.pool.table.publish(b.sets.owner, heartbeat_ns=1)
    site.turn("a")
    moved = a.moved
    for _ in range(10):
        site.turn("a", "c")
    assert a.moved == moved
    assert b.row["demand"] > 0, "it still says so"


def test_nothing_is_moved_while_nobody_is_short(site: Site) -> None:
    a = in_fragments(site, "a")
    site.models["b"].add(1)
    for _ in range(20):
        site.turn()
    assert a.moved == a.row["vacatable"] == 0


def test_a_worker_that_has_stopped_keeps_nobody_from_compacting(site: Site) -> None:
    a, b, c = in_fragments(site, "a"), site.models["b"], site.models["c"]
    # c says that it could free sets for nothing, and is never heard of again
    c.sets.publish(vacatable=8, vacate_milli=0)
    b.add(60)
    for _ in range(5):
        site.turn("a", "b")
    assert a.moved == 0
    c.sets.pool.table.publish(c.sets.owner, heartbeat_ns=1)
    for _ in range(5):
        site.turn("a", "b")
    assert a.moved > 0
