"""Pool bytes and leased sets: addresses, draining behind a fence, wiping, and blocks of three models that never meet."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minserve.pool import LeasedSets, SlabPool
from minserve.shared_memory import create_memfd
from minserve.slab_table import SlabTable
from sched.blocks import BlockPool
from sched.slabs import ModelShape, PoolPlan, solve
from sched.step import MAX_SLOTS, SLOT_BITS

ROOT = Path(__file__).resolve().parents[2]

PLAN = solve(
    [
        ModelShape(
            name="deep", layers=6, block_bytes=640, block_tokens=16, max_model_len=128, reserve_tokens=64
        ),
        ModelShape(
            name="wide", layers=2, block_bytes=2048, block_tokens=32, max_model_len=128, reserve_tokens=128
        ),
        ModelShape(
            name="mid", layers=3, block_bytes=1024, block_tokens=16, max_model_len=256, reserve_tokens=64
        ),
    ],
    240 << 10,
    min_sets=8,
)


@pytest.fixture
def pool() -> Iterator[SlabPool]:
    pool = SlabPool.create(PLAN)
    pool.fill()
    yield pool
    pool.close()


def test_layers_that_share_slabs_have_rows_of_their_own() -> None:
    sizes = (4096, 2048, 2048)
    shape = ModelShape(
        name="m", layers=3, block_bytes=4096, block_tokens=16, max_model_len=64, layer_bytes=sizes
    )
    pool = SlabPool.create(solve([shape], 1 << 20, min_sets=4, max_slab_bytes=16384))
    sets = LeasedSets(pool, "m")
    set_id = sets.lease()
    assert set_id is not None
    sets.check()
    sets.slab_table_SL[set_id, 2] += 16
    with pytest.raises(AssertionError, match="names other slabs"):
        sets.check()
    sets.close()
    pool.close()


class Fence:
    """A GPU that has done the enqueued work up to `reached`."""

    def __init__(self) -> None:
        self.enqueued = self.reached = 0

    def __call__(self) -> Callable[[], bool]:
        self.enqueued += 1
        mine = self.enqueued
        return lambda: self.reached >= mine


def lease_all(sets: LeasedSets) -> list[int]:
    out = []
    while (set_id := sets.lease()) is not None:
        out.append(set_id)
    return out


def test_a_filled_pool_is_nan_in_every_float_format(pool: SlabPool):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert pool.bytes.view(dtype).isnan().all()


def test_closing_waits_for_the_device(pool: SlabPool):
    asked = []

    def fence() -> Callable[[], bool]:
        return lambda: asked.append(0) or len(asked) > 5

    sets = LeasedSets(pool, next(iter(PLAN.models)), fence=fence)
    sets.give_back(sets.lease())
    sets.lease()
    sets.close()
    assert sets.num_leased == sets.num_draining == 0


def test_rows_are_the_byte_offsets_of_slabs_that_nobody_else_has(pool: SlabPool):
    sets = [LeasedSets(pool, name) for name in PLAN.models]
    offsets = []
    for s in sets:
        first, second = s.lease(), s.lease()
        assert (first, second) == (0, 1)
        assert s.slab_table_SL.shape == (PLAN.max_sets(s.model), PLAN.models[s.model].layers)
        assert s.slab_table_SL.dtype == torch.int64
        offsets += s.slab_table_SL[:2].flatten().tolist()
    assert len(set(offsets)) == len(offsets)
    assert all(o % PLAN.slab_bytes == 0 and 0 <= o < PLAN.pool_bytes for o in offsets)
    for s in sets:
        s.check()


def test_set_ids_stay_small_and_are_reused(pool: SlabPool):
    sets = LeasedSets(pool, "wide")
    assert [sets.lease() for _ in range(4)] == [0, 1, 2, 3]
    sets.give_back(1)
    sets.give_back(0)
    assert [sets.lease() for _ in range(3)] == [0, 1, 4]
    assert sets.take_changed() == [0, 1, 2, 3, 4]
    sets.give_back(3)
    sets.lease()
    assert sets.take_changed() == [3]
    assert sets.take_changed() == []


def test_a_set_that_is_not_leased_cannot_be_given_back(pool: SlabPool):
    sets = LeasedSets(pool, "wide")
    set_id = sets.lease()
    sets.give_back(set_id)
    with pytest.raises(ValueError, match="set 0 is not leased by wide"):
        sets.give_back(set_id)


def test_draining_sets_come_free_when_their_fence_has_passed_and_not_before(pool: SlabPool):
    fence = Fence()
    sets, other = LeasedSets(pool, "deep", fence=fence), LeasedSets(pool, "mid")
    ids = lease_all(sets)
    stuck = len(lease_all(other))
    for set_id in ids:
        sets.give_back(set_id)
    assert (sets.num_leased, sets.num_draining) == (0, len(ids))
    assert sets.lease() is None, "a set was given out while the GPU may still write to it"
    assert other.lease() is None
    sets.check()
    fence.reached = 1
    assert sets.lease() == ids[0]
    assert sets.num_draining == len(ids) - 1
    fence.reached = len(ids)
    sets.poll()
    assert pool.table.counts().draining == 0
    assert len(lease_all(other)) > stuck - len(ids)
    pool.table.check()


def test_close_gives_everything_back_and_refuses_to_while_the_gpu_works(pool: SlabPool):
    fence = Fence()
    sets = LeasedSets(pool, "deep", fence=fence)
    lease_all(sets)
    with pytest.raises(AssertionError, match="still draining"):
        sets.close(timeout_s=0.01)
    fence.reached = 10**6
    sets.close()
    assert pool.table.counts().free == PLAN.num_slabs


@pytest.mark.parametrize("zero", [False, True])
def test_zero_on_lease_wipes_what_another_model_wrote_and_only_that(pool: SlabPool, zero: bool):
    mine, other = LeasedSets(pool, "deep", zero_on_lease=zero), LeasedSets(pool, "wide")
    first = mine.lease()
    mine_slabs = mine.slab_table_SL[first].clone() // PLAN.slab_bytes
    assert all(bool((pool.slab(s) == (0 if zero else 0xFF)).all()) for s in mine_slabs.tolist()), (
        "fresh slabs"
    )
    for slab in mine_slabs.tolist():
        pool.slab(slab).fill_(7)
    mine.give_back(first)
    again = mine.lease()
    assert all(bool((pool.slab(s) == 7).all()) for s in mine_slabs.tolist()), "its own bytes are no secret"
    mine.give_back(again)
    taken = other.lease()
    passed_on = set((other.slab_table_SL[taken] // PLAN.slab_bytes).tolist()) & set(mine_slabs.tolist())
    assert passed_on
    other.give_back(taken)
    mine.lease()
    for slab in mine_slabs.tolist():
        wiped = zero and slab in passed_on
        assert bool((pool.slab(slab) == (0 if wiped else 7)).all()), f"slab {slab}"


def test_a_refused_lease_is_not_urgent_enough(pool: SlabPool):
    sets = LeasedSets(pool, "mid")
    ids = lease_all(sets)
    assert sets.lease() is None
    assert sets.lease(urgent=True) == len(ids)
    assert pool.table.counts().liveness_holder == "mid"


def test_a_lost_set_and_a_wrong_row_are_caught_by_check(pool: SlabPool):
    sets = LeasedSets(pool, "mid")
    sets.lease()
    sets.check()
    sets.slab_table_SL[0, 1] += PLAN.slab_bytes
    with pytest.raises(AssertionError, match="names other slabs"):
        sets.check()
    sets.slab_table_SL[0, 1] -= PLAN.slab_bytes
    pool.table.reclaim(sets.owner)
    with pytest.raises(AssertionError, match="has lost its slabs"):
        sets.check()


# ---- attaching


ATTACHER = """
import sys
from minserve.pool import LeasedSets, SlabPool
pool = SlabPool.attach(int(sys.argv[1]), int(sys.argv[2]))
sets = LeasedSets(pool, "wide")
for _ in range(3):
    set_id = sets.lease()
pool.bytes[sets.slab_table_SL[set_id, 1]] = 42
sys.stdout.write(str(int(sets.slab_table_SL[set_id, 1])))
"""


def test_another_process_leases_and_writes_and_is_reclaimed_after_its_death(pool: SlabPool):
    fds = (pool.table.fd, pool.pool_fd)
    command = [sys.executable, "-c", ATTACHER, *map(str, fds)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, pass_fds=fds, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert pool.bytes[int(done.stdout)] == 42
    owner = pool.table.owner_of("wide")
    assert pool.table.counts().models["wide"].live == 6
    assert pool.table.reclaim(owner) == 6
    pool.table.check()


def test_a_pool_of_another_table_is_refused(pool: SlabPool):
    other = PoolPlan(PLAN.slab_bytes, PLAN.num_slabs + 1, PLAN.models, PLAN.liveness_slabs)
    table = SlabTable.create(other)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=f"has {PLAN.pool_bytes} bytes, its table says {other.pool_bytes}"):
        SlabPool.attach(table.fd, pool.pool_fd)
    with pytest.raises(ValueError, match="is not a minserve slab table"):
        SlabPool.attach(pool.pool_fd, table.fd)
    with pytest.raises(ValueError, match="slab pool fd 9999 is not an open memfd"):
        SlabPool.attach(table.fd, 9999)
    assert len(os.listdir("/proc/self/fd")) == open_before, "a refused attach leaks a descriptor"
    with pytest.raises(ValueError, match="flat uint8"):
        SlabPool(table, torch.zeros(4))
    with pytest.raises(ValueError, match=f"must have {other.pool_bytes} bytes, got 4"):
        SlabPool(table, torch.zeros(4, dtype=torch.uint8))
    table.close()


def test_a_closed_pool_leaves_no_descriptor_behind():
    before = set(os.listdir("/proc/self/fd"))
    pool = SlabPool.create(PLAN)
    SlabPool.attach(pool.table.fd, pool.pool_fd).close()
    pool.close()
    assert set(os.listdir("/proc/self/fd")) <= before


def test_memfds_are_not_inherited_unless_passed():
    fd = create_memfd("private", 4096)
    code = f"import os; os.fstat({fd})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, close_fds=False).returncode != 0
    os.close(fd)


# ---- blocks of three models over one pool


class Blocks(RuleBasedStateMachine):
    """Three models allocate and release blocks at random.  Every block is marked in every layer of its set when it is
    allocated; a mark that changes means that two blocks share bytes.  After every step everything is checked."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlabPool.create(PLAN)
        self.pool.fill()
        self.fences = [Fence() for _ in PLAN.models]
        self.sets = [LeasedSets(self.pool, n, fence=f) for n, f in zip(PLAN.models, self.fences, strict=True)]
        self.blocks = [BlockPool(s, s.shape.slots, s.shape.block_tokens) for s in self.sets]
        self.held: list[list[tuple[int, int]]] = [[], [], []]  # (block, mark)
        self.marks = 0

    def views(self, model: int, block: int) -> list[torch.Tensor]:
        sets = self.sets[model]
        size = sets.shape.groups[0].block_bytes
        rows = sets.slab_table_SL[block >> SLOT_BITS].tolist()
        at = (block & (MAX_SLOTS - 1)) * size
        return [self.pool.bytes[row + at : row + at + size] for row in rows]

    @rule(model=st.integers(0, 2), n=st.integers(1, 9), urgent=st.booleans())
    def allocate(self, model: int, n: int, urgent: bool) -> None:
        blocks = self.blocks[model].allocate(n, urgent=urgent)
        for block in blocks or []:
            self.marks = self.marks % 250 + 1
            for view in self.views(model, block):
                view.fill_(self.marks)
            self.held[model].append((block, self.marks))

    @precondition(lambda self: any(self.held))
    @rule(model=st.integers(0, 2), n=st.integers(1, 20), pick=st.integers(0, 10**6))
    def release(self, model: int, n: int, pick: int) -> None:
        held = self.held[model]
        start = pick % (len(held) or 1)
        self.blocks[model].release([block for block, _ in held[start : start + n]])
        del held[start : start + n]

    @rule(model=st.integers(0, 2), steps=st.integers(1, 3))
    def gpu_goes_on(self, model: int, steps: int) -> None:
        fence = self.fences[model]
        fence.reached = min(fence.enqueued, fence.reached + steps)
        self.sets[model].poll()

    @invariant()
    def nobody_else_wrote_here(self) -> None:
        for model in range(3):
            for block, mark in self.held[model]:
                for view in self.views(model, block):
                    assert bool((view == mark).all()), f"block {block:#x} of model {model} was overwritten"

    @invariant()
    def everything_adds_up(self) -> None:
        self.pool.table.check()
        counts = self.pool.table.counts()
        for sets, blocks in zip(self.sets, self.blocks, strict=True):
            sets.check()
            blocks.check()
            of = counts.models[sets.model]
            assert of.live == sets.num_leased * sets.shape.layers
            assert of.draining == sets.num_draining * sets.shape.layers
            assert blocks.num_sets == sets.num_leased

    def teardown(self) -> None:
        for fence, sets in zip(self.fences, self.sets, strict=True):
            fence.reached = 10**9
            sets.close()
        assert self.pool.table.counts().free == PLAN.num_slabs
        self.pool.close()


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
