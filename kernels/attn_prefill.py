"""Causal attention of chunks of tokens over their whole paged context, the chunk itself included.

A program takes TOKENS tokens of a chunk item and one KV head; (token, head) pairs are the rows of its products.  Keys
before the tile need no mask; then come those that some row may not see.  Keys are added up in turns of BN from key 0,
whatever the tile, and a turn of masked keys changes no bit: a row's result depends neither on its neighbours nor on
where its chunk is cut.  Not split over the keys: chunks bring enough programs.
Bound by the tensor cores: 4 K operations a query, head and key.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attn_ref import attention_ref
from kernels.kv_case import Paged, places
from kernels.kv_dequant import kv_dequant_triton
from kernels.kv_layout import SLOT_BITS, KvLayout
from kernels.kv_read import FLOAT_DTYPES
from kernels.kv_step import KvStep
from kernels.kv_to_fp8 import kv_to_fp8
from kernels.kv_work import CHUNK_TOKENS, chunk_items, scratch_tables
from kernels.launch import GpuFacts, cdiv, default_device, gpu_facts, launch
from kernels.prefill_fp8 import prefill_fp8, rounded_queries, takes_fp8
from kernels.prefill_tile import (
    TL_DTYPES,
    UNIT_BYTES,
    Keys,
    attend_ahead,
    attend_range,
    pool_sizes,
    product_dtype,
    tile_rows,
)
from kernels.rope_kv_write import rope_kv_write_cpu
from kernels.spec import Bound, Case, Cost, KernelSpec, ModelShape, case
from kernels.table import tuned


@dataclass(frozen=True)
class AttnPrefillConfig:
    """Tile: `block_m` rows of (token, head) pairs against `block_n` keys a turn.  `ahead`: scores a turn ahead."""

    block_m: int
    block_n: int
    ahead: bool
    num_warps: int
    num_stages: int

    @classmethod
    def pick(cls, gpu: GpuFacts, head_dim: int, heads_per_kv: int, bits: int) -> "AttnPrefillConfig":
        """`bits`: of the operands of the products."""
        # words: a tile of another head dim or type needs other room
        dims = {"K": f"K{head_dim}", "heads": f"H{heads_per_kv}", "bits": f"b{bits}"}
        found = tuned(cls, "attn_prefill", gpu, **dims)
        return found or cls.rule(gpu, padded(head_dim), bits)

    @classmethod
    def rule(cls, gpu: GpuFacts, block_d: int, bits: int) -> "AttnPrefillConfig":
        # all without spills, registers and programs an SM counted (docs/log.md)
        if bits == 32:  # no tensor core takes them: a thread holds more of the operands than of the result
            return cls(32, 16, False, 4 if block_d <= 64 else 8, 1)
        if gpu.capability >= 90:
            if (
                block_d <= 64 and gpu.capability == 90
            ):  # 128 registers: two programs on an SM overlap each other
                return cls(128, 64, False, 8, 3)
            return cls(128, 64, True, 8, 3) if block_d <= 128 else cls(128, 32, gpu.capability > 90, 8, 3)
        # products that are not asynchronous leave nothing to overlap, and keep the queries in registers
        if block_d <= 128:
            return cls(128, 64 if block_d <= 64 else 32, False, 8, 3)
        return cls(32, 32, False, 4, 3)


def padded(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit(do_not_specialize=["stride_block", "layer"])
def _attn_prefill_kernel(
    out,
    q,
    codes,
    slab_table,
    block_table,
    chunks,
    stride_slab,
    stride_block,
    layer,
    scale_log2,
    H: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    PER: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    HEADS: tl.constexpr = H // G
    pid = tl.program_id(0)
    i_g = pid % G
    i_seq, i_row, num_rows, i_pos = tile_rows(pid, chunks, G, PARTS, TOKENS)
    if num_rows < 1:
        return
    o_m = tl.arange(0, BM)
    o_t = o_m // HEADS
    o_d = tl.arange(0, BLOCK_D)
    o_out = ((i_row + o_t) * H + i_g * HEADS + o_m % HEADS) * K
    m_out = (o_t < num_rows)[:, None] & (o_d < K)[None, :]
    b_q = tl.load(q + o_out[:, None] + o_d[None, :], mask=m_out, other=0.0).to(DTYPE)

    p_blocks = block_table + i_seq * stride_block
    i_end = i_pos + num_rows
    i_full = i_pos // BN * BN
    b_acc = tl.zeros([BM, BLOCK_D], tl.float32)
    b_max = tl.full([BM], -1.0e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    if i_full > 0:
        if AHEAD:
            b_acc, b_max, b_sum = attend_ahead(
                b_acc, b_max, b_sum, b_q, codes, slab_table, p_blocks, stride_slab, layer, i_g,
                i_full, scale_log2, STAGES, PER, K, P, BN, BLOCK_D, BLOCK_UNITS, HEAD_UNITS, SLOT_BITS,
            )  # fmt: skip
        else:
            b_acc, b_max, b_sum = attend_range(
                b_acc, b_max, b_sum, b_q, codes, slab_table, p_blocks, stride_slab, layer, i_g,
                0, i_full, i_full, i_pos + o_t, scale_log2, False, STAGES, PER, K, P, BN, BLOCK_D, BLOCK_UNITS, HEAD_UNITS, SLOT_BITS,
            )  # fmt: skip
    b_acc, b_max, b_sum = attend_range(
        b_acc, b_max, b_sum, b_q, codes, slab_table, p_blocks, stride_slab, layer, i_g,
        i_full, i_end, i_end, i_pos + o_t, scale_log2, True, 1, PER, K, P, BN, BLOCK_D, BLOCK_UNITS, HEAD_UNITS, SLOT_BITS,
    )  # fmt: skip
    b_y = b_acc / b_sum[:, None]
    tl.store(out + o_out[:, None] + o_d[None, :], b_y.to(out.dtype.element_ty), mask=m_out)


def attn_prefill(
    out_THK: Tensor,
    q_THK: Tensor,
    pool: Tensor,
    step: KvStep,
    layer: int,
    scale: float,
    config: AttnPrefillConfig | None = None,
    fp8: bool = False,
) -> None:
    """Writes the rows of `out_THK` that belong to chunks.  `fp8`: over an fp8 or int4 pool, multiply in fp8 where
    there is a kernel for it: queries and probabilities are rounded to e4m3 then."""
    if fp8 and takes_fp8(gpu_facts(q_THK.device), step.layout):
        prefill_fp8(out_THK, q_THK, _keys_in_fp8(pool, step, layer), step.work.chunk_X4, scale)
        return
    _, H, K = q_THK.shape
    keys = _keys(pool, step, layer, q_THK.dtype)
    lay, G = keys.layout, keys.layout.num_kv_heads
    dtype = product_dtype(q_THK.dtype, lay.fmt)
    c = config or AttnPrefillConfig.pick(gpu_facts(q_THK.device), K, H // G, 8 * dtype.itemsize)
    codes = keys.pool.view(FLOAT_DTYPES[lay.fmt])
    tokens = c.block_m * G // H
    assert tokens, f"{H // G} query heads a KV head do not fit {c}"
    parts = cdiv(CHUNK_TOKENS, tokens)
    launch(
        _attn_prefill_kernel,
        (len(step.work.chunk_X4) * parts * G,),
        out_THK,
        q_THK,
        codes,
        keys.slab_table_SL,
        keys.block_BN,
        step.work.chunk_X4,
        keys.slab_table_SL.stride(0),
        keys.block_BN.stride(0),
        keys.layer,
        scale * math.log2(math.e),
        H=H,
        G=G,
        K=K,
        **pool_sizes(lay),
        PER=UNIT_BYTES // codes.element_size(),
        SLOT_BITS=keys.slot_bits,
        DTYPE=TL_DTYPES[dtype],
        BLOCK_D=padded(K),
        BM=c.block_m,
        BN=min(c.block_n, 2 * lay.block_tokens),
        TOKENS=tokens,
        PARTS=parts,
        AHEAD=c.ahead,
        STAGES=c.num_stages,
        num_warps=c.num_warps,
    )


def _keys(pool: Tensor, step: KvStep, layer: int, q_dtype: torch.dtype) -> Keys:
    """The pool itself, or the chunks' blocks of this layer dequantized: once a layer, not once a tile of queries."""
    lay, work = step.layout, step.work
    if not lay.quantized:
        return Keys(pool, lay, step.slab_table_SL, work.block_BN, layer, SLOT_BITS)
    fmt = next(fmt for fmt, held in FLOAT_DTYPES.items() if held == q_dtype)
    wide = lay.with_format(fmt)
    scratch = torch.empty(len(work.scratch_X2) * wide.block_bytes, dtype=torch.uint8, device=pool.device)
    kv_dequant_triton(scratch, pool, lay, step.slab_table_SL, work.scratch_X2, layer, fmt)
    return Keys.of_scratch(scratch, wide, work.scratch_BN)


def _keys_in_fp8(pool: Tensor, step: KvStep, layer: int) -> Keys:
    """The pool itself, or the chunks' int4 blocks of this layer as fp8."""
    lay, work = step.layout, step.work
    if lay.fmt == "fp8":
        return Keys(pool, lay, step.slab_table_SL, work.block_BN, layer, SLOT_BITS)
    wide = lay.with_format("fp8")
    scratch = torch.empty(len(work.scratch_X2) * wide.block_bytes, dtype=torch.uint8, device=pool.device)
    kv_to_fp8(scratch, pool, lay, step.slab_table_SL, work.scratch_X2, layer)
    return Keys.of_scratch(scratch, wide, work.scratch_BN)


def _spans(c: Case) -> tuple[tuple[int, int, int], ...]:
    """`spans` of (sequence, start, count) as they are, or one chunk of `chunk` tokens after `context` others."""
    return c.dims.get("spans") or ((0, c["context"], c["chunk"]),)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    """Layer 1 of the pool holds every sequence up to its last row; nothing else but NaN is there."""
    layout = KvLayout(c["fmt"], c["G"], c["K"])
    ends = {seq: start + count for seq, start, count in _spans(c)}
    paged = Paged.make(layout, tuple(ends[seq] for seq in sorted(ends)), generator)
    context_T2 = places(*((seq, 0, end) for seq, end in ends.items()))
    qkv_TX = torch.randn(len(context_T2), 3 * c["G"] * c["K"], generator=generator).to(c.dtype)
    one_MK = torch.ones(max(ends.values()), c["K"])
    step = paged.step(context_T2, triton=False)
    rope_kv_write_cpu(qkv_TX, one_MK, torch.zeros_like(one_MK), paged.pool, step, 1)
    place_T2 = places(*_spans(c))
    q_THK = torch.randn(len(place_T2), c["H"], c["K"], generator=generator).to(c.dtype)
    return q_THK, place_T2, paged, c["K"] ** -0.5, c.dims.get("fp8", False)


def _prepare(q_THK: Tensor, place_T2: Tensor, paged: Paged, scale: float, fp8: bool) -> tuple[Any, ...]:
    """A step whose every span is a chunk, however short: serving gives those to the decode kernel."""
    paged = paged.to(q_THK.device)
    step = paged.step(place_T2, triton=True, heads_per_kv=q_THK.shape[1] // paged.layout.num_kv_heads)
    every = np.arange(len(step.spans.count_B))
    tables = (chunk_items(step.spans, every), *scratch_tables(paged.layout, step.spans, every))
    chunk_X4, *scratch = (torch.from_numpy(t).int().to(q_THK.device) for t in tables)
    work = step.work._replace(chunk_X4=chunk_X4, scratch_X2=scratch[0], scratch_BN=scratch[1])
    return q_THK, paged.pool, replace(step, work=work), scale, fp8


def _run(
    q_THK: Tensor,
    pool: Tensor,
    step: KvStep,
    scale: float,
    fp8: bool,
    config: AttnPrefillConfig | None = None,
) -> Tensor:
    out_THK = torch.empty_like(q_THK)
    attn_prefill(out_THK, q_THK, pool, step, 1, scale, config, fp8)
    return out_THK


def _ref(q_THK: Tensor, place_T2: Tensor, paged: Paged, scale: float, fp8: bool) -> Tensor:
    return attention_ref(q_THK, paged.pool, paged.step(place_T2), 1, scale)


def _bound(c: Case, args: tuple[Any, ...]) -> Bound | None:
    """Of products in e4m3: half an ulp of 3 mantissa bits is 2^-4 of a probability, so of the mean of |v|, which is below
    its root mean square; the 2^-8 is the bf16 of the result, and 14-bit sums on a GPU.  The truth has the queries as
    they are rounded; the errors of probabilities are independent, and far smaller in the mean."""
    q_THK, place_T2, paged, scale, fp8 = args
    if not (fp8 and takes_fp8(gpu_facts(default_device()), paged.layout)):
        return None
    step, q = paged.step(place_T2), rounded_queries(q_THK)
    truth, squares = (attention_ref(q, paged.pool, step, 1, scale, power) for power in (1, 2))
    each = 2**-4 * squares.sqrt() + 2**-8 * truth.abs() + 1e-3
    return Bound(truth, each, 0.03 * squares.mean().sqrt().item())


def _cost(c: Case) -> Cost:
    """Keys and values are read once; causal: half of the chunk's own square."""
    layout = KvLayout(c["fmt"], c["G"], c["K"])
    rows = sum(count for _, _, count in _spans(c))
    pairs = sum(count * start + count * (count + 1) // 2 for _, start, count in _spans(c))
    read = sum(start + count for _, start, count in _spans(c)) * layout.block_bytes // layout.block_tokens
    return Cost(read + 2 * rows * c["H"] * c["K"] * c.dtype.itemsize, 4 * pairs * c["H"] * c["K"])


def _in_fp8(c: Case, gpu: GpuFacts) -> bool:
    return c.dims.get("fp8", False) and takes_fp8(gpu, KvLayout(c["fmt"], c["G"], c["K"]))


def _config(c: Case, gpu: GpuFacts) -> AttnPrefillConfig | None:
    """None: the kernel in fp8 has one shape."""
    if _in_fp8(c, gpu):
        return None
    bits = 8 * torch.promote_types(c.dtype, FLOAT_DTYPES.get(c["fmt"], c.dtype)).itemsize
    return AttnPrefillConfig.pick(gpu, c["K"], c["H"] // c["G"], bits)


def _candidates(c: Case, gpu: GpuFacts) -> Iterator[AttnPrefillConfig]:
    if _in_fp8(c, gpu):
        return
    for block_m, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
        for block_n, ahead, stages in itertools.product((32, 64, 128), (False, True), (2, 3, 4)):
            yield AttnPrefillConfig(block_m, block_n, ahead, warps, stages)


def _serving(shape: ModelShape) -> tuple[Case, ...]:
    H, G, K = shape.H, shape.G, shape.K
    return tuple(
        case(torch.bfloat16, chunk=chunk, context=context, fmt=fmt, H=H, G=G, K=K, fp8=fmt != "bf16")
        for chunk, context in ((1024, 0), (8192, 0), (2048, 6144))
        for fmt in ("bf16", "fp8", "int4")
    )


def _bytes_a_turn(constants: Mapping[str, Any]) -> int:
    return 2 * constants["BN"] * constants["K"] * UNIT_BYTES // constants["PER"]


def _bytes_a_turn8(constants: Mapping[str, Any]) -> int:
    return constants["BN"] * (2 * constants["K"] + 4)


_CUTS = ((0, 0, 3), (1, 31, 1), (2, 100, 45), (3, 63, 66))
_WIDE = {"H": 32, "G": 8, "K": 128}
SPEC = KernelSpec(
    name="attn_prefill",
    runs={"triton": _run},
    prepare={"triton": _prepare},
    ref=_ref,
    make=_make,
    cost=_cost,
    row_args=(0, 1),
    tests=(
        case(torch.bfloat16, spans=_CUTS, fmt="bf16", H=4, G=1, K=64),
        case(torch.float16, chunk=70, context=0, fmt="fp16", H=3, G=1, K=80),
        case(torch.bfloat16, chunk=70, context=65, fmt="bf16", H=2, G=1, K=96),
        case(torch.float16, chunk=9, context=100, fmt="fp16", H=16, G=1, K=128),
        case(torch.bfloat16, chunk=20, context=32, fmt="bf16", H=7, G=1, K=256),
        case(torch.float32, chunk=11, context=17, fmt="fp32", H=5, G=1, K=16),
        case(torch.float32, chunk=40, context=3, fmt="bf16", H=1, G=1, K=32),
        case(torch.bfloat16, spans=((0, 31, 1), (1, 100, 45)), fmt="int8", H=2, G=1, K=64),
        case(torch.float16, chunk=35, context=33, fmt="int4z", H=3, G=1, K=32),
        case(torch.bfloat16, chunk=33, context=5, fmt="fp8", H=2, G=2, K=64),
        case(torch.bfloat16, chunk=70, context=0, fmt="fp8", H=4, G=1, K=128, fp8=True),
        case(torch.bfloat16, spans=((0, 31, 3), (1, 130, 33)), fmt="fp8", H=3, G=1, K=64, fp8=True),
        case(torch.float16, spans=((0, 40, 50), (1, 130, 33)), fmt="fp8", H=1, G=1, K=80, fp8=True),
        case(torch.bfloat16, spans=((0, 31, 3), (1, 130, 33)), fmt="int4", H=4, G=2, K=64, fp8=True),
    ),
    compiles=tuple(
        case(dtype, chunk=9, context=0, fmt=fmt, H=heads * 2, G=2, K=K)
        for dtype, fmt, heads, K in (
            (torch.float16, "fp16", 1, 64),
            (torch.bfloat16, "bf16", 7, 80),
            (torch.bfloat16, "bf16", 3, 96),
            (torch.bfloat16, "bf16", 16, 256),
            (torch.float32, "fp32", 4, 64),
            (torch.float32, "fp32", 4, 256),
            (torch.float32, "bf16", 4, 128),
        )
    ),
    benches=tuple(
        case(torch.bfloat16, chunk=chunk, context=context, fmt=fmt, **_WIDE, fp8=fp8)
        for chunk, context in ((1024, 0), (8192, 0), (2048, 14336))
        for fmt, fp8 in (("bf16", False), ("fp8", True), ("fp8", False), ("int4", False))
    ),
    serving=_serving,
    config=_config,
    candidates=_candidates,
    small=lambda c: case(c.dtype, **{**c.dims, "chunk": 9, "context": 0}),
    bound=_bound,
    streams={"_attn_prefill_kernel": _bytes_a_turn, "_prefill_fp8_kernel": _bytes_a_turn8},
)
