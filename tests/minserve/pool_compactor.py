"""A torch-free worker of the nursery that allocates blocks, moves them together, and never loses sight of one.

Every slot of a slab begins with a word: who has written the block there, and in which layer.  Before a block is
released, or moved, all its layers must say what was written; what another model wrote there would show.
"""

import itertools
import os
import random

import numpy as np

from minserve.slab_table import Lease, SlabTable
from sched.blocks import BlockPool
from sched.compaction import choose
from sched.step import MAX_SLOTS, SLOT_BITS

BROKEN = 3


class TableSets:
    """Sets of one model: slab rows by set id, and the words of their slots."""

    def __init__(self, table: SlabTable, owner: int, slots: np.ndarray) -> None:
        self.table, self.owner, self.slots = table, owner, slots
        self.layers = list(table.plan.models.values())[owner].layers
        self.leases: dict[int, Lease] = {}

    def lease(self, *, urgent: bool = False) -> int | None:
        lease = self.table.lease(self.owner, self.layers, urgent=urgent)
        if lease is None:
            return None
        set_id = next(i for i in itertools.count() if i not in self.leases)
        self.leases[set_id] = lease
        return set_id

    def give_back(self, set_id: int) -> None:
        self.table.free(self.owner, self.leases.pop(set_id))

    def words(self, block: int) -> np.ndarray:
        return self.slots[self.leases[block >> SLOT_BITS].slabs, block & (MAX_SLOTS - 1)]

    def write(self, block: int, words: np.ndarray) -> None:
        self.slots[self.leases[block >> SLOT_BITS].slabs, block & (MAX_SLOTS - 1)] = words


def compact_for_ever(table: SlabTable, slots: np.ndarray, owner: int, seed: int) -> None:
    """Publishes `moved_bytes` (here: blocks), and `vacatable` 1 while blocks are on their way."""
    rng, sets = random.Random(seed), TableSets(table, owner, slots)
    pool = BlockPool(sets, slots.shape[1], 16)
    written: dict[int, np.ndarray] = {}
    serial, moved_blocks = itertools.count(seed << 20), 0

    def check(block: int) -> None:
        if not (sets.words(block) == written[block]).all():
            os._exit(BROKEN)

    while True:
        blocks = pool.allocate(rng.randint(1, 20)) if rng.random() < 0.6 else None
        for block in blocks or ():
            # the layers differ, so that rows that are mixed up show
            written[block] = (next(serial) << 8) + np.arange(sets.layers)
            sets.write(block, written[block])
        if written and blocks is None:
            gone = rng.sample(sorted(written), min(len(written), rng.randint(1, 20)))
            for block in gone:
                check(block)
                del written[block]
            pool.release(gone)
        chosen = choose(pool, 3, 40)
        if not chosen or rng.random() < 0.5:
            continue
        table.publish(owner, vacatable=1)
        moved, held = pool.evacuate(chosen, 0)
        for source, target in moved.items():
            check(source)
            sets.write(target, sets.words(source))
            written[target] = written.pop(source)
        pool.release(held)
        pool.trim()
        pool.check()
        moved_blocks += len(moved)
        table.publish(owner, vacatable=0, moved_bytes=moved_blocks)
