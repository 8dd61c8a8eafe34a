"""A packed 4-bit weight with one scale an output, written out as the int8 codes it stands for: codes[n,k] as they are.

N outputs, K inputs.  Reads N*K/2 bytes and writes N*K: bandwidth-bound.  Many rows share the result, so large products
go through gemm_w8a8 and a scratch tensor.  Scales by group have no such form: their weights are no int8 times one scale.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import GpuFacts, cdiv, gpu_facts, launch
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case
from kernels.table import tuned
from kernels.w4_decode import decode
from kernels.w4_pack import Int4, Packed4, pack, unit, widened


@dataclass(frozen=True)
class ExpandConfig:
    block_n: int
    num_warps: int

    @classmethod
    def pick(cls, gpu: GpuFacts, N: int, K: int) -> "ExpandConfig":
        """What was measured, else 64 outputs of a pair of groups a program; not timed."""
        return tuned(cls, "w4_to_w8", gpu, N=N, K=K) or cls(64, num_warps=4)


def w4_to_w8_ref(codes_NK: Tensor, zero_NQ: Tensor | None, step_NQ: Tensor | None) -> Tensor:
    # progressive values, or a channel's codes with its zero taken off; without either, 16 times the codes
    w = Int4(codes_NK, torch.ones(codes_NK.shape[0], 1), zero_NQ, step_NQ)
    return (widened(w) * (16 if zero_NQ is None and step_NQ is None else 1)).to(torch.int8)


@triton.jit(do_not_specialize=["N", "k_units"])
def _w4_to_w8_kernel(
    out,
    w,
    meta,
    N,
    k_units,
    K_UNIT: tl.constexpr,
    DECODE: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    K = k_units * K_UNIT
    i_p = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, CHUNK)
    o_row = tl.minimum(o_n, N - 1)
    p_w = w + o_row.to(tl.int64)[:, None] * (tl.cdiv(K, 2 * GROUP) * CHUNK) + i_p * CHUNK + o_c[None, :]
    b_even, b_odd = decode(tl.load(p_w), meta + i_p * N + o_row, DECODE)
    left = K - i_p * (2 * GROUP)
    p_out = out + o_n.to(tl.int64)[:, None] * K + i_p * (2 * GROUP) + o_c[None, :]
    m_n = (o_n < N)[:, None]
    tl.store(p_out, b_even, mask=m_n & (o_c < tl.minimum(left, GROUP))[None, :])
    tl.store(p_out + GROUP, b_odd, mask=m_n & (o_c < tl.minimum(left - GROUP, GROUP))[None, :])


def w4_to_w8(w: Packed4, out_features: int, in_features: int, config: ExpandConfig | None = None) -> Tensor:
    """int8 [N, K]; with `w.scale` they are the weight."""
    N, K = out_features, in_features
    assert not w.by_group, "weights with scales by group are no int8 times one scale"
    c = config or ExpandConfig.pick(gpu_facts(w.codes.device), N, K)
    out = torch.empty(N, K, dtype=torch.int8, device=w.codes.device)
    launch(
        _w4_to_w8_kernel,
        (cdiv(K, 2 * w.group), cdiv(N, c.block_n)),
        out,
        w.codes,
        w.codes if w.meta_PN is None else w.meta_PN,
        N,
        K // unit(K),
        K_UNIT=unit(K),
        DECODE=w.decode,
        GROUP=w.group,
        CHUNK=w.chunk,
        BLOCK_N=c.block_n,
        num_warps=c.num_warps,
    )
    return out


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    """Steps 1..8 keep (code - zero) * step within -120..120."""
    N, K, Q = c["N"], c["K"], c["Q"]
    codes = torch.randint(-8, 8, (N, K), generator=generator, dtype=torch.int8)
    step = torch.randint(1, 9, (N, Q), generator=generator, dtype=torch.int8) if c.dims.get("step") else None
    zero = torch.randint(-8, 8, (N, Q), generator=generator, dtype=torch.int8) if c.dims.get("zero") else None
    return codes, zero, step


def _prepare(codes_NK: Tensor, zero_NQ: Tensor | None, step_NQ: Tensor | None) -> tuple[Any, ...]:
    w = Int4(codes_NK, torch.ones(codes_NK.shape[0], 1, device=codes_NK.device), zero_NQ, step_NQ)
    return pack("channel" if step_NQ is None else "progressive", w), *codes_NK.shape


def _cost(c: Case) -> Cost:
    return Cost(c["N"] * c["K"] * 3 // 2 + 2 * c["N"] * c["Q"], 0)


def _serving(m: ModelShape) -> tuple[Case, ...]:
    shapes = ((m.H + 2 * m.G) * m.K, m.D), (m.D, m.H * m.K), (2 * m.F, m.D), (m.D, m.F)
    progressive = tuple(case(torch.int8, N=N, K=K, Q=K // 128, step=True, zero=True) for N, K in shapes)
    return progressive + tuple(case(torch.int8, N=N, K=K, Q=1) for N, K in shapes)


def _small(c: Case) -> Case:
    return Case(c.dtype, {**c.dims, "N": 16, "K": 256 * c["Q"] if c["Q"] == 1 else 512, "Q": min(c["Q"], 4)})


SPEC = KernelSpec(
    name="w4_to_w8",
    runs={"triton": w4_to_w8},
    ref=w4_to_w8_ref,
    make=_make,
    cost=_cost,
    row_args=(0, 1, 2),  # outputs do not see each other either
    prepare={"triton": _prepare},
    tests=(
        case(torch.int8, N=3, K=320, Q=5, step=True, zero=True),
        case(torch.int8, N=65, K=96, Q=1),
        case(torch.int8, N=5, K=90, Q=1, zero=True),
    ),
    compiles=(
        case(torch.int8, N=256, K=512, Q=4, step=True, zero=True),
        case(torch.int8, N=256, K=512, Q=1),
    ),
    benches=tuple(case(torch.int8, N=28672, K=4096, Q=Q, step=Q > 1) for Q in (1, 32)),
    serving=_serving,
    config=lambda c, gpu: ExpandConfig.pick(gpu, c["N"], c["K"]),
    candidates=lambda c, gpu: [ExpandConfig(n, w) for n in (16, 32, 64, 128) for w in (2, 4, 8)],
    small=_small,
)
