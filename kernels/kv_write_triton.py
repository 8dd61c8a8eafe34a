"""The Triton path of rope_kv_write: one program a token for q, one a written block and KV head for k and v.

All of a step's tokens in a block belong to one program: two tokens of a block share the bytes of V's nibbles.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_layout import MAX_SCALE, MIN_SCALE, QMAX, SLOT_BITS
from kernels.kv_read import FLOAT_DTYPES
from kernels.kv_step import KvStep

STATIC_FORMATS = ("fp8", "int8")


class KvScales(NamedTuple):
    """What a checkpoint may bring.  `channel_GK`: fp32; after rotation keys are divided and queries multiplied by it,
    which leaves their products.  `static`: constant scales of keys and of values, in place of a token's own."""

    channel_GK: Tensor | None = None
    static: tuple[float, float] | None = None


NO_SCALES = KvScales()


@dataclass(frozen=True)
class RopeKvWriteConfig:
    """Tiles: half a head (rope works on halves) and all query heads of a token."""

    block_half: int
    block_h: int
    num_warps: int = 8

    @classmethod
    def pick(cls, head_dim: int, num_heads: int) -> "RopeKvWriteConfig":
        return cls(max(1, triton.next_power_of_2(head_dim // 2)), triton.next_power_of_2(num_heads))


@triton.jit
def _rope_q_kernel(
    out,
    qkv,
    cos,
    sin,
    pos,
    stride_qkv_t,
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = K // 2
    o_h = tl.arange(0, BLOCK_H)[:, None]
    o_d = tl.arange(0, BLOCK_HALF)[None, :]
    m_d = o_d < HALF
    m_hd = (o_h < H) & m_d
    i_pos = tl.load(pos + i_t).to(tl.int64)
    p_x = qkv + i_t * stride_qkv_t + o_h * K + o_d
    b_x1 = tl.load(p_x, mask=m_hd, other=0.0).to(tl.float32)
    b_x2 = tl.load(p_x + HALF, mask=m_hd, other=0.0).to(tl.float32)
    p_cos = cos + i_pos * K + o_d
    p_sin = sin + i_pos * K + o_d
    b_y1 = b_x1 * tl.load(p_cos, mask=m_d, other=0.0) - b_x2 * tl.load(p_sin, mask=m_d, other=0.0)
    b_y2 = b_x2 * tl.load(p_cos + HALF, mask=m_d, other=0.0) + b_x1 * tl.load(
        p_sin + HALF, mask=m_d, other=0.0
    )
    p_y = out + (i_t * H + o_h) * K + o_d
    tl.store(p_y, b_y1.to(out.dtype.element_ty), mask=m_hd)
    tl.store(p_y + HALF, b_y2.to(out.dtype.element_ty), mask=m_hd)


@triton.jit
def _scale_of(b_absmax, QMAX: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    b_qmax = tl.full(b_absmax.shape, QMAX, tl.float32)
    return tl.minimum(tl.maximum(tl.div_rn(b_absmax, b_qmax), LEAST), MOST).to(tl.float16)


@triton.jit
def _codes_of(b_x, b_scale, QMAX: tl.constexpr):
    b_inv = tl.div_rn(tl.full(b_scale.shape, 1.0, tl.float32), b_scale.to(tl.float32))
    b_c = (b_x * b_inv[:, None] + 12582912.0) - 12582912.0  # round half to even: 1.5 * 2^23
    return tl.minimum(tl.maximum(b_c, -QMAX), QMAX).to(tl.int32)


@triton.jit
def _rotated_key(qkv_k, cos, sin, pos, o_row, m_n, stride_qkv_t, K: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The two halves of the keys of rows o_row, fp32; zero where not m_n."""
    HALF: tl.constexpr = K // 2
    o_h = tl.arange(0, BLOCK_HALF)
    m_nh = m_n[:, None] & (o_h < HALF)[None, :]
    o_cos = tl.load(pos + o_row, mask=m_n, other=0).to(tl.int64)[:, None] * K + o_h[None, :]
    p_k = qkv_k + o_row[:, None] * stride_qkv_t + o_h[None, :]
    b_x1 = tl.load(p_k, mask=m_nh, other=0.0).to(tl.float32)
    b_x2 = tl.load(p_k + HALF, mask=m_nh, other=0.0).to(tl.float32)
    b_c1 = tl.load(cos + o_cos, mask=m_nh, other=0.0)
    b_s1 = tl.load(sin + o_cos, mask=m_nh, other=0.0)
    b_c2 = tl.load(cos + HALF + o_cos, mask=m_nh, other=0.0)
    b_s2 = tl.load(sin + HALF + o_cos, mask=m_nh, other=0.0)
    return b_x1 * b_c1 - b_x2 * b_s1, b_x2 * b_c2 + b_x1 * b_s2


@triton.jit
def _value_codes(
    qkv_v,
    p_scale,
    o_row,
    o_lane,
    m_n,
    stride_qkv_t,
    K: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    QMAX: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """Codes of the values of rows o_row; stores their scales in the high halves of lanes o_lane."""
    o_d = tl.arange(0, 2 * BLOCK_HALF)
    p_v = qkv_v + o_row[:, None] * stride_qkv_t + o_d[None, :]
    b_v = tl.load(p_v, mask=m_n[:, None] & (o_d < K)[None, :], other=0.0).to(tl.float32)
    b_scale = _scale_of(tl.max(tl.abs(b_v), 1), QMAX, LEAST, MOST)
    tl.store(p_scale + 2 * o_lane + 1, b_scale.to(tl.int16, bitcast=True), mask=m_n)
    return _codes_of(b_v, b_scale, QMAX)


@triton.jit
def _store_floats(p_block, b_k1, b_k2, qkv_v, o_row, m_n, stride_qkv_t, K: tl.constexpr, P: tl.constexpr):
    """Keys and values, both row-major."""
    BLOCK_HALF: tl.constexpr = b_k1.shape[1]
    DTYPE: tl.constexpr = p_block.dtype.element_ty
    o_n = tl.arange(0, P)
    o_h = tl.arange(0, BLOCK_HALF)
    o_d = tl.arange(0, 2 * BLOCK_HALF)
    m_nh = m_n[:, None] & (o_h < K // 2)[None, :]
    m_nd = m_n[:, None] & (o_d < K)[None, :]
    p_k = p_block + o_n[:, None] * K + o_h[None, :]
    tl.store(p_k, b_k1.to(DTYPE), mask=m_nh)
    tl.store(p_k + K // 2, b_k2.to(DTYPE), mask=m_nh)
    b_v = tl.load(qkv_v + o_row[:, None] * stride_qkv_t + o_d[None, :], mask=m_nd, other=0.0)
    tl.store(p_block + P * K + o_n[:, None] * K + o_d[None, :], b_v.to(DTYPE), mask=m_nd)


@triton.jit
def _store_key_codes(
    p_key,
    p_scale,
    b_k1,
    b_k2,
    m_n,
    K: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
    QMAX: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    HALF: tl.constexpr = K // 2
    o_n = tl.arange(0, P)
    o_h = tl.arange(0, b_k1.shape[1])
    m_nh = m_n[:, None] & (o_h < HALF)[None, :]
    b_absmax = tl.maximum(tl.max(tl.abs(b_k1), 1), tl.max(tl.abs(b_k2), 1))
    b_scale = _scale_of(b_absmax, QMAX, LEAST, MOST)
    tl.store(p_scale + 2 * o_n, b_scale.to(tl.int16, bitcast=True), mask=m_n)
    b_q1 = _codes_of(b_k1, b_scale, QMAX)
    b_q2 = _codes_of(b_k2, b_scale, QMAX)
    if BITS == 8:
        p_k = p_key + o_n[:, None] * K + o_h[None, :]
        tl.store(p_k, b_q1.to(tl.int8), mask=m_nh)
        tl.store(p_k + HALF, b_q2.to(tl.int8), mask=m_nh)
    else:
        b_byte = (b_q1 + 8) | ((b_q2 + 8) << 4)
        tl.store(p_key + o_n[:, None] * HALF + o_h[None, :], b_byte.to(tl.int8), mask=m_nh)


@triton.jit(do_not_specialize=["layer"])
def _kv_write_kernel(
    codes,
    halves,
    qkv,
    cos,
    sin,
    pos,
    slab_table,
    touches,
    stride_qkv_t,
    stride_slab,
    layer,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    QMAX: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """`codes`: the pool in the format's type; `halves`: as int16, for the scales."""
    p_touch = touches + tl.program_id(0) * 4
    i_g = tl.program_id(1)
    i_block = tl.load(p_touch)
    i_lane = tl.load(p_touch + 1)
    i_stop = i_lane + tl.load(p_touch + 2)
    i_row = tl.load(p_touch + 3) - i_lane  # the row that lane 0 would have
    i_slot = (i_block & ((1 << SLOT_BITS) - 1)).to(tl.int64)
    at = tl.load(slab_table + (i_block >> SLOT_BITS).to(tl.int64) * stride_slab + layer)
    at += (i_slot * G + i_g) * HEAD_BYTES

    CODE_BYTES: tl.constexpr = P * K * BITS // 8  # of the keys, and of the values
    o_n = tl.arange(0, P)
    m_n = (o_n >= i_lane) & (o_n < i_stop)
    o_row = (i_row + o_n).to(tl.int64)
    qkv_k = qkv + (H + i_g) * K
    qkv_v = qkv_k + G * K
    b_k1, b_k2 = _rotated_key(qkv_k, cos, sin, pos, o_row, m_n, stride_qkv_t, K, BLOCK_HALF)
    if BITS >= 16:
        _store_floats(codes + at // (BITS // 8), b_k1, b_k2, qkv_v, o_row, m_n, stride_qkv_t, K, P)
    else:
        p_scale = halves + (at + 2 * CODE_BYTES) // 2
        _store_key_codes(codes + at, p_scale, b_k1, b_k2, m_n, K, P, BITS, QMAX, LEAST, MOST)
        p_value = codes + at + CODE_BYTES
        o_d = tl.arange(0, 2 * BLOCK_HALF)
        m_d = (o_d < K)[None, :]
        if BITS == 8:
            b_v = _value_codes(
                qkv_v, p_scale, o_row, o_n, m_n, stride_qkv_t, K, BLOCK_HALF, QMAX, LEAST, MOST
            )
            tl.store(
                p_value + o_d[None, :] * P + o_n[:, None], (b_v + 128).to(tl.int8), mask=m_n[:, None] & m_d
            )
        else:
            o_lo = tl.arange(0, P // 2)
            o_hi = o_lo + P // 2
            m_lo = (o_lo >= i_lane) & (o_lo < i_stop)
            m_hi = (o_hi >= i_lane) & (o_hi < i_stop)
            r_lo = (i_row + o_lo).to(tl.int64)
            r_hi = (i_row + o_hi).to(tl.int64)
            b_lo = _value_codes(
                qkv_v, p_scale, r_lo, o_lo, m_lo, stride_qkv_t, K, BLOCK_HALF, QMAX, LEAST, MOST
            )
            b_hi = _value_codes(
                qkv_v, p_scale, r_hi, o_hi, m_hi, stride_qkv_t, K, BLOCK_HALF, QMAX, LEAST, MOST
            )
            # a nibble that this step does not write keeps its token
            m_v = (m_lo | m_hi)[:, None] & m_d
            p_v = p_value + o_d[None, :] * (P // 2) + o_lo[:, None]
            b_held = tl.load(p_v, mask=m_v, other=0).to(tl.int32)
            b_low = tl.where(m_lo[:, None], b_lo + 8, b_held & 15)
            b_high = tl.where(m_hi[:, None], b_hi + 8, (b_held >> 4) & 15)
            tl.store(p_v, (b_low | (b_high << 4)).to(tl.int8), mask=m_v)


def rope_kv_write_triton(
    qkv_TX: Tensor,
    cos_MK: Tensor,
    sin_MK: Tensor,
    pool: Tensor,
    step: KvStep,
    layer: int,
    scales: KvScales = NO_SCALES,
) -> Tensor:
    lay, work = step.layout, step.work
    num_heads = qkv_TX.shape[1] // lay.head_dim - 2 * lay.num_kv_heads
    assert work is not None, "this KvStep was built for the CPU path"
    T, G, K = qkv_TX.shape[0], lay.num_kv_heads, lay.head_dim
    config = RopeKvWriteConfig.pick(K, num_heads)
    q_THK = torch.empty(T, num_heads, K, dtype=qkv_TX.dtype, device=qkv_TX.device)
    tables = (qkv_TX, cos_MK, sin_MK, work.pos_T)
    _rope_q_kernel[(T,)](
        q_THK,
        *tables,
        qkv_TX.stride(0),
        H=num_heads,
        K=K,
        BLOCK_H=config.block_h,
        BLOCK_HALF=config.block_half,
        num_warps=config.num_warps,
    )
    _kv_write_kernel[(len(work.touch_X4), G)](
        pool.view(FLOAT_DTYPES.get(lay.fmt, torch.int8)),
        pool.view(torch.int16),
        *tables,
        step.slab_table_SL,
        work.touch_X4,
        qkv_TX.stride(0),
        step.slab_table_SL.stride(0),
        layer,
        H=num_heads,
        G=G,
        K=K,
        P=lay.block_tokens,
        BITS=8 * lay.row_bytes // K,
        HEAD_BYTES=lay.head_bytes,
        BLOCK_HALF=config.block_half,
        SLOT_BITS=SLOT_BITS,
        QMAX=QMAX.get(lay.fmt, 1),
        LEAST=MIN_SCALE,
        MOST=MAX_SCALE,
        num_warps=config.num_warps,
    )
    return q_THK
