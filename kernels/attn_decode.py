"""Attention of single tokens over their paged context, split over the keys, then merged.

A piece is at most SPLIT_TOKENS keys of one row, whatever the batch, so a row's result does not depend on its
neighbours.  A persistent grid walks (piece, KV head) pairs; columns are the query heads of one KV head.  Each piece
leaves an unnormalised fp32 output, its maximum and its sum; the merge is one program a row.
Bound by the bandwidth of the pool.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attn_tile import TL_DTYPES, UNIT_BYTES, attend_keys, compute_dtype, load_queries, typed_views
from kernels.kv_layout import SLOT_BITS
from kernels.kv_step import KvStep

MAX_PROGRAMS = 1024  # grid of the persistent kernel: about 8 programs on each of 132 SMs


@dataclass(frozen=True)
class AttnDecodeConfig:
    """Tile: padded head dim (both halves of it at least 16, for the dots) and padded heads per KV head."""

    block_d: int
    block_h: int
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def pick(cls, head_dim: int, heads_per_kv: int, item_bytes: int) -> "AttnDecodeConfig":
        block_d = max(32, triton.next_power_of_2(head_dim))
        # fp32 tiles of 256 dims: three in flight do not fit in shared memory
        return cls(
            block_d,
            max(8, triton.next_power_of_2(heads_per_kv)),
            num_stages=2 if item_bytes * block_d > 512 else 3,
        )


# one variant whatever the step and the layer: a compilation while serving is a stall
@triton.jit(do_not_specialize=["num_items", "stride_block", "layer"])
def _attn_decode_kernel(
    part_o,
    part_max,
    part_sum,
    q,
    codes,
    scales,
    slab_table,
    block_table,
    pieces,
    num_items,
    stride_slab,
    stride_block,
    layer,
    scale_log2,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    HEADS: tl.constexpr = H // G
    o_h = tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_h = o_h < HEADS
    num_turns = tl.cdiv(num_items - tl.program_id(0), tl.num_programs(0))
    for turn in tl.range(0, num_turns):
        item = tl.program_id(0) + turn * tl.num_programs(0)
        i_g = item % G
        i_piece = (item // G).to(tl.int64)
        p_piece = pieces + i_piece * 4
        i_seq = tl.load(p_piece).to(tl.int64)
        i_row = tl.load(p_piece + 1).to(tl.int64)
        i_low = tl.multiple_of(tl.load(p_piece + 2), P)
        i_end = tl.load(p_piece + 3)
        o_col = (i_row * H + i_g * HEADS + o_h) * K
        b_q0, b_q1 = load_queries(q, o_col, m_h, K, BLOCK_D, BITS, DTYPE)
        b_acc, b_max, b_sum = attend_keys(
            b_q0,
            b_q1,
            codes,
            scales,
            slab_table,
            block_table + i_seq * stride_block,
            stride_slab,
            layer,
            i_g,
            i_low,
            i_end,
            tl.full([BLOCK_H], 0, tl.int32) + (i_end - 1),
            scale_log2,
            K,
            BLOCK_D,
            P,
            BITS,
            BLOCK_UNITS,
            HEAD_UNITS,
            SLOT_BITS,
            STAGES,
        )
        o_out = i_piece * H + i_g * HEADS + o_h
        tl.store(part_o + o_out[None, :] * K + o_d[:, None], b_acc, mask=m_h[None, :] & (o_d < K)[:, None])
        tl.store(part_max + o_out, b_max, mask=m_h)
        tl.store(part_sum + o_out, b_sum, mask=m_h)


@triton.jit
def _attn_merge_kernel(
    out,
    part_o,
    part_max,
    part_sum,
    merges,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p_merge = merges + tl.program_id(0) * 3
    i_row = tl.load(p_merge).to(tl.int64)
    i_piece = tl.load(p_merge + 1).to(tl.int64)
    num_pieces = tl.load(p_merge + 2)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_h = o_h < H
    m_hd = m_h[:, None] & (o_d < K)[None, :]
    b_acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_H], -1.0e30, tl.float32)
    b_sum = tl.zeros([BLOCK_H], tl.float32)
    for i in tl.range(0, num_pieces):
        o_part = (i_piece + i) * H + o_h
        b_m = tl.load(part_max + o_part, mask=m_h, other=-1.0e30)
        b_s = tl.load(part_sum + o_part, mask=m_h, other=0.0)
        b_o = tl.load(part_o + o_part[:, None] * K + o_d[None, :], mask=m_hd, other=0.0)
        b_new = tl.maximum(b_max, b_m)
        b_a = tl.exp2(b_max - b_new)
        b_b = tl.exp2(b_m - b_new)
        b_acc = b_acc * b_a[:, None] + b_o * b_b[:, None]
        b_sum = b_sum * b_a + b_s * b_b
        b_max = b_new
    b_y = b_acc / tl.where(m_h, b_sum, 1.0)[:, None]
    tl.store(out + (i_row * H + o_h)[:, None] * K + o_d[None, :], b_y.to(out.dtype.element_ty), mask=m_hd)


def attn_decode(out_THK: Tensor, q_THK: Tensor, pool: Tensor, step: KvStep, layer: int, scale: float) -> None:
    """Writes the rows of `out_THK` that the step's decode pieces name."""
    lay, work = step.layout, step.work
    _, H, K = q_THK.shape
    G, num_pieces = lay.num_kv_heads, len(work.piece_X4)
    codes, scales = typed_views(pool, lay)
    config = AttnDecodeConfig.pick(K, H // G, codes.element_size())
    part_o = torch.empty(num_pieces, H, K, dtype=torch.float32, device=q_THK.device)
    part_max = torch.empty(num_pieces, H, dtype=torch.float32, device=q_THK.device)
    part_sum = torch.empty_like(part_max)
    _attn_decode_kernel[(min(num_pieces * G, MAX_PROGRAMS),)](
        part_o,
        part_max,
        part_sum,
        q_THK,
        codes,
        scales,
        step.slab_table_SL,
        work.block_BN,
        work.piece_X4,
        num_pieces * G,
        step.slab_table_SL.stride(0),
        work.block_BN.stride(0),
        layer,
        scale * math.log2(math.e),
        H=H,
        G=G,
        K=K,
        P=lay.block_tokens,
        BITS=8 * lay.row_bytes // K,
        BLOCK_UNITS=lay.block_bytes // UNIT_BYTES,
        HEAD_UNITS=lay.head_bytes // UNIT_BYTES,
        SLOT_BITS=SLOT_BITS,
        DTYPE=TL_DTYPES[compute_dtype(q_THK.dtype, lay.fmt)],
        BLOCK_D=config.block_d,
        BLOCK_H=config.block_h,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    block_h = min(16, triton.next_power_of_2(H))
    _attn_merge_kernel[(len(work.merge_X3), triton.cdiv(H, block_h))](
        out_THK,
        part_o,
        part_max,
        part_sum,
        work.merge_X3,
        H=H,
        K=K,
        BLOCK_H=block_h,
        BLOCK_D=triton.next_power_of_2(K),
        num_warps=4,
    )
