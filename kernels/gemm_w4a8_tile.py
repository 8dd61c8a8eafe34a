"""The 4-bit matmul's kernel: weights stream through registers, tokens through shared memory.

The operands are swapped (weights are the rows of the tensor core's tile, tokens its 16 to 128 columns), because Hopper
takes the row operand from registers: decoded weights are never written anywhere.  A turn of the loop is one pair of
groups.  One scale a channel: the sum over all K stays in int32, exact.  Scales by group: each group's sum is exact
(fp8: float32), and added to the total in the order of the groups.  K may be split (split_sums).
"""

import triton
import triton.language as tl

from kernels.split_sums import arrive, sum_parts
from kernels.w4_decode import decode


@triton.jit
def _store_tile(
    y, b_acc, scale_t, scale, bias, o_t, o_n, T, N, BY_GROUP: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """b_acc is [BLOCK_N, BLOCK_T]; the arithmetic of gemm_w8a8, so that either kernel gives the same bits."""
    m_t, m_n = o_t < T, o_n < N
    b_y = b_acc.to(tl.float32)
    if not BY_GROUP:
        b_y *= tl.load(scale + o_n, mask=m_n, other=0.0)[:, None]
    b_y *= tl.load(scale_t + o_t, mask=m_t, other=0.0)[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    p_y = y + o_t.to(tl.int64)[None, :] * N + o_n[:, None]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[None, :] & m_n[:, None])


@triton.jit
def _load_rows(p_x, o_c, left, WHOLE: tl.constexpr):
    """A chunk of every token, [CHUNK, BLOCK_T]: its group has `left` inputs and the chunk may have more."""
    return tl.load(p_x) if WHOLE else tl.load(p_x, mask=(o_c < left)[:, None], other=0.0)


@triton.jit
def _add_group(b_acc, b_w, b_x, p_scale, BY_GROUP: tl.constexpr):
    if BY_GROUP:
        SUM: tl.constexpr = tl.int32 if b_w.dtype == tl.int8 else tl.float32
        b_acc += tl.dot(b_w, b_x, out_dtype=SUM).to(tl.float32) * tl.load(p_scale)[:, None]
    else:
        b_acc = tl.dot(b_w, b_x, b_acc, out_dtype=tl.int32)
    return b_acc


@triton.jit(do_not_specialize=["T", "n_units", "k_units", "splits"])
def _gemm_w4a8_kernel(
    y,
    partials,
    arrivals,
    x,
    w,
    scale_t,
    scale,
    meta,
    bias,
    T,
    n_units,
    k_units,
    splits,
    DECODE: tl.constexpr,
    BY_GROUP: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    N_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # in units the compiler knows the divisor of: one binary serves every N and K that have it
    N, K = n_units * N_UNIT, k_units * K_UNIT
    pairs = tl.cdiv(K, 2 * GROUP)
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles = tiles_t * tl.cdiv(N, BLOCK_N)
    i_tile = tl.program_id(0) % tiles
    i_s = tl.program_id(0) // tiles
    # neighbours share a tile of weights
    o_t = (i_tile % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = (i_tile // tiles_t) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, CHUNK)
    first, last = 0, pairs
    if HAS_SPLITS:
        share = tl.cdiv(pairs, splits)
        first = i_s * share
        last = tl.minimum(first + share, pairs)
    # rows past the end read the last one again: cheaper than a mask, and never stored.  One pointer that moves and
    # offsets of 32 bits that stay: a pointer for every lane would take two additions each, in every turn
    o_row = tl.minimum(o_n, N - 1)
    p_x = x + first * (2 * GROUP)
    p_w = w + first * CHUNK
    p_meta = meta + first * N
    p_scale = scale + 2 * first * N
    o_x = (tl.minimum(o_t, T - 1)[None, :] * K + o_c[:, None]).to(tl.uint32)
    o_w = (o_row[:, None] * (pairs * CHUNK) + o_c[None, :]).to(tl.uint32)
    o_meta = o_row.to(tl.uint32)
    b_acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32 if BY_GROUP else tl.int32)
    for i in tl.range(first, last, num_stages=NUM_STAGES):
        left = K - i * (2 * GROUP)
        b_x0 = _load_rows(p_x + o_x, o_c, tl.minimum(left, GROUP), WHOLE)
        b_x1 = _load_rows(p_x + GROUP + o_x, o_c, tl.minimum(left - GROUP, GROUP), WHOLE)
        b_w0, b_w1 = decode(tl.load(p_w + o_w), p_meta + o_meta, DECODE)
        b_acc = _add_group(b_acc, b_w0, b_x0, p_scale + o_meta, BY_GROUP)
        b_acc = _add_group(b_acc, b_w1, b_x1, p_scale + N + o_meta, BY_GROUP)
        p_x += 2 * GROUP
        p_w += CHUNK
        p_meta += N
        p_scale += 2 * N
    if not HAS_SPLITS:
        _store_tile(y, b_acc, scale_t, scale, bias, o_t, o_n, T, N, BY_GROUP, HAS_BIAS)
    else:
        SIZE: tl.constexpr = BLOCK_T * BLOCK_N
        AT_ONCE: tl.constexpr = max(1, 64 // BLOCK_T)
        o_part = tl.arange(0, BLOCK_T)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        m_part = (o_t < T)[None, :] & (o_n < N)[:, None]
        p_tile, is_last = arrive(partials, arrivals, b_acc, o_part, m_part, i_tile, i_s, splits, SIZE)
        if is_last:
            b_sum = sum_parts(p_tile, arrivals + i_tile, m_part, splits, b_acc.dtype, SIZE, AT_ONCE)
            _store_tile(y, b_sum, scale_t, scale, bias, o_t, o_n, T, N, BY_GROUP, HAS_BIAS)
