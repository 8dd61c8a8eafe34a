"""Copies blocks of a model to other places of its pool, all layers in one launch: what compaction moves.

M moves of blocks in L layers.  Bytes as they lie, so that nothing computed from a block can tell.  Reads and writes each
byte once: bound by bandwidth.  A program copies a part of one block of one layer, in units of 16 bytes; blocks of layers
in different formats differ in size.  No block may be a source and a target.
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
from kernels.kv_case import Paged
from kernels.kv_layout import SLOT_BITS, SLOT_MASK, KvLayout
from kernels.launch import GpuFacts, gpu_facts, launch
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case
from kernels.table import tuned


@dataclass(frozen=True)
class CopyBlocksConfig:
    """Units of 16 bytes that a program moves in a turn, and programs for a block of a layer."""

    units: int
    parts: int
    num_warps: int

    @classmethod
    def pick(cls, gpu: GpuFacts, block_units: int) -> "CopyBlocksConfig":
        found = tuned(cls, "copy_blocks", gpu, units=block_units)
        # four loads of 16 bytes in flight a thread, and enough programs that a few blocks fill the chip
        return found or cls(512, 4, 4)

    @classmethod
    def candidates(cls) -> Iterator["CopyBlocksConfig"]:
        for units, num_warps in ((256, 2), (512, 4), (1024, 4), (1024, 8)):
            yield from (cls(units, parts, num_warps) for parts in (1, 2, 4, 8))


def copy_blocks_ref(paged: Paged, moves_M2: Tensor) -> Tensor:
    """int8 [M, L, block bytes]: what the targets hold afterwards."""
    size = paged.layout.block_bytes
    return torch.stack([torch.stack([_block(paged, s, layer, size) for layer in range(paged.slab_table_SL.shape[1])])
                        for s in moves_M2[:, 0].tolist()]).view(torch.int8)  # fmt: skip


def _block(paged: Paged, block: int, layer: int, size: int) -> Tensor:
    at = int(paged.slab_table_SL[block >> SLOT_BITS, layer]) + (block & SLOT_MASK) * size
    return paged.pool[at : at + size]


@triton.jit(do_not_specialize=["stride_slab", "num_layers"])
def _copy_blocks_kernel(
    words,
    slab_table,
    units_of,
    moves,
    stride_slab,
    num_layers,
    SLOT_BITS: tl.constexpr,
    UNITS: tl.constexpr,
    PARTS: tl.constexpr,
):
    i_part = tl.program_id(0) % PARTS
    i_layer = tl.program_id(0) // PARTS % num_layers
    i_move = tl.program_id(0) // PARTS // num_layers
    i_from = tl.load(moves + i_move * 2)
    i_to = tl.load(moves + i_move * 2 + 1)
    units = tl.load(units_of + i_layer)
    SLOT: tl.constexpr = (1 << SLOT_BITS) - 1
    at_from = tl.load(slab_table + (i_from >> SLOT_BITS).to(tl.int64) * stride_slab + i_layer) >> 4
    at_to = tl.load(slab_table + (i_to >> SLOT_BITS).to(tl.int64) * stride_slab + i_layer) >> 4
    p_from = words + (at_from + (i_from & SLOT).to(tl.int64) * units) * 4
    p_to = words + (at_to + (i_to & SLOT).to(tl.int64) * units) * 4
    o_u = tl.arange(0, UNITS)[:, None]
    o_w = tl.arange(0, 4)[None, :]
    for i_unit in tl.range(i_part * UNITS, units, PARTS * UNITS):
        m_u = i_unit + o_u < units
        o_x = (i_unit + o_u) * 4 + o_w
        tl.store(p_to + o_x, tl.load(p_from + o_x, mask=m_u), mask=m_u)


def copy_blocks_triton(
    pool: Tensor,
    slab_table_SL: Tensor,
    units_L: Tensor,
    moves_M2: Tensor,
    config: CopyBlocksConfig | None = None,
) -> None:
    # the config may not depend on what is on the device: 16-bit blocks of 8 heads are what is worth tuning
    c = config or CopyBlocksConfig.pick(gpu_facts(pool.device), 4096)
    layers = slab_table_SL.shape[1]
    launch(
        _copy_blocks_kernel,
        (len(moves_M2) * layers * c.parts,),
        pool.view(torch.int32),
        slab_table_SL,
        units_L,
        moves_M2,
        slab_table_SL.stride(0),
        layers,
        SLOT_BITS=SLOT_BITS,
        UNITS=c.units,
        PARTS=c.parts,
        num_warps=c.num_warps,
    )


def copy_blocks_cpu(pool: Tensor, slab_table_SL: Tensor, units_L: Tensor, moves_M2: Tensor) -> None:
    held, table, sizes = pool.numpy(), slab_table_SL.numpy(), units_L.numpy().astype("int64") * 16
    moves = moves_M2.numpy()
    # [M, L] byte offsets
    places = (table[moves[:, i] >> SLOT_BITS] + (moves[:, i] & SLOT_MASK)[:, None] * sizes for i in (0, 1))
    for sources, targets in zip(*(p.tolist() for p in places), strict=True):
        for source, target, size in zip(sources, targets, sizes.tolist(), strict=True):
            held[target : target + size] = held[source : source + size]


def copy_blocks(pool: Tensor, slab_table_SL: Tensor, units_L: Tensor, moves_M2: Tensor) -> None:
    """For each line of `moves_M2`, int32 (source, target) block ids: the bytes of block `source` go to block `target`, in
    every layer.  `units_L`: int32, a block's bytes in that layer, in units of 16.  All on the device of the pool."""
    assert moves_M2.shape[1:] == (2,), f"{moves_M2.shape=}"
    assert units_L.shape == slab_table_SL.shape[1:], f"{units_L.shape=} {slab_table_SL.shape=}"
    run = copy_blocks_triton if backend.runs_triton(pool.device) else copy_blocks_cpu
    run(pool, slab_table_SL, units_L, moves_M2)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    layout = KvLayout(c["fmt"], c["G"], c["K"])
    moves = c["moves"]
    lengths = (2 * moves * layout.block_tokens,)
    paged = Paged.make(layout, lengths, generator, num_layers=c["L"])
    paged.pool.copy_(torch.randint(0, 256, paged.pool.shape, generator=generator, dtype=torch.uint8))
    return paged, paged.block_table_BN[0].view(moves, 2)


def _arguments(paged: Paged, moves_M2: Tensor) -> tuple[Tensor, ...]:
    layers, device = paged.slab_table_SL.shape[1], moves_M2.device
    units_L = torch.full((layers,), paged.layout.block_bytes // 16, dtype=torch.int32, device=device)
    return paged.pool, paged.slab_table_SL, units_L, moves_M2


def _run(run: Any, paged: Paged, moves_M2: Tensor, **options: Any) -> Tensor:
    paged = paged.to(moves_M2.device)
    before = paged.pool.clone()
    run(*_arguments(paged, moves_M2), **options)
    after = copy_blocks_ref(paged, moves_M2.flip(1))
    # all the rest is as it was
    for target in moves_M2[:, 1].tolist():
        for layer in range(paged.slab_table_SL.shape[1]):
            size = paged.layout.block_bytes
            at = int(paged.slab_table_SL[target >> SLOT_BITS, layer]) + (target & SLOT_MASK) * size
            paged.pool[at : at + size] = before[at : at + size]
    assert torch.equal(paged.pool, before), "bytes beside the targets were written"
    return after


def _timed(run: Any, paged: Paged, moves_M2: Tensor, **options: Any) -> Callable[[], None]:
    arguments = _arguments(paged.to(moves_M2.device), moves_M2)
    return lambda: run(*arguments, **options)


def _cost(c: Case) -> Cost:
    layout = KvLayout(c["fmt"], c["G"], c["K"])
    return Cost(2 * c["moves"] * c["L"] * layout.block_bytes, 0)


def _serving(shape: ModelShape) -> tuple[Case, ...]:
    return (case(torch.bfloat16, G=shape.G, K=shape.K, fmt="bf16", L=32, moves=64),)


SPEC = KernelSpec(
    name="copy_blocks",
    runs={"cpu": partial(_run, copy_blocks_cpu), "triton": partial(_run, copy_blocks_triton)},
    timed={"cpu": partial(_timed, copy_blocks_cpu), "triton": partial(_timed, copy_blocks_triton)},
    ref=copy_blocks_ref,
    make=_make,
    cost=_cost,
    row_args=(1,),
    tests=(
        case(torch.bfloat16, G=2, K=16, fmt="fp8", L=3, moves=2),
        case(torch.float16, G=1, K=10, fmt="int4z", L=2, moves=3),
        case(torch.bfloat16, G=3, K=80, fmt="bf16", L=2, moves=2),
        case(torch.float32, G=1, K=128, fmt="fp32", L=1, moves=5),
    ),
    compiles=(case(torch.bfloat16, G=8, K=128, fmt="bf16", L=1, moves=1),),
    benches=tuple(
        case(torch.bfloat16, G=8, K=128, fmt=fmt, L=32, moves=moves)
        for fmt in ("bf16", "int4")
        for moves in (8, 128)
    ),
    serving=_serving,
    config=lambda c, gpu: CopyBlocksConfig.pick(gpu, 4096),
    candidates=lambda c, gpu: CopyBlocksConfig.candidates(),
    small=lambda c: Case(c.dtype, {**c.dims, "L": 1, "moves": 1}),
)
