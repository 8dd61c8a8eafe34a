"""Rotates q and k, stores k and v in the pool: q' = q * cos + half(q) * sin with half(q) = (-q2, q1), the same for k.

T tokens, H query heads, G KV heads, K head dim, qkv_TX with X = (H + 2G) K.  Bound by bandwidth, and by launches when
T is small.  Quantized formats: scale = absmax / qmax of a token and head, rounded to fp16 first; codes = rint(x / scale)
with that rounded scale.  A nibble of V shares its byte with another token: the Triton kernel takes all tokens of a block
in one program, the CPU path does low nibbles before high ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_layout import MAX_SCALE, MIN_SCALE, QMAX, SLOT_BITS, SLOT_MASK, KvLayout
from kernels.kv_read import FLOAT_DTYPES
from kernels.kv_step import KvStep


@dataclass(frozen=True)
class RopeKvWriteConfig:
    """Tiles: half a head (rope works on halves) and all query heads of a token."""

    block_half: int
    block_h: int
    num_warps: int = 4

    @classmethod
    def pick(cls, head_dim: int, num_heads: int) -> "RopeKvWriteConfig":
        return cls(triton.next_power_of_2(head_dim // 2), triton.next_power_of_2(num_heads))


def rotate(x_TXK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """In fp32, or fp64 if x is."""
    x = x_TXK.to(torch.promote_types(x_TXK.dtype, torch.float32))
    cos, sin, half = cos_TK[:, None].to(x.dtype), sin_TK[:, None].to(x.dtype), x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def quantize_heads(x_XK: Tensor, fmt: str) -> tuple[Tensor, Tensor]:
    """Codes (int8, signed) and fp16 scales of the rows of x."""
    qmax = QMAX[fmt]
    scale = (x_XK.abs().amax(-1) / qmax).clamp_(MIN_SCALE, MAX_SCALE).half()
    codes = x_XK.div(scale.to(x_XK.dtype).unsqueeze(-1)).round_().clamp_(-qmax, qmax)
    return codes.to(torch.int8), scale


def rope_kv_write_ref(
    qkv_TX: Tensor, cos_MK: Tensor, sin_MK: Tensor, pool: Tensor, step: KvStep, layer: int, num_heads: int
) -> Tensor:
    """Token by token and head by head, through the definition of the layout."""
    lay, spans = step.layout, step.spans
    G, K, P = lay.num_kv_heads, lay.head_dim, lay.block_tokens
    heads = qkv_TX.view(-1, num_heads + 2 * G, K)
    turned = rotate(heads[:, : num_heads + G], cos_MK[step.pos_T.long()], sin_MK[step.pos_T.long()])
    for b, (start, count, row) in enumerate(zip(spans.start_B, spans.count_B, spans.row_B, strict=True)):
        for t in range(int(count)):
            index, lane = divmod(int(start) + t, P)
            block = int(spans.block_BN[b, index])
            at = int(step.slab_table_SL[block >> SLOT_BITS, layer]) + (block & SLOT_MASK) * lay.block_bytes
            for g in range(G):
                part = pool[at + g * lay.head_bytes :][: lay.head_bytes]
                _store_one(lay, part, lane, turned[int(row) + t, num_heads + g], heads[int(row) + t, num_heads + G + g])
    return turned[:, :num_heads].to(qkv_TX.dtype)


def _store_one(lay: KvLayout, part: Tensor, lane: int, key_K: Tensor, value_K: Tensor) -> None:
    P, K = lay.block_tokens, lay.head_dim
    keys, values, scales = part.split([lay.key_bytes, lay.value_bytes, lay.scale_bytes])
    if not lay.quantized:
        keys.view(FLOAT_DTYPES[lay.fmt]).view(P, K)[lane] = key_K
        values.view(FLOAT_DTYPES[lay.fmt]).view(P, K)[lane] = value_K
        return
    (key, key_scale), (value, value_scale) = (quantize_heads(x.float(), lay.fmt) for x in (key_K, value_K))
    scales.view(torch.float16).view(P, 2)[lane] = torch.stack((key_scale, value_scale))
    if lay.fmt == "int8":
        keys.view(torch.int8).view(P, K)[lane] = key
        values.view(torch.int8).view(K, P)[:, lane] = value
        return
    key, value = (key + 8).to(torch.uint8), (value + 8).to(torch.uint8)
    keys.view(P, K // 2)[lane] = key[: K // 2] | key[K // 2 :] << 4
    column = values.view(K, P // 2)[:, lane % (P // 2)]
    column.copy_(column & 0xF0 | value if lane < P // 2 else column & 0x0F | value << 4)


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
    b_y2 = b_x2 * tl.load(p_cos + HALF, mask=m_d, other=0.0) + b_x1 * tl.load(p_sin + HALF, mask=m_d, other=0.0)
    p_y = out + (i_t * H + o_h) * K + o_d
    tl.store(p_y, b_y1.to(out.dtype.element_ty), mask=m_hd)
    tl.store(p_y + HALF, b_y2.to(out.dtype.element_ty), mask=m_hd)


@triton.jit
def _scale_of(b_absmax, QMAX: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    b_qmax = tl.full(b_absmax.shape, QMAX, tl.float32)
    return tl.minimum(tl.maximum(tl.div_rn(b_absmax, b_qmax), LEAST), MOST).to(tl.float16)


@triton.jit
def _codes_of(b_x, b_scale, QMAX: tl.constexpr):
    b_s = tl.broadcast_to(b_scale.to(tl.float32)[:, None], b_x.shape)
    b_c = (tl.div_rn(b_x, b_s) + 12582912.0) - 12582912.0  # round half to even: 1.5 * 2^23
    return tl.minimum(tl.maximum(b_c, -QMAX), QMAX).to(tl.int32)


@triton.jit
def _load_values(qkv_v, i_row, o_lane, i_lane, n_lanes, stride_qkv_t, o_d, K: tl.constexpr):
    m_lane = (o_lane >= i_lane) & (o_lane < i_lane + n_lanes)
    p_v = qkv_v + (i_row + o_lane - i_lane).to(tl.int64)[:, None] * stride_qkv_t + o_d[None, :]
    return tl.load(p_v, mask=m_lane[:, None] & (o_d < K)[None, :], other=0.0).to(tl.float32), m_lane


@triton.jit
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
    """One program a written block and KV head.  `codes`: the pool in the format's type; `halves`: as int16, for scales."""
    p_touch = touches + tl.program_id(0) * 4
    i_g = tl.program_id(1)
    i_block = tl.load(p_touch)
    i_lane = tl.load(p_touch + 1)
    n_lanes = tl.load(p_touch + 2)
    i_row = tl.load(p_touch + 3)
    i_slot = (i_block & ((1 << SLOT_BITS) - 1)).to(tl.int64)
    at = tl.load(slab_table + (i_block >> SLOT_BITS).to(tl.int64) * stride_slab + layer)
    at += (i_slot * G + i_g) * HEAD_BYTES

    HALF: tl.constexpr = K // 2
    HALF_P: tl.constexpr = P // 2
    KEY_BYTES: tl.constexpr = P * K * BITS // 8
    o_n = tl.arange(0, P)
    o_h = tl.arange(0, BLOCK_HALF)
    m_n = (o_n >= i_lane) & (o_n < i_lane + n_lanes)
    m_nh = m_n[:, None] & (o_h < HALF)[None, :]
    o_row = (i_row + o_n - i_lane).to(tl.int64)
    o_cos = tl.load(pos + o_row, mask=m_n, other=0).to(tl.int64)[:, None] * K + o_h[None, :]
    p_k = qkv + o_row[:, None] * stride_qkv_t + (H + i_g) * K + o_h[None, :]
    b_x1 = tl.load(p_k, mask=m_nh, other=0.0).to(tl.float32)
    b_x2 = tl.load(p_k + HALF, mask=m_nh, other=0.0).to(tl.float32)
    b_c1 = tl.load(cos + o_cos, mask=m_nh, other=0.0)
    b_s1 = tl.load(sin + o_cos, mask=m_nh, other=0.0)
    b_c2 = tl.load(cos + HALF + o_cos, mask=m_nh, other=0.0)
    b_s2 = tl.load(sin + HALF + o_cos, mask=m_nh, other=0.0)
    b_k1 = b_x1 * b_c1 - b_x2 * b_s1
    b_k2 = b_x2 * b_c2 + b_x1 * b_s2

    o_d = tl.arange(0, 2 * BLOCK_HALF)
    qkv_v = qkv + (H + G + i_g) * K
    if BITS >= 16:
        p_c = codes + at // (BITS // 8)
        o_k = o_n[:, None] * K + o_h[None, :]
        tl.store(p_c + o_k, b_k1.to(codes.dtype.element_ty), mask=m_nh)
        tl.store(p_c + HALF + o_k, b_k2.to(codes.dtype.element_ty), mask=m_nh)
        b_v, _ = _load_values(qkv_v, i_row, o_n, i_lane, n_lanes, stride_qkv_t, o_d, K)
        m_v = m_n[:, None] & (o_d < K)[None, :]
        tl.store(p_c + P * K + o_n[:, None] * K + o_d[None, :], b_v.to(codes.dtype.element_ty), mask=m_v)
    else:
        p_c = codes + at
        p_s = halves + (at + 2 * KEY_BYTES) // 2
        b_ks = _scale_of(tl.maximum(tl.max(tl.abs(b_k1), 1), tl.max(tl.abs(b_k2), 1)), QMAX, LEAST, MOST)
        tl.store(p_s + 2 * o_n, b_ks.to(tl.int16, bitcast=True), mask=m_n)
        b_q1 = _codes_of(b_k1, b_ks, QMAX)
        b_q2 = _codes_of(b_k2, b_ks, QMAX)
        if BITS == 8:
            o_k = o_n[:, None] * K + o_h[None, :]
            tl.store(p_c + o_k, b_q1.to(tl.int8), mask=m_nh)
            tl.store(p_c + HALF + o_k, b_q2.to(tl.int8), mask=m_nh)
            b_v, _ = _load_values(qkv_v, i_row, o_n, i_lane, n_lanes, stride_qkv_t, o_d, K)
            b_vs = _scale_of(tl.max(tl.abs(b_v), 1), QMAX, LEAST, MOST)
            tl.store(p_s + 2 * o_n + 1, b_vs.to(tl.int16, bitcast=True), mask=m_n)
            m_v = m_n[:, None] & (o_d < K)[None, :]
            b_vq = _codes_of(b_v, b_vs, QMAX)
            tl.store(p_c + KEY_BYTES + o_d[None, :] * P + o_n[:, None], b_vq.to(tl.int8), mask=m_v)
        else:
            b_kb = (b_q1 + 8) | ((b_q2 + 8) << 4)
            tl.store(p_c + o_n[:, None] * HALF + o_h[None, :], b_kb.to(tl.int8), mask=m_nh)
            o_l = tl.arange(0, HALF_P)
            b_lo, m_lo = _load_values(qkv_v, i_row, o_l, i_lane, n_lanes, stride_qkv_t, o_d, K)
            b_hi, m_hi = _load_values(qkv_v, i_row, o_l + HALF_P, i_lane, n_lanes, stride_qkv_t, o_d, K)
            b_los = _scale_of(tl.max(tl.abs(b_lo), 1), QMAX, LEAST, MOST)
            b_his = _scale_of(tl.max(tl.abs(b_hi), 1), QMAX, LEAST, MOST)
            tl.store(p_s + 2 * o_l + 1, b_los.to(tl.int16, bitcast=True), mask=m_lo)
            tl.store(p_s + 2 * (o_l + HALF_P) + 1, b_his.to(tl.int16, bitcast=True), mask=m_hi)
            # a nibble that is not written keeps its token: [kept low | kept high] by lane
            m_v = (m_lo | m_hi)[:, None] & (o_d < K)[None, :]
            p_v = p_c + KEY_BYTES + o_d[None, :] * HALF_P + o_l[:, None]
            b_old = tl.load(p_v, mask=m_v, other=0).to(tl.int32)
            b_low = tl.where(m_lo[:, None], _codes_of(b_lo, b_los, QMAX) + 8, b_old & 15)
            b_high = tl.where(m_hi[:, None], _codes_of(b_hi, b_his, QMAX) + 8, (b_old >> 4) & 15)
            tl.store(p_v, (b_low | (b_high << 4)).to(tl.int8), mask=m_v)


def rope_kv_write_triton(
    qkv_TX: Tensor, cos_MK: Tensor, sin_MK: Tensor, pool: Tensor, step: KvStep, layer: int, num_heads: int
) -> Tensor:
    lay, work = step.layout, step.work
    assert work is not None, "this KvStep was built for the CPU path"
    T, G, K = qkv_TX.shape[0], lay.num_kv_heads, lay.head_dim
    config = RopeKvWriteConfig.pick(K, num_heads)
    out_THK = torch.empty(T, num_heads, K, dtype=qkv_TX.dtype, device=qkv_TX.device)
    _rope_q_kernel[(T,)](
        out_THK,
        qkv_TX,
        cos_MK,
        sin_MK,
        work.pos_T,
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
        qkv_TX,
        cos_MK,
        sin_MK,
        work.pos_T,
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
    return out_THK


def rope_kv_write_cpu(
    qkv_TX: Tensor, cos_MK: Tensor, sin_MK: Tensor, pool: Tensor, step: KvStep, layer: int, num_heads: int
) -> Tensor:
    lay, rows = step.layout, step.rows
    assert rows is not None, "this KvStep was built for Triton"
    T, G, K = qkv_TX.shape[0], lay.num_kv_heads, lay.head_dim
    heads = qkv_TX.view(T, num_heads + 2 * G, K)
    cos_TK, sin_TK = cos_MK.index_select(0, step.pos_T), sin_MK.index_select(0, step.pos_T)
    turned = rotate(heads[:, : num_heads + G], cos_TK, sin_TK)
    kv_T2GK = torch.empty(T, 2, G, K, dtype=FLOAT_DTYPES.get(lay.fmt, torch.float32))
    kv_T2GK[:, 0] = turned[:, num_heads:]
    kv_T2GK[:, 1] = heads[:, num_heads + G :]
    write = rows.write
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[write.word]
    keys = _rows_at_every_word(pool.view(word), lay.row_bytes // write.word)
    if lay.quantized:
        _store_codes(kv_T2GK, keys, pool, step, layer)
    else:
        keys.index_copy_(0, write.key_LX[layer], kv_T2GK.view(T * 2 * G, K).view(word))
    return turned[:, :num_heads].to(qkv_TX.dtype).contiguous()


def _rows_at_every_word(words: Tensor, width: int, stride: int = 1) -> Tensor:
    """Row i holds words i, i + stride, ...  Rows overlap: what is written must not."""
    return words.as_strided((len(words) - (width - 1) * stride, width), (1, stride))


def _store_codes(kv_T2GK: Tensor, keys: Tensor, pool: Tensor, step: KvStep, layer: int) -> None:
    lay, write, K = step.layout, step.rows.write, step.layout.head_dim
    codes_T2GK, scale_T2G = quantize_heads(kv_T2GK, lay.fmt)
    pairs = torch.stack((scale_T2G[:, 0], scale_T2G[:, 1]), dim=-1).view(torch.int32)
    pool.view(torch.int32).index_copy_(0, write.scale_LX[layer], pairs.view(-1))
    if lay.fmt == "int8":
        keys.index_copy_(0, write.key_LX[layer], codes_T2GK[:, 0].reshape(-1, K).view(keys.dtype))
        columns = _rows_at_every_word(pool, K, lay.block_tokens)
        columns.index_copy_(0, write.value_LX[layer], codes_T2GK[:, 1].reshape(-1, K).view(torch.uint8))
        return
    codes = (codes_T2GK + 8).view(torch.uint8)
    packed = codes[:, 0, :, : K // 2] | codes[:, 0, :, K // 2 :] << 4
    keys.index_copy_(0, write.key_LX[layer], packed.view(-1, K // 2).view(keys.dtype))
    columns = _rows_at_every_word(pool, K, lay.block_tokens // 2)
    value_XK = codes[:, 1].reshape(-1, K)
    for half_X, shift, kept in zip(write.half_X, (0, 4), (0xF0, 0x0F), strict=True):
        at = write.value_LX[layer][half_X]
        columns.index_copy_(0, at, columns.index_select(0, at) & kept | value_XK[half_X] << shift)


RopeKvWrite = Callable[[Tensor, Tensor, Tensor, Tensor, KvStep, int, int], Tensor]


def rope_kv_write(
    qkv_TX: Tensor, cos_MK: Tensor, sin_MK: Tensor, pool: Tensor, step: KvStep, layer: int, num_heads: int
) -> Tensor:
    """Returns the rotated q_THK; writes the step's keys and values into `pool`.  Tables are fp32 [positions, K]."""
    assert qkv_TX.shape == (step.num_tokens, (num_heads + 2 * step.layout.num_kv_heads) * step.layout.head_dim)
    assert qkv_TX.stride(1) == 1
    run: RopeKvWrite = rope_kv_write_cpu if step.work is None else rope_kv_write_triton
    return run(qkv_TX, cos_MK, sin_MK, pool, step, layer, num_heads)
