"""Dynamic fp8 (e4m3) of rows with a scale for every 128 columns: scale = absmax / 448, codes = round(x / scale).

T rows, D columns, Q blocks of 128 columns, the last of them maybe shorter.  Reads T*D, writes T*D bytes:
bandwidth-bound.  These are the rows of block-scaled weights (gemm_fp8_block).  A block of zeros has scale 1, and NaN
stays NaN; otherwise the arithmetic is that of quant_rows, the same on every device.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import backend
from kernels.launch import cdiv, launch
from kernels.quant_rows import few_rows, quant_rows_cpu, quant_rows_ref, quantize_rows, row_unit
from kernels.spec import Case, Cost, KernelSpec, case

FP8 = torch.float8_e4m3fn
BLOCK = 128
# blocks of a program, which is one warp: 32 elements a thread, and no reduction leaves the warp
BLOCKS = 8


class BlockRows(NamedTuple):
    """`scale_TQ` is float32 and lies transposed: a tile of tokens reads the scales of a block side by side."""

    codes_TD: Tensor
    scale_TQ: Tensor


def _by_block(x_TD: Tensor) -> Tensor:
    """[T * Q, 128], zeros behind a row's end."""
    past = -x_TD.shape[1] % BLOCK
    return (F.pad(x_TD, (0, past)) if past else x_TD).reshape(-1, BLOCK)


def _joined(codes: Tensor, scale: Tensor, T: int, D: int) -> BlockRows:
    Q = cdiv(D, BLOCK)
    scale_QT = torch.where(scale == 0, 1.0, scale).view(T, Q).t().contiguous()
    return BlockRows(codes.view(T, Q * BLOCK)[:, :D].contiguous(), scale_QT.t())


def quant_blocks_ref(x_TD: Tensor) -> BlockRows:
    codes, scale = quant_rows_ref(_by_block(x_TD), FP8)
    return _joined(codes, scale, *x_TD.shape)


@triton.jit(do_not_specialize=["stride_xt", "T"])
def _quant_blocks_kernel(
    codes, scale, x, stride_xt, T, UNIT: tl.constexpr, D: tl.constexpr, BLOCKS: tl.constexpr
):
    Q: tl.constexpr = (D + 127) // 128
    o_b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    o_t, o_q = o_b // Q, o_b % Q
    o_d = o_q[:, None] * 128 + tl.arange(0, 128)[None, :]
    m = (o_t < T)[:, None]
    if D % 128 != 0:
        m = m & (o_d < D)
    b_x = tl.load(x + (o_t * stride_xt * UNIT)[:, None] + o_d, mask=m, other=0.0).to(tl.float32)
    b_codes, b_scale = quantize_rows(b_x, codes.dtype.element_ty)
    tl.store(codes + (o_t * D)[:, None] + o_d, b_codes, mask=m)
    tl.store(scale + o_q * T + o_t, tl.where(b_scale == 0.0, 1.0, b_scale), mask=o_t < T)


def quant_blocks_triton(x_TD: Tensor) -> BlockRows:
    T, D = x_TD.shape
    assert not T or x_TD.stride(-1) == 1, f"{x_TD.stride()=}"
    codes_TD = torch.empty(T, D, dtype=FP8, device=x_TD.device)
    scale_QT = torch.empty(cdiv(D, BLOCK), T, dtype=torch.float32, device=x_TD.device)
    unit = row_unit(x_TD)
    if T:
        launch(
            _quant_blocks_kernel,
            (cdiv(scale_QT.numel(), BLOCKS),),
            codes_TD,
            scale_QT,
            x_TD,
            x_TD.stride(0) // unit,
            T,
            UNIT=unit,
            D=D,
            BLOCKS=BLOCKS,
            num_warps=1,
            # as in quant_rows: a contracted product would skip a rounding
            enable_fp_fusion=False,
        )
    return BlockRows(codes_TD, scale_QT.t())


def quant_blocks_cpu(x_TD: Tensor) -> BlockRows:
    codes, scale = quant_rows_cpu(_by_block(x_TD), FP8)
    return _joined(codes, scale, *x_TD.shape)


def quant_blocks(x_TD: Tensor) -> BlockRows:
    """e4m3 codes [T, D] and scales [T, ceil(D / 128)] of float rows.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 3.3.2); as checkpoints say it, `activation_scheme` dynamic with a
    `weight_block_size`, or compressed-tensors' FP8_BLOCK (input_activations: strategy group, group_size 128).
    """
    return (quant_blocks_triton if backend.runs_triton(x_TD.device) else quant_blocks_cpu)(x_TD)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    wide = torch.randn(c["T"], c["D"] + c.dims.get("pad", 0), generator=generator)
    if c.dims.get("zero_row"):
        wide[1] = 0.0
    return (wide.to(c.dtype)[:, : c["D"]],)


def _cost(c: Case) -> Cost:
    return Cost(c["T"] * c["D"] * (c.dtype.itemsize + 1), 3 * c["T"] * c["D"])


SPEC = KernelSpec(
    name="quant_blocks",
    runs={"cpu": quant_blocks_cpu, "triton": quant_blocks_triton},
    ref=quant_blocks_ref,
    make=_make,
    cost=_cost,
    tests=(
        case(torch.float32, T=1, D=1),
        case(torch.float16, T=5, D=129),
        case(torch.bfloat16, T=3, D=1024, zero_row=True),
        case(torch.float32, T=7, D=300, pad=3),
        case(torch.bfloat16, T=0, D=64),
    ),
    compiles=(case(torch.bfloat16, T=2, D=14336), case(torch.bfloat16, T=2, D=4096)),
    benches=(case(torch.bfloat16, T=32, D=4096), case(torch.bfloat16, T=4096, D=4096)),
    small=few_rows,
)
