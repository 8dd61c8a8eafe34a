"""One block of keys and values against a tile of query columns, in the registers of a Triton program.

Operands are swapped: scores are [tokens, columns] = K q, the accumulator is [dims, columns] = V^T p.  Decode and
prefill share this; they differ in what a column is (a head, or a token and a head) and where the result goes.
Addresses are in units of 16 bytes.  Softmax state is fp32 in base 2; -1e30 stands for minus infinity.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_layout import KvLayout
from kernels.kv_read import FLOAT_DTYPES

UNIT_BYTES = 16
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def compute_dtype(q_dtype: torch.dtype, fmt: str) -> torch.dtype:
    """What the dot products take: codes are exact in every float type, two different float types meet in fp32."""
    return torch.promote_types(q_dtype, FLOAT_DTYPES.get(fmt, q_dtype))


def typed_views(pool: Tensor, layout: KvLayout) -> tuple[Tensor, Tensor]:
    """The pool as codes (the format's own type) and as int32 scales."""
    return pool.view(FLOAT_DTYPES.get(layout.fmt, torch.int8)), pool.view(torch.int32)


@triton.jit
def load_queries(
    q, o_col, m_c, K: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """Columns of q that start at `o_col`: [BLOCK_D, C], or for 4 bit the two halves of the head, [BLOCK_D / 2, C]."""
    PARTS: tl.constexpr = 2 if BITS == 4 else 1
    o_d = tl.arange(0, BLOCK_D // PARTS)
    m_q = (o_d < K // PARTS)[:, None] & m_c[None, :]
    p_q = q + o_col[None, :] + o_d[:, None]
    b_q0 = tl.load(p_q, mask=m_q, other=0.0)
    b_q1 = tl.load(p_q + (K - K // PARTS), mask=m_q, other=0.0)
    return b_q0.to(DTYPE), b_q1.to(DTYPE)


@triton.jit
def block_unit(i_set_at, i_slot, i_g, BLOCK_UNITS: tl.constexpr, HEAD_UNITS: tl.constexpr):
    """Unit address of a head's part: `i_set_at` is the byte offset of the set's slab in this layer."""
    return i_set_at // 16 + i_slot.to(tl.int64) * BLOCK_UNITS + i_g * HEAD_UNITS


@triton.jit
def _scale_pair(b_pair):
    """Key and value scales, packed as two fp16 in an int32 (2-byte loads in a loop are not pipelined)."""
    b_k = b_pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return b_k, (b_pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _nibbles(b_byte, DTYPE: tl.constexpr):
    b_i = b_byte.to(tl.int32)
    return ((b_i & 15) - 8).to(DTYPE), (((b_i >> 4) & 15) - 8).to(DTYPE)


@triton.jit
def attend_block(
    b_acc,
    b_max,
    b_sum,
    b_q0,
    b_q1,
    codes,
    scales,
    unit,
    i_first,
    i_end,
    o_pos,
    scale_log2,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
):
    """Adds keys i_first .. i_first + P; column c sees keys up to o_pos[c], and none from i_end on was written."""
    DTYPE: tl.constexpr = b_q0.dtype
    o_n = i_first + tl.arange(0, P)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < K
    if BITS == 8:
        p_c = codes + unit * 16
        b_pair = tl.load(scales + unit * 4 + 2 * P * K // 4 + tl.arange(0, P), mask=o_n < i_end, other=0)
        b_ks, b_vs = _scale_pair(b_pair)
        p_k = p_c + tl.arange(0, P)[:, None] * K + o_d[None, :]
        b_k = tl.load(p_k, mask=m_d[None, :], other=0)
        p_v = p_c + P * K + o_d[:, None] * P + tl.arange(0, P)[None, :]
        b_v = (tl.load(p_v, mask=m_d[:, None], other=0).to(tl.int32) & 255) - 128
        b_s = tl.dot(b_k.to(DTYPE), b_q0, input_precision="ieee") * b_ks[:, None]
    else:
        p_c = codes + unit * (128 // BITS)
        p_k = p_c + tl.arange(0, P)[:, None] * K + o_d[None, :]
        b_k = tl.load(p_k, mask=m_d[None, :], other=0.0)
        # V row-major, loaded as its transpose: tl.trans of a loaded tile leaves the asynchronous copies
        p_v = p_c + P * K + tl.arange(0, P)[None, :] * K + o_d[:, None]
        b_v = tl.load(p_v, mask=m_d[:, None] & (o_n < i_end)[None, :], other=0.0)
        b_s = tl.dot(b_k.to(DTYPE), b_q0, input_precision="ieee")
    b_s = tl.where(o_n[:, None] <= o_pos[None, :], b_s * scale_log2, -1.0e30)
    b_new = tl.maximum(b_max, tl.max(b_s, 0))
    b_old = tl.exp2(b_max - b_new)
    b_p = tl.exp2(b_s - b_new[None, :])
    b_sum = b_sum * b_old + tl.sum(b_p, 0)
    if BITS == 8:
        b_p = b_p * b_vs[:, None]
    b_acc = tl.dot(b_v.to(DTYPE), b_p.to(DTYPE), b_acc * b_old[None, :], input_precision="ieee")
    return b_acc, b_new, b_sum


@triton.jit
def attend_block4(
    b_acc,
    b_max,
    b_sum,
    b_q0,
    b_q1,
    codes,
    scales,
    unit,
    i_first,
    i_end,
    o_pos,
    scale_log2,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
):
    """As attend_block for 4 bit: tokens t (lo) and t + P/2 (hi) share V's bytes, dims d and d + K/2 share K's."""
    DTYPE: tl.constexpr = b_q0.dtype
    HALF_P: tl.constexpr = P // 2
    HALF_K: tl.constexpr = K // 2
    o_l = tl.arange(0, HALF_P)
    o_h = tl.arange(0, BLOCK_D // 2)
    o_d = tl.arange(0, BLOCK_D)
    o_lo = i_first + o_l
    o_hi = o_lo + HALF_P
    p_c = codes + unit * 16
    p_s = scales + unit * 4 + P * K // 4
    b_klos, b_vlos = _scale_pair(tl.load(p_s + o_l, mask=o_lo < i_end, other=0))
    b_khis, b_vhis = _scale_pair(tl.load(p_s + HALF_P + o_l, mask=o_hi < i_end, other=0))
    p_k = p_c + o_l[:, None] * HALF_K + o_h[None, :]
    m_h = (o_h < HALF_K)[None, :]
    b_a0, b_a1 = _nibbles(tl.load(p_k, mask=m_h, other=0), DTYPE)
    b_b0, b_b1 = _nibbles(tl.load(p_k + HALF_P * HALF_K, mask=m_h, other=0), DTYPE)
    p_v = p_c + P * HALF_K + o_d[:, None] * HALF_P + o_l[None, :]
    b_v0, b_v1 = _nibbles(tl.load(p_v, mask=(o_d < K)[:, None], other=0), DTYPE)

    b_lo = tl.dot(b_a1, b_q1, tl.dot(b_a0, b_q0, input_precision="ieee"), input_precision="ieee")
    b_hi = tl.dot(b_b1, b_q1, tl.dot(b_b0, b_q0, input_precision="ieee"), input_precision="ieee")
    b_lo = tl.where(o_lo[:, None] <= o_pos[None, :], b_lo * (b_klos * scale_log2)[:, None], -1.0e30)
    b_hi = tl.where(o_hi[:, None] <= o_pos[None, :], b_hi * (b_khis * scale_log2)[:, None], -1.0e30)
    b_new = tl.maximum(b_max, tl.max(tl.maximum(b_lo, b_hi), 0))
    b_old = tl.exp2(b_max - b_new)
    b_plo = tl.exp2(b_lo - b_new[None, :])
    b_phi = tl.exp2(b_hi - b_new[None, :])
    b_sum = b_sum * b_old + tl.sum(b_plo + b_phi, 0)
    b_plo = (b_plo * b_vlos[:, None]).to(DTYPE)
    b_phi = (b_phi * b_vhis[:, None]).to(DTYPE)
    b_acc = tl.dot(b_v0, b_plo, b_acc * b_old[None, :], input_precision="ieee")
    b_acc = tl.dot(b_v1, b_phi, b_acc, input_precision="ieee")
    return b_acc, b_new, b_sum


@triton.jit
def attend_keys(
    b_q0,
    b_q1,
    codes,
    scales,
    slab_table,
    p_blocks,
    stride_slab,
    layer,
    i_g,
    i_low,
    i_end,
    o_pos,
    scale_log2,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Keys i_low .. i_end (i_low a multiple of P) of the sequence whose block ids start at p_blocks."""
    MASK: tl.constexpr = (1 << SLOT_BITS) - 1
    b_acc = tl.zeros([BLOCK_D, o_pos.shape[0]], tl.float32)
    b_max = tl.full([o_pos.shape[0]], -1.0e30, tl.float32)
    b_sum = tl.zeros([o_pos.shape[0]], tl.float32)
    # the block id is read two tiles ahead and the slab's offset one: a look-up inside the loop keeps one tile in flight
    i_last = (i_end - 1) // P
    i_block = tl.load(p_blocks + i_low // P)
    i_slot = i_block & MASK
    i_at = tl.load(slab_table + (i_block >> SLOT_BITS).to(tl.int64) * stride_slab + layer)
    i_next = tl.load(p_blocks + tl.minimum(i_low // P + 1, i_last))
    for i_first in tl.range(i_low, i_end, P, num_stages=STAGES):
        unit = block_unit(i_at, i_slot, i_g, BLOCK_UNITS, HEAD_UNITS)
        i_at = tl.load(slab_table + (i_next >> SLOT_BITS).to(tl.int64) * stride_slab + layer)
        i_slot = i_next & MASK
        i_next = tl.load(p_blocks + tl.minimum(i_first // P + 2, i_last))
        if BITS == 4:
            b_acc, b_max, b_sum = attend_block4(
                b_acc,
                b_max,
                b_sum,
                b_q0,
                b_q1,
                codes,
                scales,
                unit,
                i_first,
                i_end,
                o_pos,
                scale_log2,
                K,
                BLOCK_D,
                P,
            )
        else:
            b_acc, b_max, b_sum = attend_block(
                b_acc,
                b_max,
                b_sum,
                b_q0,
                b_q1,
                codes,
                scales,
                unit,
                i_first,
                i_end,
                o_pos,
                scale_log2,
                K,
                BLOCK_D,
                P,
                BITS,
            )
    return b_acc, b_max, b_sum
