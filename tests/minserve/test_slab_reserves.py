"""The reserve rule and the liveness reserve (banker's rule) of the slab table, against counting by hand."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minserve import slab_words as sw
from minserve.slab_table import Lease, OwnershipError, SlabTable
from tests.minserve.small_table import LONGEST, PLAN, RESERVES, copy_of, leased, snapshot


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
    """Random leases, drains, returns, deaths, and models that come and go, against rules counted out from plain lists.

    After every step: the invariant checker; every model can still fill its reserve, one slab at a time; and whoever
    drew on the liveness reserve (or, when nobody did, any model) can still get all of it on top of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table = SlabTable.create(PLAN)
        self.views = [self.table, SlabTable.attach(self.table.fd)]
        self.leases: list[tuple[int, Lease, bool]] = []  # owner, lease, draining
        self.drawer: int | None = None
        self.out: set[int] = set()
        self.asked: dict[int, int] = {}  # slabs that those who want in wait for

    def reserves(self, out: set[int]) -> list[int]:
        return [0 if owner in out else r for owner, r in enumerate(RESERVES)]

    def liveness(self, out: set[int]) -> int:
        longest = [n for owner, n in enumerate(LONGEST) if owner not in out]
        return max(longest, default=0) if out else PLAN.liveness_slabs

    def held(self, owner: int) -> int:
        return sum(len(lease.slabs) for o, lease, _ in self.leases if o == owner)

    def spare(self, more: dict[int, int], out: set[int] | None = None) -> int:
        """Free slabs that no model's reserve needs, if every owner in `more` got that many more."""
        held = [self.held(owner) + more.get(owner, 0) for owner in range(3)]
        reserves = self.reserves(self.out if out is None else out)
        owed = sum(max(0, reserve - h) for reserve, h in zip(reserves, held, strict=True))
        return PLAN.num_slabs - sum(held) - owed

    def allowed(self, owner: int, n: int, urgent: bool) -> bool:
        spare = self.spare({owner: n})
        if self.held(owner) + n <= self.reserves(self.out)[owner]:
            return True
        if spare >= self.liveness(self.out):
            claimed = sum(n for o, n in self.asked.items() if o != owner)
            # what others wait for is not for those who could do without
            return urgent or not claimed or spare - self.liveness(self.out) >= claimed
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
        if self.spare({}) < self.liveness(self.out) and self.held(owner) > self.reserves(self.out)[owner]:
            self.drawer = owner

    def settle(self) -> None:
        if self.spare({}) >= self.liveness(self.out):
            self.drawer = None

    @rule(owner=st.integers(0, 2), view=st.integers(0, 1))
    def leave(self, owner: int, view: int) -> None:
        if self.held(owner):
            with pytest.raises(OwnershipError, match="still holds"):
                self.views[view].leave(owner)
            return
        self.views[view].leave(owner)
        self.out.add(owner)
        self.asked.pop(owner, None)
        self.settle()

    @rule(owner=st.integers(0, 2), view=st.integers(0, 1))
    def enter(self, owner: int, view: int) -> None:
        """With what it gets in, everybody's promises can be kept at once, the liveness reserve's too; or it waits."""
        out = self.out - {owner}
        more = self.spare({}) - self.spare({}, out) + self.liveness(out) - self.liveness(self.out)
        fits = not more or self.spare({}, out) >= self.liveness(out)
        assert self.views[view].enter(owner) == fits
        if fits:
            self.out = out
            self.asked.pop(owner, None)
            self.settle()
        else:
            self.asked[owner] = more
        asked = [self.table.quotas.wanted(o) for o in range(3)]
        assert asked == [self.asked.get(o, 0) for o in range(3)]

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
            reserves = self.reserves(self.out)
            while held[lucky] < reserves[lucky] + self.liveness(self.out):
                assert copy.lease(lucky, 1, urgent=True) is not None, f"{lucky} is stuck at {held}"
                held[lucky] += 1
            for owner in range(3):
                while held[owner] < reserves[owner]:
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
