"""Prefill attention with both products in e4m3 over fp8 keys and values, as FireQ does it: queries, keys, values, probabilities.

Queries are quantized here, per token and head.  V is stored transposed, which is what fp8 products want; K's rows are
taken in an order that leaves the probabilities, once they are fp8, in the registers where the second product reads them.
Probabilities take their values' scales over the largest that their row has seen, and are 2^8 at most: 14 binades of
e4m3's normal range lie below.  Hopper's tensor cores add fp8 products with about 14 bits, over the head dim and over all
keys: adding up turns in fp32 instead takes registers that are not there.  Bound by the tensor cores, at twice the
16-bit rate.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_layout import KvLayout
from kernels.kv_work import CHUNK_TOKENS
from kernels.launch import GpuFacts, cdiv, gpu_facts, launch
from kernels.prefill_tile import Keys, pool_sizes, slab_at, tile_rows, unit_at

WIDEST = 128  # head dims beyond it leave no registers
TURN = 32  # keys: what fp8 products add up at once

LEAST_QUERY = tl.constexpr(1e-12)  # as in attn_queries
ROOM = tl.constexpr(8.0)  # log2 of the largest probability: 256, e4m3 reaches 448


@triton.jit
def key_lanes(BN: tl.constexpr):
    """Which key of a turn each column of the scores is.

    A thread holds columns 2t, 2t + 1, 2t + 8, 2t + 9 of 16 scores, and needs 4t .. 4t + 3 of 16 probabilities.
    """
    o_n = tl.arange(0, BN)
    return o_n // 16 * 16 + o_n % 8 // 2 * 4 + o_n % 16 // 8 * 2 + o_n % 2


@triton.jit
def in_key_order(b_p, BM: tl.constexpr, BN: tl.constexpr):
    """Columns of `key_lanes` back in the order of keys: within each thread's registers."""
    b_p = tl.reshape(b_p, [BM, BN // 16, 2, 4, 2])
    return tl.reshape(tl.permute(b_p, [0, 1, 3, 2, 4]), [BM, BN])


@triton.jit
def load_keys8(
    codes, unit, i_first, K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BLOCK_D: tl.constexpr
):
    o_d = tl.arange(0, BLOCK_D)[:, None]
    o_row = unit * 16 + (i_first % P + key_lanes(BN)) * K
    if K == BLOCK_D:
        b_k = tl.load(codes + o_row[None, :] + o_d)
    else:
        b_k = tl.load(codes + o_row[None, :] + o_d, mask=o_d < K, other=0.0)
    return b_k


@triton.jit
def load_values8(
    codes, unit, i_first, i_end, MASKED: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """[keys, dims] out of [dims, keys]."""
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    # BN divides P: a turn's keys lie side by side, on 16 bytes
    o_col = tl.max_contiguous(tl.multiple_of(unit * 16 + tl.multiple_of(i_first % P, 16) + o_n, 16), 16)
    p_v = codes + P * K + o_col[:, None] + o_d * P
    if MASKED:
        b_v = tl.load(p_v, mask=(i_first + o_n < i_end)[:, None] & (o_d < K), other=0.0)
    elif K == BLOCK_D:
        b_v = tl.load(p_v)
    else:
        b_v = tl.load(p_v, mask=o_d < K, other=0.0)
    return b_v


@triton.jit
def load_scales8(
    words, unit, i_first, i_end, MASKED: tl.constexpr, K: tl.constexpr, P: tl.constexpr, BN: tl.constexpr
):
    """Packed scales of the scores' columns; of a key that is not there 1, of its value 0."""
    o_lane = key_lanes(BN)
    p_s = words + unit * 4 + P * K // 2 + (i_first % P + o_lane)
    if MASKED:
        b_pair = tl.load(p_s, mask=i_first + o_lane < i_end, other=0x3C00)
    else:
        b_pair = tl.load(p_s)
    return b_pair


@triton.jit
def soften8(b_s, b_pair, b_max, b_sum, ref, b_scale, m_s, MASKED: tl.constexpr):
    """Probabilities times value scales over the largest that a row has seen, `ref` (a number where all rows see all keys,
    else one a row); the factor of what was added up before, and the new state.  `b_scale`: of a row's queries, in base 2.

    A turn of which a row sees nothing leaves it bit for bit: both factors are 1 then.
    """
    b_ks = b_pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    b_vs = (b_pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    b_s = b_s * b_ks[None, :]
    if MASKED:
        b_s = tl.where(m_s, b_s, -1.0e30)
        new = tl.maximum(ref, tl.max(tl.where(m_s, b_vs[None, :], 0.0), 1))
        inverse = 1.0 / new
        b_w = b_vs[None, :] * inverse[:, None]
    else:
        new = tl.maximum(ref, tl.max(b_vs, 0))
        inverse = 1.0 / new
        b_w = (b_vs * inverse)[None, :]
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * b_scale - ROOM)
    b_p = tl.exp2(b_s * b_scale[:, None] - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_old + tl.sum(b_p, 1)
    return b_p * b_w, b_old * tl.where(new > ref, ref * inverse, 1.0), b_new, b_sum, new


@triton.jit(do_not_specialize=["stride_block", "layer"])
def _prefill_fp8_kernel(
    out,
    q,
    codes,
    words,
    slab_table,
    block_table,
    chunks,
    stride_slab,
    stride_block,
    layer,
    scale_log2,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    HEADS: tl.constexpr = H // G
    i_g = tl.program_id(0) % G
    i_seq, i_row, num_rows, i_pos = tile_rows(tl.program_id(0), chunks, G, PARTS, TOKENS)
    if num_rows < 1:
        return
    o_m = tl.arange(0, BM)
    o_t = o_m // HEADS
    o_d = tl.arange(0, BLOCK_D)
    o_out = ((i_row + o_t) * H + i_g * HEADS + o_m % HEADS) * K
    m_out = (o_t < num_rows)[:, None] & (o_d < K)[None, :]
    b_q = tl.load(q + o_out[:, None] + o_d[None, :], mask=m_out, other=0.0).to(tl.float32)
    # a row of zeros keeps a scale that -1e30 is far below zero with
    b_scale = tl.maximum(tl.max(tl.abs(b_q), 1), LEAST_QUERY) / 448.0
    b_q = (b_q / b_scale[:, None]).to(tl.float8e4nv)
    b_scale = b_scale * scale_log2

    i_end = i_pos + num_rows
    i_full = i_pos // BN * BN
    b_acc = tl.zeros([BM, BLOCK_D], tl.float32)
    b_max = tl.full([BM], -1.0e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    ref = 1e-30  # the largest value scale so far
    p_blocks = block_table + i_seq * stride_block
    if i_full > 0:
        b_acc, b_max, b_sum, ref = attend_ahead8(
            b_acc, b_max, b_sum, ref, b_q, b_scale, codes, words, slab_table, p_blocks, stride_slab, layer, i_g, i_full,
            STAGES, K, P, BM, BN, BLOCK_D, BLOCK_UNITS, HEAD_UNITS, SLOT_BITS,
        )  # fmt: skip
    b_ref = tl.zeros([BM], tl.float32) + ref
    for i_first in tl.range(i_full, i_end, BN, num_stages=1):
        i_block = tl.load(p_blocks + i_first // P)
        i_at = slab_at(slab_table, stride_slab, layer, i_block, SLOT_BITS)
        unit = unit_at(i_at, i_block & ((1 << SLOT_BITS) - 1), i_g, BLOCK_UNITS, HEAD_UNITS)
        b_pair = load_scales8(words, unit, i_first, i_end, True, K, P, BN)
        b_s = tl.dot(b_q, load_keys8(codes, unit, i_first, K, P, BN, BLOCK_D))
        m_s = (i_first + key_lanes(BN))[None, :] <= (i_pos + o_t)[:, None]
        b_p, b_old, b_max, b_sum, b_ref = soften8(b_s, b_pair, b_max, b_sum, b_ref, b_scale, m_s, True)
        b_v = load_values8(codes, unit, i_first, i_end, True, K, P, BN, BLOCK_D)
        b_acc = tl.dot(in_key_order(b_p, BM, BN).to(tl.float8e4nv), b_v, b_acc * b_old[:, None])
    b_y = b_acc * (b_ref / b_sum)[:, None]
    tl.store(out + o_out[:, None] + o_d[None, :], b_y.to(out.dtype.element_ty), mask=m_out)


@triton.jit
def attend_ahead8(
    b_acc,
    b_max,
    b_sum,
    ref,
    b_q,
    b_scale,
    codes,
    words,
    slab_table,
    p_blocks,
    stride_slab,
    layer,
    i_g,
    i_high,
    STAGES: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
):
    """As prefill_tile.attend_ahead; P V of a turn is added to the accumulator after the next turn's scores."""
    MASK: tl.constexpr = (1 << SLOT_BITS) - 1
    i_last = (i_high - 1) // P
    i_now = tl.load(p_blocks)
    i_at = slab_at(slab_table, stride_slab, layer, i_now, SLOT_BITS)
    unit = unit_at(i_at, i_now & MASK, i_g, BLOCK_UNITS, HEAD_UNITS)
    i_mid = tl.load(p_blocks + tl.minimum(BN // P, i_last))
    i_next = tl.load(p_blocks + tl.minimum(2 * BN // P, i_last))
    i_at = slab_at(slab_table, stride_slab, layer, i_mid, SLOT_BITS)
    i_slot = i_mid & MASK
    b_s = tl.dot(b_q, load_keys8(codes, unit, 0, K, P, BN, BLOCK_D))
    for i_first in tl.range(BN, i_high, BN, num_stages=STAGES):
        b_pair = load_scales8(words, unit, i_first - BN, i_high, False, K, P, BN)
        b_v = load_values8(codes, unit, i_first - BN, i_high, False, K, P, BN, BLOCK_D)
        unit = unit_at(i_at, i_slot, i_g, BLOCK_UNITS, HEAD_UNITS)
        i_at = slab_at(slab_table, stride_slab, layer, i_next, SLOT_BITS)
        i_slot = i_next & MASK
        i_next = tl.load(p_blocks + tl.minimum((i_first + 2 * BN) // P, i_last))
        b_k = load_keys8(codes, unit, i_first, K, P, BN, BLOCK_D)
        b_p, b_old, b_max, b_sum, ref = soften8(b_s, b_pair, b_max, b_sum, ref, b_scale, b_s, False)
        b_p8 = in_key_order(b_p, BM, BN).to(tl.float8e4nv)
        b_s = tl.dot(b_q, b_k)
        b_acc = tl.dot(b_p8, b_v, b_acc * b_old[:, None])
    b_pair = load_scales8(words, unit, i_high - BN, i_high, False, K, P, BN)
    b_v = load_values8(codes, unit, i_high - BN, i_high, False, K, P, BN, BLOCK_D)
    b_p, b_old, b_max, b_sum, ref = soften8(b_s, b_pair, b_max, b_sum, ref, b_scale, b_s, False)
    b_acc = tl.dot(in_key_order(b_p, BM, BN).to(tl.float8e4nv), b_v, b_acc * b_old[:, None])
    return b_acc, b_max, b_sum, ref


def rounded_queries(q_THK: Tensor) -> Tensor:
    """What the kernel multiplies, in float64: e4m3 over a scale per token and head."""
    scale = q_THK.float().abs().amax(-1, keepdim=True).clamp_min(LEAST_QUERY.value) / 448
    return (q_THK.float() / scale).to(torch.float8_e4m3fn).double() * scale


def takes_fp8(gpu: GpuFacts, layout: KvLayout) -> bool:
    """Whether there is a kernel for it here; otherwise prefill attends in 16 bit."""
    wide_blocks = layout.block_tokens % TURN == 0
    return (
        layout.fmt in ("fp8", "int4") and gpu.capability >= 89 and layout.head_dim <= WIDEST and wide_blocks
    )


def prefill_fp8(out_THK: Tensor, q_THK: Tensor, keys: Keys, chunk_X4: Tensor, scale: float) -> None:
    """Writes the rows of `out_THK` that belong to chunks."""
    lay = keys.layout
    _, H, K = q_THK.shape
    G, gpu = lay.num_kv_heads, gpu_facts(q_THK.device)
    assert takes_fp8(gpu, lay), f"{gpu=} {lay=}"
    tokens = 128 * G // H
    parts = cdiv(CHUNK_TOKENS, tokens)
    launch(
        _prefill_fp8_kernel,
        (len(chunk_X4) * parts * G,),
        out_THK,
        q_THK,
        keys.pool.view(torch.float8_e4m3fn),
        keys.pool.view(torch.int32),
        keys.slab_table_SL,
        keys.block_BN,
        chunk_X4,
        keys.slab_table_SL.stride(0),
        keys.block_BN.stride(0),
        keys.layer,
        scale * math.log2(math.e),
        H=H,
        G=G,
        K=K,
        **pool_sizes(lay),
        SLOT_BITS=keys.slot_bits,
        BLOCK_D=max(32, triton.next_power_of_2(K)),
        BM=128,
        BN=TURN,
        TOKENS=tokens,
        PARTS=parts,
        STAGES=2 if gpu.capability == 89 else 3,
        num_warps=8,
        maxnreg=128 if gpu.capability == 90 and K <= 64 else None,
    )
