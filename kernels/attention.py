"""Paged attention: o = softmax(scale q k^T) v over the keys and values as stored, causal, for decodes and chunks.

T tokens of the step, H query heads in G groups that share a KV head, K head dim.  Every query sees its own key and all
before it, read back from the pool (so write first): chunk cuts and preemption change no input.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from kernels.attn_cpu import attn_cpu
from kernels.attn_decode import (
    UNIT_BYTES,
    AttnDecodeConfig,
    Parts,
    Query,
    attn_decode,
    padded_columns,
)
from kernels.attn_merge import attn_merge, attn_merge_quant
from kernels.attn_prefill import attn_prefill
from kernels.attn_ref import attention_ref
from kernels.kv_case import Paged, places
from kernels.kv_layout import KvLayout, wide_tokens
from kernels.kv_step import KvStep
from kernels.kv_work import LEAST_SPLIT
from kernels.launch import GpuFacts
from kernels.quant_rows import Quant, QuantRows, code_dtype, quant_rows
from kernels.rope_kv_write import rope_kv_write_cpu
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case

FUSED_ROWS = 8  # fewer rows of many pieces keep too few programs busy when each merges a whole row


def attention_triton(
    query: Query,
    step: KvStep,
    quant: torch.dtype | None,
    config: AttnDecodeConfig | None = None,
    fp8_prefill: bool = False,
) -> Tensor | QuantRows:
    q_THK, work = query.q_THK, step.work
    assert work is not None, "this KvStep was built for a CPU"
    # merging whole rows pays once they are many; a row's codes must not depend on how many there are
    fused = quant is not None and not step.deterministic and not len(work.chunk_X4)
    fused = fused and len(work.merge_X3) >= FUSED_ROWS
    out_THK = q_THK if fused else torch.empty_like(q_THK)
    if len(work.merge_X3):
        parts = Parts.empty(work.num_slots, *q_THK.shape[1:], q_THK.device)
        for one_token, pieces in ((True, work.piece_X8), (False, work.wide_X8)):
            if len(pieces):
                attn_decode(out_THK, parts, query, step, one_token, not fused, config)
        if fused:
            return attn_merge_quant(q_THK, parts, step, quant)
        if work.num_split:
            attn_merge(out_THK, parts, step)
    if len(work.chunk_X4):
        attn_prefill(out_THK, q_THK, query.pool, step, query.layer, query.scale, fp8=fp8_prefill)
    return out_THK if quant is None else quant_rows(out_THK.flatten(1), quant)


@overload
def attention(q_THK: Tensor, pool: Tensor, step: KvStep, layer: int, scale: float) -> Tensor: ...


@overload
def attention(
    q_THK: Tensor,
    pool: Tensor,
    step: KvStep,
    layer: int,
    scale: float,
    quant: Quant,
    int8_qk: bool = False,
    fp8_prefill: bool = False,
) -> Tensor | QuantRows: ...


def attention(
    q_THK: Tensor,
    pool: Tensor,
    step: KvStep,
    layer: int,
    scale: float,
    quant: Quant = None,
    int8_qk: bool = False,
    fp8_prefill: bool = False,
) -> Tensor | QuantRows:
    """o_THK, or its rows' codes with `quant` (int8 or fp8).  The step says whether it is deterministic, and which path
    it was built for.  `int8_qk`: on a GPU, decodes over int8 and 4 bit keys take queries of 8 bits instead of 16.
    `fp8_prefill`: there, chunks over fp8 and int4 keys and values are multiplied in fp8 (prefill_fp8)."""
    lay = step.layout
    assert q_THK.is_contiguous(), f"{q_THK.stride()=}"
    assert len(q_THK) == step.num_tokens, f"{q_THK.shape=} {step.num_tokens=}"
    assert q_THK.shape[1] % lay.num_kv_heads == 0, f"{q_THK.shape=} {lay=}"
    assert q_THK.shape[2] == lay.head_dim, f"{q_THK.shape=} {lay=}"
    dtype = code_dtype(quant)
    if step.work is not None:
        query = Query(q_THK, pool, layer, scale, 1 if int8_qk else 2)
        return attention_triton(query, step, dtype, fp8_prefill=fp8_prefill)
    out_THK = attn_cpu(q_THK, pool, step, layer, scale)
    return out_THK if dtype is None else quant_rows(out_THK.flatten(1), dtype)


def _spans(c: Case) -> tuple[tuple[int, int, int], ...]:
    """`spans` as they are, or `decodes` with `context` tokens each (the last `tokens` of which are new), or a fresh chunk
    of `chunk` tokens; else everything around a block: decodes of 1, P - 1, P, P + 1 and 3P + 5 tokens, one with context
    and a fresh short chunk."""
    if "spans" in c.dims:
        return c["spans"]
    if "chunk" in c.dims or "decodes" in c.dims:
        new = c.dims.get("tokens", 1)
        decodes = tuple((b, c["context"] - new, new) for b in range(c.dims.get("decodes", 0)))
        return (*decodes, (len(decodes), 0, c["chunk"])) if "chunk" in c.dims else decodes
    P = KvLayout(c["fmt"], c["G"], c["K"]).block_tokens
    decodes = tuple((b, length - 1, 1) for b, length in enumerate((1, P - 1, P, P + 1, 3 * P + 5)))
    return (*decodes, (5, P - 1, 3), (6, 0, 2))


class _Steps(NamedTuple):
    plain: KvStep
    deterministic: KvStep


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
    return q_THK, place_T2, paged, c["K"] ** -0.5, c.dims.get("int8_qk", False)


def _prepare(triton: bool, q_THK: Tensor, place_T2: Tensor, paged: Paged, *rest: Any) -> tuple[Any, ...]:
    paged, heads = paged.to(q_THK.device), q_THK.shape[1] // paged.layout.num_kv_heads
    steps = _Steps(*(paged.step(place_T2, triton, det, heads_per_kv=heads) for det in (False, True)))
    return q_THK, paged.pool, steps, *rest


def _run_cpu(
    q_THK: Tensor, pool: Tensor, steps: _Steps, scale: float, int8_qk: bool, deterministic: bool = False
) -> Tensor:
    return attn_cpu(q_THK, pool, steps.deterministic if deterministic else steps.plain, 1, scale)


def _run_triton(
    q_THK: Tensor,
    pool: Tensor,
    steps: _Steps,
    scale: float,
    int8_qk: bool,
    deterministic: bool = False,
    config: Any = None,
) -> Tensor | QuantRows:
    query = Query(q_THK, pool, 1, scale, 1 if int8_qk else 2)
    return attention_triton(query, steps.deterministic if deterministic else steps.plain, None, config)


def _ref(q_THK: Tensor, place_T2: Tensor, paged: Paged, scale: float, int8_qk: bool) -> Tensor:
    return attention_ref(q_THK, paged.pool, paged.step(place_T2), 1, scale)


def _cost(c: Case) -> Cost:
    layout = KvLayout(c["fmt"], c["G"], c["K"])
    token_bytes = layout.block_bytes // layout.block_tokens
    spans = _spans(c)
    rows = sum(count for _, _, count in spans)
    pairs = sum(count * start + count * (count + 1) // 2 for _, start, count in spans)
    read = sum(start + count for _, start, count in spans) * token_bytes
    return Cost(read + 2 * rows * c["H"] * c["K"] * c.dtype.itemsize, 4 * pairs * c["H"] * c["K"])


def _decode_config(c: Case, gpu: GpuFacts) -> AttnDecodeConfig | None:
    layout = KvLayout(c["fmt"], c["G"], c["K"])
    columns = padded_columns(c.dims.get("tokens", 1), c["H"] // c["G"])
    return AttnDecodeConfig.pick(gpu, layout, columns, c.dtype.itemsize) if "decodes" in c.dims else None


def _candidates(c: Case, gpu: GpuFacts) -> Iterator[AttnDecodeConfig]:
    if "decodes" in c.dims:
        layout = KvLayout(c["fmt"], c["G"], c["K"])
        yield from AttnDecodeConfig.candidates(gpu, 2 * layout.key_bytes)


def _small(c: Case) -> Case:
    """Enough context for two pieces, so that they are merged."""
    few = {"decodes": 1, "context": LEAST_SPLIT + 2} if "decodes" in c.dims else {"chunk": 65}
    return case(c.dtype, **c.dims | few)


def _serving(shape: ModelShape) -> tuple[Case, ...]:
    """Decodes of every format that is served; four tokens a sequence, as drafts that are to be checked have; and as many
    as the router gives to one work item."""
    dims = {"H": shape.H, "G": shape.G, "K": shape.K}
    decodes = {"decodes": 64, "context": 4096}
    formats = ("bf16", "fp8", "int8", "int4", "int4z")
    return (
        *(case(torch.bfloat16, **dims, fmt=fmt, **decodes) for fmt in formats),
        *(case(torch.bfloat16, **dims, fmt=fmt, **decodes, int8_qk=True) for fmt in formats[2:]),
        *(
            case(torch.bfloat16, **dims, fmt=fmt, **decodes, tokens=tokens)
            for tokens in (4, wide_tokens(shape.K, shape.H // shape.G))
            for fmt in formats
        ),
    )


def _block_bytes(constants: Mapping[str, Any]) -> int:
    """Of one KV head: what a turn of the decode loop reads."""
    return constants["HEAD_UNITS"] * UNIT_BYTES


_WIDE = {"H": 32, "G": 8, "K": 128}
SPEC = KernelSpec(
    name="attention",
    runs={"cpu": _run_cpu, "triton": _run_triton},
    prepare={"cpu": partial(_prepare, False), "triton": partial(_prepare, True)},
    ref=_ref,
    make=_make,
    cost=_cost,
    row_args=(0, 1),
    # pieces of decodes are as long as fills the GPU, and a chunk's sums follow its cut, unless the step is deterministic
    invariant={"cpu": {"deterministic": True}, "triton": {"deterministic": True}},
    # float16 shows the errors of products that bfloat16 would hide
    tests=(
        case(torch.float32, H=4, G=2, K=16, fmt="fp32"),
        case(torch.bfloat16, H=3, G=1, K=80, fmt="bf16"),
        case(torch.float16, H=2, G=2, K=64, fmt="fp16"),
        case(torch.float32, H=16, G=1, K=8, fmt="int8"),
        case(torch.float16, H=4, G=1, K=128, fmt="int8"),
        case(torch.float32, H=10, G=2, K=32, fmt="int4"),
        case(torch.float16, H=5, G=1, K=96, fmt="int4"),
        case(torch.bfloat16, H=2, G=1, K=256, fmt="int4"),
        case(torch.float16, H=8, G=1, K=64, fmt="int4z"),
        case(torch.float16, H=16, G=1, K=80, fmt="fp8"),
        case(torch.float32, H=2, G=1, K=32, fmt="fp8"),
        case(torch.bfloat16, H=2, G=1, K=32, fmt="fp32"),
        # a chunk across the end of a piece: its first tokens see nothing of the second
        *(
            case(torch.float16, H=4, G=1, K=K, fmt=fmt, spans=((0, LEAST_SPLIT - 2, 4),))
            for fmt, K in (("fp16", 64), ("fp8", 64), ("int8", 128), ("int4", 128), ("int4z", 32))
        ),
        case(torch.float32, H=4, G=1, K=16, fmt="int8", spans=((0, LEAST_SPLIT - 2, 4),)),
    ),
    compiles=(
        *(
            case(torch.bfloat16, **_WIDE, fmt=fmt, decodes=1, context=LEAST_SPLIT + 2, chunk=65)
            for fmt in ("bf16", "int8", "int4")
        ),
        case(torch.float32, H=8, G=8, K=64, fmt="fp32", decodes=1, context=9, chunk=65),
        # the widest tiles of the widest heads, and heads that fill no power of two
        *(
            case(torch.bfloat16, H=16, G=1, K=256, fmt=fmt, decodes=1, context=LEAST_SPLIT + 2, tokens=2)
            for fmt in ("bf16", "fp8", "int8", "int4", "int4z")
        ),
        *(
            case(torch.bfloat16, H=32, G=8, K=K, fmt=fmt, decodes=1, context=LEAST_SPLIT + 2)
            for K in (80, 96)
            for fmt in ("bf16", "fp8", "int8", "int4", "int4z")
        ),
    ),
    benches=tuple(
        case(torch.bfloat16, **_WIDE, fmt=fmt, **spans)
        for fmt in ("bf16", "fp8", "int8", "int4", "int4z")
        for spans in ({"decodes": 64, "context": 4096}, {"chunk": 1024})
    ),
    serving=_serving,
    config=_decode_config,
    candidates=_candidates,
    small=_small,
    streams={"_attn_decode_kernel": _block_bytes},
)
