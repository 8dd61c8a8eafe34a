"""Attention of few tokens a sequence over their paged context, split over the keys into pieces.

A persistent grid walks (piece, KV head) items, longest first; columns are the query heads of one KV head, of one token or
of a few (a short chunk), each with its own causal end.  A row of one piece is written as it is; of any other, a piece
leaves an unnormalised fp32 output, its maximum and its sum for attn_merge.  Counts are read on the device, so that a
captured launch serves any work.  Bound by the bandwidth of the pool.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attn_block import SHIFT, attend_bytes, attend_codes, attend_floats, attend_nibbles
from kernels.attn_queries import byte_queries, float_queries, nibble_queries
from kernels.kv_layout import SLOT_BITS, KvLayout
from kernels.kv_read import FLOAT_DTYPES
from kernels.kv_step import KvStep
from kernels.launch import GpuFacts, gpu_facts, launch
from kernels.table import tuned

TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
UNIT_BYTES = 16


class Parts(NamedTuple):
    """What pieces leave behind, S slots: unnormalised outputs, maxima in base 2, sums."""

    o_SHK: Tensor
    max_SH: Tensor
    sum_SH: Tensor

    @classmethod
    def empty(cls, slots: int, num_heads: int, head_dim: int, device: torch.device) -> "Parts":
        shape = (slots, num_heads)
        return cls(
            torch.empty(*shape, head_dim, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )


@dataclass(frozen=True)
class AttnDecodeConfig:
    """`programs`: of the persistent grid, on one SM."""

    num_warps: int
    num_stages: int
    programs: int

    @classmethod
    def pick(cls, gpu: GpuFacts, layout: KvLayout, columns: int, q_bytes: int) -> "AttnDecodeConfig":
        """`columns` padded; `q_bytes` of an element of q: fp32 models multiply in fp32."""
        # words: a tile of another size needs other room
        sizes = {"K": layout.head_dim, "P": layout.block_tokens, "C": columns, "q_bytes": q_bytes}
        words = {name: f"{name}{size}" for name, size in sizes.items()}
        found = tuned(cls, "attn_decode", gpu, fmt=layout.fmt, **words)
        if found is not None:
            return found
        block_d = padded_dim(layout)
        if max(q_bytes, layout.bits // 8) == 4:
            # fp32 products take no tensor core, and dequantized blocks fill registers; three tiles of 256 dims do not fit
            return cls(8 if layout.quantized else 4, 2 if block_d > 128 else 3, 2)
        # a warp on its own needs no barrier and repeats no softmax, as long as its accumulator fits beside the codes
        room = block_d * columns * (2 if layout.bits == 4 else 1)
        if layout.bits == 4 and block_d > layout.head_dim:
            room *= 4 if layout.fmt == "int4z" else 2  # masks
        num_warps = 1 if room <= 2048 else 2 if room <= 4096 else 4
        if columns >= 64:
            # two halves of 64 columns fit four warps' registers at 128 dims where products are asynchronous
            fits = block_d <= 64 or (block_d <= 128 and gpu.capability >= 90 and layout.fmt != "int4z")
            num_warps = 4 if fits else 8
        tile_bytes = 2 * layout.row_bytes * layout.block_tokens
        programs = min(8, gpu.shared_bytes // (2 * tile_bytes + 4096), 8 // num_warps)
        return cls(num_warps, 3, max(1, programs))

    @classmethod
    def candidates(cls, gpu: GpuFacts, block_bytes: int) -> Iterator["AttnDecodeConfig"]:
        """`block_bytes` of a KV head: as many programs as have two to four blocks each in flight."""
        for num_warps in (1, 2, 4):
            for num_stages in (2, 3, 4):
                for programs in (2, 4, 6, 8, 12):
                    fits = programs * (num_stages * block_bytes + 2048) <= gpu.shared_bytes
                    if fits and programs * num_warps <= 16:
                        yield cls(num_warps, num_stages, programs)


def padded_dim(layout: KvLayout) -> int:
    """Integer dots run over at least 32 dims, of 4 bit over half a head."""
    return max(64 if layout.bits == 4 else 32, triton.next_power_of_2(layout.head_dim))


def padded_columns(num_tokens: int, heads_per_kv: int) -> int:
    return max(8, triton.next_power_of_2(num_tokens * heads_per_kv))


def typed_views(pool: Tensor, layout: KvLayout) -> tuple[Tensor, Tensor]:
    """The pool as codes (the format's own type, or bytes) and as int32 scales."""
    return pool.view(FLOAT_DTYPES.get(layout.fmt, torch.int8)), pool.view(torch.int32)


@triton.jit
def _prepared(
    q,
    o_col,
    m_c,
    scale_log2,
    SIZES: tl.constexpr,
    FMT: tl.constexpr,
    DTYPE: tl.constexpr,
    DIGITS: tl.constexpr,
):
    if DIGITS == 0:
        queries = float_queries(q, o_col, m_c, scale_log2, SIZES, DTYPE)
    elif FMT == "int8":
        queries = byte_queries(q, o_col, m_c, scale_log2, SIZES, DIGITS)
    else:
        queries = nibble_queries(q, o_col, m_c, scale_log2, SIZES, FMT == "int4z", DIGITS)
    return queries


@triton.jit
def _attend_block(
    state,
    queries,
    codes,
    scales,
    unit,
    lanes,
    SIZES: tl.constexpr,
    FMT: tl.constexpr,
    DIGITS: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    SHIFT: tl.constexpr,
):
    if FMT == "fp32" or FMT == "bf16" or FMT == "fp16":
        BITS: tl.constexpr = 32 if FMT == "fp32" else 16
        state = attend_floats(state, queries, codes, unit, lanes, SIZES, BITS, ONE_TOKEN)
    elif DIGITS == 0 and queries[0].dtype == tl.float32:
        state = attend_codes(state, queries, codes, scales, unit, lanes, SIZES, FMT, ONE_TOKEN)
    elif FMT == "int8" or FMT == "fp8":
        state = attend_bytes(
            state, queries, codes, scales, unit, lanes, SIZES, FMT == "fp8", DIGITS, ONE_TOKEN, SHIFT
        )
    else:
        state = attend_nibbles(
            state, queries, codes, scales, unit, lanes, SIZES, FMT == "int4z", DIGITS, ONE_TOKEN, SHIFT
        )
    return state


# one variant whatever the step and the layer: a compilation while serving is a stall
@triton.jit(do_not_specialize=["stride_block", "layer"])
def _attn_decode_kernel(
    out,
    part_o,
    part_max,
    part_sum,
    q,
    codes,
    scales,
    slab_table,
    block_table,
    pieces,
    counts,
    stride_slab,
    stride_block,
    layer,
    scale_log2,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    P: tl.constexpr,
    FMT: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    DIGITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    DIRECT: tl.constexpr,
    SHIFT: tl.constexpr,
    STAGES: tl.constexpr,
):
    HEADS: tl.constexpr = H // G
    HALVES: tl.constexpr = (FMT == "int4" or FMT == "int4z") and DIGITS > 0
    ROWS: tl.constexpr = P // 2 if HALVES else P  # of a tile of scores
    MASK: tl.constexpr = (1 << SLOT_BITS) - 1
    o_t = tl.arange(0, COLUMNS) // HEADS
    o_h = tl.arange(0, COLUMNS) % HEADS
    o_d = tl.arange(0, BLOCK_D)
    num_items = tl.load(counts + (0 if ONE_TOKEN else 1)) * G
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0)):
        i_g = item % G
        p_piece = pieces + item // G * 8
        i_seq = tl.load(p_piece).to(tl.int64)
        i_low = tl.load(p_piece + 4)
        i_end = tl.load(p_piece + 5)
        m_c = o_t < tl.load(p_piece + 3)
        o_pos = tl.minimum(tl.load(p_piece + 2) + o_t, i_end - 1)
        o_out = (tl.load(p_piece + 1).to(tl.int64) + o_t) * H + i_g * HEADS + o_h
        queries = _prepared(q, o_out * K, m_c, scale_log2, (K, BLOCK_D, P), FMT, DTYPE, DIGITS)
        state = (
            tl.zeros([BLOCK_D, COLUMNS], tl.float32),
            tl.full([COLUMNS], -1.0e25, tl.float32),  # far above a masked score: attn_block
            tl.zeros([ROWS, COLUMNS], tl.float32),
            tl.zeros([16, COLUMNS], tl.float32),
            tl.zeros([ROWS, COLUMNS], tl.float32),
        )
        # the block id is read two blocks ahead and the slab's offset one: a look-up inside the loop keeps one in flight
        p_blocks = block_table + i_seq * stride_block
        i_last = (i_end - 1) // P
        i_block = tl.load(p_blocks + i_low // P)
        i_slot = i_block & MASK
        i_at = tl.load(slab_table + (i_block >> SLOT_BITS).to(tl.int64) * stride_slab + layer)
        i_next = tl.load(p_blocks + tl.minimum(i_low // P + 1, i_last))
        for i_first in tl.range(i_low, i_end, P, num_stages=STAGES):
            unit = (i_at >> 4) + i_slot.to(tl.int64) * BLOCK_UNITS + i_g * HEAD_UNITS
            i_at = tl.load(slab_table + (i_next >> SLOT_BITS).to(tl.int64) * stride_slab + layer)
            i_slot = i_next & MASK
            i_next = tl.load(p_blocks + tl.minimum(i_first // P + 2, i_last))
            lanes = (i_first, i_end, o_pos)
            state = _attend_block(
                state, queries, codes, scales, unit, lanes, (K, BLOCK_D, P), FMT, DIGITS, ONE_TOKEN, SHIFT
            )
        b_acc, b_max, b_sum, b_bias, b_zero = state
        b_sum = tl.sum(b_sum, 0)
        b_acc += (tl.sum(b_zero, 0) - tl.max(b_bias, 0))[None, :]
        m_out = m_c[None, :] & (o_d < K)[:, None]
        pieces_of_row = tl.load(p_piece + 7)
        if DIRECT and pieces_of_row == 1:
            b_y = (b_acc / b_sum[None, :]).to(out.dtype.element_ty)
            tl.store(out + (o_out * K)[None, :] + o_d[:, None], b_y, mask=m_out)
        else:
            o_slot = (tl.load(p_piece + 6) + o_t * pieces_of_row).to(tl.int64) * H + i_g * HEADS + o_h
            tl.store(part_o + (o_slot * K)[None, :] + o_d[:, None], b_acc, mask=m_out)
            tl.store(part_max + o_slot, b_max * queries[6], mask=m_c)
            tl.store(part_sum + o_slot, b_sum, mask=m_c)


class Query(NamedTuple):
    """What a layer asks: `digits` of an integer query, where keys are integers."""

    q_THK: Tensor
    pool: Tensor
    layer: int
    scale: float
    digits: int = 2


def _dot_dtype(q_dtype: torch.dtype, layout: KvLayout) -> torch.dtype:
    """What the dot products take: codes meet fp16, whose mantissa holds them, or fp32; two float types meet in fp32."""
    if layout.quantized:
        return torch.float32 if q_dtype == torch.float32 else torch.float16
    return torch.promote_types(q_dtype, FLOAT_DTYPES[layout.fmt])


def attn_decode(
    out_THK: Tensor,
    parts: Parts,
    query: Query,
    step: KvStep,
    one_token: bool,
    direct: bool,
    config: AttnDecodeConfig | None = None,
) -> None:
    """Walks the step's pieces of single tokens, or of short chunks.  `direct`: rows of one piece go to `out_THK`."""
    lay, work, q_THK = step.layout, step.work, query.q_THK
    assert work is not None, "this KvStep was built for a CPU"
    _, H, K = q_THK.shape
    G, pieces = lay.num_kv_heads, work.piece_X8 if one_token else work.wide_X8
    gpu, columns = (
        gpu_facts(q_THK.device),
        padded_columns(1 if one_token else work.wide_tokens, H // lay.num_kv_heads),
    )
    c = config or AttnDecodeConfig.pick(gpu, lay, columns, q_THK.element_size())
    dtype, (codes, scales) = _dot_dtype(q_THK.dtype, lay), typed_views(query.pool, lay)
    integers = lay.quantized and lay.fmt != "fp8" and dtype != torch.float32
    launch(
        _attn_decode_kernel,
        (min(len(pieces) * G, gpu.num_sms * c.programs),),
        out_THK,
        *parts,
        q_THK,
        codes,
        scales,
        step.slab_table_SL,
        work.block_BN,
        pieces,
        work.count_X,
        step.slab_table_SL.stride(0),
        work.block_BN.stride(0),
        query.layer,
        query.scale * math.log2(math.e),
        H=H,
        G=G,
        K=K,
        BLOCK_D=padded_dim(lay),
        P=lay.block_tokens,
        FMT=lay.fmt,
        BLOCK_UNITS=lay.block_bytes // UNIT_BYTES,
        HEAD_UNITS=lay.head_bytes // UNIT_BYTES,
        SLOT_BITS=SLOT_BITS,
        DTYPE=TL_DTYPES[dtype],
        DIGITS=query.digits if integers else 0,
        COLUMNS=columns,
        ONE_TOKEN=one_token,
        DIRECT=direct,
        SHIFT=SHIFT.get(lay.fmt, 0),
        STAGES=c.num_stages,
        num_warps=c.num_warps,
    )
