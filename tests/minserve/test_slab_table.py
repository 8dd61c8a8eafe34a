"""The slab table: ownership, the reserve rules against brute force, the lock, torn tables, foreign descriptors."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minserve import slab_words as sw
from minserve.shared_memory import create_memfd
from minserve.slab_table import Lease, OwnershipError, SlabTable
from sched.slabs import LayerGroup, PoolPlan, SetShape

ROOT = Path(__file__).resolve().parents[2]


def shape(layers: int, reserve_sets: int) -> SetShape:
    return SetShape(layers, (LayerGroup(0, layers, 4096),), 1, 16, reserve_sets, reserve_sets, 0.0)


# reserves of 6, 4 and 0 slabs, and a liveness reserve of 5, out of 24
PLAN = PoolPlan(4096, 24, {"deep": shape(3, 2), "wide": shape(2, 2), "poor": shape(2, 0)}, 5)
RESERVES = (6, 4, 0)


@pytest.fixture
def table() -> Iterator[SlabTable]:
    table = SlabTable.create(PLAN)
    yield table
    table.close()


def leased(table: SlabTable, owner: int, n: int, *, urgent: bool = False) -> Lease:
    lease = table.lease(owner, n, urgent=urgent)
    assert lease is not None
    return lease


def snapshot(table: SlabTable) -> bytes:
    """All bytes of the table but the count of refusals, which a refusal may change."""
    data = bytearray(table._map[:])
    for owner in range(len(table.names)):
        at = 8 * (sw.HEAD_WORDS + owner * sw.ROW_WORDS + sw.R_REFUSED)
        data[at : at + 8] = bytes(8)
    return bytes(data)


def copy_of(table: SlabTable) -> SlabTable:
    fd = create_memfd("copy", len(table._map))
    os.pwrite(fd, table._map[:], 0)
    copy = SlabTable.attach(fd)
    os.close(fd)
    return copy


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
    with pytest.raises(ValueError, match="quota, demand, heartbeat_ns"):
        table.publish(0, hearbeat_ns=1)
    with pytest.raises(ValueError, match="at least the 15 slabs reserved, got 14"):
        SlabTable.create(PoolPlan(4096, 14, PLAN.models, 5))


def test_status_words_reach_other_processes(table: SlabTable):
    SlabTable.attach(table.fd).publish(2, quota=5, heartbeat_ns=2**62, slack_us=-3)
    assert table.status(2) == {"quota": 5, "demand": 0, "heartbeat_ns": 2**62, "slack_us": -3, "step_us": 0}
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


# ---- the reserve rules


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


# ---- the lock


@pytest.mark.parametrize("views", [1, 2], ids=["one table", "two attaches"])
def test_two_threads_of_a_process_exclude_each_other(table: SlabTable, views: int):
    tables = [table, table if views == 1 else SlabTable.attach(table.fd)]
    entered = threading.Event()

    def second() -> None:
        tables[1].counts()
        entered.set()

    thread = threading.Thread(target=second)
    with tables[0]._lock:
        thread.start()
        assert not entered.wait(0.1), "both were inside"
    assert entered.wait(5)
    thread.join()


def test_threads_that_lease_and_return_at_once_keep_the_table_whole(table: SlabTable):
    faults: list[BaseException] = []

    def churn(view: SlabTable, owner: int) -> None:
        try:
            for _ in range(300):
                lease = view.lease(owner, 2)
                if lease is not None:
                    assert view.holds(owner, lease)
                    view.free(owner, lease)
        except BaseException as fault:
            faults.append(fault)

    attached = SlabTable.attach(table.fd)
    threads = [
        threading.Thread(target=churn, args=(v, o)) for v, o in ((table, 0), (table, 1), (attached, 2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    table.check()
    assert table.counts().free == PLAN.num_slabs


STOPPED = """
import os, signal, sys
from minserve.slab_table import SlabTable
table = SlabTable.attach(int(sys.argv[1]))
assert "torch" not in sys.modules and "msgspec" not in sys.modules
with table._lock:
    table._head[8] = 1
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_stopped_holder_is_a_timeout_and_a_killed_one_is_repaired(table: SlabTable):
    patient = SlabTable.attach(table.fd, timeout_s=0.2)
    child = subprocess.Popen([sys.executable, "-c", STOPPED, str(table.fd)], pass_fds=(table.fd,), cwd=ROOT)
    try:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="another process has held"):
            patient.counts()
        assert time.monotonic() - began < 5
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert patient.counts().repairs == 1
    patient.check()


def test_a_thread_that_waits_too_long_for_another_gets_a_timeout(table: SlabTable):
    patient = SlabTable.attach(table.fd, timeout_s=0.05)
    with patient._lock:
        caught: list[BaseException] = []

        def wait() -> None:
            with pytest.raises(TimeoutError, match="another thread") as error:
                patient.counts()
            caught.append(error.value)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    assert caught
    patient.check()


def test_a_forked_child_must_attach_again(table: SlabTable):
    real = os.getpid
    try:
        os.getpid = lambda: real() + 1
        with pytest.raises(RuntimeError, match="attach again"):
            table.lease(0, 1)
    finally:
        os.getpid = real
    leased(table, 0, 1)


# ---- descriptors


def closed_fd() -> int:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd


def plain_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def pipe() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def unsealed() -> int:
    fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    return fd


def memfd(change: Callable[[np.ndarray], None] | None = None, cut: int = 0) -> int:
    """A copy of a good table with a change to its header words or its last bytes cut off."""
    table = SlabTable.create(PLAN)
    data = np.frombuffer(bytearray(table._map[:].ljust(-(-len(table._map) // 8) * 8, b"\0")), np.int64)
    size = len(table._map) - cut
    if change is not None:
        change(data)
    fd = create_memfd("changed", size)
    os.pwrite(fd, data.tobytes()[:size], 0)
    table.close()
    return fd


FOREIGN = {
    "closed": (closed_fd, "not an open memfd"),
    "file": (plain_file, "not an open memfd"),
    "pipe": (pipe, "not an open memfd"),
    "unsealed": (unsealed, "not sealed"),
    "zeros": (lambda: create_memfd("zeros", 8192), "is not a minserve slab table"),
    "empty": (lambda: create_memfd("empty", 0), "is not a minserve slab table"),
    "version": (lambda: memfd(lambda d: d.__setitem__(sw.H_VERSION, 2)), "version 2, this minserve reads 1"),
    "slabs": (lambda: memfd(lambda d: d.__setitem__(sw.H_SLABS, 2**40)), "damaged header"),
    "models": (lambda: memfd(lambda d: d.__setitem__(sw.H_MODELS, -(2**60))), "damaged header"),
    "plan": (lambda: memfd(lambda d: d.__setitem__(-2, 7)), "damaged header"),
    "checksum": (lambda: memfd(lambda d: d.__setitem__(sw.H_CRC, 7)), "damaged header"),
    "cut": (lambda: memfd(cut=100), "damaged header"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_descriptor_that_is_no_table_of_ours_is_a_clear_error(case: str):
    make, message = FOREIGN[case]
    fd = make()
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=message):
        SlabTable.attach(fd)
    assert len(os.listdir("/proc/self/fd")) == open_before, "a refused attach leaks a descriptor"
    if case != "closed":
        os.close(fd)


def test_the_unchanged_copy_attaches_and_cannot_be_resized():
    fd = memfd()
    table = SlabTable.attach(fd)
    table.check()
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    assert fcntl.fcntl(table.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    table.close()
    os.close(fd)
