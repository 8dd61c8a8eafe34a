"""Rotates q and k, stores k and v in the pool: q' = q * cos + half(q) * sin with half(q) = (-q2, q1), the same for k.

T tokens, H query heads, G KV heads, K head dim, qkv_TX with X = (H + 2G) K.  Bound by bandwidth, and by launches when
T is small.  Quantized formats, for each token and head: scale = absmax / qmax, rounded to fp16; codes = rint(x / scale),
as a product with the inverse (fp8: rounded to e4m3).  int4z: zero = min, scale = (max - min) / 15, codes of x - zero.
A nibble of V shares its byte with another token of the block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.kv_case import Paged, places, rope_tables
from kernels.kv_layout import BIAS, CODE_BITS, MAX_SCALE, MIN_SCALE, QMAX, SLOT_BITS, SLOT_MASK, KvLayout
from kernels.kv_read import FLOAT_DTYPES
from kernels.kv_step import KvStep
from kernels.kv_write_triton import (
    NO_SCALES,
    STATIC_FORMATS,
    KvScales,
    RopeKvWriteConfig,
    rope_kv_write_triton,
)
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# the tests' rows: a decode, and chunks over the edges of blocks and of their halves
SPANS = ((0, 5, 1), (1, 30, 4), (2, 15, 3))


def rotate(x_TXK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """In fp32, or fp64 if x is."""
    x = x_TXK.to(torch.promote_types(x_TXK.dtype, torch.float32))
    cos, sin, half = cos_TK[:, None].to(x.dtype), sin_TK[:, None].to(x.dtype), x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class Quantized(NamedTuple):
    """Codes of rows (int8, or e4m3 for fp8; without any bias), and what they are multiplied by and added to, fp16."""

    code_XK: Tensor
    scale_X: Tensor
    zero_X: Tensor | None


def quantize_heads(x_XK: Tensor, fmt: str, scale_X: Tensor | None = None) -> Quantized:
    """Row by row.  `scale_X`: fp16 scales to use in place of the rows' own (symmetric formats)."""
    qmax, zero_X, least = QMAX[fmt], None, -QMAX[fmt]
    if fmt == "int4z":
        low_X, high_X = x_XK.amin(-1), x_XK.amax(-1)
        spread_X, least = high_X - low_X, 0
        zero_X = low_X.clamp(-MAX_SCALE, MAX_SCALE).half()
        x_XK = x_XK - zero_X.to(x_XK.dtype).unsqueeze(-1)
    elif scale_X is None:
        spread_X = x_XK.abs().amax(-1)
    if scale_X is None:
        scale_X = (spread_X / qmax).clamp_(MIN_SCALE, MAX_SCALE).half()
    code_XK = x_XK * scale_X.to(x_XK.dtype).reciprocal().unsqueeze(-1)
    if fmt == "fp8":
        return Quantized(code_XK.clamp_(least, qmax).to(torch.float8_e4m3fn), scale_X, None)
    return Quantized(code_XK.round_().clamp_(least, qmax).to(torch.int8), scale_X, zero_X)


def _static_scales(scales: KvScales, fmt: str) -> Tensor | None:
    """The constant scales of keys and of values, [2] fp16, where there are any."""
    if scales.static is None:
        return None
    assert fmt in STATIC_FORMATS, f"static scales are for {STATIC_FORMATS}, not {fmt}"
    return torch.tensor(scales.static).clamp_(MIN_SCALE, MAX_SCALE).half()


def turn(
    qkv_TX: Tensor, cos_TK: Tensor, sin_TK: Tensor, lay: KvLayout, scales: KvScales
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys after rotation and channel scaling (fp32, or fp64 if qkv is), and the values as they came."""
    T, G, K = len(qkv_TX), lay.num_kv_heads, lay.head_dim
    heads = qkv_TX.reshape(T, -1, K)
    turned = rotate(heads[:, :-G], cos_TK, sin_TK)
    q_THK, key_TGK = turned[:, :-G], turned[:, -G:]
    if scales.channel_GK is not None:
        s_GK = scales.channel_GK.to(turned.dtype)
        q_THK = (q_THK.view(T, G, -1, K) * s_GK[:, None]).view(q_THK.shape)
        key_TGK = key_TGK * s_GK.reciprocal()
    return q_THK, key_TGK, heads[:, -G:]


def rope_kv_write_ref(
    qkv_TX: Tensor,
    cos_MK: Tensor,
    sin_MK: Tensor,
    pool: Tensor,
    step: KvStep,
    layer: int,
    scales: KvScales = NO_SCALES,
) -> Tensor:
    """Token by token and head by head, through the definition of the layout."""
    lay, spans, pos_T = step.layout, step.spans, step.pos_T.long()
    P = lay.block_tokens
    turned = turn(qkv_TX, cos_MK[pos_T], sin_MK[pos_T], lay, scales)
    q_THK, key_TGK, value_TGK = turned
    for b, (start, count, row) in enumerate(zip(spans.start_B, spans.count_B, spans.row_B, strict=True)):
        for t in range(int(count)):
            index, lane = divmod(int(start) + t, P)
            block = int(spans.block_BN[b, index])
            at = int(step.slab_table_SL[block >> SLOT_BITS, layer]) + (block & SLOT_MASK) * lay.block_bytes
            for g in range(lay.num_kv_heads):
                part = pool[at + g * lay.head_bytes :][: lay.head_bytes]
                key_K, value_K = key_TGK[int(row) + t, g], value_TGK[int(row) + t, g]
                _store_one(lay, part, lane, key_K, value_K, _static_scales(scales, lay.fmt))
    return q_THK.to(qkv_TX.dtype)


def _store_one(
    lay: KvLayout, part: Tensor, lane: int, key_K: Tensor, value_K: Tensor, static_2: Tensor | None
) -> None:
    P, K = lay.block_tokens, lay.head_dim
    keys, values, scales, zeros = part.split(
        [lay.key_bytes, lay.value_bytes, lay.scale_bytes, lay.zero_bytes]
    )
    if not lay.quantized:
        keys.view(FLOAT_DTYPES[lay.fmt]).view(P, K)[lane] = key_K
        values.view(FLOAT_DTYPES[lay.fmt]).view(P, K)[lane] = value_K
        return
    wide = torch.promote_types(key_K.dtype, torch.float32)
    key, value = (
        quantize_heads(x.to(wide), lay.fmt, None if static_2 is None else static_2[i].to(x.device))
        for i, x in enumerate((key_K, value_K))
    )
    scales.view(torch.float16).view(P, 2)[lane] = torch.stack((key.scale_X, value.scale_X))
    if key.zero_X is not None and value.zero_X is not None:
        zeros.view(torch.float16).view(P, 2)[lane] = torch.stack((key.zero_X, value.zero_X))
    if lay.bits == 8:
        keys.view(P, K)[lane] = key.code_XK.view(torch.uint8)
        values.view(K, P)[:, lane] = value.code_XK.view(torch.uint8) ^ BIAS.get(lay.fmt, 0)
        return
    low, high = ((key.code_XK + BIAS[lay.fmt]).to(torch.uint8)).split(K // 2)
    keys.view(P, K // 2)[lane] = low | high << 4
    code = (value.code_XK + BIAS[lay.fmt]).to(torch.uint8)
    column = values.view(K, P // 2)[:, lane % (P // 2)]
    column.copy_(column & 0xF0 | code if lane < P // 2 else column & 0x0F | code << 4)


def rope_kv_write_cpu(
    qkv_TX: Tensor,
    cos_MK: Tensor,
    sin_MK: Tensor,
    pool: Tensor,
    step: KvStep,
    layer: int,
    scales: KvScales = NO_SCALES,
) -> Tensor:
    lay, rows = step.layout, step.rows
    assert rows is not None, "this KvStep was built for Triton"
    T, G, K = qkv_TX.shape[0], lay.num_kv_heads, lay.head_dim
    cos_TK, sin_TK = cos_MK.index_select(0, step.pos_T), sin_MK.index_select(0, step.pos_T)
    q_THK, key_TGK, value_TGK = turn(qkv_TX, cos_TK, sin_TK, lay, scales)
    kv_T2GK = torch.empty(T, 2, G, K, dtype=FLOAT_DTYPES.get(lay.fmt, torch.float32))
    kv_T2GK[:, 0] = key_TGK
    kv_T2GK[:, 1] = value_TGK
    write = rows.write
    word = WORDS[write.word]
    keys = _rows_at_every_word(pool.view(word), lay.row_bytes // write.word)
    if lay.quantized:
        _store_codes(kv_T2GK, keys, pool, step, layer, _static_scales(scales, lay.fmt))
    else:
        keys.index_copy_(0, write.key_LX[layer], kv_T2GK.view(T * 2 * G, K).view(word))
    return q_THK.to(qkv_TX.dtype).contiguous()


def _rows_at_every_word(words: Tensor, width: int, stride: int = 1) -> Tensor:
    """Row i holds words i, i + stride, ...  Rows overlap: what is written must not."""
    return words.as_strided((len(words) - (width - 1) * stride, width), (1, stride))


def _store_codes(
    kv_T2GK: Tensor, keys: Tensor, pool: Tensor, step: KvStep, layer: int, static_2: Tensor | None
) -> None:
    lay, write, K = step.layout, step.rows.write, step.layout.head_dim
    given = None if static_2 is None else static_2[:, None].expand(kv_T2GK.shape[:3])
    codes_T2GK, scale_T2G, zero_T2G = quantize_heads(kv_T2GK, lay.fmt, given)
    words = pool.view(torch.int32)
    words.index_copy_(0, write.scale_LX[layer], _pairs(scale_T2G))
    if zero_T2G is not None:
        words.index_copy_(0, write.scale_LX[layer] + lay.block_tokens, _pairs(zero_T2G))
    if lay.bits == 8:
        key_XK, value_XK = (x.reshape(-1, K).view(torch.uint8) for x in codes_T2GK.unbind(1))
        keys.index_copy_(0, write.key_LX[layer], key_XK.view(keys.dtype))
        columns = _rows_at_every_word(pool, K, lay.block_tokens)
        columns.index_copy_(0, write.value_LX[layer], value_XK ^ BIAS.get(lay.fmt, 0))
        return
    codes = (codes_T2GK + BIAS[lay.fmt]).view(torch.uint8)
    packed = codes[:, 0, :, : K // 2] | codes[:, 0, :, K // 2 :] << 4
    keys.index_copy_(0, write.key_LX[layer], packed.view(-1, K // 2).view(keys.dtype))
    columns = _rows_at_every_word(pool, K, lay.block_tokens // 2)
    value_XK = codes[:, 1].reshape(-1, K)
    for half_X, shift, kept in zip(write.half_X, (0, 4), (0xF0, 0x0F), strict=True):
        at = write.value_LX[layer][half_X]
        columns.index_copy_(0, at, columns.index_select(0, at) & kept | value_XK[half_X] << shift)


def _pairs(x_T2G: Tensor) -> Tensor:
    """The keys' and values' fp16 of every token and head in one int32."""
    return torch.stack((x_T2G[:, 0], x_T2G[:, 1]), dim=-1).view(torch.int32).view(-1)


def rope_kv_write(
    qkv_TX: Tensor,
    cos_MK: Tensor,
    sin_MK: Tensor,
    pool: Tensor,
    step: KvStep,
    layer: int,
    num_heads: int,
    scales: KvScales = NO_SCALES,
) -> Tensor:
    """Returns the rotated q_THK; writes the step's keys and values into `pool`.

    Tables are fp32 [positions, K], their second half equal to the first."""
    assert qkv_TX.shape == (
        step.num_tokens,
        (num_heads + 2 * step.layout.num_kv_heads) * step.layout.head_dim,
    )
    assert qkv_TX.stride(1) == 1
    run = rope_kv_write_cpu if step.work is None else rope_kv_write_triton
    return run(qkv_TX, cos_MK, sin_MK, pool, step, layer, scales)


def _spans(c: Case) -> tuple[tuple[int, int, int], ...]:
    """`decodes` sequences with one token each, a fresh chunk of `chunk` tokens, or SPANS."""
    if "decodes" in c.dims:
        return tuple((b, 40, 1) for b in range(c["decodes"]))
    return ((0, 0, c["chunk"]),) if "chunk" in c.dims else SPANS


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    layout = KvLayout(c["fmt"], c["G"], c["K"])
    spans = _spans(c)
    length = max(start + count for _, start, count in spans)
    paged = Paged.make(layout, (length,) * (1 + max(seq for seq, _, _ in spans)), generator)
    width = (c["H"] + 2 * c["G"]) * c["K"]
    place_T2 = places(*spans)
    qkv_TX = torch.randn(len(place_T2), width + c.dims.get("pad", 0), generator=generator).to(c.dtype)
    channel = torch.rand(c["G"], c["K"], generator=generator) + 0.5 if c.dims.get("channel") else None
    return qkv_TX[:, :width], place_T2, *rope_tables(length, c["K"]), paged, channel


def _write(
    run: Any,
    qkv_TX: Tensor,
    place_T2: Tensor,
    cos_MK: Tensor,
    sin_MK: Tensor,
    paged: Paged,
    channel: Tensor | None,
    config: RopeKvWriteConfig | None = None,
) -> tuple[Tensor | None, ...]:
    """Writes layer 1 of a copy of the pool: (q, what it then holds for these rows as integers, but for wide floats)."""
    paged = paged.to(qkv_TX.device)
    triton = run is rope_kv_write_triton
    step = paged.step(place_T2, triton=triton)
    options = {"config": config} if triton else {}
    q_THK = run(qkv_TX, cos_MK, sin_MK, paged.pool, step, 1, KvScales(channel), **options)
    # read row by row: a GPU's answer would cost a wait for each
    return q_THK, *(None if x is None else _bits(x) for x in paged.to("cpu").stored(place_T2, 1))


def _timed(
    run: Any,
    qkv_TX: Tensor,
    place_T2: Tensor,
    cos_MK: Tensor,
    sin_MK: Tensor,
    paged: Paged,
    channel: Tensor | None,
    **options: Any,
) -> Callable[[], Tensor]:
    step, scales = paged.step(place_T2, triton=run is rope_kv_write_triton), KvScales(channel)
    return lambda: run(qkv_TX, cos_MK, sin_MK, paged.pool, step, 1, scales, **options)


def _bits(x: Tensor) -> Tensor:
    """Neighbours among the values of a type of 8 or 16 bits are neighbours among these integers."""
    if x.dtype == torch.float8_e4m3fn:
        bits = x.view(torch.int8).short()
        return torch.where(bits < 0, -(bits & 127), bits)
    return x.view(torch.int16) if x.dtype.itemsize == 2 else x


def _cost(c: Case) -> Cost:
    tokens, layout = len(places(*_spans(c))), KvLayout(c["fmt"], c["G"], c["K"])
    rows = (2 * c["H"] + 2 * c["G"]) * c["K"] * c.dtype.itemsize
    return Cost(tokens * (rows + layout.block_bytes // layout.block_tokens), tokens * 6 * c["H"] * c["K"])


def _serving(shape: ModelShape) -> tuple[Case, ...]:
    heads = {"H": shape.H, "G": shape.G, "K": shape.K}
    steps: tuple[dict[str, int], ...] = (*({"decodes": n} for n in (1, 16, 64, 256)), {"chunk": 2048})
    return tuple(
        case(torch.bfloat16, **heads, fmt=fmt, **step) for fmt in ("bf16", *CODE_BITS) for step in steps
    )


def _small(c: Case) -> Case:
    """Two decodes, or a chunk over two blocks."""
    dims = {name: x for name, x in c.dims.items() if name not in ("decodes", "chunk")}
    return Case(c.dtype, {**dims, "decodes": 2} if "decodes" in c.dims else {**dims, "chunk": 40})


_WIDE = {"H": 32, "G": 8, "K": 128}
SPEC = KernelSpec(
    name="rope_kv_write",
    runs={"cpu": partial(_write, rope_kv_write_cpu), "triton": partial(_write, rope_kv_write_triton)},
    timed={"cpu": partial(_timed, rope_kv_write_cpu), "triton": partial(_timed, rope_kv_write_triton)},
    ref=partial(_write, rope_kv_write_ref),
    make=_make,
    cost=_cost,
    row_args=(0, 1),
    tests=(
        case(torch.float32, H=4, G=2, K=16, fmt="fp32"),
        case(torch.bfloat16, H=3, G=1, K=80, fmt="bf16", pad=16),
        case(torch.float16, H=2, G=2, K=64, fmt="fp16", channel=True),
        case(torch.bfloat16, H=6, G=3, K=32, fmt="fp8", channel=True),
        case(torch.float32, H=5, G=1, K=8, fmt="int8"),
        case(torch.bfloat16, H=4, G=2, K=80, fmt="int8"),
        case(torch.float32, H=2, G=2, K=10, fmt="int4"),
        case(torch.bfloat16, H=4, G=2, K=64, fmt="int4"),
        case(torch.float16, H=16, G=1, K=96, fmt="int4z", channel=True),
    ),
    compiles=tuple(
        case(torch.bfloat16, **_WIDE, fmt=fmt, **step)
        for fmt in ("bf16", *CODE_BITS)
        for step in ({"decodes": 2}, {"chunk": 40})
    ),
    benches=tuple(
        case(torch.bfloat16, **_WIDE, fmt=fmt, **step)
        for fmt in ("bf16", *CODE_BITS)
        for step in ({"decodes": 64}, {"chunk": 4096})
    ),
    serving=_serving,
    config=lambda c, gpu: RopeKvWriteConfig.pick(
        gpu, c["H"], KvLayout(c["fmt"], c["G"], c["K"]), "decodes" in c.dims
    ),
    candidates=lambda c, gpu: RopeKvWriteConfig.candidates(c["H"], c["G"], "decodes" in c.dims),
    small=_small,
)
