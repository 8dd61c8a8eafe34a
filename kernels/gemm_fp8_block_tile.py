"""The block-scaled fp8 matmul's kernel: a turn of the loop is one block of 128 inputs, whose sum is scaled and added.

A tile's weights share one scale.  Its tokens are the rows of the tensor core's tile, which has a thread hold one or two
scales of them; but Hopper's fp8 instruction takes 64 rows or more, so fewer tokens are the columns (SWAP).
"""

import triton
import triton.language as tl

from kernels.split_sums import arrive, sum_parts


@triton.jit
def _store_tile(y, b_acc, bias, o_t, o_n, m_y, N, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        b_acc += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    tl.store(y + o_t.to(tl.int64) * N + o_n, b_acc.to(y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["T", "n_units", "k_units", "splits"])
def _gemm_fp8_block_kernel(
    y,
    partials,
    arrivals,
    x,
    w,
    scale_x,
    scale_w,
    bias,
    T,
    n_units,
    k_units,
    splits,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SWAP: tl.constexpr,
    N_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    WHOLE_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`scale_x` is [Q, T]."""
    # in units the compiler knows the divisor of: one binary serves every N and K that have it
    N, K = n_units * N_UNIT, k_units * K_UNIT
    Q = tl.cdiv(K, 128)
    tiles_t = tl.cdiv(T, BLOCK_T)
    tiles = tiles_t * tl.cdiv(N, BLOCK_N)
    i_tile = tl.program_id(0) % tiles
    i_s = tl.program_id(0) // tiles
    # neighbours share a tile of weights
    i_n = i_tile // tiles_t
    o_t = (i_tile % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, 128)
    first, last = 0, Q
    if HAS_SPLITS:
        share = tl.cdiv(Q, splits)
        first = i_s * share
        last = tl.minimum(first + share, Q)
    # rows past the end read the last one again: cheaper than a mask, and never stored.  One pointer that moves and
    # offsets of 32 bits that stay: a pointer for every lane would take two additions each, in every turn
    o_row = tl.minimum(o_t, T - 1)
    o_x = (o_row[:, None] * K + o_k[None, :]).to(tl.uint32)
    o_w = (tl.minimum(o_n, N - 1)[:, None] * K + o_k[None, :]).to(tl.uint32)
    p_x = x + first * 128
    p_w = w + first * 128
    p_sx = scale_x + first * T
    p_sw = scale_w + i_n * BLOCK_N // 128 * Q + first
    # of the tile [BLOCK_N, BLOCK_T], or [BLOCK_T, BLOCK_N]
    T_AXIS: tl.constexpr = 0 if SWAP else 1
    N_AXIS: tl.constexpr = 1 - T_AXIS
    o_ty, o_ny = tl.expand_dims(o_t, T_AXIS), tl.expand_dims(o_n, N_AXIS)
    m_y = (o_ty < T) & (o_ny < N)
    b_acc = tl.zeros(m_y.shape, tl.float32)
    for i in tl.range(first, last, num_stages=NUM_STAGES):
        if WHOLE_K:
            b_w = tl.load(p_w + o_w)
            b_x = tl.load(p_x + o_x)
        else:
            m_k = (o_k < K - i * 128)[None, :]
            b_w = tl.load(p_w + o_w, mask=m_k, other=0.0)
            b_x = tl.load(p_x + o_x, mask=m_k, other=0.0)
        b_scale = tl.load(p_sx + o_row) * tl.load(p_sw)
        b_y = tl.dot(b_w, tl.trans(b_x)) if SWAP else tl.dot(b_x, tl.trans(b_w))
        b_acc += b_y * tl.expand_dims(b_scale, T_AXIS)
        p_x += 128
        p_w += 128
        p_sx += T
        p_sw += 1
    if not HAS_SPLITS:
        _store_tile(y, b_acc, bias, o_ty, o_ny, m_y, N, HAS_BIAS)
    else:
        SIZE: tl.constexpr = BLOCK_T * BLOCK_N
        AT_ONCE: tl.constexpr = max(1, 64 // BLOCK_T)
        j_t = tl.expand_dims(tl.arange(0, BLOCK_T), T_AXIS)
        j_n = tl.expand_dims(tl.arange(0, BLOCK_N), N_AXIS)
        p_tile, is_last = arrive(
            partials, arrivals, b_acc, j_t * BLOCK_N + j_n, m_y, i_tile, i_s, splits, SIZE
        )
        if is_last:
            b_sum = sum_parts(p_tile, arrivals + i_tile, m_y, splits, tl.float32, SIZE, AT_ONCE)
            _store_tile(y, b_sum, bias, o_ty, o_ny, m_y, N, HAS_BIAS)
