"""A tile of query rows against a sequence's keys in the pool: where blocks lie, how they are loaded, the loops over them.

Rows are (token, query head) pairs of one KV head; scores are [rows, keys] = q K^T, the accumulator [rows, dims] = P V.
A turn takes BN keys: one block, a part of one, or two of them, between whose addresses a row of keys chooses.
Ids and slab offsets of blocks are read one and two turns ahead: a look-up inside the loop keeps one tile in flight.
Addresses are in units of 16 bytes.  Softmax state is fp32 in base 2; -1e30 stands for minus infinity.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_layout import KvLayout
from kernels.kv_read import FLOAT_DTYPES

UNIT_BYTES = 16
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product_dtype(q_dtype: torch.dtype, fmt: str) -> torch.dtype:
    """What the dot products take: two different float types meet in fp32."""
    return torch.promote_types(q_dtype, FLOAT_DTYPES[fmt])


def pool_sizes(layout: KvLayout) -> dict[str, int]:
    """The layout as the kernels' constants."""
    return {
        "P": layout.block_tokens,
        "BLOCK_UNITS": layout.block_bytes // UNIT_BYTES,
        "HEAD_UNITS": layout.head_bytes // UNIT_BYTES,
    }


class Keys(NamedTuple):
    """Where a layer's keys and values are read from."""

    pool: Tensor
    layout: KvLayout
    slab_table_SL: Tensor
    block_BN: Tensor
    layer: int
    slot_bits: int

    @classmethod
    def of_scratch(cls, scratch: Tensor, layout: KvLayout, block_BN: Tensor) -> "Keys":
        """Blocks that lie one after the other: one slab that begins at 0 holds them all."""
        nowhere = torch.zeros(1, 1, dtype=torch.int64, device=scratch.device)
        return cls(scratch, layout, nowhere, block_BN, 0, 30)


@triton.jit
def tile_rows(pid, chunks, G: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr):
    """Sequence, first row, rows and first position of a program's tile; rows < 1: nothing to do.

    The last tile of an item comes first: it has the most keys.
    """
    p_chunk = chunks + pid // (G * PARTS) * 4
    i_skip = (PARTS - 1 - pid // G % PARTS) * TOKENS
    i_seq = tl.load(p_chunk).to(tl.int64)
    i_row = tl.load(p_chunk + 1).to(tl.int64) + i_skip
    num_rows = tl.minimum(tl.load(p_chunk + 2) - i_skip, TOKENS)
    return i_seq, i_row, num_rows, tl.load(p_chunk + 3) + i_skip


@triton.jit
def slab_at(slab_table, stride_slab, layer, i_id, SLOT_BITS: tl.constexpr):
    """Byte offset of the slab that holds this layer of a block."""
    return tl.load(slab_table + ((i_id >> SLOT_BITS) * stride_slab + layer))


@triton.jit
def unit_at(i_at, i_slot, i_g, BLOCK_UNITS: tl.constexpr, HEAD_UNITS: tl.constexpr):
    """Unit address of a head's part of the block in this slot of the slab that begins at byte `i_at`."""
    return (i_at >> 4) + i_slot.to(tl.int64) * BLOCK_UNITS + i_g * HEAD_UNITS


@triton.jit
def key_offsets(unit0, unit1, i_first, PER: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr):
    """Element offsets of the keys of the turn that begins at key `i_first`; `PER` elements make a unit."""
    o_n = tl.arange(0, BN)
    if BN > P:
        o_key = tl.where(o_n < P, unit0, unit1) * PER + (o_n % P) * K
    else:
        o_key = unit0 * PER + (i_first % P + o_n) * K
    return o_key


@triton.jit
def load_keys(codes, o_key, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """[dims, keys] out of rows of dims."""
    o_d = tl.arange(0, BLOCK_D)
    p_k = codes + o_key[None, :] + o_d[:, None]
    if K == BLOCK_D:
        b_k = tl.load(p_k)
    else:
        b_k = tl.load(p_k, mask=(o_d < K)[:, None], other=0.0)
    return b_k


@triton.jit
def load_values(codes, o_key, m_n, MASKED: tl.constexpr, K: tl.constexpr, BLOCK_D: tl.constexpr):
    """[keys, dims]; lanes that nobody wrote may hold NaN, which a probability of 0 would not silence."""
    o_d = tl.arange(0, BLOCK_D)
    p_v = codes + o_key[:, None] + o_d[None, :]
    if MASKED:
        b_v = tl.load(p_v, mask=m_n[:, None] & (o_d < K)[None, :], other=0.0)
    elif K == BLOCK_D:
        b_v = tl.load(p_v)
    else:
        b_v = tl.load(p_v, mask=(o_d < K)[None, :], other=0.0)
    return b_v


@triton.jit
def soften(b_s, b_max, b_sum, scale_log2):
    """Probabilities against the new maximum, the factor of what was added up before, and the new state."""
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    return b_p, b_old, b_new, b_sum * b_old + tl.sum(b_p, 1)


@triton.jit
def attend_range(
    b_acc,
    b_max,
    b_sum,
    b_q,
    codes,
    slab_table,
    p_blocks,
    stride_slab,
    layer,
    i_g,
    i_low,
    i_high,
    i_end,
    o_pos,
    scale_log2,
    MASKED: tl.constexpr,
    STAGES: tl.constexpr,
    PER: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
):
    """Adds keys i_low .. i_high (i_low a multiple of BN).  `MASKED`: row m sees keys up to o_pos[m], and none from i_end
    on was written; otherwise every row sees every key."""
    TWO: tl.constexpr = BN > P
    MASK: tl.constexpr = (1 << SLOT_BITS) - 1
    i_last = (i_end - 1) // P
    i_b0 = tl.load(p_blocks + i_low // P)
    i_n0 = tl.load(p_blocks + tl.minimum((i_low + BN) // P, i_last))
    i_a0 = slab_at(slab_table, stride_slab, layer, i_b0, SLOT_BITS)
    i_s0 = i_b0 & MASK
    i_a1, i_s1, i_n1 = i_a0, i_s0, i_n0
    if TWO:
        i_b1 = tl.load(p_blocks + tl.minimum(i_low // P + 1, i_last))
        i_n1 = tl.load(p_blocks + tl.minimum((i_low + BN) // P + 1, i_last))
        i_a1 = slab_at(slab_table, stride_slab, layer, i_b1, SLOT_BITS)
        i_s1 = i_b1 & MASK
    for i_first in tl.range(i_low, i_high, BN, num_stages=STAGES):
        unit0 = unit_at(i_a0, i_s0, i_g, BLOCK_UNITS, HEAD_UNITS)
        unit1 = unit_at(i_a1, i_s1, i_g, BLOCK_UNITS, HEAD_UNITS)
        # slots are carried, not ids: a value handed on twice as it is keeps Triton from pipelining the loop
        i_a0 = slab_at(slab_table, stride_slab, layer, i_n0, SLOT_BITS)
        i_s0 = i_n0 & MASK
        i_n0 = tl.load(p_blocks + tl.minimum((i_first + 2 * BN) // P, i_last))
        if TWO:
            i_a1 = slab_at(slab_table, stride_slab, layer, i_n1, SLOT_BITS)
            i_s1 = i_n1 & MASK
            i_n1 = tl.load(p_blocks + tl.minimum((i_first + 2 * BN) // P + 1, i_last))
        o_key = key_offsets(unit0, unit1, i_first, PER, K, P, BN)
        o_n = i_first + tl.arange(0, BN)
        b_k = load_keys(codes, o_key, K, BLOCK_D)
        b_v = load_values(codes + P * K, o_key, o_n < i_end, MASKED, K, BLOCK_D)
        b_s = tl.dot(b_q, b_k.to(b_q.dtype), input_precision="ieee")
        if MASKED:
            b_s = tl.where(o_n[None, :] <= o_pos[:, None], b_s, -1.0e30)
        b_p, b_old, b_max, b_sum = soften(b_s, b_max, b_sum, scale_log2)
        b_acc = b_acc * b_old[:, None]
        b_acc = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_acc, input_precision="ieee")
    return b_acc, b_max, b_sum


@triton.jit
def attend_ahead(
    b_acc,
    b_max,
    b_sum,
    b_q,
    codes,
    slab_table,
    p_blocks,
    stride_slab,
    layer,
    i_g,
    i_high,
    scale_log2,
    STAGES: tl.constexpr,
    PER: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
):
    """Adds keys 0 .. i_high, a positive multiple of BN, that every row sees.

    Scores are computed a turn ahead: P V stays in flight during the softmax of the next turn, because nothing reads
    the accumulator before the wait for the next scores.
    """
    TWO: tl.constexpr = BN > P
    MASK: tl.constexpr = (1 << SLOT_BITS) - 1
    i_last = (i_high - 1) // P
    i_b0 = tl.load(p_blocks)
    i_m0 = tl.load(p_blocks + tl.minimum(BN // P, i_last))
    i_n0 = tl.load(p_blocks + tl.minimum(2 * BN // P, i_last))
    i_a0 = slab_at(slab_table, stride_slab, layer, i_b0, SLOT_BITS)
    unit0 = unit_at(i_a0, i_b0 & MASK, i_g, BLOCK_UNITS, HEAD_UNITS)
    i_a0 = slab_at(slab_table, stride_slab, layer, i_m0, SLOT_BITS)
    i_s0 = i_m0 & MASK
    unit1, i_a1, i_s1, i_n1 = unit0, i_a0, i_s0, i_n0
    if TWO:
        i_b1 = tl.load(p_blocks + 1)
        i_m1 = tl.load(p_blocks + tl.minimum(BN // P + 1, i_last))
        i_n1 = tl.load(p_blocks + tl.minimum(2 * BN // P + 1, i_last))
        i_a1 = slab_at(slab_table, stride_slab, layer, i_b1, SLOT_BITS)
        unit1 = unit_at(i_a1, i_b1 & MASK, i_g, BLOCK_UNITS, HEAD_UNITS)
        i_a1 = slab_at(slab_table, stride_slab, layer, i_m1, SLOT_BITS)
        i_s1 = i_m1 & MASK
    o_key = key_offsets(unit0, unit1, 0, PER, K, P, BN)
    b_s = tl.dot(b_q, load_keys(codes, o_key, K, BLOCK_D).to(b_q.dtype), input_precision="ieee")
    for i_first in tl.range(BN, i_high, BN, num_stages=STAGES):
        o_key = key_offsets(unit0, unit1, i_first - BN, PER, K, P, BN)
        b_v = load_values(codes + P * K, o_key, o_key, False, K, BLOCK_D)
        unit0 = unit_at(i_a0, i_s0, i_g, BLOCK_UNITS, HEAD_UNITS)
        unit1 = unit_at(i_a1, i_s1, i_g, BLOCK_UNITS, HEAD_UNITS)
        i_a0 = slab_at(slab_table, stride_slab, layer, i_n0, SLOT_BITS)
        i_s0 = i_n0 & MASK
        i_n0 = tl.load(p_blocks + tl.minimum((i_first + 2 * BN) // P, i_last))
        if TWO:
            i_a1 = slab_at(slab_table, stride_slab, layer, i_n1, SLOT_BITS)
            i_s1 = i_n1 & MASK
            i_n1 = tl.load(p_blocks + tl.minimum((i_first + 2 * BN) // P + 1, i_last))
        b_k = load_keys(codes, key_offsets(unit0, unit1, i_first, PER, K, P, BN), K, BLOCK_D)
        b_p, b_old, b_max, b_sum = soften(b_s, b_max, b_sum, scale_log2)
        b_p = b_p.to(b_q.dtype)
        b_s = tl.dot(b_q, b_k.to(b_q.dtype), input_precision="ieee")
        b_acc = tl.dot(b_p, b_v.to(b_q.dtype), b_acc * b_old[:, None], input_precision="ieee")
    o_key = key_offsets(unit0, unit1, i_high - BN, PER, K, P, BN)
    b_v = load_values(codes + P * K, o_key, o_key, False, K, BLOCK_D)
    b_p, b_old, b_max, b_sum = soften(b_s, b_max, b_sum, scale_log2)
    b_acc = b_acc * b_old[:, None]
    b_acc = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), b_acc, input_precision="ieee")
    return b_acc, b_max, b_sum
