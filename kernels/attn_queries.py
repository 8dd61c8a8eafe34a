"""Queries as the decode kernel wants them, once for all keys of a work item: one column a query head of a token.

16 and 32 bit and fp8: floats.  int8 and 4 bit: integers of two int8 digits, 256 * high + low, which hold a column to
2^-16 of its largest element (dims from K/2 on of 4 bit, whose codes count sixteen times, to 2^-12): two integer products
cost less than turning every key into floats.  One digit: 2^-8, cheaper still.
Every function returns (4 operands, start of the accumulator, sum of the column, base); a score times its base is in
units of log 2.  Unused places repeat what is there.  NaN in a column makes its base NaN.
"""

import triton
import triton.language as tl

from kernels.quant_rows import larger_or_nan, largest_or_nan


@triton.jit
def load_columns(q, o_col, m_c, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Dims FIRST .. FIRST + COUNT of the columns of q that start at o_col, [BLOCK, C]."""
    o_d = tl.arange(0, BLOCK)
    p_q = q + o_col[None, :] + FIRST + o_d[:, None]
    return tl.load(p_q, mask=(o_d < COUNT)[:, None] & m_c[None, :], other=0.0)


@triton.jit
def _digits(b_q, b_unit, DIGITS: tl.constexpr):
    """q / unit, rounded, as digits high and low (one digit: high alone), and its sum over the dims."""
    b_i = ((b_q / b_unit[None, :] + 12582912.0) - 12582912.0).to(tl.int32)
    b_high = b_i if DIGITS == 1 else (b_i + 128) >> 8
    return b_high.to(tl.int8), (b_i - (b_high << 8)).to(tl.int8), tl.sum(b_i, 0)


@triton.jit
def float_queries(q, o_col, m_c, scale_log2, SIZES: tl.constexpr, DTYPE: tl.constexpr):
    b_q = load_columns(q, o_col, m_c, 0, SIZES[0], SIZES[1]).to(DTYPE)
    b_base = tl.zeros([o_col.shape[0]], tl.float32) + scale_log2
    return b_q, b_q, b_q, b_q, b_base, b_base, b_base


@triton.jit
def byte_queries(q, o_col, m_c, scale_log2, SIZES: tl.constexpr, DIGITS: tl.constexpr):
    b_q = load_columns(q, o_col, m_c, 0, SIZES[0], SIZES[1]).to(tl.float32)
    LARGEST: tl.constexpr = 127.0 if DIGITS == 1 else 127.0 * 256.0
    # a column of zeros keeps a base that -1e30 is far below zero with
    b_unit = larger_or_nan(largest_or_nan(b_q, 0) / LARGEST, 1e-12)
    b_high, b_low, _ = _digits(b_q, b_unit, DIGITS)
    b_base = b_unit * scale_log2
    return b_high, b_low, b_high, b_low, b_base, b_base, b_base


@triton.jit
def nibble_queries(
    q, o_col, m_c, scale_log2, SIZES: tl.constexpr, HAS_ZERO: tl.constexpr, DIGITS: tl.constexpr
):
    """For codes u (dims below K/2) and 16 * (u - 8) (the others): `start` makes both u - 8, or both u with a zero point."""
    HALF: tl.constexpr = SIZES[0] // 2
    b_q0 = load_columns(q, o_col, m_c, 0, HALF, SIZES[1] // 2).to(tl.float32)
    b_q1 = load_columns(q, o_col, m_c, HALF, HALF, SIZES[1] // 2).to(tl.float32)
    if DIGITS == 1:
        # the kernel counts the first half sixteen times too
        b_largest = larger_or_nan(largest_or_nan(b_q0, 0), largest_or_nan(b_q1, 0))
        b_unit = larger_or_nan(b_largest / 127.0, 1e-12)
        b_qh0, b_ql0, b_sum0 = _digits(b_q0, b_unit, 1)
        b_qh1, b_ql1, b_sum1 = _digits(b_q1, b_unit, 1)
        b_base = b_unit * (scale_log2 * 0.0625)
        b_start = 8 * b_sum1 if HAS_ZERO else -8 * b_sum0
        b_total = ((b_sum0 + b_sum1) * 16).to(tl.float32)
    else:
        b_largest = larger_or_nan(largest_or_nan(b_q0, 0), largest_or_nan(b_q1, 0) * 0.0625)
        b_unit = larger_or_nan(b_largest / (127.0 * 256.0), 1e-12)
        b_qh0, b_ql0, b_sum0 = _digits(b_q0, b_unit, 2)
        b_qh1, b_ql1, b_sum1 = _digits(b_q1, b_unit * 16.0, 2)
        b_base = b_unit * scale_log2
        b_start = 128 * b_sum1 if HAS_ZERO else -8 * b_sum0
        b_total = (b_sum0 + b_sum1 * 16).to(tl.float32)
    return b_qh0, b_ql0, b_qh1, b_ql1, b_start, b_total, b_base
