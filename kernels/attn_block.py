"""One block of keys and values against a tile of query columns, in the registers of a Triton program.

Operands are swapped: scores are [tokens, columns] = K q, the accumulator is [dims, columns] = V^T p, so that few columns
waste little of a tensor core.  Softmax state is fp32 in base 2: p = 2^(base * (score - max)), base > 0 a number a column;
a masked score is -1e30, and the maximum begins far above it: fma(mask, base, -round(mask * base)) is no 0, but +-1e21.
The sum of p stays a tile until the end: adding its rows up costs shuffles.
Addresses are in units of 16 bytes.  A lane past the end holds anything, NaN too; scales are loaded as 0 there.

Tuples: state (accumulator, max, sum of p, bias, zeros), queries (attn_queries), lanes (first key of the block, end of
the keys, last key that each column sees), SIZES (K, padded K, P).
"""

import triton
import triton.language as tl

from kernels.attn_unpack import bytes_to_fp16, nibbles_to_fp16, nibbles_to_int8, scale_pair

# p counts 2^SHIFT times: p * scale, which is rounded to fp16, then stays in its normal range for small p; it overflows
# for values beyond 2^16 * 448 / 2^SHIFT (8 bit) and 2^16 * 7 / 2^SHIFT (4 bit)
SHIFT = {"fp8": 6, "int8": 6, "int4": 4, "int4z": 4}


@triton.jit
def _masked(b_s, o_n, lanes, ONE_TOKEN: tl.constexpr):
    if ONE_TOKEN:
        b_s = tl.where((o_n < lanes[1])[:, None], b_s, -1.0e30)
    else:
        b_s = tl.where(o_n[:, None] <= lanes[2][None, :], b_s, -1.0e30)
    return b_s


@triton.jit
def _scaled(b_s, b_ks, o_n, lanes, ONE_TOKEN: tl.constexpr):
    """Masked scores of integer products: finite, so where all columns see the same keys the mask can be an addend."""
    b_s = b_s.to(tl.float32) * b_ks[:, None]
    if ONE_TOKEN:
        b_s += tl.where(o_n < lanes[1], 0.0, -1.0e30)[:, None]
    else:
        b_s = _masked(b_s, o_n, lanes, False)
    return b_s


@triton.jit
def _attend(state, b_s, b_v, b_base):
    """Scores and values as the dot products take them."""
    b_acc, b_max, b_sum, b_bias, b_zero = state
    b_new = tl.maximum(b_max, tl.max(b_s, 0))
    b_old = tl.exp2((b_max - b_new) * b_base)
    b_p = tl.exp2(tl.fma(b_s, b_base[None, :], -(b_new * b_base)[None, :]))
    b_sum = b_sum * b_old[None, :] + b_p
    b_acc = tl.dot(b_v, b_p.to(b_v.dtype), b_acc * b_old[None, :], input_precision="ieee")
    return b_acc, b_new, b_sum, b_bias, b_zero


@triton.jit
def attend_floats(
    state, queries, codes, unit, lanes, SIZES: tl.constexpr, BITS: tl.constexpr, ONE_TOKEN: tl.constexpr
):
    """A block of 16 or 32 bit, products in the type of the queries."""
    K: tl.constexpr = SIZES[0]
    P: tl.constexpr = SIZES[2]
    b_q = queries[0]
    o_n = tl.arange(0, P)
    o_d = tl.arange(0, SIZES[1])
    m_d = o_d < K
    p_c = codes + unit * (128 // BITS)
    b_k = tl.load(p_c + o_n[:, None] * K + o_d[None, :], mask=m_d[None, :], other=0.0)
    # V row-major, loaded as its transpose: tl.trans of a loaded tile leaves the asynchronous copies
    m_v = m_d[:, None] & (lanes[0] + o_n < lanes[1])[None, :]
    b_v = tl.load(p_c + P * K + o_n[None, :] * K + o_d[:, None], mask=m_v, other=0.0)
    b_s = tl.dot(b_k.to(b_q.dtype), b_q, input_precision="ieee")
    b_s = _masked(b_s, lanes[0] + o_n, lanes, ONE_TOKEN)
    return _attend(state, b_s, b_v.to(b_q.dtype), queries[6])


@triton.jit
def attend_bytes(
    state,
    queries,
    codes,
    scales,
    unit,
    lanes,
    SIZES: tl.constexpr,
    FP8: tl.constexpr,
    DIGITS: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """A block of 8 bit.  The bias of values, as often as they were counted, is one more row of the product with p."""
    K: tl.constexpr = SIZES[0]
    P: tl.constexpr = SIZES[2]
    b_acc, b_max, b_sum, b_bias, b_zero = state
    b_base = queries[6]
    o_n = tl.arange(0, P)
    o_d = tl.arange(0, SIZES[1])
    m_d = o_d < K
    o_pos = lanes[0] + o_n
    p_c = codes + unit * 16
    b_pair = tl.load(scales + unit * 4 + 2 * P * K // 4 + o_n, mask=o_pos < lanes[1], other=0)
    b_k = tl.load(p_c + o_n[:, None] * K + o_d[None, :], mask=m_d[None, :], other=0)
    b_v = tl.load(p_c + P * K + o_d[:, None] * P + o_n[None, :], mask=m_d[:, None], other=0)
    b_ks, b_vs = scale_pair(b_pair)
    if FP8:
        b_s = tl.dot(b_k.to(tl.float8e4nv, bitcast=True).to(tl.float16), queries[0]) * b_ks[:, None]
        b_s = _masked(b_s, o_pos, lanes, ONE_TOKEN)
        # NaN past the end becomes 448, which p = 0 silences
        b_v16 = b_v.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        b_v16 = tl.minimum(b_v16, tl.full(b_v.shape, 448.0, tl.float16))
    else:
        b_s = tl.dot(b_k, queries[0], out_dtype=tl.int32)
        if DIGITS == 2:
            b_s = tl.dot(b_k, queries[1], b_s << 8, out_dtype=tl.int32)
        b_s = _scaled(b_s, b_ks, o_pos, lanes, ONE_TOKEN)
        b_v16 = bytes_to_fp16(b_v)
    b_new = tl.maximum(b_max, tl.max(b_s, 0))
    b_old = tl.exp2((b_max - b_new) * b_base)
    b_p = tl.exp2(tl.fma(b_s, b_base[None, :], (SHIFT - b_new * b_base)[None, :]))
    b_sum = b_sum * b_old[None, :] + b_p
    b_p16 = (b_p * b_vs[:, None]).to(tl.float16)
    b_acc = tl.dot(b_v16, b_p16, b_acc * b_old[None, :])
    if not FP8:
        b_one = bytes_to_fp16(tl.full([16, P], -128, tl.int8))
        b_bias = tl.dot(b_one, b_p16, b_bias * b_old[None, :])
    return b_acc, b_new, b_sum, b_bias, b_zero


@triton.jit
def _dot_nibbles(b_k, queries, DIGITS: tl.constexpr):
    b_qh0, b_ql0, b_qh1, b_ql1, b_start, _, _ = queries
    b_k0, b_k1 = nibbles_to_int8(b_k)
    b_start = tl.zeros([b_k.shape[0], b_start.shape[0]], tl.int32) + b_start[None, :]
    if DIGITS == 2:
        b_s = tl.dot(b_k1, b_qh1, tl.dot(b_k0, b_qh0, out_dtype=tl.int32), out_dtype=tl.int32)
        b_t = tl.dot(b_k1, b_ql1, tl.dot(b_k0, b_ql0, b_start, out_dtype=tl.int32), out_dtype=tl.int32)
        b_s = (b_s << 8) + b_t
    else:
        b_s = tl.dot(b_k1, b_qh1, tl.dot(b_k0, b_qh0, b_start, out_dtype=tl.int32) << 4, out_dtype=tl.int32)
    return b_s


@triton.jit
def attend_nibbles(
    state,
    queries,
    codes,
    scales,
    unit,
    lanes,
    SIZES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    DIGITS: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """A block of 4 bit: tokens t (lo) and t + P/2 (hi) share V's bytes, dims d and d + K/2 share K's."""
    K: tl.constexpr = SIZES[0]
    P: tl.constexpr = SIZES[2]
    HALF_P: tl.constexpr = P // 2
    HALF_K: tl.constexpr = K // 2
    b_acc, b_max, b_sum, b_bias, b_zero = state
    b_base = queries[6]
    o_l = tl.arange(0, HALF_P)
    o_h = tl.arange(0, SIZES[1] // 2)
    o_d = tl.arange(0, SIZES[1])
    o_lo = lanes[0] + o_l
    o_hi = o_lo + HALF_P
    p_c = codes + unit * 16
    p_s = scales + unit * 4 + P * K // 4 + o_l
    p_k = p_c + o_l[:, None] * HALF_K + o_h[None, :]
    p_v = p_c + P * HALF_K + o_d[:, None] * HALF_P + o_l[None, :]
    b_slo = tl.load(p_s, mask=o_lo < lanes[1], other=0)
    b_shi = tl.load(p_s + HALF_P, mask=o_hi < lanes[1], other=0)
    b_klo = tl.load(p_k, mask=(o_h < HALF_K)[None, :], other=0)
    b_khi = tl.load(p_k + HALF_P * HALF_K, mask=(o_h < HALF_K)[None, :], other=0)
    b_v = tl.load(p_v, mask=(o_d < K)[:, None], other=0)
    b_kslo, b_vslo = scale_pair(b_slo)
    b_kshi, b_vshi = scale_pair(b_shi)
    b_lo = _scaled(_dot_nibbles(b_klo, queries, DIGITS), b_kslo, o_lo, lanes, ONE_TOKEN)
    b_hi = _scaled(_dot_nibbles(b_khi, queries, DIGITS), b_kshi, o_hi, lanes, ONE_TOKEN)
    if HAS_ZERO:
        b_kzlo, b_vzlo = scale_pair(tl.load(p_s + P, mask=o_lo < lanes[1], other=0))
        b_kzhi, b_vzhi = scale_pair(tl.load(p_s + P + HALF_P, mask=o_hi < lanes[1], other=0))
        b_lo += b_kzlo[:, None] * queries[5][None, :]
        b_hi += b_kzhi[:, None] * queries[5][None, :]
    b_new = tl.maximum(b_max, tl.max(tl.maximum(b_lo, b_hi), 0))
    b_old = tl.exp2((b_max - b_new) * b_base)
    b_off = (SHIFT - b_new * b_base)[None, :]
    b_lo = tl.exp2(tl.fma(b_lo, b_base[None, :], b_off))
    b_hi = tl.exp2(tl.fma(b_hi, b_base[None, :], b_off))
    b_sum = b_sum * b_old[None, :] + b_lo + b_hi
    if HAS_ZERO:
        b_zero = b_zero * b_old[None, :] + b_lo * b_vzlo[:, None] + b_hi * b_vzhi[:, None]
    b_lo = (b_lo * b_vslo[:, None]).to(tl.float16)
    b_hi = (b_hi * (b_vshi * 0.0625)[:, None]).to(tl.float16)  # high nibbles count sixteen times
    b_v0, b_v1 = nibbles_to_fp16(b_v)
    b_acc = tl.dot(b_v1, b_hi, tl.dot(b_v0, b_lo, b_acc * b_old[None, :]))
    b_one0, b_one1 = nibbles_to_fp16(tl.full([16, HALF_P], 0 if HAS_ZERO else -120, tl.int8))
    b_bias = tl.dot(b_one1, b_hi, tl.dot(b_one0, b_lo, b_bias * b_old[None, :]))
    return b_acc, b_new, b_sum, b_bias, b_zero


@triton.jit
def attend_codes(
    state,
    queries,
    codes,
    scales,
    unit,
    lanes,
    SIZES: tl.constexpr,
    FMT: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
):
    """A block of 8 or 4 bit, dequantized to fp32: for models whose floats are fp32, not for speed."""
    K: tl.constexpr = SIZES[0]
    P: tl.constexpr = SIZES[2]
    o_n = tl.arange(0, P)
    o_d = tl.arange(0, SIZES[1])
    m_d = o_d < K
    m_n = lanes[0] + o_n < lanes[1]
    p_c = codes + unit * 16
    if FMT == "int4" or FMT == "int4z":
        BIAS: tl.constexpr = 8 if FMT == "int4" else 0
        p_s = scales + unit * 4 + P * K // 4 + o_n
        p_k = p_c + o_n[:, None] * (K // 2) + (o_d % (K // 2))[None, :]
        p_v = p_c + P * K // 2 + o_d[:, None] * (P // 2) + (o_n % (P // 2))[None, :]
        b_k = tl.load(p_k, mask=m_d[None, :], other=0).to(tl.int32) >> (o_d // (K // 2) * 4)[None, :]
        b_v = tl.load(p_v, mask=m_d[:, None], other=0).to(tl.int32) >> (o_n // (P // 2) * 4)[None, :]
        b_k = ((b_k & 15) - BIAS).to(tl.float32)
        b_v = ((b_v & 15) - BIAS).to(tl.float32)
    else:
        p_s = scales + unit * 4 + 2 * P * K // 4 + o_n
        b_k = tl.load(p_c + o_n[:, None] * K + o_d[None, :], mask=m_d[None, :], other=0)
        b_v = tl.load(p_c + P * K + o_d[:, None] * P + o_n[None, :], mask=m_d[:, None], other=0)
        if FMT == "fp8":
            b_k = b_k.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            b_v = tl.where(m_n[None, :], b_v.to(tl.float8e4nv, bitcast=True).to(tl.float32), 0.0)
        else:
            b_k = b_k.to(tl.float32)
            b_v = ((b_v.to(tl.int32) & 255) - 128).to(tl.float32)
    b_ks, b_vs = scale_pair(tl.load(p_s, mask=m_n, other=0))
    b_k = b_k * b_ks[:, None]
    b_v = b_v * b_vs[None, :]
    if FMT == "int4z":
        b_kz, b_vz = scale_pair(tl.load(p_s + P, mask=m_n, other=0))
        b_k += tl.where(m_d[None, :], b_kz[:, None], 0.0)
        b_v += b_vz[None, :]
    b_s = _masked(tl.dot(b_k, queries[0], input_precision="ieee"), lanes[0] + o_n, lanes, ONE_TOKEN)
    return _attend(state, b_s, b_v, queries[6])
