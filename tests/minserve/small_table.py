"""A slab table small enough to count by hand."""

import os

from minserve import slab_words as sw
from minserve.shared_memory import create_memfd
from minserve.slab_table import Lease, SlabTable
from sched.slabs import LayerGroup, PoolPlan, SetShape


def shape(layers: int, reserve_sets: int, more_sets: int) -> SetShape:
    """`more_sets` beyond the reserve hold the longest sequence."""
    longest = reserve_sets + more_sets
    return SetShape(layers, (LayerGroup(0, layers, 4096),), 1, 16, reserve_sets, longest, 0.0)


# reserves of 6, 4 and 0 slabs, and a liveness reserve of 5, out of 24; without all of them 4, for deep alone 3
PLAN = PoolPlan(4096, 24, {"deep": shape(3, 2, 1), "wide": shape(2, 2, 2), "poor": shape(2, 0, 2)}, 5)
LONGEST = (3, 4, 4)
RESERVES = (6, 4, 0)


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
