"""The Triton run of rope_kv_write, one launch: a program takes the step's tokens of one block and a few heads.

Programs of a block: some for its KV heads, the rest for the query heads of its tokens.  A tile's rows are the block's
tokens, one head after the other (so that transposed values are stored along the tokens), or the heads of one token
where the block gets a single one.  A block belongs to one line of `touch_X4`, so two tokens whose values share a byte
belong to one program; a line of 0 lanes is padding.  Addresses are in units of 16 bytes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_layout import BIAS, MAX_SCALE, MIN_SCALE, QMAX, KvLayout
from kernels.kv_read import FLOAT_DTYPES
from kernels.kv_step import KvStep
from kernels.kv_write_tile import (
    halves,
    lanes,
    padded_half,
    pair,
    quantized,
    store_block,
    store_token,
    tables,
    touched,
    turned,
)
from kernels.launch import GpuFacts, cdiv, gpu_facts, launch
from kernels.table import tuned

STATIC_FORMATS = ("fp8", "int8")


class KvScales(NamedTuple):
    """What a checkpoint may bring.  `channel_GK`: fp32; after rotation keys are divided and queries multiplied by it,
    which leaves their products.  `static`: constant scales of keys and of values, in place of a token's own."""

    channel_GK: Tensor | None = None
    static: tuple[float, float] | None = None


NO_SCALES = KvScales()


@dataclass(frozen=True)
class RopeKvWriteConfig:
    """Query heads or KV heads of a program, and, unless each block gets a single one, its tokens."""

    q_heads: int
    kv_heads: int
    tokens: int
    num_warps: int

    @classmethod
    def pick(cls, gpu: GpuFacts, num_heads: int, layout: KvLayout, single: bool) -> "RopeKvWriteConfig":
        """`single`: every block gets one token, as in a step of decodes only."""
        G, K = layout.num_kv_heads, layout.head_dim
        found = tuned(cls, "rope_kv_write", gpu, H=num_heads, G=G, K=f"K{K}", fmt=layout.fmt, single=single)
        if found or single:
            return found or cls(_up_to(4, num_heads), _up_to(4, G), 1, num_warps=1)
        tokens = min(32, layout.block_tokens)
        # a tile of half heads gives each thread 16 bytes of bf16 to load at a time
        num_warps = tokens * triton.next_power_of_2(K // 2) // 256
        return cls(_up_to(8, num_heads), _up_to(2, G), tokens, max(1, min(8, num_warps)))

    @classmethod
    def candidates(cls, num_heads: int, num_kv_heads: int, single: bool) -> Iterator["RopeKvWriteConfig"]:
        q_heads = {_up_to(n, num_heads) for n in (2, 4, 8, 16)}
        kv_heads = {_up_to(n, num_kv_heads) for n in (1, 2, 4)}
        rest = [(1, w) for w in (1, 2, 4)] if single else [(16, 4), (32, 4), (32, 8)]
        for q, kv, (tokens, num_warps) in itertools.product(sorted(q_heads), sorted(kv_heads), rest):
            yield cls(q, kv, tokens, num_warps)


def _up_to(most: int, heads: int) -> int:
    return min(most, triton.next_power_of_2(heads))


@triton.jit
def _rows_of(
    row,
    head,
    lane,
    num,
    i_sub,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """A tile's rows as (token, head, lane, mask).  `SINGLE`: heads from `head` on of token `row` at lane `lane`; else
    part `i_sub` of the block's lanes, of which `num` from `lane` on are there; `row` is where lane 0 would be."""
    if SINGLE:
        o_row, o_head, o_lane = row, head + tl.arange(0, TILE), lane
        m_r = o_head < HEADS
    else:
        o_lane = lanes(i_sub, TILE, P, BITS)
        o_row, o_head = row + o_lane, head
        m_r = (o_lane >= lane) & (o_lane < lane + num)
    return o_row, o_head, o_lane, m_r


@triton.jit
def _write_q(
    out,
    qkv,
    channel,
    o_row,
    o_head,
    m_r,
    b_cos,
    b_sin,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    CHANNEL: tl.constexpr,
):
    HALF: tl.constexpr = K // 2
    o_h = tl.arange(0, padded_half(K))[None, :]
    m_x = m_r[:, None] & (o_h < HALF)
    b_x1, b_x2 = halves(qkv + (o_row * STRIDE + o_head * K)[:, None] + o_h, m_x, HALF)
    b_y1, b_y2 = turned(b_x1, b_x2, b_cos, b_sin)
    if CHANNEL:
        o_s = (
            o_row * 0 + o_head // (H // G) * K
        )  # a line for each row of the tile, whichever of the two varies
        b_s1, b_s2 = halves(channel + o_s[:, None] + o_h, m_x, HALF)
        b_y1 *= b_s1
        b_y2 *= b_s2
    p_y = out + ((o_row * H + o_head) * K)[:, None] + o_h
    tl.store(p_y, b_y1.to(out.dtype.element_ty), mask=m_x)
    tl.store(p_y + HALF, b_y2.to(out.dtype.element_ty), mask=m_x)


@triton.jit
def _write_kv(
    codes,
    words,
    qkv,
    channel,
    at_unit,
    row,
    head,
    lane,
    num,
    i_sub,
    b_cos,
    b_sin,
    key_scale,
    value_scale,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    FMT: tl.constexpr,
    BITS: tl.constexpr,
    QMAX: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    STATIC: tl.constexpr,
    TILE: tl.constexpr,
    CHANNEL: tl.constexpr,
    SINGLE: tl.constexpr,
):
    HALF: tl.constexpr = K // 2
    ROW: tl.constexpr = K * BITS // 8
    o_row, o_head, o_lane, m_r = _rows_of(row, head, lane, num, i_sub, G, TILE, P, BITS, SINGLE)
    o_h = tl.arange(0, padded_half(K))[None, :]
    m_h = o_h < HALF
    m_x = m_r[:, None] & m_h
    p_k = qkv + (o_row * STRIDE + (H + o_head) * K)[:, None] + o_h
    b_k1, b_k2 = halves(p_k, m_x, HALF)
    b_k1, b_k2 = turned(b_k1, b_k2, b_cos, b_sin)
    if CHANNEL:
        p_s = channel + (o_row * 0 + o_head * K)[:, None] + o_h
        b_one = tl.full(b_k1.shape, 1.0, tl.float32)
        b_k1 *= tl.div_rn(b_one, tl.load(p_s, mask=m_x, other=1.0))
        b_k2 *= tl.div_rn(b_one, tl.load(p_s + HALF, mask=m_x, other=1.0))
    o_unit = at_unit + o_head * HEAD_UNITS
    if BITS >= 16:
        b_v1, b_v2 = halves(p_k + G * K, m_x, HALF)
        p_c = codes + (o_unit * (128 // BITS) + o_lane * K)[:, None] + o_h
        tl.store(p_c, b_k1.to(codes.dtype.element_ty), mask=m_x)
        tl.store(p_c + HALF, b_k2.to(codes.dtype.element_ty), mask=m_x)
        tl.store(p_c + P * K, b_v1.to(codes.dtype.element_ty), mask=m_x)
        tl.store(p_c + P * K + HALF, b_v2.to(codes.dtype.element_ty), mask=m_x)
    else:
        b_k1, b_k2, b_ks, b_kz = quantized(
            b_k1, b_k2, m_h, key_scale, FMT, QMAX, BIAS if BITS == 4 else 0, STATIC
        )
        p_c = codes + (o_unit * 16 + o_lane * ROW)[:, None] + o_h
        if BITS == 8:
            tl.store(p_c, b_k1.to(tl.int8), mask=m_x)
            tl.store(p_c + HALF, b_k2.to(tl.int8), mask=m_x)
        else:
            tl.store(p_c, ((b_k1 & 15) | (b_k2 << 4)).to(tl.int8), mask=m_x)
        # after the keys are stored: their registers are free
        b_v1, b_v2 = halves(p_k + G * K, m_x, HALF)
        b_v1, b_v2, b_vs, b_vz = quantized(b_v1, b_v2, m_h, value_scale, FMT, QMAX, BIAS, STATIC)
        p_w = words + (o_unit * 4 + 2 * P * ROW // 4 + o_lane)
        tl.store(p_w, pair(b_ks, b_vs), mask=m_r)
        if FMT == "int4z":
            tl.store(p_w + P, pair(b_kz, b_vz), mask=m_r)
        p_v = codes + (o_unit * 16 + P * ROW)
        if SINGLE:
            store_token(p_v[:, None], b_v1.to(tl.int8), o_h, m_x, lane, P, BITS)
            store_token(p_v[:, None], b_v2.to(tl.int8), o_h + HALF, m_x, lane, P, BITS)
        else:
            store_block(p_v, b_v1.to(tl.int8), o_h, m_h, lane, num, i_sub, P, BITS)
            store_block(p_v, b_v2.to(tl.int8), o_h + HALF, m_h, lane, num, i_sub, P, BITS)


@triton.jit(do_not_specialize=["stride_slab", "layer"])
def _rope_kv_write_kernel(
    out,
    codes,
    words,
    qkv,
    cos,
    sin,
    pos,
    slab_table,
    touches,
    channel,
    stride_slab,
    layer,
    key_scale,
    value_scale,
    STRIDE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    FMT: tl.constexpr,
    BITS: tl.constexpr,
    QMAX: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    STATIC: tl.constexpr,
    CHANNEL: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    SINGLE: tl.constexpr,
):
    KV_PARTS: tl.constexpr = (G + KV_HEADS - 1) // KV_HEADS
    PARTS: tl.constexpr = KV_PARTS + (H + Q_HEADS - 1) // Q_HEADS
    i_part = tl.program_id(0) % PARTS
    i_sub = tl.program_id(0) // PARTS % (P // TOKENS)
    i_touch = tl.program_id(0) // (PARTS * (P // TOKENS))
    at_unit, i_row, i_lane, num = touched(touches, slab_table, i_touch, stride_slab, layer, G * HEAD_UNITS)
    if num == 0:
        return
    is_kv = i_part < KV_PARTS
    i_head = tl.where(is_kv, i_part * KV_HEADS, (i_part - KV_PARTS) * Q_HEADS)
    # turns: the block's tokens, all heads at once; or the heads, all tokens at once
    if SINGLE:
        turns = num
    else:
        turns = tl.minimum(tl.where(is_kv, KV_HEADS, Q_HEADS), tl.where(is_kv, G, H) - i_head)
        i_row -= i_lane
        o_row, _, _, m_n = _rows_of(i_row, 0, i_lane, num, i_sub, G, TOKENS, P, BITS, SINGLE)
        o_pos = tl.load(pos + o_row, mask=m_n, other=0)
        b_cos, b_sin = tables(cos, sin, o_pos[:, None], m_n[:, None], K)
    for turn in tl.range(0, turns):
        if SINGLE:
            row, head, lane = i_row + turn, i_head, i_lane + turn
            b_cos, b_sin = tables(cos, sin, tl.load(pos + row), True, K)
        else:
            row, head, lane = i_row, i_head + turn, i_lane
        if is_kv:
            _write_kv(
                codes,
                words,
                qkv,
                channel,
                at_unit,
                row,
                head,
                lane,
                num,
                i_sub,
                b_cos,
                b_sin,
                key_scale,
                value_scale,
                STRIDE,
                H,
                G,
                K,
                P,
                FMT,
                BITS,
                QMAX,
                BIAS,
                HEAD_UNITS,
                STATIC,
                KV_HEADS if SINGLE else TOKENS,
                CHANNEL,
                SINGLE,
            )
        else:
            TILE: tl.constexpr = Q_HEADS if SINGLE else TOKENS
            o_row, o_head, _, m_r = _rows_of(row, head, lane, num, i_sub, H, TILE, P, BITS, SINGLE)
            _write_q(out, qkv, channel, o_row, o_head, m_r, b_cos, b_sin, STRIDE, H, G, K, CHANNEL)


def rope_kv_write_triton(
    qkv_TX: Tensor,
    cos_MK: Tensor,
    sin_MK: Tensor,
    pool: Tensor,
    step: KvStep,
    layer: int,
    scales: KvScales = NO_SCALES,
    config: RopeKvWriteConfig | None = None,
) -> Tensor:
    lay, work = step.layout, step.work
    assert work is not None, "this KvStep was built for the CPU path"
    T, G, K = qkv_TX.shape[0], lay.num_kv_heads, lay.head_dim
    H = qkv_TX.shape[1] // K - 2 * G
    # as many blocks as tokens: one each, but for padding (if that made up for shared blocks, these would only take longer)
    single = len(work.touch_X4) >= T
    c = config or RopeKvWriteConfig.pick(gpu_facts(pool.device), H, lay, single)
    tokens = lay.block_tokens if single else min(c.tokens, lay.block_tokens)
    q_THK = torch.empty(T, H, K, dtype=qkv_TX.dtype, device=qkv_TX.device)
    channel, static = scales.channel_GK, scales.static
    assert static is None or lay.fmt in STATIC_FORMATS, (
        f"static scales are for {STATIC_FORMATS}, not {lay.fmt}"
    )
    key_scale, value_scale = (min(max(float(s), MIN_SCALE), MAX_SCALE) for s in static or (1.0, 1.0))
    launch(
        _rope_kv_write_kernel,
        (len(work.touch_X4) * (lay.block_tokens // tokens) * (cdiv(G, c.kv_heads) + cdiv(H, c.q_heads)),),
        q_THK,
        pool.view(FLOAT_DTYPES.get(lay.fmt, torch.int8)),
        pool.view(torch.int32),
        qkv_TX,
        cos_MK,
        sin_MK,
        work.pos_T,
        step.slab_table_SL,
        work.touch_X4,
        cos_MK if channel is None else channel,
        step.slab_table_SL.stride(0),
        layer,
        key_scale,
        value_scale,
        STRIDE=qkv_TX.stride(0),
        H=H,
        G=G,
        K=K,
        P=lay.block_tokens,
        FMT=lay.fmt,
        BITS=lay.bits,
        QMAX=QMAX.get(lay.fmt, 1),
        BIAS=BIAS.get(lay.fmt, 0),
        HEAD_UNITS=lay.head_bytes // 16,
        STATIC=static is not None,
        CHANNEL=channel is not None,
        Q_HEADS=c.q_heads,
        KV_HEADS=c.kv_heads,
        TOKENS=tokens,
        SINGLE=single,
        num_warps=c.num_warps,
    )
    return q_THK
