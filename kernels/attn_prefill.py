"""Causal attention of chunks of tokens over their whole paged context, the chunk itself included.

A program takes TOKENS tokens of a chunk item and one KV head; (token, head) pairs are the rows of its products.  Keys
that some row may not see come first, masked; then, without any mask, those before the tile.  Not split over the
keys: chunks bring enough programs, and a row's result depends on where its chunk begins, not on other sequences.
Bound by the tensor cores: 4 K operations a query, head and key.
"""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_layout import SLOT_BITS
from kernels.kv_read import FLOAT_DTYPES
from kernels.kv_step import KvStep
from kernels.kv_work import CHUNK_TOKENS
from kernels.launch import GpuFacts, cdiv, gpu_facts, launch
from kernels.prefill_inline import prefill_inline
from kernels.prefill_tile import (
    TL_DTYPES,
    UNIT_BYTES,
    attend_ahead,
    attend_range,
    pool_sizes,
    product_dtype,
    tile_rows,
)
from kernels.table import tuned


@dataclass(frozen=True)
class AttnPrefillConfig:
    """Tile: `block_m` rows of (token, head) pairs against `block_n` keys a turn.  `ahead`: scores a turn ahead."""

    block_m: int
    block_n: int
    ahead: bool
    num_warps: int
    num_stages: int

    @classmethod
    def pick(cls, gpu: GpuFacts, head_dim: int, heads_per_kv: int, bits: int) -> "AttnPrefillConfig":
        """`bits`: of the operands of the products."""
        found = tuned(cls, "attn_prefill", gpu, K=head_dim, heads=heads_per_kv, bits=bits)
        return found or cls.rule(gpu, padded(head_dim), bits)

    @classmethod
    def rule(cls, gpu: GpuFacts, block_d: int, bits: int) -> "AttnPrefillConfig":
        if bits == 32:  # no tensor core takes them, and what is unrolled in registers grows with every dim
            return cls(32, 16, False, 4, 2) if block_d <= 128 else cls(16, 16, False, 4, 2)
        if gpu.capability >= 90:
            return cls(128, 64, True, 8, 3) if block_d <= 128 else cls(128, 32, True, 8, 2)
        if block_d > 128:  # the queries are held in registers there
            return cls(32, 32, False, 4, 2)
        return cls(128, 64 if block_d <= 64 else 32, True, 8, 2)


def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit(do_not_specialize=["stride_block", "layer"])
def _attn_prefill_kernel(
    out,
    q,
    codes,
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
    PER: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    HEADS: tl.constexpr = H // G
    pid = tl.program_id(0)
    i_g = pid % G
    i_seq, i_row, num_rows, i_pos = tile_rows(pid, chunks, G, PARTS, TOKENS)
    if num_rows < 1:
        return
    o_m = tl.arange(0, BM)
    o_t = o_m // HEADS
    o_d = tl.arange(0, BLOCK_D)
    o_out = ((i_row + o_t) * H + i_g * HEADS + o_m % HEADS) * K
    m_out = (o_t < num_rows)[:, None] & (o_d < K)[None, :]
    b_q = tl.load(q + o_out[:, None] + o_d[None, :], mask=m_out, other=0.0).to(DTYPE)

    p_blocks = block_table + i_seq * stride_block
    i_end = i_pos + num_rows
    i_full = i_pos // BN * BN
    b_acc = tl.zeros([BM, BLOCK_D], tl.float32)
    b_max = tl.full([BM], -1.0e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc, b_max, b_sum = attend_range(
        b_acc, b_max, b_sum, b_q, codes, slab_table, p_blocks, stride_slab, layer, i_g,
        i_full, i_end, i_end, i_pos + o_t, scale_log2, True, 1, PER, K, P, BN, BLOCK_D, BLOCK_UNITS, HEAD_UNITS, SLOT_BITS,
    )  # fmt: skip
    if i_full > 0:
        if AHEAD:
            b_acc, b_max, b_sum = attend_ahead(
                b_acc, b_max, b_sum, b_q, codes, slab_table, p_blocks, stride_slab, layer, i_g,
                i_full, scale_log2, STAGES, PER, K, P, BN, BLOCK_D, BLOCK_UNITS, HEAD_UNITS, SLOT_BITS,
            )  # fmt: skip
        else:
            b_acc, b_max, b_sum = attend_range(
                b_acc, b_max, b_sum, b_q, codes, slab_table, p_blocks, stride_slab, layer, i_g,
                0, i_full, i_full, i_pos + o_t, scale_log2, False, STAGES, PER, K, P, BN, BLOCK_D, BLOCK_UNITS, HEAD_UNITS, SLOT_BITS,
            )  # fmt: skip
    b_y = b_acc / b_sum[:, None]
    tl.store(out + o_out[:, None] + o_d[None, :], b_y.to(out.dtype.element_ty), mask=m_out)


def attn_prefill(
    out_THK: Tensor,
    q_THK: Tensor,
    pool: Tensor,
    step: KvStep,
    layer: int,
    scale: float,
    config: AttnPrefillConfig | None = None,
) -> None:
    """Writes the rows of `out_THK` that belong to chunks."""
    lay, work = step.layout, step.work
    if lay.quantized:
        prefill_inline(out_THK, q_THK, pool, step, layer, scale)
        return
    _, H, K = q_THK.shape
    heads, dtype = H // lay.num_kv_heads, product_dtype(q_THK.dtype, lay.fmt)
    c = config or AttnPrefillConfig.pick(gpu_facts(q_THK.device), K, heads, 8 * dtype.itemsize)
    codes = pool.view(FLOAT_DTYPES[lay.fmt])
    tokens = c.block_m // heads
    parts = cdiv(CHUNK_TOKENS, tokens)
    launch(
        _attn_prefill_kernel,
        (len(work.chunk_X4) * parts * lay.num_kv_heads,),
        out_THK,
        q_THK,
        codes,
        step.slab_table_SL,
        work.block_BN,
        work.chunk_X4,
        step.slab_table_SL.stride(0),
        work.block_BN.stride(0),
        layer,
        scale * math.log2(math.e),
        H=H,
        G=lay.num_kv_heads,
        K=K,
        **pool_sizes(lay),
        PER=UNIT_BYTES // codes.element_size(),
        SLOT_BITS=SLOT_BITS,
        DTYPE=TL_DTYPES[dtype],
        BLOCK_D=padded(K),
        BM=c.block_m,
        BN=min(c.block_n, 2 * lay.block_tokens),
        TOKENS=tokens,
        PARTS=parts,
        AHEAD=c.ahead,
        STAGES=c.num_stages,
        num_warps=c.num_warps,
    )
