"""Our allocator in E1: the BlockPools and the slab table that serve, and the geometry that `solve` plans.

Compaction follows the rule of the design: between two steps, while fewer slabs are free than a step may ask for, the
owner whose emptiest sets cost the least to empty copies their live blocks into its other sets, patches its block
tables and returns the sets; what it copies in a step takes a GPU at most 1 ms.  The copy itself is counted, not made.
"""

import dataclasses
from collections.abc import Sequence

from bench.slabs_arms import ENTRY_BYTES
from bench.slabs_load import CHUNK_TOKENS, Model
from bench.slabs_replay import Lane
from minserve.slab_table import Lease, SlabTable
from sched.blocks import BlockPool
from sched.slabs import MAX_SLAB_BYTES, PoolPlan, solve
from sched.step import SLOT_BITS

# 1 ms of copying on an H200, which reads and writes 4.8 TB/s at best
STEP_COPY_BYTES = int(0.5 * 4.8e9 * 0.8)
OFFSET_BYTES = 8  # of the slab table on the device


class TableSets:
    """Slab sets of one model out of the table: what LeasedSets is, without tensors."""

    def __init__(self, table: SlabTable, model: str, layers: int) -> None:
        self.table, self.owner, self.layers = table, table.owner_of(model), layers
        self.num_leases = 0
        self._leases: dict[int, Lease] = {}
        self._ids: list[int] = []

    def lease(self, *, urgent: bool = False) -> int | None:
        lease = self.table.lease(self.owner, self.layers, urgent=urgent)
        if lease is None:
            return None
        set_id = self._ids.pop() if self._ids else len(self._leases)
        self._leases[set_id] = lease
        self.num_leases += 1
        return set_id

    def give_back(self, set_id: int) -> None:
        self.table.free(self.owner, self._leases.pop(set_id))
        self._ids.append(set_id)


def plan_for(models: Sequence[Model], pool_bytes: int, *, reserves: bool, max_slab: int) -> PoolPlan:
    """As served; without `reserves` nobody keeps any, as no other arm does."""
    tables = ENTRY_BYTES * (pool_bytes // min(m.whole_bytes for m in models))
    tables += OFFSET_BYTES * len(models) * (pool_bytes // (1 << 20))
    plan = solve(
        [m.shape(8192 if reserves else 0) for m in models], pool_bytes - tables, max_slab_bytes=max_slab
    )
    if reserves:
        return plan
    shapes = {name: dataclasses.replace(s, reserve_sets=0) for name, s in plan.models.items()}
    return dataclasses.replace(plan, models=shapes, liveness_slabs=0)


class Slabs:
    """Ours: `compact` between steps; `reserves` as a server keeps them."""

    def __init__(
        self,
        models: Sequence[Model],
        pool_bytes: int,
        *,
        compact: bool,
        reserves: bool = False,
        max_slab: int = MAX_SLAB_BYTES,
    ) -> None:
        self.models, self.pool_bytes, self.moved_bytes = tuple(models), pool_bytes, 0
        self.plan = plan_for(models, pool_bytes, reserves=reserves, max_slab=max_slab)
        self.table = SlabTable.create(self.plan)
        self._compact, self._urgent = compact, reserves
        shapes = [self.plan.models[m.name] for m in models]
        self.sets = [TableSets(self.table, m.name, m.layers) for m in models]
        self.pools = [
            BlockPool(source, s.slots, m.P) for source, s, m in zip(self.sets, shapes, models, strict=True)
        ]
        # slabs that one step of the most demanding model may take, and a set of each other
        chunk = max(-(-CHUNK_TOKENS // s.set_tokens) * s.layers for s in shapes)
        self._wanted = chunk + sum(s.layers for s in shapes)

    @property
    def leases(self) -> int:
        return sum(s.num_leases for s in self.sets)

    def capacity(self, m: int) -> int:
        # without the reserves of the others
        others = (
            self.plan.reserved_slabs
            - self.plan.models[self.models[m].name].reserve_sets * self.models[m].layers
        )
        return (self.plan.num_slabs - others) // self.models[m].layers * self.pools[m].slots

    def allocate(self, m: int, n: int) -> list[int] | None:
        return self.pools[m].allocate(n, urgent=self._urgent)

    def release(self, m: int, blocks: list[int]) -> None:
        self.pools[m].release(blocks)

    def stalled_s(self, m: int) -> float:
        return 0.0

    def held(self) -> tuple[int, int]:
        held = tail = 0
        for m, pool in zip(self.models, self.pools, strict=True):
            set_bytes = m.layers * self.plan.slab_bytes
            held += pool.num_sets * set_bytes
            tail += pool.num_sets * (set_bytes - pool.slots * m.whole_bytes)
        return held, tail

    @property
    def free_slabs(self) -> int:
        """Counted here: the table would take its lock."""
        return self.plan.num_slabs - sum(
            p.num_sets * m.layers for p, m in zip(self.pools, self.models, strict=True)
        )

    def tick(self, tables: list[Lane]) -> None:
        if self.free_slabs >= self._wanted:
            return
        for pool in self.pools:
            pool.trim()
        budget, goal = STEP_COPY_BYTES, 2 * self._wanted  # not again in the next step
        while self._compact and self.free_slabs < goal:
            m = self._cheapest()
            if m is None:
                return
            missing = -(-(goal - self.free_slabs) // self.models[m].layers)
            moved = self._vacate(m, tables[m], budget, missing)
            if not moved:
                return
            budget -= moved

    def _emptiest(self, m: int) -> list[tuple[int, int]]:
        """(live blocks, set) of the sets that could be emptied into the others, fewest live first."""
        pool = self.pools[m]
        if pool.num_free < pool.slots:
            return []
        sets = sorted((pool.slots - len(free), set_id) for set_id, free in pool._free.items())
        return sets[: pool.num_free // pool.slots]

    def _cheapest(self) -> int | None:
        """The model that frees a byte for the least bytes moved."""
        costs = []
        for m, pool in enumerate(self.pools):
            sets = self._emptiest(m)
            if sets:
                costs.append((sets[0][0] / pool.slots, m))
        return min(costs)[1] if costs else None

    def _vacate(self, m: int, lane: Lane, budget: int, most: int) -> int:
        """Empties at most so many sets of model m within the budget, and says how many bytes were moved."""
        pool, model = self.pools[m], self.models[m]
        victims: set[int] = set()
        count = 0
        for live, set_id in self._emptiest(m)[:most]:
            if (count + live) * model.whole_bytes > budget:
                break
            victims.add(set_id)
            count += live
        if not victims:
            return 0
        free = {set_id: len(blocks) for set_id, blocks in pool._free.items()}
        taken = pool.allocate(pool.num_free)
        assert taken is not None, f"{pool.num_free} free blocks could not be taken"
        # into the fullest sets first
        targets = sorted(
            (b for b in taken if b >> SLOT_BITS not in victims), key=lambda b: (free[b >> SLOT_BITS], b)
        )[:count]
        used = set(targets)
        pool.release([b for b in taken if b not in used])
        pool.release(_patch(lane, victims, targets))
        pool.trim()
        self.moved_bytes += count * model.whole_bytes
        return count * model.whole_bytes

    def close(self) -> None:
        self.table.close()


def _patch(lane: Lane, victims: set[int], targets: list[int]) -> list[int]:
    """Puts the targets where the victims' blocks stand in the lane's block tables, and returns those blocks."""
    old: list[int] = []
    fresh = iter(targets)
    for seq in lane.running:
        for i, block in enumerate(seq.blocks):
            if block >> SLOT_BITS in victims:
                old.append(block)
                seq.blocks[i] = next(fresh)
    assert len(old) == len(targets), f"{len(old)} live blocks in the victims, {len(targets)} targets"
    return old
