"""Dynamic quantization of rows: scale = absmax / limit, codes = round-half-even(x / scale); int8 or fp8 (e4m3).

T rows, D columns; the limit is 127 or 448.  Reads T*D, writes T*D bytes: bandwidth-bound.  A row of zeros has codes 0
and scale 0.  The arithmetic (the reciprocal of the scale once a row, one multiplication an element) is the same on
every device and in every fused kernel, so codes do not depend on where they were computed.  A row that holds NaN or inf
has that as its scale, and codes that mean nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend
from kernels.launch import GpuFacts, cdiv, gpu_facts, launch
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case
from kernels.table import tuned

# the reciprocal of a smaller scale could overflow: codes of a row that small are taken with this one, and are near 0
TINIEST_SCALE = 1e-30
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SERVED_ROWS = (1, 16, 64, 256, 2048)
Quant: TypeAlias = torch.dtype | bool | None


class QuantRows(NamedTuple):
    codes_TD: Tensor
    scale_T: Tensor


@dataclass(frozen=True)
class RowConfig:
    """Launch shape of a kernel with whole rows in a program.

    Of the row's length alone: another number of warps adds in another order, and a row's result must not depend on
    how many rows there are.
    """

    rows: int
    num_warps: int

    @classmethod
    def pick(cls, gpu: GpuFacts, op: str, **columns: int) -> "RowConfig":
        block = row_block(*columns.values())
        # a block of another size takes other registers
        found = tuned(cls, op, gpu, **columns, block=f"B{block}")
        if found is not None:
            return found
        # 32 elements a thread: four loads of 16 bytes in flight for each 16-bit operand
        return cls(rows=max(1, 1024 // block), num_warps=min(max(1, block // 1024), 16))

    @classmethod
    def candidates(cls, gpu: GpuFacts, columns: int) -> Iterator["RowConfig"]:
        block = row_block(columns)
        for rows in (1, 2, 4, 8, 16):
            for num_warps in (1, 2, 4, 8, 16, 32):
                if 8 <= rows * block // (32 * num_warps) <= 64 and (rows == 1 or rows * block <= 8192):
                    yield cls(rows, num_warps)

    @property
    def options(self) -> dict[str, int | bool]:
        # a product contracted into an FMA with the rounding constant would skip a rounding that the CPU makes
        return {"ROWS": self.rows, "num_warps": self.num_warps, "enable_fp_fusion": False}


def row_block(columns: int) -> int:
    return triton.next_power_of_2(columns)


def code_dtype(quant: Quant) -> torch.dtype | None:
    """What `quant` of an op asks for: True is int8, False and None leave floats."""
    if quant is None or quant is False:
        return None
    dtype = torch.int8 if quant is True else quant
    assert dtype in LIMITS, f"{quant=}, one of {list(LIMITS)}"
    return dtype


def row_unit(x: Tensor) -> int:
    """How many elements every row of x surely begins at a multiple of: 16 bytes' worth, where the stride allows."""
    return math.gcd(x.stride(0), 16 // x.element_size())


def quant_rows_ref(x_TD: Tensor, dtype: torch.dtype = torch.int8) -> QuantRows:
    x = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    limit = LIMITS[dtype]
    scale_T = x.abs().amax(-1) / limit
    scaled_TD = x * scale_T.clamp_min(TINIEST_SCALE).reciprocal()[:, None]
    if dtype == torch.int8:
        scaled_TD = scaled_TD.round()
    return QuantRows(scaled_TD.clamp(-limit, limit).to(dtype), scale_T)


@triton.jit
def load_rows(p, o_t, o_d, T, D: tl.constexpr):
    """A block of rows as float32, zeros past their end.  `p` points at each element; no mask where none can hold."""
    if o_t.shape[0] == 1 and o_d.shape[0] == D:
        b_x = tl.load(p)
    else:
        b_x = tl.load(p, mask=(o_t < T)[:, None] & (o_d < D)[None, :], other=0.0)
    return b_x.to(tl.float32)


@triton.jit
def store_rows(p, b_x, o_t, o_d, T, D: tl.constexpr):
    if o_t.shape[0] == 1 and o_d.shape[0] == D:
        tl.store(p, b_x)
    else:
        tl.store(p, b_x, mask=(o_t < T)[:, None] & (o_d < D)[None, :])


@triton.jit
def round_to_int8(b_x):
    """Half to even, for |b_x| <= 128: adding 1.5 * 2^23 leaves the integer in the low bits, two's complement."""
    return (b_x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller_or_nan(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_or_nan(b_x, AXIS: tl.constexpr):
    """Of the absolute values; tl.max would drop a NaN, and finite codes would hide it."""
    return tl.reduce(tl.abs(b_x), AXIS, larger_or_nan)


@triton.jit
def quantize_rows(b_x, DTYPE: tl.constexpr):
    """The codes and the scales of a [rows, columns] block of float32; lanes past a row must hold 0."""
    IS_INT8: tl.constexpr = tl.int8 == DTYPE
    b_scale = tl.div_rn(largest_or_nan(b_x, 1), 127.0 if IS_INT8 else 448.0)
    b_codes = b_x * tl.div_rn(1.0, tl.maximum(b_scale, 1e-30))[:, None]
    b_codes = round_to_int8(b_codes) if IS_INT8 else b_codes.to(DTYPE)
    return b_codes, b_scale


@triton.jit(do_not_specialize=["stride_xt", "T"])
def _quant_rows_kernel(
    codes,
    scale,
    x,
    stride_xt,
    T,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    b_x = load_rows(x + (o_t * stride_xt * UNIT)[:, None] + o_d[None, :], o_t, o_d, T, D)
    b_codes, b_scale = quantize_rows(b_x, codes.dtype.element_ty)
    # 8 codes a thread: with 16, a thread's loads would be every other 16 bytes, and in kernels that store 16-bit rows
    # besides, the layouts would differ with shared memory between them
    p_codes = tl.max_contiguous(codes + (o_t * D)[:, None] + o_d[None, :], [1, 8])
    store_rows(p_codes, b_codes, o_t, o_d, T, D)
    tl.store(scale + o_t, b_scale, mask=o_t < T)


def quant_rows_triton(
    x_TD: Tensor, dtype: torch.dtype = torch.int8, config: RowConfig | None = None
) -> QuantRows:
    T, D = x_TD.shape
    assert not T or x_TD.stride(-1) == 1, f"{x_TD.stride()=}"
    c = config or RowConfig.pick(gpu_facts(x_TD.device), "quant_rows", D=D)
    codes_TD = torch.empty(T, D, dtype=dtype, device=x_TD.device)
    scale_T = torch.empty(T, dtype=torch.float32, device=x_TD.device)
    unit = row_unit(x_TD)
    if T:
        launch(
            _quant_rows_kernel,
            (cdiv(T, c.rows),),
            codes_TD,
            scale_T,
            x_TD,
            x_TD.stride(0) // unit,
            T,
            UNIT=unit,
            D=D,
            BLOCK_D=row_block(D),
            **c.options,
        )
    return QuantRows(codes_TD, scale_T)


def quant_rows_cpu(x_TD: Tensor, dtype: torch.dtype = torch.int8) -> QuantRows:
    limit = LIMITS[dtype]
    scale_T = x_TD.abs().amax(-1).float() / limit
    # a 16-bit row times a float32 column is float32: no separate widening pass
    scaled_TD = x_TD * scale_T.clamp_min(TINIEST_SCALE).reciprocal_()[:, None]
    if dtype == torch.int8:
        return QuantRows(scaled_TD.round_().to(dtype), scale_T)
    # torch's cast makes NaN of what is too large
    return QuantRows(scaled_TD.clamp_(-limit, limit).to(dtype), scale_T)


def quant_rows(x_TD: Tensor, dtype: torch.dtype = torch.int8) -> QuantRows:
    """Codes and scales of the rows of x_TD; codes * scale is within half a quantum of x everywhere."""
    run = quant_rows_triton if backend.runs_triton(x_TD.device) else quant_rows_cpu
    return run(x_TD, dtype)


def case_quant(c: Case) -> Quant:
    """Cases name codes by True (int8) or "fp8", so that their ids stay readable."""
    quant = c.dims.get("quant", False)
    return torch.float8_e4m3fn if quant == "fp8" else bool(quant)


def few_rows(c: Case) -> Case:
    return Case(c.dtype, {**c.dims, "T": 2})


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    wide = torch.randn(c["T"], c["D"] + c.dims.get("pad", 0), generator=generator)
    if c.dims.get("zero_row"):
        wide[1] = 0.0
    return wide.to(c.dtype)[:, : c["D"]], code_dtype(case_quant(c)) or torch.int8


def _cost(c: Case) -> Cost:
    return Cost(c["T"] * c["D"] * (c.dtype.itemsize + 1), 3 * c["T"] * c["D"])


def _serving(shape: ModelShape) -> tuple[Case, ...]:
    """The rows that no norm or gate has quantized: what attention hands to its output projection."""
    width = shape.H * shape.K
    return tuple(
        case(torch.bfloat16, T=T, D=width, quant=quant) for quant in (True, "fp8") for T in SERVED_ROWS
    )


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
        case(torch.float32, T=1, D=1, quant="fp8"),
        case(torch.bfloat16, T=19, D=65, zero_row=True, quant="fp8"),
        case(torch.float16, T=4, D=2048, pad=8, quant="fp8"),
    ),
    compiles=(case(torch.bfloat16, T=2, D=14336), case(torch.bfloat16, T=2, D=4096)),
    benches=(
        case(torch.bfloat16, T=32, D=4096),
        case(torch.bfloat16, T=4096, D=4096),
        case(torch.bfloat16, T=4096, D=4096, quant="fp8"),
    ),
    serving=_serving,
    config=lambda c, gpu: RowConfig.pick(gpu, "quant_rows", D=c["D"]),
    candidates=lambda c, gpu: RowConfig.candidates(gpu, c["D"]),
    small=few_rows,
)
