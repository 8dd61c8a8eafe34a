"""Dequantizes blocks of one layer into a scratch of 16-bit blocks, for kernels that read keys and values often.

x = code * scale (+ zero).  X blocks of P tokens and G heads of K dims.  Reads a block's codes, writes 2 or 4 times as
many bytes: bound by bandwidth.  Block i of the list becomes block i of `scratch`, laid out as KvLayout(out_fmt) with the
same heads, head dim and block tokens: K and V both [P, K], so V is transposed on the way.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend
from kernels.kv_case import Paged, places, rope_tables
from kernels.kv_layout import BIAS, CODE_BITS, SLOT_BITS, KvLayout
from kernels.kv_read import FLOAT_DTYPES, read_kv
from kernels.launch import GpuFacts, gpu_facts, launch
from kernels.rope_kv_write import rope_kv_write_cpu
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case
from kernels.table import tuned


@dataclass(frozen=True)
class KvDequantConfig:
    """Tokens of a program; of 4 bit they come in two parts of the block, which share V's bytes."""

    tokens: int
    num_warps: int

    @classmethod
    def pick(cls, gpu: GpuFacts, layout: KvLayout) -> "KvDequantConfig":
        K, P = layout.head_dim, layout.block_tokens
        found = tuned(cls, "kv_dequant", gpu, K=f"K{K}", P=f"P{P}", fmt=layout.fmt)
        # 16 or 8 bytes a load for each thread
        return found or cls(min(32, P), 4 if K > 64 or layout.bits == 8 else 2)

    @classmethod
    def candidates(cls, layout: KvLayout) -> Iterator["KvDequantConfig"]:
        for tokens in (32, 64):
            if tokens <= layout.block_tokens:
                yield from (cls(tokens, num_warps) for num_warps in (1, 2, 4, 8))


def kv_dequant_ref(paged: Paged, blocks_X2: Tensor, dtype: torch.dtype) -> Tensor:
    """[X, G, 2, P, K] of layer 1 in `dtype`: keys, then values of every head; zeros past the valid lanes."""
    lay, blocks = paged.layout, []
    for block, lanes in blocks_X2.tolist():
        both = torch.stack(read_kv(paged.pool, lay, paged.slab_table_SL, [block], 1))
        both[:, lanes:] = 0.0
        blocks.append(both.permute(2, 0, 1, 3).to(dtype))
    return torch.stack(blocks)


@triton.jit
def _halves_of(b_pair):
    """Two fp16 in an int32: the key's, the value's."""
    b_key = b_pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return b_key, (b_pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _store(p_out, b_code, b_scale, b_zero, m_lane, m_x, ZERO: tl.constexpr):
    """`b_code` in fp32; what lanes past the end hold may be NaN."""
    b_x = b_code * b_scale
    if ZERO:
        b_x += b_zero
    tl.store(p_out, tl.where(m_lane, b_x, 0.0).to(p_out.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["stride_slab", "layer"])
def _kv_dequant_kernel(
    out,
    codes,
    words,
    slab_table,
    blocks,
    stride_slab,
    layer,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    FMT: tl.constexpr,
    BITS: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
):
    PLANES: tl.constexpr = 8 // BITS
    ROWS: tl.constexpr = TOKENS // PLANES  # tokens of a plane
    DIMS: tl.constexpr = K // PLANES  # bytes of a key
    ZERO: tl.constexpr = FMT == "int4z"
    i_part = tl.program_id(0) % (P // TOKENS)
    i_g = tl.program_id(0) // (P // TOKENS) % G
    i_x = (tl.program_id(0) // (P // TOKENS * G)).to(tl.int64)
    i_block = tl.load(blocks + i_x * 2)
    num = tl.load(blocks + i_x * 2 + 1)
    if num == 0:
        return
    i_at = tl.load(slab_table + (i_block >> SLOT_BITS).to(tl.int64) * stride_slab + layer)
    i_slot = (i_block & ((1 << SLOT_BITS) - 1)).to(tl.int64)
    unit = (i_at >> 4) + (i_slot * G + i_g) * HEAD_UNITS
    p_codes = codes + unit * 16
    p_words = words + unit * 4 + 2 * P * DIMS // 4
    p_out = out + (i_x * G + i_g) * (2 * P * K)

    o_b = tl.arange(0, BLOCK_D // PLANES)[None, :]  # a byte of a key
    o_d = tl.arange(0, BLOCK_D)[:, None]
    o_t = i_part * ROWS + tl.arange(0, ROWS)  # a byte of a value
    p_v = p_codes + P * DIMS + o_d * (P // PLANES) + o_t[None, :]
    b_v = tl.load(p_v, mask=o_d < K, other=0.0)
    for plane in tl.static_range(PLANES):
        o_n = o_t + plane * (P // PLANES)
        m_n = o_n < num
        b_ks, b_vs = _halves_of(tl.load(p_words + o_n))
        b_kz, b_vz = b_ks, b_vs
        if ZERO:
            b_kz, b_vz = _halves_of(tl.load(p_words + P + o_n))
        m_b = o_b < DIMS
        b_k = tl.load(p_codes + o_n[:, None] * DIMS + o_b, mask=m_b, other=0.0)
        p_y = p_out + o_n[:, None] * K + o_b
        p_z = p_out + P * K + o_n[None, :] * K + o_d
        if BITS == 8:
            if BIAS != 0:
                b_v = b_v ^ -128
            _store(p_y, b_k.to(tl.float32), b_ks[:, None], b_kz[:, None], m_n[:, None], m_b, ZERO)
            _store(p_z, b_v.to(tl.float32), b_vs[None, :], b_vz[None, :], m_n[None, :], o_d < K, ZERO)
        else:
            b_k1 = ((b_k & 15).to(tl.int32) - BIAS).to(tl.float32)
            b_k2 = (((b_k >> 4) & 15).to(tl.int32) - BIAS).to(tl.float32)
            b_c = (((b_v >> (4 * plane)) & 15).to(tl.int32) - BIAS).to(tl.float32)
            _store(p_y, b_k1, b_ks[:, None], b_kz[:, None], m_n[:, None], m_b, ZERO)
            _store(p_y + DIMS, b_k2, b_ks[:, None], b_kz[:, None], m_n[:, None], m_b, ZERO)
            _store(p_z, b_c, b_vs[None, :], b_vz[None, :], m_n[None, :], o_d < K, ZERO)


def kv_dequant_triton(
    scratch: Tensor,
    pool: Tensor,
    layout: KvLayout,
    slab_table_SL: Tensor,
    blocks_X2: Tensor,
    layer: int,
    out_fmt: str,
    config: KvDequantConfig | None = None,
) -> None:
    c = config or KvDequantConfig.pick(gpu_facts(pool.device), layout)
    G, K, P = layout.num_kv_heads, layout.head_dim, layout.block_tokens
    assert P % c.tokens == 0, f"{c} cannot cut blocks of {P} tokens"
    launch(
        _kv_dequant_kernel,
        (len(blocks_X2) * G * (P // c.tokens),),
        scratch.view(FLOAT_DTYPES[out_fmt]),
        pool.view(torch.float8_e4m3fn if layout.fmt == "fp8" else torch.int8),
        pool.view(torch.int32),
        slab_table_SL,
        blocks_X2,
        slab_table_SL.stride(0),
        layer,
        G=G,
        K=K,
        P=P,
        FMT=layout.fmt,
        BITS=layout.bits,
        BIAS=BIAS.get(layout.fmt, 0),
        HEAD_UNITS=layout.head_bytes // 16,
        SLOT_BITS=SLOT_BITS,
        BLOCK_D=triton.next_power_of_2(K),
        TOKENS=c.tokens,
        num_warps=c.num_warps,
    )


def kv_dequant_cpu(
    scratch: Tensor,
    pool: Tensor,
    layout: KvLayout,
    slab_table_SL: Tensor,
    blocks_X2: Tensor,
    layer: int,
    out_fmt: str,
) -> None:
    shape = (-1, layout.num_kv_heads, 2, layout.block_tokens, layout.head_dim)
    out_XG2PK = scratch.view(FLOAT_DTYPES[out_fmt]).view(shape)
    for i, (block, lanes) in enumerate(blocks_X2.tolist()):
        if lanes:
            for part, x_PGK in enumerate(read_kv(pool, layout, slab_table_SL, [block], layer)):
                out_XG2PK[i, :, part, :lanes] = x_PGK[:lanes].transpose(0, 1)
                out_XG2PK[i, :, part, lanes:] = 0.0


def kv_dequant(
    scratch: Tensor,
    pool: Tensor,
    layout: KvLayout,
    slab_table_SL: Tensor,
    blocks_X2: Tensor,
    layer: int,
    out_fmt: str,
) -> None:
    """Writes the blocks `blocks_X2` lists, int32 (block id, valid lanes), to `scratch`: uint8, whole blocks of
    KvLayout(out_fmt, G, K, P), `out_fmt` fp16 or bf16 (or fp32), block i at i times their size.

    Lanes past the valid ones become zeros.  A line of no lanes is padding: nothing is read or written.  The launch
    depends on the length of the list alone.
    """
    assert layout.quantized, f"{layout.fmt} is not quantized: read the pool itself"
    size = KvLayout(out_fmt, layout.num_kv_heads, layout.head_dim, layout.block_tokens).block_bytes
    assert scratch.numel() % size == 0, f"{scratch.numel()} bytes of scratch are not whole blocks of {size}"
    assert scratch.numel() >= len(blocks_X2) * size, (
        f"{len(blocks_X2)} blocks do not fit {scratch.numel()} bytes"
    )
    run = kv_dequant_triton if backend.runs_triton(pool.device) else kv_dequant_cpu
    run(scratch, pool, layout, slab_table_SL, blocks_X2, layer, out_fmt)


def some_blocks(layout: KvLayout, blocks: int, generator: torch.Generator) -> tuple[Paged, Tensor]:
    """A sequence of so many blocks in layer 1, the last with one lane less than half of it, and the list of them, int32
    [blocks, 2]; nothing else but NaN is there."""
    last = layout.block_tokens // 2 - 1
    length = (blocks - 1) * layout.block_tokens + last
    paged = Paged.make(layout, (length,), generator)
    qkv_TX = torch.randn(length, 3 * layout.num_kv_heads * layout.head_dim, generator=generator)
    step = paged.step(places((0, 0, length)), triton=False)
    rope_kv_write_cpu(qkv_TX, *rope_tables(length, layout.head_dim), paged.pool, step, 1)
    blocks_X2 = torch.full((blocks, 2), layout.block_tokens, dtype=torch.int32)
    blocks_X2[:, 0] = paged.block_table_BN[0]
    blocks_X2[-1, 1] = last
    return paged, blocks_X2


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    return *some_blocks(KvLayout(c["fmt"], c["G"], c["K"]), c["blocks"], generator), c.dtype


def _run(
    run: Any, paged: Paged, blocks_X2: Tensor, dtype: torch.dtype, config: KvDequantConfig | None = None
) -> Tensor:
    paged, lay = paged.to(blocks_X2.device), paged.layout
    out_fmt = next(fmt for fmt, held in FLOAT_DTYPES.items() if held == dtype)
    size = KvLayout(out_fmt, lay.num_kv_heads, lay.head_dim, lay.block_tokens).block_bytes
    scratch = torch.full((len(blocks_X2) * size,), 255, dtype=torch.uint8, device=blocks_X2.device)
    options = {"config": config} if run is kv_dequant_triton else {}
    run(scratch, paged.pool, lay, paged.slab_table_SL, blocks_X2, 1, out_fmt, **options)
    return scratch.view(dtype).view(-1, lay.num_kv_heads, 2, lay.block_tokens, lay.head_dim)


def _timed(
    run: Any, paged: Paged, blocks_X2: Tensor, dtype: torch.dtype, **options: Any
) -> Callable[[], None]:
    lay = paged.layout
    out_fmt = next(fmt for fmt, held in FLOAT_DTYPES.items() if held == dtype)
    size = KvLayout(out_fmt, lay.num_kv_heads, lay.head_dim, lay.block_tokens).block_bytes
    scratch = torch.empty(len(blocks_X2) * size, dtype=torch.uint8, device=blocks_X2.device)
    return lambda: run(scratch, paged.pool, lay, paged.slab_table_SL, blocks_X2, 1, out_fmt, **options)


def _cost(c: Case) -> Cost:
    layout = KvLayout(c["fmt"], c["G"], c["K"])
    elements = 2 * layout.num_kv_heads * layout.head_dim * layout.block_tokens
    moved = layout.block_bytes + elements * c.dtype.itemsize
    return Cost(c["blocks"] * moved, c["blocks"] * elements)


def _serving(shape: ModelShape) -> tuple[Case, ...]:
    return tuple(
        case(torch.bfloat16, G=shape.G, K=shape.K, fmt=fmt, blocks=blocks)
        for fmt in CODE_BITS
        for blocks in (32, 256)
    )


SPEC = KernelSpec(
    name="kv_dequant",
    runs={"cpu": partial(_run, kv_dequant_cpu), "triton": partial(_run, kv_dequant_triton)},
    timed={"cpu": partial(_timed, kv_dequant_cpu), "triton": partial(_timed, kv_dequant_triton)},
    ref=kv_dequant_ref,
    make=_make,
    cost=_cost,
    row_args=(1,),
    tests=(
        case(torch.bfloat16, G=2, K=16, fmt="fp8", blocks=2),
        case(torch.float16, G=1, K=80, fmt="int8", blocks=2),
        case(torch.bfloat16, G=3, K=64, fmt="int4", blocks=2),
        case(torch.float16, G=1, K=10, fmt="int4z", blocks=3),
        case(torch.float32, G=1, K=128, fmt="int4z", blocks=2),
    ),
    compiles=tuple(case(torch.bfloat16, G=8, K=128, fmt=fmt, blocks=1) for fmt in CODE_BITS),
    benches=tuple(case(torch.bfloat16, G=8, K=128, fmt=fmt, blocks=256) for fmt in CODE_BITS),
    serving=_serving,
    config=lambda c, gpu: KvDequantConfig.pick(gpu, KvLayout(c["fmt"], c["G"], c["K"])),
    candidates=lambda c, gpu: KvDequantConfig.candidates(KvLayout(c["fmt"], c["G"], c["K"])),
    small=lambda c: Case(c.dtype, {**c.dims, "blocks": 1}),
)
