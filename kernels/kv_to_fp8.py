"""Turns int4 blocks of one layer into fp8 blocks, for products in fp8: e4m3 holds every int4 code exactly.

X blocks of P tokens and G heads of K dims.  x = code * scale stays what it was: scales are copied.  Block i of the list
becomes block i of `scratch`, laid out as KvLayout("fp8") with the same heads, head dim and block tokens.  Reads a block
and writes twice as many bytes: bound by bandwidth.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_case import Paged
from kernels.kv_dequant import kv_dequant_ref, some_blocks
from kernels.kv_layout import BIAS, SLOT_BITS, KvLayout
from kernels.kv_read import read_kv
from kernels.launch import launch
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case

FP8 = torch.float8_e4m3fn


@triton.jit(do_not_specialize=["stride_slab", "layer"])
def _kv_to_fp8_kernel(
    out,
    out_words,
    codes,
    words,
    slab_table,
    blocks,
    stride_slab,
    layer,
    G: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD_UNITS: tl.constexpr,
    OUT_UNITS: tl.constexpr,
    SLOT_BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program turns one head of a block."""
    HALF: tl.constexpr = K // 2
    i_g = tl.program_id(0) % G
    i_x = (tl.program_id(0) // G).to(tl.int64)
    i_block = tl.load(blocks + i_x * 2)
    if tl.load(blocks + i_x * 2 + 1) == 0:
        return
    i_at = tl.load(slab_table + (i_block >> SLOT_BITS).to(tl.int64) * stride_slab + layer)
    i_slot = (i_block & ((1 << SLOT_BITS) - 1)).to(tl.int64)
    unit = (i_at >> 4) + (i_slot * G + i_g) * HEAD_UNITS
    unit_out = (i_x * G + i_g) * OUT_UNITS
    o_p = tl.arange(0, P)
    b_pair = tl.load(words + unit * 4 + P * K // 4 + o_p)
    tl.store(out_words + unit_out * 4 + P * K // 2 + o_p, b_pair)

    # a byte of a key: dims b and K/2 + b; one of a value: tokens t and P/2 + t
    o_b = tl.arange(0, BLOCK_D // 2)[None, :]
    b_k = tl.load(codes + unit * 16 + o_p[:, None] * HALF + o_b, mask=o_b < HALF, other=0)
    p_k = out + unit_out * 16 + o_p[:, None] * K + o_b
    tl.store(p_k, ((b_k & 15).to(tl.int32) - BIAS).to(tl.float32).to(tl.float8e4nv), mask=o_b < HALF)
    tl.store(
        p_k + HALF, (((b_k >> 4) & 15).to(tl.int32) - BIAS).to(tl.float32).to(tl.float8e4nv), mask=o_b < HALF
    )
    o_d = tl.arange(0, BLOCK_D)[:, None]
    o_t = tl.arange(0, P // 2)[None, :]
    b_v = tl.load(codes + unit * 16 + P * HALF + o_d * (P // 2) + o_t, mask=o_d < K, other=0)
    p_v = out + unit_out * 16 + P * K + o_d * P + o_t
    tl.store(p_v, ((b_v & 15).to(tl.int32) - BIAS).to(tl.float32).to(tl.float8e4nv), mask=o_d < K)
    tl.store(
        p_v + P // 2, (((b_v >> 4) & 15).to(tl.int32) - BIAS).to(tl.float32).to(tl.float8e4nv), mask=o_d < K
    )


def kv_to_fp8(
    scratch: Tensor, pool: Tensor, layout: KvLayout, slab_table_SL: Tensor, blocks_X2: Tensor, layer: int
) -> None:
    """Writes the blocks `blocks_X2` lists, int32 (block id, valid lanes), to `scratch`: uint8, whole fp8
    blocks.  Lanes past the valid ones hold codes of whatever was there.  A line of no lanes is padding."""
    wide = layout.with_format("fp8")
    assert layout.fmt == "int4", f"{layout.fmt} has no codes that e4m3 holds exactly"
    assert scratch.numel() == len(blocks_X2) * wide.block_bytes, f"{scratch.numel()=} {len(blocks_X2)=}"
    launch(
        _kv_to_fp8_kernel,
        (len(blocks_X2) * layout.num_kv_heads,),
        scratch.view(FP8),
        scratch.view(torch.int32),
        pool.view(torch.int8),
        pool.view(torch.int32),
        slab_table_SL,
        blocks_X2,
        slab_table_SL.stride(0),
        layer,
        G=layout.num_kv_heads,
        K=layout.head_dim,
        P=layout.block_tokens,
        BIAS=BIAS["int4"],
        HEAD_UNITS=layout.head_bytes // 16,
        OUT_UNITS=wide.head_bytes // 16,
        SLOT_BITS=SLOT_BITS,
        BLOCK_D=triton.next_power_of_2(layout.head_dim),
        num_warps=4,
    )


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    return some_blocks(KvLayout("int4", c["G"], c["K"]), c["blocks"], generator)


def _scratch(paged: Paged, blocks_X2: Tensor) -> Tensor:
    size = paged.layout.with_format("fp8").block_bytes
    return torch.full((len(blocks_X2) * size,), 255, dtype=torch.uint8, device=blocks_X2.device)


def _run(paged: Paged, blocks_X2: Tensor) -> Tensor:
    """What the fp8 blocks say, read as any fp8 pool is."""
    paged = paged.to(blocks_X2.device)
    scratch = _scratch(paged, blocks_X2)
    kv_to_fp8(scratch, paged.pool, paged.layout, paged.slab_table_SL, blocks_X2, 1)
    blocks, wide = [], paged.layout.with_format("fp8")
    for i, (_, lanes) in enumerate(blocks_X2.tolist()):
        here = torch.tensor([[i * wide.block_bytes]])
        both = torch.stack(read_kv(scratch.cpu(), wide, here, [0], 0)).double()
        both[:, lanes:] = 0.0
        blocks.append(both.permute(2, 0, 1, 3))
    return torch.stack(blocks)


def _timed(paged: Paged, blocks_X2: Tensor) -> Callable[[], None]:
    scratch = _scratch(paged, blocks_X2)
    return partial(kv_to_fp8, scratch, paged.pool, paged.layout, paged.slab_table_SL, blocks_X2, 1)


def _cost(c: Case) -> Cost:
    layout = KvLayout("int4", c["G"], c["K"])
    return Cost(c["blocks"] * (layout.block_bytes + layout.with_format("fp8").block_bytes), 0)


def _serving(shape: ModelShape) -> tuple[Case, ...]:
    return (case(torch.float64, G=shape.G, K=shape.K, blocks=128),)


SPEC = KernelSpec(
    name="kv_to_fp8",
    runs={"triton": _run},
    timed={"triton": _timed},
    ref=partial(kv_dequant_ref, dtype=torch.float64),
    make=_make,
    cost=_cost,
    row_args=(1,),
    tests=tuple(case(torch.float64, G=G, K=K, blocks=3) for G, K in ((1, 64), (3, 80), (2, 128), (1, 96))),
    compiles=(case(torch.float64, G=2, K=80, blocks=1),),
    benches=(case(torch.float64, G=8, K=128, blocks=128),),
    serving=_serving,
    small=lambda c: case(c.dtype, G=c["G"], K=c["K"], blocks=1),
)
