"""Our allocator in E1: the BlockPools and the slab table that serve, and the geometry that `solve` plans.

Compaction is the rule and the block moves that serve (sched/compaction.py): once a step a model looks what the others
lack, and whoever frees a byte for the fewest bytes copied empties sets, within 1 ms of a GPU.  The copy itself is
counted, not made, and the sets are free at once, not a step later.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence

from bench.slabs_arms import ENTRY_BYTES
from bench.slabs_load import CHUNK_TOKENS, STEP_S, Model
from bench.slabs_replay import MAX_RUNNING, Lane
from minserve.kv_share import CLAIM_AHEAD_S
from minserve.slab_table import Lease, SlabTable
from sched.blocks import BlockPool
from sched.compaction import MOST_SETS, NO_OFFER, Offer, choose, sets_to_vacate, watermark
from sched.slabs import MAX_SLAB_BYTES, PoolPlan, solve

# 1 ms of copying on an H200, which reads and writes 4.8 TB/s at best
STEP_COPY_BYTES = int(0.5 * 4.8e9 * 0.8)
AHEAD_STEPS = int(CLAIM_AHEAD_S / STEP_S)
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
        """As minserve/kv_moves.py: each model looks once a step what the others lack, and what it could do about it."""
        if not self._compact:
            if self.free_slabs < self._wanted:
                for pool in self.pools:
                    pool.trim()
            return
        wants = [self._wants(lane) for lane in tables]
        if sum(wants) + self._wanted <= self.free_slabs:
            return
        shapes = [self.plan.models[m.name] for m in self.models]
        busy = [bool(lane.running or lane.waiting) for lane in tables]
        offers = [self._offer(lane) for lane in tables]
        for m, lane in enumerate(tables):
            least = watermark([s for i, s in enumerate(shapes) if busy[i] and i != m], self.plan.num_slabs)
            missing = max(least, sum(wants) - wants[m]) - self.free_slabs
            others = offers[:m] + offers[m + 1 :]
            sets = sets_to_vacate(offers[m], others, -(-missing // self.models[m].layers))
            if sets:
                self._vacate(lane, sets)

    def _wants(self, lane: Lane) -> int:
        """Slabs it would take beyond those it has: for the prompts that wait, and for what runs in the next half second."""
        room = MAX_RUNNING - len(lane.running)
        waiting = itertools.islice(lane.waiting, max(0, room))
        blocks = sum(-(-seq.prompt // lane.model.P) for seq in waiting)
        blocks += sum(
            len(lane._due[k]) for k in range(lane.k + 1, lane.k + 1 + AHEAD_STEPS) if k in lane._due
        )
        pool = self.pools[lane.m]
        return -(-max(0, blocks - pool.num_available) // pool.slots) * lane.model.layers

    def _offer(self, lane: Lane) -> Offer:
        pool = self.pools[lane.m]
        sets = choose(pool, MOST_SETS, sys.maxsize, len(lane.running) // 8)
        return Offer(len(sets), pool.num_live_in(sets[0]) / pool.slots) if sets else NO_OFFER

    def _vacate(self, lane: Lane, most: int) -> None:
        """Empties at most so many sets within a step's budget."""
        pool, block_bytes = self.pools[lane.m], lane.model.whole_bytes
        sets = choose(pool, most, STEP_COPY_BYTES // block_bytes, len(lane.running) // 8)
        moved, held = pool.evacuate(sets, 0)
        for seq in lane.running:
            seq.blocks = [moved.get(block, block) for block in seq.blocks]
        pool.release(held)
        pool.trim()
        self.moved_bytes += len(moved) * block_bytes

    def close(self) -> None:
        self.table.close()
