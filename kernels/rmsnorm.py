"""RMS norm of rows, with the residual sum before it and row quantization behind it.

h = x + residual (in the model's dtype), y = h / sqrt(mean(h^2) + eps) cast to that dtype, times w.  This is the order
of rounding transformers has.  T tokens, D model width.  Reads 2*T*D, writes 2*T*D: bandwidth-bound.
With `quant`, y leaves as codes (int8 or fp8) and one scale a row, exactly as quant_rows(y) would give them.
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


class NormOut(NamedTuple):
    """`residual_TD` is the sum h, None where no residual was given; `scale_T` is None unless quantized."""

    y_TD: Tensor
    residual_TD: Tensor | None
    scale_T: Tensor | None


def rmsnorm_ref(
    x_TD: Tensor, w_D: Tensor, eps: float, residual_TD: Tensor | None = None, quant: Quant = None
) -> NormOut:
    sum_TD = None if residual_TD is None else x_TD + residual_TD
    h = x_TD if sum_TD is None else sum_TD
    wide = h.to(torch.promote_types(h.dtype, torch.float32))  # fp64 in stays fp64: the truth
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(h.dtype) * w_D
    codes = code_dtype(quant)
    if codes is None:
        return NormOut(y, sum_TD, None)
    codes_TD, scale_T = quant_rows_ref(y, codes)
    return NormOut(codes_TD, sum_TD, scale_T)


@triton.jit(do_not_specialize=["stride_xt", "stride_rt", "T"])
def _rmsnorm_kernel(
    y,
    total,
    scale,
    x,
    residual,
    w,
    stride_xt,
    stride_rt,
    T,
    eps,
    UNIT_X: tl.constexpr,
    UNIT_R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_QUANT: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    o_td = (o_t * D)[:, None] + o_d[None, :]
    b_h = load_rows(x + (o_t * stride_xt * UNIT_X)[:, None] + o_d[None, :], o_t, o_d, T, D)
    if HAS_RESIDUAL:
        b_r = load_rows(residual + (o_t * stride_rt * UNIT_R)[:, None] + o_d[None, :], o_t, o_d, T, D)
        b_sum = (b_h + b_r).to(x.dtype.element_ty)
        store_rows(total + o_td, b_sum, o_t, o_d, T, D)
        b_h = b_sum.to(tl.float32)
    b_w = tl.load(w + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_h * b_h, 1) / D + eps)
    b_n = (b_h * b_rstd[:, None]).to(x.dtype.element_ty).to(tl.float32)
    b_y = (b_n * b_w).to(x.dtype.element_ty)
    if IS_QUANT:
        b_codes, b_scale = quantize_rows(b_y.to(tl.float32), y.dtype.element_ty)
        # as in _quant_rows_kernel
        store_rows(tl.max_contiguous(y + o_td, [1, 8]), b_codes, o_t, o_d, T, D)
        tl.store(scale + o_t, b_scale, mask=o_t < T)
    else:
        store_rows(y + o_td, b_y, o_t, o_d, T, D)


def rmsnorm_triton(
    x_TD: Tensor,
    w_D: Tensor,
    eps: float,
    residual_TD: Tensor | None = None,
    quant: Quant = None,
    config: RowConfig | None = None,
) -> NormOut:
    T, D = x_TD.shape
    assert w_D.shape == (D,), f"{w_D.shape=} does not match {x_TD.shape=}"
    # an empty tensor has any stride
    assert not T or x_TD.stride(-1) == w_D.stride(-1) == 1, f"{x_TD.stride()=} {w_D.stride()=}"
    c = config or RowConfig.pick(gpu_facts(x_TD.device), "rmsnorm", D=D)
    codes = code_dtype(quant)
    y_TD = torch.empty(T, D, dtype=codes or x_TD.dtype, device=x_TD.device)
    scale_T = None if codes is None else torch.empty(T, dtype=torch.float32, device=x_TD.device)
    sum_TD = None
    if residual_TD is not None:
        assert residual_TD.shape == x_TD.shape, f"{residual_TD.shape=} {x_TD.shape=}"
        assert not T or residual_TD.stride(-1) == 1, f"{residual_TD.stride()=}"
        sum_TD = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
    added = x_TD if residual_TD is None else residual_TD
    unit_x, unit_r = row_unit(x_TD), row_unit(added)
    if T:
        launch(
            _rmsnorm_kernel,
            (cdiv(T, c.rows),),
            y_TD,
            y_TD if sum_TD is None else sum_TD,
            y_TD if scale_T is None else scale_T,
            x_TD,
            added,
            w_D,
            x_TD.stride(0) // unit_x,
            added.stride(0) // unit_r,
            T,
            eps,
            UNIT_X=unit_x,
            UNIT_R=unit_r,
            D=D,
            BLOCK_D=row_block(D),
            HAS_RESIDUAL=residual_TD is not None,
            IS_QUANT=codes is not None,
            **c.options,
        )
    return NormOut(y_TD, sum_TD, scale_T)


def rmsnorm_cpu(
    x_TD: Tensor, w_D: Tensor, eps: float, residual_TD: Tensor | None = None, quant: Quant = None
) -> NormOut:
    sum_TD = None if residual_TD is None else x_TD + residual_TD
    h = x_TD if sum_TD is None else sum_TD
    y = F.rms_norm(h.float(), w_D.shape, None, eps).to(h.dtype).mul_(w_D)
    codes = code_dtype(quant)
    if codes is None:
        return NormOut(y, sum_TD, None)
    codes_TD, scale_T = quant_rows_cpu(y, codes)
    return NormOut(codes_TD, sum_TD, scale_T)


def rmsnorm(
    x_TD: Tensor, w_D: Tensor, eps: float, residual_TD: Tensor | None = None, quant: Quant = None
) -> NormOut:
    """`quant`: the type of the codes, True for int8.  The last axes must be contiguous; nothing given is written to."""
    run = rmsnorm_triton if backend.runs_triton(x_TD.device) else rmsnorm_cpu
    return run(x_TD, w_D, eps, residual_TD, quant)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    T, D, pad = c["T"], c["D"], c.dims.get("pad", 0)
    x = torch.randn(T, D + pad, generator=generator).to(c.dtype)[:, :D]
    w = torch.randn(D, generator=generator).to(c.dtype)
    residual = 3 * torch.randn(T, D, generator=generator).to(c.dtype) if c.dims.get("residual") else None
    return x, w, 1e-5, residual, code_dtype(case_quant(c))


def _cost(c: Case) -> Cost:
    elements, size = c["T"] * c["D"], c.dtype.itemsize
    return Cost(elements * (3 * size + (1 if c.dims.get("quant") else size)), 6 * elements)


def _serving(shape: ModelShape) -> tuple[Case, ...]:
    """The first norm of a model has no residual, all others have."""
    return tuple(
        case(torch.bfloat16, T=T, D=shape.D, residual=residual, quant=quant)
        for quant in (False, True, "fp8")
        for residual in (False, True)
        for T in SERVED_ROWS
    )


SPEC = KernelSpec(
    name="rmsnorm",
    runs={"cpu": rmsnorm_cpu, "triton": rmsnorm_triton},
    ref=rmsnorm_ref,
    make=_make,
    cost=_cost,
    row_args=(0, 3),
    tests=(
        case(torch.float32, T=1, D=1),
        case(torch.float16, T=5, D=129),
        case(torch.bfloat16, T=5, D=1000, residual=True),
        case(torch.float32, T=7, D=257, pad=3, residual=True, quant=True),
        case(torch.bfloat16, T=3, D=1024, residual=True, quant=True),
        case(torch.float16, T=3, D=96, quant=True),
        case(torch.bfloat16, T=0, D=64, residual=True, quant=True),
        case(torch.bfloat16, T=19, D=65, residual=True, quant="fp8"),
        case(torch.float16, T=4, D=2048, pad=8, residual=True, quant="fp8"),
    ),
    compiles=(
        case(torch.bfloat16, T=2, D=4096, residual=True),
        case(torch.bfloat16, T=2, D=8192, residual=True, quant=True),
    ),
    benches=(
        case(torch.bfloat16, T=32, D=4096, residual=True),
        case(torch.bfloat16, T=4096, D=4096, residual=True),
        case(torch.bfloat16, T=4096, D=4096, residual=True, quant=True),
        case(torch.bfloat16, T=4096, D=4096, residual=True, quant="fp8"),
    ),
    serving=_serving,
    config=lambda c, gpu: RowConfig.pick(gpu, "rmsnorm", D=c["D"]),
    candidates=lambda c, gpu: RowConfig.candidates(gpu, c["D"]),
    small=few_rows,
)
