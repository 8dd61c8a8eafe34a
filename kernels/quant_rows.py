"""Dynamic quantization of rows to int8: scale = absmax / 127, codes = round-half-even(x / scale).

T rows, D columns.  Reads T*D, writes T*D bytes: bandwidth-bound.  A row of zeros has codes 0 and scale 0.
The arithmetic (the reciprocal of the scale once a row, one multiplication an element) is the same on every device and
in every fused kernel, so codes do not depend on where they were computed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.spec import Case, Cost, KernelSpec, case

# the reciprocal of a smaller scale could overflow: codes of a row that small are taken with this one, and are near 0
TINIEST_SCALE = 1e-30


class QuantRows(NamedTuple):
    codes_TD: Tensor
    scale_T: Tensor


@dataclass(frozen=True)
class RowConfig:
    """Launch shape of a kernel with one row a program."""

    block: int
    num_warps: int

    @classmethod
    def pick(cls, columns: int) -> "RowConfig":
        block = triton.next_power_of_2(columns)
        return cls(block, num_warps=4 if block <= 4096 else 8 if block <= 16384 else 16)

    @property
    def options(self) -> dict[str, int | bool]:
        # a product contracted into an FMA with the rounding constant would skip a rounding that the CPU makes
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


def quant_rows_ref(x_TD: Tensor) -> QuantRows:
    x = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    scale_T = x.abs().amax(-1) / 127.0
    codes_TD = (x * scale_T.clamp_min(TINIEST_SCALE).reciprocal()[:, None]).round().to(torch.int8)
    return QuantRows(codes_TD, scale_T)


@triton.jit
def round_to_int8(b_x):
    """Half to even, for |b_x| < 2^22: adding 1.5 * 2^23 leaves no bit for the fraction."""
    return ((b_x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def quantize_row(b_x):
    """The codes and the scale of one row of float32 values; lanes past the row must hold 0."""
    b_scale = tl.div_rn(tl.max(tl.abs(b_x), 0), 127.0)
    return round_to_int8(b_x * tl.div_rn(1.0, tl.maximum(b_scale, 1e-30))), b_scale


@triton.jit
def _quant_rows_kernel(codes, scale, x, stride_xt, D: tl.constexpr, BLOCK_D: tl.constexpr):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = tl.load(x + i_t * stride_xt + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_codes, b_scale = quantize_row(b_x)
    tl.store(codes + i_t * D + o_d, b_codes, mask=m_d)
    tl.store(scale + i_t, b_scale)


def quant_rows_triton(x_TD: Tensor, config: RowConfig | None = None) -> QuantRows:
    T, D = x_TD.shape
    assert x_TD.stride(-1) == 1, f"{x_TD.stride()=}"
    c = config or RowConfig.pick(D)
    codes_TD = torch.empty(T, D, dtype=torch.int8, device=x_TD.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TD.device)
    if T:
        _quant_rows_kernel[(T,)](codes_TD, scale_T, x_TD, x_TD.stride(0), D=D, BLOCK_D=c.block, **c.options)
    return QuantRows(codes_TD, scale_T)


def quant_rows_cpu(x_TD: Tensor) -> QuantRows:
    scale_T = x_TD.abs().amax(-1).float() / 127.0
    # a 16-bit row times a float32 column is float32: no separate widening pass
    codes_TD = (x_TD * scale_T.clamp_min(TINIEST_SCALE).reciprocal_()[:, None]).round_().to(torch.int8)
    return QuantRows(codes_TD, scale_T)


def quant_rows(x_TD: Tensor) -> QuantRows:
    """Codes and scales of the rows of x_TD; codes * scale is within half a scale of x everywhere."""
    return quant_rows_triton(x_TD) if x_TD.is_cuda else quant_rows_cpu(x_TD)


def _make(c: Case, generator: torch.Generator) -> tuple[Tensor, ...]:
    wide = torch.randn(c["T"], c["D"] + c.dims.get("pad", 0), generator=generator)
    if c.dims.get("zero_row"):
        wide[1] = 0.0
    return (wide.to(c.dtype)[:, : c["D"]],)


def _cost(c: Case) -> Cost:
    return Cost(c["T"] * c["D"] * (c.dtype.itemsize + 1), 3 * c["T"] * c["D"])


SPEC = KernelSpec(
    name="quant_rows",
    runs={"cpu": quant_rows_cpu, "triton": quant_rows_triton},
    ref=quant_rows_ref,
    make=_make,
    cost=_cost,
    tests=(
        case(torch.float32, T=1, D=1),
        case(torch.float16, T=5, D=129),
        case(torch.bfloat16, T=3, D=1024, zero_row=True),
        case(torch.float32, T=7, D=257, pad=3),
        case(torch.bfloat16, T=0, D=64),
    ),
    compiles=(case(torch.bfloat16, T=2, D=14336),),
    benches=(case(torch.bfloat16, T=32, D=4096), case(torch.bfloat16, T=2048, D=4096)),
)
