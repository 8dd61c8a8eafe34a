"""The 8-bit matmul for few tokens: bound by the stream of weights, so everything serves the loads.

The operands are swapped (weights are the rows of the tensor core's tile, tokens its 16 to 128 columns): a tile of
weights is multiplied as it lies, and fp8 keeps the native instruction, which Hopper has for 64 rows and more only.
Where N gives too few programs, K is split over several (split_sums).
"""

import triton
import triton.language as tl

from kernels.split_sums import arrive, sum_parts


@triton.jit
def multiply(b_a, b_b, b_acc, PROMOTE: tl.constexpr):
    """b_acc + b_a b_b.  Hopper adds fp8 products in about 14 bits; PROMOTE moves them to float32 after every 128."""
    if b_acc.dtype == tl.int32:
        b_acc = tl.dot(b_a, b_b, b_acc, out_dtype=tl.int32)
    elif PROMOTE:
        b_acc = tl.dot(b_a, b_b, b_acc, max_num_imprecise_acc=128)
    else:
        b_acc = tl.dot(b_a, b_b, b_acc)
    return b_acc


@triton.jit
def _store_rows(y, b_acc, scale_t, scale_n, bias, o_t, o_n, T, N, HAS_BIAS: tl.constexpr):
    """b_acc is [BLOCK_N, BLOCK_T]."""
    m_t, m_n = o_t < T, o_n < N
    b_sn = tl.load(scale_n + o_n, mask=m_n, other=0.0)
    b_st = tl.load(scale_t + o_t, mask=m_t, other=0.0)
    b_y = b_acc.to(tl.float32) * b_sn[:, None] * b_st[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    p_y = y + o_t.to(tl.int64)[None, :] * N + o_n[:, None]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[None, :] & m_n[:, None])


@triton.jit(do_not_specialize=["T", "n_units", "k_units", "splits"])
def _gemm_w8a8_small_kernel(
    y,
    partials,
    arrivals,
    x,
    w,
    scale_t,
    scale_n,
    bias,
    T,
    n_units,
    k_units,
    splits,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    N_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    WHOLE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
    PROMOTE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # in units the compiler knows the divisor of: one binary serves every N and K that have it
    N, K = n_units * N_UNIT, k_units * K_UNIT
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles = tiles_t * tl.cdiv(N, BLOCK_N)
    i_tile = tl.program_id(0) % tiles
    i_s = tl.program_id(0) // tiles
    # neighbours share a tile of weights
    o_t = (i_tile % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = (i_tile // tiles_t) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    first, last = 0, K
    if HAS_SPLITS:
        share = tl.cdiv(tl.cdiv(K, BLOCK_K), splits) * BLOCK_K
        first = i_s * share
        last = tl.minimum(first + share, K)
    # rows past the end read the last one again: cheaper than a mask, and never stored
    p_x = x + tl.minimum(o_t, T - 1).to(tl.int64)[None, :] * K + first + o_k[:, None]
    p_w = w + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * K + first + o_k[None, :]
    IS_INT: tl.constexpr = x.dtype.element_ty == tl.int8
    b_acc = tl.zeros([BLOCK_N, BLOCK_T], tl.int32 if IS_INT else tl.float32)
    for i_k in tl.range(first, last, BLOCK_K, num_stages=NUM_STAGES):
        if WHOLE_K:
            b_w = tl.load(p_w)
            b_x = tl.load(p_x)
        else:
            m_k = o_k < K - i_k
            b_w = tl.load(p_w, mask=m_k[None, :], other=0.0)
            b_x = tl.load(p_x, mask=m_k[:, None], other=0.0)
        b_acc = multiply(b_w, b_x, b_acc, PROMOTE)
        p_w += BLOCK_K
        p_x += BLOCK_K
    if not HAS_SPLITS:
        _store_rows(y, b_acc, scale_t, scale_n, bias, o_t, o_n, T, N, HAS_BIAS)
    else:
        SIZE: tl.constexpr = BLOCK_T * BLOCK_N
        AT_ONCE: tl.constexpr = max(1, 64 // BLOCK_T)
        o_part = tl.arange(0, BLOCK_T)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        m_part = (o_t < T)[None, :] & (o_n < N)[:, None]
        p_tile, is_last = arrive(partials, arrivals, b_acc, o_part, m_part, i_tile, i_s, splits, SIZE)
        if is_last:
            b_sum = sum_parts(p_tile, arrivals + i_tile, m_part, splits, b_acc.dtype, SIZE, AT_ONCE)
            _store_rows(y, b_sum, scale_t, scale_n, bias, o_t, o_n, T, N, HAS_BIAS)
