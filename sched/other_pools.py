"""What the same models take at a time from the pools of others: a slab of 2 x LCM, and pages mapped by the driver.

FineServe's public code makes a slab twice the least common multiple of all block sizes, K and V apart, so that a block
id times the block's size is its address; a model takes such a slab for K and for V of every layer at once, and only
models of equal depth share.  kvcached maps pages of 2 MiB, likewise one for K and for V of every layer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sched.slabs import ModelShape

LCM_TIMES = 2
PAGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Grain:
    """The least that a model takes and gives back: `unit_bytes` for `unit_tokens` tokens; `tail` of it holds none."""

    unit_bytes: int
    unit_tokens: int
    tail: float


def grain(shape: ModelShape, part_bytes: int) -> Grain:
    """Of units of one part for K and one for V of every layer."""
    half = half_block(shape)
    slots = part_bytes // half
    return Grain(2 * shape.layers * part_bytes, slots * shape.block_tokens, 1 - slots * half / part_bytes)


def half_block(shape: ModelShape) -> int:
    """Bytes of the keys alone, or the values: what these pools call a block."""
    return shape.block_bytes // 2


def lcm_slab(half_blocks: Iterable[int]) -> int:
    """Bytes of FineServe's slab for these blocks."""
    return LCM_TIMES * math.lcm(*half_blocks)


def lcm_grains(shapes: Sequence[ModelShape]) -> dict[str, Grain]:
    """FineServe's, where the models share a GPU."""
    part = lcm_slab(map(half_block, shapes))
    return {s.name: grain(s, part) for s in shapes}


def page_grains(shapes: Sequence[ModelShape]) -> dict[str, Grain]:
    """kvcached's; a page smaller than a block is no page for that model: a multiple of it is taken then."""
    return {s.name: grain(s, PAGE_BYTES * -(-half_block(s) // PAGE_BYTES)) for s in shapes}


def depth_groups(shapes: Sequence[ModelShape]) -> dict[int, tuple[str, ...]]:
    """Names by number of layers: FineServe's pools, cut once, that lend each other nothing."""
    depths = sorted({s.layers for s in shapes})
    return {d: tuple(s.name for s in shapes if s.layers == d) for d in depths}
