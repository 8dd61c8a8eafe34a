"""RMS norm of rows, with the residual sum before it and row quantization behind it.

h = x + residual (in the model's dtype), y = h / sqrt(mean(h^2) + eps) cast to that dtype, times w.  This is the order
of rounding transformers has.  T tokens, D model width.  Reads 2*T*D, writes 2*T*D: bandwidth-bound.
With `quant`, y leaves as int8 codes and one scale a row, exactly as quant_rows(y) would give them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.quant_rows import RowConfig, quant_rows_cpu, quant_rows_ref, quantize_row
from kernels.spec import Case, Cost, KernelSpec, case


class NormOut(NamedTuple):
    """`residual_TD` is the sum h, None where no residual was given; `scale_T` is None unless quantized."""

    y_TD: Tensor
    residual_TD: Tensor | None
    scale_T: Tensor | None


def rmsnorm_ref(
    x_TD: Tensor, w_D: Tensor, eps: float, residual_TD: Tensor | None = None, quant: bool = False
) -> NormOut:
    sum_TD = None if residual_TD is None else x_TD + residual_TD
    h = x_TD if sum_TD is None else sum_TD
    wide = h.to(torch.promote_types(h.dtype, torch.float32))  # fp64 in stays fp64: the truth
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(h.dtype) * w_D
    return (
        NormOut(quant_rows_ref(y).codes_TD, sum_TD, quant_rows_ref(y).scale_T)
        if quant
        else NormOut(y, sum_TD, None)
    )


@triton.jit
def _rmsnorm_kernel(
    y,
    total,
    scale,
    x,
    residual,
    w,
    stride_xt,
    stride_rt,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_QUANT: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_h = tl.load(x + i_t * stride_xt + o_d, mask=m_d, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_r = tl.load(residual + i_t * stride_rt + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_sum = (b_h + b_r).to(x.dtype.element_ty)
        tl.store(total + i_t * D + o_d, b_sum, mask=m_d)
        b_h = b_sum.to(tl.float32)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_h * b_h, 0) / D + eps)
    b_w = tl.load(w + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_n = (b_h * b_rstd).to(x.dtype.element_ty).to(tl.float32)
    b_y = (b_n * b_w).to(x.dtype.element_ty)
    if IS_QUANT:
        b_codes, b_scale = quantize_row(b_y.to(tl.float32))
        tl.store(y + i_t * D + o_d, b_codes, mask=m_d)
        tl.store(scale + i_t, b_scale)
    else:
        tl.store(y + i_t * D + o_d, b_y, mask=m_d)


def rmsnorm_triton(
    x_TD: Tensor,
    w_D: Tensor,
    eps: float,
    residual_TD: Tensor | None = None,
    quant: bool = False,
    config: RowConfig | None = None,
) -> NormOut:
    T, D = x_TD.shape
    assert w_D.shape == (D,), f"{w_D.shape=} does not match {x_TD.shape=}"
    assert x_TD.stride(-1) == w_D.stride(-1) == 1, f"{x_TD.stride()=} {w_D.stride()=}"
    c = config or RowConfig.pick(D)
    y_TD = torch.empty(T, D, dtype=torch.int8 if quant else x_TD.dtype, device=x_TD.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TD.device) if quant else None
    sum_TD = None
    if residual_TD is not None:
        assert residual_TD.shape == x_TD.shape, f"{residual_TD.shape=} {x_TD.shape=}"
        assert residual_TD.stride(-1) == 1, f"{residual_TD.stride()=}"
        sum_TD = torch.empty(T, D, dtype=x_TD.dtype, device=x_TD.device)
    if T:
        _rmsnorm_kernel[(T,)](
            y_TD,
            y_TD if sum_TD is None else sum_TD,
            y_TD if scale_T is None else scale_T,
            x_TD,
            x_TD if residual_TD is None else residual_TD,
            w_D,
            x_TD.stride(0),
            0 if residual_TD is None else residual_TD.stride(0),
            eps,
            D=D,
            BLOCK_D=c.block,
            HAS_RESIDUAL=residual_TD is not None,
            IS_QUANT=quant,
            **c.options,
        )
    return NormOut(y_TD, sum_TD, scale_T)


def rmsnorm_cpu(
    x_TD: Tensor, w_D: Tensor, eps: float, residual_TD: Tensor | None = None, quant: bool = False
) -> NormOut:
    sum_TD = None if residual_TD is None else x_TD + residual_TD
    h = x_TD if sum_TD is None else sum_TD
    y = F.rms_norm(h.float(), w_D.shape, None, eps).to(h.dtype).mul_(w_D)
    if not quant:
        return NormOut(y, sum_TD, None)
    codes, scale_T = quant_rows_cpu(y)
    return NormOut(codes, sum_TD, scale_T)


def rmsnorm(
    x_TD: Tensor, w_D: Tensor, eps: float, residual_TD: Tensor | None = None, quant: bool = False
) -> NormOut:
    """The last axes must be contiguous; nothing given is written to."""
    run = rmsnorm_triton if x_TD.is_cuda else rmsnorm_cpu
    return run(x_TD, w_D, eps, residual_TD, quant)


def _make(c: Case, generator: torch.Generator) -> tuple[Tensor | float | bool | None, ...]:
    T, D, pad = c["T"], c["D"], c.dims.get("pad", 0)
    x = torch.randn(T, D + pad, generator=generator).to(c.dtype)[:, :D]
    w = torch.randn(D, generator=generator).to(c.dtype)
    residual = 3 * torch.randn(T, D, generator=generator).to(c.dtype) if c.dims.get("residual") else None
    return x, w, 1e-5, residual, bool(c.dims.get("quant"))


def _cost(c: Case) -> Cost:
    elements, size = c["T"] * c["D"], c.dtype.itemsize
    return Cost(elements * (3 * size + (1 if c.dims.get("quant") else size)), 6 * elements)


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
    ),
    compiles=(
        case(torch.bfloat16, T=2, D=4096, residual=True),
        case(torch.bfloat16, T=2, D=8192, residual=True, quant=True),
    ),
    benches=(
        case(torch.bfloat16, T=32, D=4096, residual=True),
        case(torch.bfloat16, T=2048, D=4096, residual=True, quant=True),
    ),
)
