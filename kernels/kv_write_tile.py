"""Pieces of rope_kv_write in the registers of a Triton program: rotation, quantization, and V's bytes in a block.

A tile's rows are tokens of one head or heads of one token, its columns the dims of half a head: rotation pairs the
halves, a byte of a 4 bit key holds a dim of each.  Codes stay in the low bits of int32 until they are stored.
"""

import triton
import triton.language as tl

from kernels.kv_layout import MAX_SCALE, MIN_SCALE, SLOT_BITS, SLOT_MASK
from kernels.quant_rows import larger_or_nan, smaller_or_nan

_LEAST, _MOST = tl.constexpr(MIN_SCALE), tl.constexpr(MAX_SCALE)
_SLOT_BITS, _SLOT_MASK = tl.constexpr(SLOT_BITS), tl.constexpr(SLOT_MASK)


@triton.constexpr_function
def padded_half(head_dim):
    return triton.next_power_of_2(head_dim // 2)


@triton.jit
def touched(touches, slab_table, i_touch, stride_slab, layer, BLOCK_UNITS: tl.constexpr):
    """A line of the table: where the block is, the row of its first new token, that token's lane, how many there are."""
    p_touch = touches + i_touch.to(tl.int64) * 4
    i_block = tl.load(p_touch)
    num = tl.load(p_touch + 2)
    p_at = slab_table + (i_block >> _SLOT_BITS).to(tl.int64) * stride_slab + layer
    i_at = tl.load(p_at, mask=num > 0, other=0)
    i_slot = (i_block & _SLOT_MASK).to(tl.int64)
    i_row = tl.load(p_touch + 3).to(tl.int64)
    return (i_at >> 4) + i_slot * BLOCK_UNITS, i_row, tl.load(p_touch + 1), num


@triton.jit
def lanes(i_sub, TILE: tl.constexpr, P: tl.constexpr, BITS: tl.constexpr):
    """The block's lanes in part i_sub; 4 bit: as many of its first half, then those that share their bytes of V."""
    ROWS: tl.constexpr = TILE // 2 if BITS == 4 else TILE
    o_r = tl.arange(0, TILE)
    return i_sub * ROWS + o_r % ROWS + o_r // ROWS * (P // 2)


@triton.jit
def halves(p_x, m_x, HALF: tl.constexpr):
    b_x1 = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    return b_x1, tl.load(p_x + HALF, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def turned(b_x1, b_x2, b_cos, b_sin):
    # fused by name: a token is rotated to the same bits whatever tile it is in
    return tl.fma(b_x1, b_cos, -(b_x2 * b_sin)), tl.fma(b_x2, b_cos, b_x1 * b_sin)


@triton.jit
def quantized(
    b_x1, b_x2, m_h, static, FMT: tl.constexpr, QMAX: tl.constexpr, BIAS: tl.constexpr, STATIC: tl.constexpr
):
    """Of rows whose halves are b_x1 and b_x2: both halves' codes + BIAS in the low bits of int32; scales, zeros (fp16).
    A row that holds NaN has that as its scale; beyond what fp16 scales reach, codes saturate."""
    ZERO: tl.constexpr = FMT == "int4z"
    LOW: tl.constexpr = 0.0 if ZERO else -QMAX
    if ZERO:
        b_low = tl.reduce(tl.where(m_h, smaller_or_nan(b_x1, b_x2), float("inf")), 1, smaller_or_nan)
        b_high = tl.reduce(tl.where(m_h, larger_or_nan(b_x1, b_x2), float("-inf")), 1, larger_or_nan)
        b_most = b_high - b_low
        b_zero = smaller_or_nan(larger_or_nan(b_low, -_MOST), _MOST).to(tl.float16)
        b_x1 -= b_zero.to(tl.float32)[:, None]
        b_x2 -= b_zero.to(tl.float32)[:, None]
    else:
        b_most = tl.reduce(larger_or_nan(tl.abs(b_x1), tl.abs(b_x2)), 1, larger_or_nan)
        b_zero = tl.zeros(b_most.shape, tl.float16)
    b_one = tl.full(b_most.shape, 1.0, tl.float32)
    if STATIC:
        b_scale = (b_one * static).to(tl.float16)
    else:
        b_scale = tl.div_rn(b_most, b_one * QMAX)
        b_scale = smaller_or_nan(larger_or_nan(b_scale, _LEAST), _MOST).to(tl.float16)
    b_inverse = tl.div_rn(b_one, b_scale.to(tl.float32))[:, None]
    b_x1 = smaller_or_nan(larger_or_nan(b_x1 * b_inverse, LOW), QMAX)
    b_x2 = smaller_or_nan(larger_or_nan(b_x2 * b_inverse, LOW), QMAX)
    if FMT == "fp8":
        b_q1 = b_x1.to(tl.float8e4nv).to(tl.int8, bitcast=True).to(tl.int32)
        b_q2 = b_x2.to(tl.float8e4nv).to(tl.int8, bitcast=True).to(tl.int32)
    else:
        # 1.5 * 2^23: the sum is rounded half to even, to an integer that fills the low bits
        b_q1 = (b_x1 + (12582912.0 + BIAS)).to(tl.int32, bitcast=True)
        b_q2 = (b_x2 + (12582912.0 + BIAS)).to(tl.int32, bitcast=True)
    return b_q1, b_q2, b_scale, b_zero


@triton.jit
def pair(b_key, b_value):
    """Two fp16 in an int32, the key's in the low half."""
    b_k = b_key.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return b_k | (b_value.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def tables(cos, sin, o_pos, m_r, K: tl.constexpr):
    """Half a line each, the other half is the same: of one position, [1, dims], or of many, [rows, dims]."""
    o_h = tl.arange(0, padded_half(K))[None, :]
    p_o = o_pos.to(tl.int64) * K + o_h
    m_x = m_r & (o_h < K // 2)
    return tl.load(cos + p_o, mask=m_x, other=0.0), tl.load(sin + p_o, mask=m_x, other=0.0)


@triton.jit
def merge(p_v, b_lo, b_hi, m_lo, m_hi, m_v):
    """4 bit: the two tokens of each byte; a nibble that is not written keeps its token."""
    b_held = tl.load(p_v, mask=m_v, other=0)
    b_low = tl.where(m_lo, b_lo, b_held) & 15
    b_high = tl.where(m_hi, b_hi, b_held >> 4) & 15
    tl.store(p_v, b_low | (b_high << 4), mask=m_v)


@triton.jit
def store_token(p_v, b_v, o_d, m_v, i_lane, P: tl.constexpr, BITS: tl.constexpr):
    """Codes of one token's values, [heads, dims]: every byte goes to a line of its own."""
    p_v += o_d * (P * BITS // 8)
    if BITS == 8:
        tl.store(p_v + i_lane, b_v, mask=m_v)
    else:
        m_lo = i_lane < P // 2
        merge(p_v + i_lane % (P // 2), b_v, b_v, m_lo, i_lane >= P // 2, m_v)


@triton.jit
def store_block(p_v, b_v, o_d, m_d, i_lane, num, i_sub, P: tl.constexpr, BITS: tl.constexpr):
    """Codes of the values of some lanes, [tokens, dims], stored along the lanes: 8 or 16 bytes a thread if the block
    is full, single bytes if not (a mask built outside the branch would make the same of both)."""
    if BITS == 8:
        TILE: tl.constexpr = b_v.shape[0]
        o_n = i_sub * TILE + tl.arange(0, TILE)[:, None]
        p_v += o_n + o_d * P
        if num == P:
            tl.store(p_v, b_v, mask=m_d)
        else:
            o_n -= i_lane
            tl.store(p_v, b_v, mask=(o_n >= 0) & (o_n < num) & m_d)
    else:
        HALF_P: tl.constexpr = P // 2
        ROWS: tl.constexpr = b_v.shape[0] // 2
        b_lo, b_hi = tl.split(tl.permute(tl.reshape(b_v, [2, ROWS, b_v.shape[1]]), [1, 2, 0]))
        o_n = i_sub * ROWS + tl.arange(0, ROWS)[:, None]
        p_v += o_n + o_d * HALF_P
        if num == P:
            tl.store(p_v, (b_lo & 15) | (b_hi << 4), mask=m_d)
        else:
            o_n -= i_lane
            m_lo = (o_n >= 0) & (o_n < num)
            m_hi = (o_n >= -HALF_P) & (o_n < num - HALF_P)
            merge(p_v, b_lo, b_hi, m_lo, m_hi, (m_lo | m_hi) & m_d)
