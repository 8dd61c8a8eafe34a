"""Merging the pieces of a row: o = sum_i 2^(max_i - max) o_i / sum_i 2^(max_i - max) sum_i; then, if asked, codes of o.

H heads, K head dim.  With codes a program takes a whole row, since its scale is the row's; else one head of it, many
pieces at a time.  Reads fp32 pieces once, from L2: bound by latency.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attn_decode import Parts
from kernels.kv_step import KvStep
from kernels.launch import launch
from kernels.quant_rows import QuantRows, quantize_rows


@dataclass(frozen=True)
class AttnMergeConfig:
    """Tile: pieces x heads x dims."""

    pieces: int
    block_h: int
    num_warps: int

    @classmethod
    def pick(cls, num_heads: int, head_dim: int, whole_rows: bool) -> "AttnMergeConfig":
        block_k = triton.next_power_of_2(head_dim)
        if whole_rows:
            block_h = triton.next_power_of_2(num_heads)
            return cls(1, block_h, min(16, max(1, block_h * block_k // 1024)))
        return cls(16, 1, max(1, block_k // 64))


@triton.jit
def _attn_merge_kernel(
    out,
    scale,
    part_o,
    part_max,
    part_sum,
    merges,
    counts,
    WHICH: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """ROUNDED: the type that values have before they are quantized; None stores them."""
    if tl.program_id(0) >= tl.load(counts + WHICH):
        return
    p_merge = merges + tl.program_id(0) * 3
    i_row = tl.load(p_merge).to(tl.int64)
    i_slot = tl.load(p_merge + 1).to(tl.int64)
    num_pieces = tl.load(p_merge + 2)
    o_p = tl.arange(0, PIECES)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_k = tl.arange(0, BLOCK_K)
    m_hk = (o_h < H)[:, None] & (o_k < K)[None, :]
    b_acc = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    b_max = tl.full([BLOCK_H], -1.0e30, tl.float32)
    b_sum = tl.zeros([BLOCK_H], tl.float32)
    for i_p in tl.range(0, num_pieces, PIECES):
        m_ph = (i_p + o_p < num_pieces)[:, None] & (o_h < H)[None, :]
        o_ph = (i_slot + i_p + o_p)[:, None] * H + o_h[None, :]
        b_m = tl.load(part_max + o_ph, mask=m_ph, other=-1.0e30)
        b_s = tl.load(part_sum + o_ph, mask=m_ph, other=0.0)
        b_o = tl.load(
            part_o + o_ph[:, :, None] * K + o_k[None, None, :],
            mask=m_ph[:, :, None] & (o_k < K)[None, None, :],
            other=0.0,
        )
        b_new = tl.maximum(b_max, tl.max(b_m, 0))
        b_old = tl.exp2(b_max - b_new)
        b_w = tl.exp2(b_m - b_new[None, :])
        b_acc = b_acc * b_old[:, None] + tl.sum(b_o * b_w[:, :, None], 0)
        b_sum = b_sum * b_old + tl.sum(b_s * b_w, 0)
        b_max = b_new
    b_y = b_acc / tl.where(o_h < H, b_sum, 1.0)[:, None]
    p_out = out + (i_row * H + o_h)[:, None] * K + o_k[None, :]
    if ROUNDED is None:
        tl.store(p_out, b_y.to(out.dtype.element_ty), mask=m_hk)
    else:
        b_y = tl.reshape(b_y.to(ROUNDED).to(tl.float32), [1, BLOCK_H * BLOCK_K])
        b_codes, b_scale = quantize_rows(b_y, out.dtype.element_ty)
        tl.store(p_out, tl.reshape(b_codes, [BLOCK_H, BLOCK_K]), mask=m_hk)
        tl.store(scale + i_row + tl.arange(0, 1), b_scale)


def _launch(
    out: Tensor,
    scale_T: Tensor,
    parts: Parts,
    step: KvStep,
    rounded: tl.dtype | None,
    config: AttnMergeConfig,
) -> None:
    work, (_, H, K) = step.work, parts.o_SHK.shape
    assert work is not None, "this KvStep was built for a CPU"
    launch(
        _attn_merge_kernel,
        (len(work.merge_X3) if rounded else work.num_split, triton.cdiv(H, config.block_h)),
        out,
        scale_T,
        *parts,
        work.merge_X3,
        work.count_X,
        WHICH=3 if rounded else 2,
        H=H,
        K=K,
        PIECES=config.pieces,
        BLOCK_H=config.block_h,
        BLOCK_K=triton.next_power_of_2(K),
        ROUNDED=rounded,
        num_warps=config.num_warps,
        # quantize_rows: a product contracted into an FMA would skip a rounding
        enable_fp_fusion=False,
    )


def attn_merge(out_THK: Tensor, parts: Parts, step: KvStep, config: AttnMergeConfig | None = None) -> None:
    """Writes the rows of several pieces; those of one are in `out_THK` already."""
    _, H, K = out_THK.shape
    _launch(out_THK, parts.sum_SH, parts, step, None, config or AttnMergeConfig.pick(H, K, False))


def attn_merge_quant(
    q_THK: Tensor, parts: Parts, step: KvStep, dtype: torch.dtype, config: AttnMergeConfig | None = None
) -> QuantRows:
    """Codes of all rows, as quant_rows makes them of an output of q's type."""
    T, H, K = q_THK.shape
    codes_TD = torch.empty(T, H * K, dtype=dtype, device=q_THK.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=q_THK.device)
    rounded = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[q_THK.dtype]
    _launch(codes_TD, scale_T, parts, step, rounded, config or AttnMergeConfig.pick(H, K, True))
    return QuantRows(codes_TD, scale_T)
