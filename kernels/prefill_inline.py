"""Causal attention of chunks of tokens over their whole paged context, the chunk itself included.

A program takes TOKENS tokens of a chunk item and one KV head; columns are (token, query head) pairs, so a block of keys
is read once for all of them.  Not split over the keys: chunks bring enough programs.  Bound by the tensor cores.
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
from kernels.kv_work import CHUNK_TOKENS


@dataclass(frozen=True)
class InlineConfig:
    """Tile: `tokens` x `block_h` columns against blocks of P keys."""

    block_d: int
    block_h: int
    tokens: int
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def pick(cls, head_dim: int, heads_per_kv: int, bits: int, dtype: torch.dtype) -> "InlineConfig":
        """`dtype`: of the dot products."""
        block_d = max(32, triton.next_power_of_2(head_dim))
        block_h = triton.next_power_of_2(heads_per_kv)
        # 64 columns of 128 dims fill the registers of 4 warps; unpacking 4 bit needs more of them, and fp32 products,
        # which no tensor core takes, far more
        columns = 64 // (1 if block_d <= 128 else 2) // (1 if bits >= 8 else 2)
        if dtype == torch.float32:
            columns = 16
        num_warps = 8 if dtype == torch.float32 else 4
        return cls(block_d, block_h, max(1, min(CHUNK_TOKENS, columns // block_h)), num_warps)


@triton.jit(do_not_specialize=["stride_block", "layer"])
def _prefill_inline_kernel(
    out,
    q,
    codes,
    scales,
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
    BITS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    p_chunk = chunks + tl.program_id(0) // PARTS * 4
    i_skip = tl.program_id(0) % PARTS * TOKENS
    i_g = tl.program_id(1)
    num_rows = tl.load(p_chunk + 2)
    if i_skip >= num_rows:
        return
    i_seq = tl.load(p_chunk).to(tl.int64)
    i_row = tl.load(p_chunk + 1).to(tl.int64)
    i_pos = tl.load(p_chunk + 3)

    HEADS: tl.constexpr = H // G
    o_c = tl.arange(0, TOKENS * BLOCK_H)
    o_t = i_skip + o_c // BLOCK_H
    o_h = o_c % BLOCK_H
    m_c = (o_t < num_rows) & (o_h < HEADS)
    o_col = ((i_row + o_t) * H + i_g * HEADS + o_h) * K
    b_q0, b_q1 = load_queries(q, o_col, m_c, K, BLOCK_D, BITS, DTYPE)
    b_acc, _, b_sum = attend_keys(
        b_q0,
        b_q1,
        codes,
        scales,
        slab_table,
        block_table + i_seq * stride_block,
        stride_slab,
        layer,
        i_g,
        0,
        i_pos + tl.minimum(num_rows, i_skip + TOKENS),
        i_pos + o_t,
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
    o_d = tl.arange(0, BLOCK_D)
    b_y = b_acc / b_sum[None, :]
    m_out = m_c[None, :] & (o_d < K)[:, None]
    tl.store(out + o_col[None, :] + o_d[:, None], b_y.to(out.dtype.element_ty), mask=m_out)


def prefill_inline(
    out_THK: Tensor, q_THK: Tensor, pool: Tensor, step: KvStep, layer: int, scale: float
) -> None:
    """Writes the rows of `out_THK` that belong to chunks."""
    lay, work = step.layout, step.work
    _, H, K = q_THK.shape
    G = lay.num_kv_heads
    bits, dtype = 8 * lay.row_bytes // K, compute_dtype(q_THK.dtype, lay.fmt)
    config = InlineConfig.pick(K, H // G, bits, dtype)
    parts = CHUNK_TOKENS // config.tokens
    codes, scales = typed_views(pool, lay)
    _prefill_inline_kernel[(len(work.chunk_X4) * parts, G)](
        out_THK,
        q_THK,
        codes,
        scales,
        step.slab_table_SL,
        work.block_BN,
        work.chunk_X4,
        step.slab_table_SL.stride(0),
        work.block_BN.stride(0),
        layer,
        scale * math.log2(math.e),
        H=H,
        G=G,
        K=K,
        P=lay.block_tokens,
        BITS=bits,
        BLOCK_UNITS=lay.block_bytes // UNIT_BYTES,
        HEAD_UNITS=lay.head_bytes // UNIT_BYTES,
        SLOT_BITS=SLOT_BITS,
        DTYPE=TL_DTYPES[dtype],
        BLOCK_D=config.block_d,
        BLOCK_H=config.block_h,
        TOKENS=config.tokens,
        PARTS=parts,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
