"""Sums of a product whose K is split over several programs: each leaves its part, and the last to arrive adds them all.

They are added in the order of the splits, so a float sum does not depend on who was last.  `partials` is [tile, split,
token, output]; `arrivals` counts, a tile each, up to the number of splits and back to 0.
"""

import triton
import triton.language as tl


@triton.jit
def arrive(partials, arrivals, b_acc, o_part, m_part, i_tile, i_s, splits, SIZE: tl.constexpr):
    """Leaves b_acc of split i_s at `o_part` of SIZE; where this tile's parts lie, and whether all are there."""
    p_tile = partials + i_tile.to(tl.int64) * splits * SIZE + o_part
    tl.store(p_tile + i_s * SIZE, b_acc, mask=m_part)
    # every thread's part is written before this program counts as arrived
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals + i_tile, 1, sem="acq_rel") == splits - 1
    return p_tile, is_last


@triton.jit
def sum_parts(
    p_tile, p_arrivals, m_part, splits, DTYPE: tl.constexpr, SIZE: tl.constexpr, AT_ONCE: tl.constexpr
):
    """The sum of all parts of a tile, for the last to arrive; resets the tile's counter.

    AT_ONCE loads hide the latency of L2: as many as stay in registers.
    """
    tl.store(p_arrivals, 0)
    b_sum = tl.zeros(p_tile.shape, DTYPE)
    for i in range(0, splits, AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            m_there = m_part & (i + j < splits)
            b_sum += tl.load(p_tile + (i + j) * SIZE, mask=m_there, other=0.0, cache_modifier=".cg")
    return b_sum
