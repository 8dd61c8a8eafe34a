"""The 8-bit matmul for many tokens: bound by the tensor cores, so tiles are as large as the registers hold.

Persistent: a program takes one tile after the other, in groups of rows whose weights stay in L2; FLATTEN makes one
loop of both, so that it loads the next tile while it stores this one.  Two ways to load: 16 bytes a thread, or the copy
engine of sm_90 and later, which needs descriptors of both operands (K a multiple of 16) and leaves the threads alone.
"""

import triton
import triton.language as tl

from kernels.gemm_w8a8_small import multiply


@triton.jit
def _tile_at(i, tiles_t, tiles_n, GROUP_T: tl.constexpr):
    """Row and column of tile i: GROUP_T rows of tiles at a time, down each column of them."""
    group = i // (GROUP_T * tiles_n)
    first = group * GROUP_T
    rows = tl.minimum(tiles_t - first, GROUP_T)
    rest = i % (GROUP_T * tiles_n)
    return first + rest % rows, rest // rows


@triton.jit
def _store_tile(y, b_acc, scale_t, scale_n, bias, o_t, o_n, T, N, HAS_BIAS: tl.constexpr):
    """b_acc is [BLOCK_T, BLOCK_N]."""
    m_t, m_n = o_t < T, o_n < N
    b_sn = tl.load(scale_n + o_n, mask=m_n, other=0.0)
    b_st = tl.load(scale_t + o_t, mask=m_t, other=0.0)
    b_y = b_acc.to(tl.float32) * b_sn[None, :] * b_st[:, None]
    if HAS_BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = y + o_t.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["T", "n_units", "k_units"])
def _gemm_w8a8_large_kernel(
    y,
    x,
    w,
    scale_t,
    scale_n,
    bias,
    T,
    n_units,
    k_units,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    N_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    WHOLE_K: tl.constexpr,
    GROUP_T: tl.constexpr,
    FLATTEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROMOTE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    N, K = n_units * N_UNIT, k_units * K_UNIT
    tiles_t, tiles_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    IS_INT: tl.constexpr = x.dtype.element_ty == tl.int8
    for i_tile in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        i_t, i_n = _tile_at(i_tile, tiles_t, tiles_n, GROUP_T)
        o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # rows past the end read the last one again: cheaper than a mask, and never stored
        p_x = x + tl.minimum(o_t, T - 1).to(tl.int64)[:, None] * K + o_k[None, :]
        p_w = w + tl.minimum(o_n, N - 1).to(tl.int64)[None, :] * K + o_k[:, None]
        b_acc = tl.zeros([BLOCK_T, BLOCK_N], tl.int32 if IS_INT else tl.float32)
        for i_k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
            if WHOLE_K:
                b_x = tl.load(p_x)
                b_w = tl.load(p_w)
            else:
                m_k = o_k < K - i_k
                b_x = tl.load(p_x, mask=m_k[None, :], other=0.0)
                b_w = tl.load(p_w, mask=m_k[:, None], other=0.0)
            b_acc = multiply(b_x, b_w, b_acc, PROMOTE)
            p_x += BLOCK_K
            p_w += BLOCK_K
        _store_tile(y, b_acc, scale_t, scale_n, bias, o_t, o_n, T, N, HAS_BIAS)


@triton.jit(do_not_specialize=["T", "n_units", "k_units"])
def _gemm_w8a8_tma_kernel(
    y,
    x,
    w,
    scale_t,
    scale_n,
    bias,
    T,
    n_units,
    k_units,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    N_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    GROUP_T: tl.constexpr,
    FLATTEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PROMOTE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`x` and `w` are descriptors of blocks [BLOCK_T, BLOCK_K] and [BLOCK_N, BLOCK_K]; past the edges they read 0."""
    N, K = n_units * N_UNIT, k_units * K_UNIT
    tiles_t, tiles_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    IS_INT: tl.constexpr = x.dtype == tl.int8
    for i_tile in tl.range(tl.program_id(0), tiles_t * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        i_t, i_n = _tile_at(i_tile, tiles_t, tiles_n, GROUP_T)
        b_acc = tl.zeros([BLOCK_T, BLOCK_N], tl.int32 if IS_INT else tl.float32)
        for i_k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
            b_x = x.load([i_t * BLOCK_T, i_k])
            b_w = w.load([i_n * BLOCK_N, i_k])
            b_acc = multiply(b_x, tl.trans(b_w), b_acc, PROMOTE)
        o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        _store_tile(y, b_acc, scale_t, scale_n, bias, o_t, o_n, T, N, HAS_BIAS)
