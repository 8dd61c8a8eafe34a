"""Block-scaled fp8 matmul: y[t,n] = sum_q scale_x[t,q] * scale_w[n // 128, q] * (sum over block q of x[t,k] * w[n,k]) + bias.

T tokens, N outputs, K inputs, Q blocks of 128 inputs; x and w are e4m3, w has a scale for 128 x 128, x for a token and
128 columns (quant_blocks).  Reads N*K bytes: bandwidth-bound until T is some 150 on an H200.  A block's sum leaves the
tensor core, which keeps 14 bits of it on Hopper, and is added in float32 in the order of the blocks.  `deterministic`
takes one config for every T.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kernels import backend
from kernels.gemm_fp8_block_tile import _gemm_fp8_block_kernel
from kernels.launch import GpuFacts, cdiv, gpu_facts, launch
from kernels.linear import TILE_ROWS, pad_rows
from kernels.quant_blocks import BLOCK, FP8, quant_blocks_cpu
from kernels.spec import Case, Cost, KernelSpec, case
from kernels.table import tuned
from kernels.w8_config import shares
from kernels.w8_cpu import WIDENED_WEIGHTS


@dataclass(frozen=True, slots=True)
class BlockWeight:
    """`form`: cuda, or float8 (a CPU widens codes some outputs at a time).  `scale_PQ`: P blocks of 128 outputs.

    `arrivals` (cuda) are zeros between two launches.
    """

    form: str
    codes_NK: Tensor
    scale_PQ: Tensor
    bias_N: Tensor | None
    out_features: int
    in_features: int
    arrivals: Tensor | None = None

    @property
    def nbytes(self) -> int:
        held = (self.codes_NK, self.scale_PQ, self.bias_N, self.arrivals)
        return sum(t.nbytes for t in held if t is not None)


def prepare_fp8_block(
    codes_NK: Tensor, scale_PQ: Tensor, bias_N: Tensor | None = None, form: str | None = None
) -> BlockWeight:
    """Takes e4m3 codes and float32 scales [ceil(N / 128), ceil(K / 128)], multipliers; the caller drops its codes.

    Source: `weight_scale_inv` of native fp8 checkpoints (DeepSeek-V3, arXiv 2412.19437, section 3.3.2) and
    `weight_scale` of compressed-tensors' FP8_BLOCK.  ValueError where the scales are not of that shape.
    """
    N, K = codes_NK.shape
    want = (cdiv(N, BLOCK), cdiv(K, BLOCK))
    if scale_PQ.shape != want or codes_NK.dtype != FP8:
        raise ValueError(
            f"block scales of {N} x {K} {FP8} codes must be {list(want)}, got {list(scale_PQ.shape)} "
            f"for {codes_NK.dtype}"
        )
    form = form or ("cuda" if backend.runs_triton(codes_NK.device) else "float8")
    codes, scale = codes_NK.contiguous(), scale_PQ.float().contiguous()
    if form != "cuda":
        return BlockWeight(form, codes, scale, bias_N, N, K)
    # kernels take tensors that start on 16 bytes, which a slice may not
    codes, scale = (t.clone() if t.data_ptr() % 16 else t for t in (codes, scale))
    arrivals = torch.zeros(8 * cdiv(N, BLOCK), dtype=torch.int32, device=codes.device)
    return BlockWeight(form, codes, scale, bias_N, N, K, arrivals)


@dataclass(frozen=True)
class BlockConfig:
    """`swap`: weights are the rows of the tensor core's tile, tokens its columns; else tokens are the rows.

    `block_n` divides 128, or a tile would have several scales of weights.
    """

    swap: bool
    block_t: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def pick(cls, gpu: GpuFacts, T: int, N: int, K: int, deterministic: bool = False) -> "BlockConfig":
        """What was measured, else by shape: free of spills and counted (`python -m bench.aot`), not timed.

        T counts as the next power of two, so a warm-up at those compiles whatever serving will launch.
        """
        if deterministic:
            # one tile and one order of sums for every T
            return cls(False, 64, 64, 1, 4, _stages(gpu))
        T = max(16, 1 << (T - 1).bit_length())
        # a word: another K is split elsewhere
        return tuned(cls, "gemm_fp8_block", gpu, T=T, N=N, K=f"K{K}") or cls._by_shape(gpu, T, N, K)

    @classmethod
    def _by_shape(cls, gpu: GpuFacts, T: int, N: int, K: int) -> "BlockConfig":
        if T <= 64:
            return cls(T < 64, T, 128, shares(K, 2 * gpu.num_sms / cdiv(N, 128)), 4, _stages(gpu))
        tiles = cdiv(T, 128) * cdiv(N, 128)
        return cls(False, 128, 128, shares(K, gpu.num_sms / tiles), 8, _stages(gpu))

    @classmethod
    def candidates(cls, gpu: GpuFacts, T: int, N: int, K: int) -> list["BlockConfig"]:
        """What a tuner may try for this shape."""
        T = max(16, 1 << (T - 1).bit_length())
        own = cls._by_shape(gpu, T, N, K)
        widths = [t for t in (16, 32, 64, 128) if min(T, 64) <= t <= T]
        splits = sorted({1, max(1, own.split_k // 2), own.split_k, shares(K, 2 * own.split_k)})
        tries = [
            cls(swap, t, n, s, 8 if t * n == 128 * 128 else 4, stages)
            for t, n, s, stages in product(widths, (64, 128), splits, (3, 4, 5))
            for swap in {t < 64, t < 128}
        ]
        return [own, *(c for c in tries if c != own)]


def _stages(gpu: GpuFacts) -> int:
    return 3 if gpu.shared_bytes < 131072 else 4


def _unit(n: int) -> int:
    return 16 if n % 16 == 0 else 1


def gemm_fp8_block_triton(
    x_TK: Tensor,
    scale_TQ: Tensor,
    w: BlockWeight,
    out_dtype: torch.dtype,
    deterministic: bool = False,
    config: BlockConfig | None = None,
) -> Tensor:
    (T, K), N, scale_QT = x_TK.shape, w.out_features, scale_TQ.t()
    assert x_TK.is_contiguous(), f"{x_TK.stride()=}"
    assert scale_QT.is_contiguous(), f"{scale_TQ.stride()=}"
    assert w.arrivals is not None, f"{w.form=}"
    assert max(T, N) * K < 1 << 32, f"offsets of 32 bits do not reach: {T=} {N=} {K=}"
    y_TN = torch.empty(T, N, dtype=out_dtype, device=x_TK.device)
    if T == 0:
        return y_TN
    c = config or BlockConfig.pick(gpu_facts(x_TK.device), T, N, K, deterministic)
    assert BLOCK % c.block_n == 0, f"{c}"
    tiles = cdiv(T, c.block_t) * cdiv(N, c.block_n)
    # a config for fewer rows may come with more tiles than there are counters
    splits = c.split_k if tiles <= w.arrivals.numel() else 1
    partials = y_TN
    if splits > 1:
        partials = torch.empty(
            tiles * splits * c.block_t * c.block_n, dtype=torch.float32, device=x_TK.device
        )
    launch(
        _gemm_fp8_block_kernel,
        (tiles * splits,),
        y_TN,
        partials,
        w.arrivals,
        x_TK,
        w.codes_NK,
        scale_QT,
        w.scale_PQ,
        w.scale_PQ if w.bias_N is None else w.bias_N,
        T,
        N // _unit(N),
        K // _unit(K),
        splits,
        BLOCK_T=c.block_t,
        BLOCK_N=c.block_n,
        SWAP=c.swap,
        N_UNIT=_unit(N),
        K_UNIT=_unit(K),
        WHOLE_K=K % BLOCK == 0,
        HAS_BIAS=w.bias_N is not None,
        HAS_SPLITS=splits > 1,
        NUM_STAGES=c.num_stages,
        num_warps=c.num_warps,
    )
    return y_TN


def _wide(codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of codes [rows, K] with scales [rows, Q]."""
    return codes.float().mul_(scale.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]])


def gemm_fp8_block_cpu(
    x_TK: Tensor, scale_TQ: Tensor, w: BlockWeight, out_dtype: torch.dtype, deterministic: bool = False
) -> Tensor:
    """float32 values of both: their roundings are those of the sums.  `deterministic`: TILE_ROWS rows at a time."""
    (T, K), N = x_TK.shape, w.out_features
    if T == 0:
        return torch.zeros(0, N, dtype=out_dtype)
    wide_TK = _wide(x_TK, scale_TQ)
    if deterministic:
        wide_TK = pad_rows(wide_TK, TILE_ROWS)
    tile = TILE_ROWS if deterministic else T
    y_TN = torch.zeros(len(wide_TK), N)
    width = max(1, WIDENED_WEIGHTS // K // BLOCK) * BLOCK
    for n in range(0, N, width):
        rows = w.codes_NK[n : n + width]
        scale_NQ = w.scale_PQ[n // BLOCK :].repeat_interleave(BLOCK, 0)[: len(rows)]
        wide_KM = _wide(rows, scale_NQ).t()
        for t in range(0, len(wide_TK), tile):
            y_TN[t : t + tile, n : n + width] = wide_TK[t : t + tile] @ wide_KM
    y_TN = y_TN[:T]
    return (y_TN if w.bias_N is None else y_TN.add_(w.bias_N)).to(out_dtype)


def gemm_fp8_block(
    x_TK: Tensor, scale_TQ: Tensor, w: BlockWeight, out_dtype: torch.dtype, deterministic: bool = False
) -> Tensor:
    """y_TN in `out_dtype` of the codes and scales that quant_blocks made."""
    assert x_TK.dtype == FP8, f"{x_TK.dtype=}"
    run = gemm_fp8_block_triton if backend.runs_triton(x_TK.device) else gemm_fp8_block_cpu
    return run(x_TK, scale_TQ, w, out_dtype, deterministic)


def gemm_fp8_block_ref(
    x_TK: Tensor,
    scale_TQ: Tensor,
    codes_NK: Tensor,
    scale_PQ: Tensor,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """In the type of the scales; codes in fp8 are added as sm_90 does it: 32 products at a time, 13 bits kept."""
    N, K = codes_NK.shape
    y_TN = scale_TQ.new_zeros(len(x_TK), N)
    for q, k in enumerate(range(0, K, BLOCK)):
        x, w = x_TK[:, k : k + BLOCK], codes_NK[:, k : k + BLOCK]
        if x_TK.dtype != FP8:
            part_TN = x @ w.t()
        else:
            part_TN = torch.zeros_like(y_TN)
            for i in range(0, x.shape[1], 32):
                part_TN += x[:, i : i + 32].float() @ w[:, i : i + 32].float().t()
                part_TN.view(torch.int32).bitwise_and_(-1024)
        scale_N = scale_PQ[:, q].repeat_interleave(BLOCK)[:N]
        y_TN += part_TN * scale_TQ[:, q, None] * scale_N
    return (y_TN if bias_N is None else y_TN + bias_N).to(out_dtype)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    T, N, K = c["T"], c["N"], c["K"]
    x_TK = torch.randn(T, K, generator=generator)
    # blocks of very different sizes: a scale taken from a neighbour is far off
    scale_PQ = torch.exp2(
        torch.randint(-12, 0, (cdiv(N, BLOCK), cdiv(K, BLOCK)), generator=generator).float()
    )
    scale_PQ *= torch.rand(scale_PQ.shape, generator=generator) + 0.5
    codes_NK = torch.randn(N, K, generator=generator).mul_(100).clamp_(-448, 448).to(FP8)
    bias = torch.randn(N, generator=generator).to(c.dtype) if c.dims.get("bias") else None
    codes_TK, scale_TQ = quant_blocks_cpu(x_TK)
    return codes_TK, scale_TQ, codes_NK, scale_PQ, bias, c.dtype


def _prepare(form: str) -> Any:
    def prepare(
        x: Tensor, scale_TQ: Tensor, codes: Tensor, scale_PQ: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, BlockWeight, torch.dtype]:
        # as quant_blocks lays them
        return x, scale_TQ.t().contiguous().t(), prepare_fp8_block(codes, scale_PQ, bias, form), dtype

    return prepare


def _cost(c: Case) -> Cost:
    T, N, K = c["T"], c["N"], c["K"]
    return Cost(N * K + T * K + T * N * c.dtype.itemsize + 4 * T * cdiv(K, BLOCK), 2 * T * N * K)


def _small(c: Case) -> Case:
    """As many tokens, which are cheap, and one tile of weights with the divisors of the real ones."""
    K = next(k for k, unit in ((512, 128), (400, 16), (401, 1)) if c["K"] % unit == 0)
    return Case(c.dtype, {**c.dims, "T": max(c["T"], 16), "N": 128 if c["N"] % 16 == 0 else 127, "K": K})


SPEC = KernelSpec(
    name="gemm_fp8_block",
    runs={"cpu": gemm_fp8_block_cpu, "triton": gemm_fp8_block_triton},
    ref=gemm_fp8_block_ref,
    make=_make,
    cost=_cost,
    row_args=(0, 1),
    prepare={"cpu": _prepare("float8"), "triton": _prepare("cuda")},
    invariant={run: {"deterministic": True} for run in ("cpu", "triton")},
    tests=(
        case(torch.float32, T=1, N=1, K=1),
        case(torch.float32, T=3, N=300, K=1200, bias=True),
        case(torch.bfloat16, T=33, N=256, K=256),
        case(torch.float16, T=130, N=129, K=127, bias=True),
        case(torch.bfloat16, T=0, N=8, K=128),
    ),
    # what few outputs, and many, make of the others
    compiles=(
        case(torch.bfloat16, T=16, N=28672, K=4096),
        case(torch.bfloat16, T=256, N=4096, K=4096, bias=True),
    ),
    benches=tuple(
        case(torch.bfloat16, T=T, N=N, K=K)
        for T in (1, 16, 64, 2048)
        for N, K in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
    ),
    serving=lambda m: tuple(case(torch.bfloat16, T=T, N=m.D, K=m.H * m.K) for T in (16, 64, 2048)),
    config=lambda c, gpu: BlockConfig.pick(gpu, c["T"], c["N"], c["K"]),
    candidates=lambda c, gpu: BlockConfig.candidates(gpu, c["T"], c["N"], c["K"]),
    small=_small,
    streams={"_gemm_fp8_block_kernel": lambda c: c["BLOCK_N"] * 128},
)
