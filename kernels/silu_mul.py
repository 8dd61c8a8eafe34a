"""The gate of the MLP: y = silu(gate) * up, with row quantization behind it.

T tokens, F ffn width; gate is the first F columns of gu, up the last F.  silu is rounded to the model's dtype before
the product, as transformers has it.  Reads 2*T*F, writes T*F: bandwidth-bound.  With `quant`, y leaves as quant_rows(y).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend
from kernels.launch import cdiv, gpu_facts, launch
from kernels.quant_rows import (
    SERVED_ROWS,
    Quant,
    RowConfig,
    case_quant,
    code_dtype,
    few_rows,
    load_rows,
    quant_rows_cpu,
    quant_rows_ref,
    quantize_rows,
    row_block,
    row_unit,
    store_rows,
)
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case


class SiluOut(NamedTuple):
    """`scale_T` is None unless quantized."""

    y_TF: Tensor
    scale_T: Tensor | None


def silu_mul_ref(gu_T2F: Tensor, quant: Quant = None) -> SiluOut:
    gate, up = gu_T2F.chunk(2, dim=-1)
    y = F.silu(gate) * up
    codes = code_dtype(quant)
    return SiluOut(y, None) if codes is None else SiluOut(*quant_rows_ref(y, codes))


@triton.jit(do_not_specialize=["stride_gt", "T"])
def _silu_mul_kernel(
    y,
    scale,
    gu,
    stride_gt,
    T,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr,
    IS_QUANT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_f = tl.arange(0, BLOCK_F)
    p_g = gu + (o_t * stride_gt * UNIT)[:, None] + o_f[None, :]
    b_g = load_rows(p_g, o_t, o_f, T, WIDTH)
    b_u = load_rows(p_g + WIDTH, o_t, o_f, T, WIDTH)
    # 1 / a as the square of 1 / sqrt(a), a >= 1: a division is 9 instructions here, and the chip is short of those
    b_r = tl.rsqrt(1.0 + tl.exp2(b_g * -1.4426950408889634))
    b_s = (b_g * b_r * b_r).to(gu.dtype.element_ty).to(tl.float32)
    b_y = (b_s * b_u).to(gu.dtype.element_ty)
    p_y = tl.max_contiguous(y + (o_t * WIDTH)[:, None] + o_f[None, :], [1, 8])  # as in _quant_rows_kernel
    if IS_QUANT:
        b_codes, b_scale = quantize_rows(b_y.to(tl.float32), y.dtype.element_ty)
        store_rows(p_y, b_codes, o_t, o_f, T, WIDTH)
        tl.store(scale + o_t, b_scale, mask=o_t < T)
    else:
        store_rows(p_y, b_y, o_t, o_f, T, WIDTH)


def silu_mul_triton(gu_T2F: Tensor, quant: Quant = None, config: RowConfig | None = None) -> SiluOut:
    T, width = gu_T2F.shape[0], gu_T2F.shape[1] // 2
    assert gu_T2F.shape[1] == 2 * width, f"{gu_T2F.shape=}"
    assert not T or gu_T2F.stride(-1) == 1, f"{gu_T2F.stride()=}"
    c = config or RowConfig.pick(gpu_facts(gu_T2F.device), "silu_mul", F=width)
    codes = code_dtype(quant)
    y_TF = torch.empty(T, width, dtype=codes or gu_T2F.dtype, device=gu_T2F.device)
    scale_T = None if codes is None else torch.empty(T, dtype=torch.float32, device=gu_T2F.device)
    unit = row_unit(gu_T2F)
    if T:
        launch(
            _silu_mul_kernel,
            (cdiv(T, c.rows),),
            y_TF,
            y_TF if scale_T is None else scale_T,
            gu_T2F,
            gu_T2F.stride(0) // unit,
            T,
            UNIT=unit,
            WIDTH=width,
            BLOCK_F=row_block(width),
            IS_QUANT=codes is not None,
            **c.options,
        )
    return SiluOut(y_TF, scale_T)


def silu_mul_cpu(gu_T2F: Tensor, quant: Quant = None) -> SiluOut:
    gate, up = gu_T2F.chunk(2, dim=-1)
    y = F.silu(gate).mul_(up)
    codes = code_dtype(quant)
    return SiluOut(y, None) if codes is None else SiluOut(*quant_rows_cpu(y, codes))


def silu_mul(gu_T2F: Tensor, quant: Quant = None) -> SiluOut:
    """`quant`: the type of the codes, True for int8.  The last axis must be contiguous."""
    run = silu_mul_triton if backend.runs_triton(gu_T2F.device) else silu_mul_cpu
    return run(gu_T2F, quant)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    width = 2 * c["F"]
    gu = 3 * torch.randn(c["T"], width + c.dims.get("pad", 0), generator=generator)
    return gu.to(c.dtype)[:, :width], code_dtype(case_quant(c))


def _cost(c: Case) -> Cost:
    elements = c["T"] * c["F"]
    return Cost(
        elements * (2 * c.dtype.itemsize + (1 if c.dims.get("quant") else c.dtype.itemsize)), 8 * elements
    )


def _serving(shape: ModelShape) -> tuple[Case, ...]:
    return tuple(
        case(torch.bfloat16, T=T, F=shape.F, quant=quant)
        for quant in (False, True, "fp8")
        for T in SERVED_ROWS
    )


SPEC = KernelSpec(
    name="silu_mul",
    runs={"cpu": silu_mul_cpu, "triton": silu_mul_triton},
    ref=silu_mul_ref,
    make=_make,
    cost=_cost,
    tests=(
        case(torch.float32, T=1, F=1),
        case(torch.float16, T=5, F=129),
        case(torch.bfloat16, T=3, F=704, quant=True),
        case(torch.float32, T=7, F=257, pad=5, quant=True),
        case(torch.float16, T=0, F=32, quant=True),
        case(torch.bfloat16, T=19, F=65, quant="fp8"),
        case(torch.float16, T=4, F=2048, pad=8, quant="fp8"),
    ),
    compiles=(case(torch.bfloat16, T=2, F=14336), case(torch.bfloat16, T=2, F=28672, quant=True)),
    benches=(
        case(torch.bfloat16, T=32, F=14336),
        case(torch.bfloat16, T=4096, F=14336),
        case(torch.bfloat16, T=4096, F=14336, quant=True),
        case(torch.bfloat16, T=4096, F=14336, quant="fp8"),
    ),
    serving=_serving,
    config=lambda c, gpu: RowConfig.pick(gpu, "silu_mul", F=c["F"]),
    candidates=lambda c, gpu: RowConfig.candidates(gpu, c["F"]),
    small=few_rows,
)
