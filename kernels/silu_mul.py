"""The gate of the MLP: y = silu(gate) * up, with row quantization behind it.

T tokens, F ffn width; gate is the first F columns of gu, up the last F.  silu is rounded to the model's dtype before
the product, as transformers has it.  Reads 2*T*F, writes T*F: bandwidth-bound.  With `quant`, y leaves as quant_rows(y).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.quant_rows import RowConfig, quant_rows_cpu, quant_rows_ref, quantize_row
from kernels.spec import Case, Cost, KernelSpec, case


class SiluOut(NamedTuple):
    """`scale_T` is None unless quantized."""

    y_TF: Tensor
    scale_T: Tensor | None


def silu_mul_ref(gu_T2F: Tensor, quant: bool = False) -> SiluOut:
    gate, up = gu_T2F.chunk(2, dim=-1)
    y = F.silu(gate) * up
    return SiluOut(*quant_rows_ref(y)) if quant else SiluOut(y, None)


@triton.jit
def _silu_mul_kernel(
    y, scale, gu, stride_gt, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, IS_QUANT: tl.constexpr
):
    i_t = tl.program_id(0).to(tl.int64)
    o_f = tl.arange(0, BLOCK_F)
    m_f = o_f < WIDTH
    p_g = gu + i_t * stride_gt + o_f
    b_g = tl.load(p_g, mask=m_f, other=0.0).to(tl.float32)
    b_u = tl.load(p_g + WIDTH, mask=m_f, other=0.0).to(tl.float32)
    b_s = (b_g / (1.0 + tl.exp(-b_g))).to(gu.dtype.element_ty).to(tl.float32)
    b_y = (b_s * b_u).to(gu.dtype.element_ty)
    if IS_QUANT:
        b_codes, b_scale = quantize_row(b_y.to(tl.float32))
        tl.store(y + i_t * WIDTH + o_f, b_codes, mask=m_f)
        tl.store(scale + i_t, b_scale)
    else:
        tl.store(y + i_t * WIDTH + o_f, b_y, mask=m_f)


def silu_mul_triton(gu_T2F: Tensor, quant: bool = False, config: RowConfig | None = None) -> SiluOut:
    T, width = gu_T2F.shape[0], gu_T2F.shape[1] // 2
    assert gu_T2F.shape[1] == 2 * width, f"{gu_T2F.shape=}"
    assert gu_T2F.stride(-1) == 1, f"{gu_T2F.stride()=}"
    c = config or RowConfig.pick(width)
    y_TF = torch.empty(T, width, dtype=torch.int8 if quant else gu_T2F.dtype, device=gu_T2F.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=gu_T2F.device) if quant else None
    if T:
        _silu_mul_kernel[(T,)](
            y_TF,
            y_TF if scale_T is None else scale_T,
            gu_T2F,
            gu_T2F.stride(0),
            WIDTH=width,
            BLOCK_F=c.block,
            IS_QUANT=quant,
            **c.options,
        )
    return SiluOut(y_TF, scale_T)


def silu_mul_cpu(gu_T2F: Tensor, quant: bool = False) -> SiluOut:
    gate, up = gu_T2F.chunk(2, dim=-1)
    y = F.silu(gate).mul_(up)
    return SiluOut(*quant_rows_cpu(y)) if quant else SiluOut(y, None)


def silu_mul(gu_T2F: Tensor, quant: bool = False) -> SiluOut:
    """The last axis must be contiguous."""
    return silu_mul_triton(gu_T2F, quant) if gu_T2F.is_cuda else silu_mul_cpu(gu_T2F, quant)


def _make(c: Case, generator: torch.Generator) -> tuple[Tensor | bool, ...]:
    width = 2 * c["F"]
    gu = 3 * torch.randn(c["T"], width + c.dims.get("pad", 0), generator=generator)
    return gu.to(c.dtype)[:, :width], bool(c.dims.get("quant"))


def _cost(c: Case) -> Cost:
    elements = c["T"] * c["F"]
    return Cost(
        elements * (2 * c.dtype.itemsize + (1 if c.dims.get("quant") else c.dtype.itemsize)), 8 * elements
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
    ),
    compiles=(case(torch.bfloat16, T=2, F=14336), case(torch.bfloat16, T=2, F=28672, quant=True)),
    benches=(case(torch.bfloat16, T=32, F=14336), case(torch.bfloat16, T=2048, F=14336, quant=True)),
)
