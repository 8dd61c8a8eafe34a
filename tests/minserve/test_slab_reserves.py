"""The reserve rule and the liveness reserve (banker's rule) of the slab table, against counting by hand."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minserve import slab_words as sw
from minserve.slab_table import Lease, SlabTable
from tests.minserve.small_table import PLAN, RESERVES, copy_of, leased, snapshot


@pytest.fixture
def table() -> Iterator[SlabTable]:
    table = SlabTable.create(PLAN)
    yield table
    table.close()


def test_a_lease_leaves_the_reserves_of_the_others_and_a_failed_one_changes_nothing(table: SlabTable):
    leased(table, 2, 9)  # 24 slabs - 10 of reserves - 5 of liveness
    before = snapshot(table)
    assert table.lease(2, 1) is None
    assert table.lease(0, 7) is None
    assert snapshot(table) == before
    leased(table, 0, 6)
    leased(table, 1, 4)
    assert table.counts().free == 5


def test_one_model_at_a_time_draws_on_the_liveness_reserve(table: SlabTable):
    common, deep = leased(table, 2, 9), leased(table, 0, 6)
    first = leased(table, 0, 3, urgent=True)
    assert table.counts().liveness_holder == "deep"
    assert table.lease(1, 5, urgent=True) is None, "wide drew on it too"
    assert table.lease(0, 1) is None, "only urgent leases may draw"
    leased(table, 1, 4)  # its own reserve stays its own
    second = leased(table, 0, 2, urgent=True)
    assert table.lease(0, 1, urgent=True) is None, "more than the reserve was drawn"
    table.free(0, first)
    assert table.lease(1, 1, urgent=True) is None, "deep has not given all of it back"
    table.free(0, second)
    assert table.counts().liveness_holder is None
    leased(table, 1, 1, urgent=True)
    assert table.counts().liveness_holder == "wide"
    for owner, lease in ((2, common), (0, deep)):
        table.free(owner, lease)
    assert table.counts().liveness_holder is None
    table.check()


class ReserveRules(RuleBasedStateMachine):
    """Random leases, drains, returns and deaths, against rules counted out slab by slab from plain lists.

    After every step: the invariant checker; every model can still fill its reserve, one slab at a time; and whoever
    drew on the liveness reserve (or, when nobody did, any model) can still get all of it on top of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = SlabTable.create(PLAN)
        self.views = [self.table, SlabTable.attach(self.table.fd)]
        self.leases: list[tuple[int, Lease, bool]] = []  # owner, lease, draining
        self.drawer: int | None = None

    def held(self, owner: int) -> int:
        return sum(len(lease.slabs) for o, lease, _ in self.leases if o == owner)

    def spare(self, more: dict[int, int]) -> int:
        """Free slabs that no model's reserve needs, if every owner in `more` got that many more."""
        held = [self.held(owner) + more.get(owner, 0) for owner in range(3)]
        owed = sum(max(0, reserve - h) for reserve, h in zip(RESERVES, held, strict=True))
        return PLAN.num_slabs - sum(held) - owed

    def allowed(self, owner: int, n: int, urgent: bool) -> bool:
        spare = self.spare({owner: n})
        if spare >= PLAN.liveness_slabs or self.held(owner) + n <= RESERVES[owner]:
            return True
        return urgent and spare >= 0 and self.drawer in (None, owner)

    @rule(owner=st.integers(0, 2), n=st.integers(1, 12), urgent=st.booleans(), view=st.integers(0, 1))
    def lease(self, owner: int, n: int, urgent: bool, view: int) -> None:
        allowed, before = self.allowed(owner, n, urgent), snapshot(self.table)
        lease = self.views[view].lease(owner, n, urgent=urgent)
        assert (lease is not None) == allowed
        if lease is None:
            assert snapshot(self.table) == before
            return
        assert len(lease.slabs) == n
        self.leases.append((owner, lease, False))
        if self.spare({}) < PLAN.liveness_slabs and self.held(owner) > RESERVES[owner]:
            self.drawer = owner

    def settle(self) -> None:
        if self.spare({}) >= PLAN.liveness_slabs:
            self.drawer = None

    @precondition(lambda self: self.leases)
    @rule(pick=st.integers(0, 10**6), view=st.integers(0, 1), free=st.booleans())
    def return_one(self, pick: int, view: int, free: bool) -> None:
        owner, lease, draining = self.leases.pop(pick % len(self.leases))
        if not free and not draining:
            self.views[view].drain(owner, lease)
            self.leases.append((owner, lease, True))
            return
        self.views[view].free(owner, lease)
        self.settle()

    @rule(owner=st.integers(0, 2))
    def die(self, owner: int) -> None:
        assert self.table.reclaim(owner) == self.held(owner)
        self.leases = [entry for entry in self.leases if entry[0] != owner]
        self.settle()

    @rule()
    def tear(self) -> None:
        """A holder died inside the lock and left all that is derived wrong."""
        head = self.table._head
        self.table._stack[:] = 0
        head[sw.H_TOP], head[sw.H_UNFILLED], head[sw.H_DIRTY] = 1, 99, 1
        for owner in range(3):
            self.table._rows[owner * sw.ROW_WORDS + sw.R_LIVE] = 77

    @invariant()
    def whole(self) -> None:
        self.table.check()
        for owner, lease, _ in self.leases:
            assert self.table.holds(owner, lease)
        counts = self.table.counts()
        assert counts.mapped == counts.leased + counts.draining + counts.free
        assert counts.leased + counts.draining == sum(map(self.held, range(3)))
        assert counts.liveness_holder == (None if self.drawer is None else self.table.names[self.drawer])

    @invariant()
    def promises_can_be_kept(self) -> None:
        for lucky in range(3) if self.drawer is None else [self.drawer]:
            copy = copy_of(self.table)
            held = list(map(self.held, range(3)))
            while held[lucky] < RESERVES[lucky] + PLAN.liveness_slabs:
                assert copy.lease(lucky, 1, urgent=True) is not None, f"{lucky} is stuck at {held}"
                held[lucky] += 1
            for owner in range(3):
                while held[owner] < RESERVES[owner]:
                    assert copy.lease(owner, 1) is not None, f"{owner} cannot fill its reserve at {held}"
                    held[owner] += 1
            copy.check()
            copy.close()

    def teardown(self) -> None:
        for view in self.views:
            view.close()


TestReserveRules = ReserveRules.TestCase
TestReserveRules.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    # a failure is 30 lines at most: shrinking it took minutes
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
