"""8-bit matmul: y = (sum_k x[t,k] * w[n,k]) * scale_w[n] * scale_x[t] + bias, x and w both int8 or both fp8 (e4m3).

T tokens, N outputs, K inputs.  Reads N*K bytes: bandwidth-bound until T is some 150 on an H200.  int8 sums are exact in
int32, so no tiling and no batch can change a row; fp8 sums are float32, added in an order that the config alone decides,
and `deterministic` takes one config for every T.  Scales per tensor are the same one, repeated.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import backend
from kernels.gemm_w8a8_large import _gemm_w8a8_large_kernel, _gemm_w8a8_tma_kernel
from kernels.gemm_w8a8_small import _gemm_w8a8_small_kernel
from kernels.launch import aligned, cdiv, gpu_facts, launch
from kernels.linear import TILE_ROWS, pad_rows
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case
from kernels.w8_config import W8Config
from kernels.w8_cpu import fp8_sum, pick_int8_form, prepack, scaled_int8

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class W8Weight:
    """`form`: cuda, onednn, int_mm, float or float8 (a CPU's fp8); the one copy of the codes lies as that form wants it.

    `row_dtype` is that of the activations' codes.  `arrivals` (cuda) are zeros between two launches.  `fast`: fp8 sums
    stay in the tensor core of a GPU (see w8_config); half the registers, so wider tiles, for about 1e-3 of error.
    """

    form: str
    codes: Tensor
    scale_N: Tensor
    bias_N: Tensor | None
    out_features: int
    in_features: int
    row_dtype: torch.dtype = torch.int8
    arrivals: Tensor | None = None
    fast: bool = False

    @property
    def kind(self) -> str:
        """The word for the codes in W8Config."""
        return "int8" if self.row_dtype == torch.int8 else "fp8-fast" if self.fast else "fp8"

    @property
    def nbytes(self) -> int:
        bias = 0 if self.bias_N is None else self.bias_N.nbytes
        arrivals = 0 if self.arrivals is None else self.arrivals.nbytes
        width = 4 if self.form == "float" else 1
        return self.out_features * self.in_features * width + self.scale_N.nbytes + bias + arrivals


def prepare_w8a8(
    codes_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    form: str | None = None,
    fast: bool = False,
) -> W8Weight:
    """Takes int8 or e4m3 codes and one float32 scale a row (or a single one); the caller drops its codes."""
    N, K = codes_NK.shape
    assert codes_NK.dtype in (torch.int8, FP8), f"{codes_NK.dtype=}"
    assert scale_N.numel() in (1, N), f"{scale_N.shape=} {N=}"
    on_gpu = backend.runs_triton(codes_NK.device)
    form = form or ("cuda" if on_gpu else "float8" if codes_NK.dtype == FP8 else pick_int8_form())
    scale_N = scale_N.float().reshape(-1).expand(N).contiguous()
    codes = codes_NK.contiguous()
    if form != "cuda":
        return W8Weight(form, prepack(form, codes), scale_N, bias_N, N, K, codes_NK.dtype)
    # kernels take tensors that start on 16 bytes, which a slice may not
    codes, scale_N = aligned(codes), aligned(scale_N)
    bias_N = None if bias_N is None else aligned(bias_N)
    arrivals = torch.zeros(8 * cdiv(N, 64), dtype=torch.int32, device=codes.device)
    return W8Weight(form, codes, scale_N, bias_N, N, K, codes_NK.dtype, arrivals, fast)


def _hopper_sum(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """What torch itself loses on sm_90, whose tensor cores keep 13 bits of a sum of 128 fp8 products, 32 at a time."""
    y_TN = torch.zeros(x_TK.shape[0], w_NK.shape[0])
    for k in range(0, x_TK.shape[1], 128):
        part_TN = torch.zeros_like(y_TN)
        for i in range(k, min(k + 128, x_TK.shape[1]), 32):
            part_TN += x_TK[:, i : i + 32].float() @ w_NK[:, i : i + 32].float().t()
            part_TN.view(torch.int32).bitwise_and_(-1024)
        y_TN += part_TN
    return y_TN


def gemm_w8a8_ref(
    x_TK: Tensor,
    scale_T: Tensor,
    codes_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    fast: bool = False,
) -> Tensor:
    """float64 adds integer products exactly; fp64 scales make the result the truth.  `fast` is for a GPU alone."""
    if codes_NK.dtype == FP8:
        total = _hopper_sum(x_TK, codes_NK)
    else:
        total = (x_TK.double() @ codes_NK.double().t()).to(scale_N.dtype)
    y = total * scale_N * scale_T[:, None]
    return (y if bias_N is None else y + bias_N).to(out_dtype)


def _unit(n: int) -> int:
    return 16 if n % 16 == 0 else 1


def _launch_small(y_TN: Tensor, x_TK: Tensor, scale_T: Tensor, w: W8Weight, c: W8Config) -> None:
    (T, K), N = x_TK.shape, w.out_features
    assert w.arrivals is not None, "a weight that was not prepared for a GPU"
    tiles = cdiv(T, c.block_t) * cdiv(N, c.block_n)
    # a config for fewer rows may come with more tiles than there are counters
    splits = c.split_k if tiles <= w.arrivals.numel() else 1
    partials = y_TN
    if splits > 1:
        sum_type = torch.int32 if w.row_dtype == torch.int8 else torch.float32
        size = tiles * splits * c.block_t * c.block_n
        partials = torch.empty(size, dtype=sum_type, device=x_TK.device)
    launch(
        _gemm_w8a8_small_kernel,
        (tiles * splits,),
        y_TN,
        partials,
        w.arrivals,
        x_TK,
        w.codes,
        scale_T,
        w.scale_N,
        w.scale_N if w.bias_N is None else w.bias_N,
        T,
        N // _unit(N),
        K // _unit(K),
        splits,
        BLOCK_T=c.block_t,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        N_UNIT=_unit(N),
        K_UNIT=_unit(K),
        WHOLE_K=K % c.block_k == 0,
        HAS_BIAS=w.bias_N is not None,
        HAS_SPLITS=splits > 1,
        PROMOTE=c.promote,
        NUM_STAGES=c.num_stages,
        num_warps=c.num_warps,
    )


def _launch_large(
    y_TN: Tensor, x_TK: Tensor, scale_T: Tensor, w: W8Weight, c: W8Config, num_sms: int
) -> None:
    (T, K), N = x_TK.shape, w.out_features
    tiles = cdiv(T, c.block_t) * cdiv(N, c.block_n)
    by_engine = c.tma and K % 16 == 0
    x, codes, whole = x_TK, w.codes, {"WHOLE_K": K % c.block_k == 0}
    if by_engine:
        x = TensorDescriptor(x_TK, [T, K], [K, 1], [c.block_t, c.block_k])
        codes = TensorDescriptor(w.codes, [N, K], [K, 1], [c.block_n, c.block_k])
        whole = {}
    launch(
        _gemm_w8a8_tma_kernel if by_engine else _gemm_w8a8_large_kernel,
        (min(tiles, num_sms * c.programs_per_sm),),
        y_TN,
        x,
        codes,
        scale_T,
        w.scale_N,
        w.scale_N if w.bias_N is None else w.bias_N,
        T,
        N // _unit(N),
        K // _unit(K),
        BLOCK_T=c.block_t,
        BLOCK_N=c.block_n,
        BLOCK_K=c.block_k,
        N_UNIT=_unit(N),
        K_UNIT=_unit(K),
        **whole,
        GROUP_T=c.group_t,
        FLATTEN=c.flatten,
        HAS_BIAS=w.bias_N is not None,
        PROMOTE=c.promote,
        NUM_STAGES=c.num_stages,
        num_warps=c.num_warps,
    )


def gemm_w8a8_triton(
    x_TK: Tensor,
    scale_T: Tensor,
    w: W8Weight,
    out_dtype: torch.dtype,
    deterministic: bool = False,
    config: W8Config | None = None,
) -> Tensor:
    (T, K), N = x_TK.shape, w.out_features
    assert x_TK.is_contiguous(), f"{x_TK.stride()=}"
    assert w.form == "cuda", f"{w.form=}"
    y_TN = torch.empty(T, N, dtype=out_dtype, device=x_TK.device)
    if T == 0:
        return y_TN
    gpu = gpu_facts(x_TK.device)
    c = config or W8Config.pick(gpu, T, N, K, w.kind, deterministic)
    if c.swap:
        _launch_small(y_TN, x_TK, scale_T, w, c)
    else:
        _launch_large(y_TN, x_TK, scale_T, w, c, gpu.num_sms)
    return y_TN


def gemm_w8a8_cpu(
    x_TK: Tensor, scale_T: Tensor, w: W8Weight, out_dtype: torch.dtype, deterministic: bool = False
) -> Tensor:
    T = x_TK.shape[0]
    if T == 0:
        return torch.zeros(0, w.out_features, dtype=out_dtype)
    if w.form == "float8":
        rows = pad_rows(x_TK, TILE_ROWS) if deterministic else x_TK
        y_TN = fp8_sum(rows, w.codes, TILE_ROWS if deterministic else T)[:T].mul_(w.scale_N)
    else:
        y_TN = scaled_int8(w.form, x_TK.contiguous(), w.codes, w.scale_N)
    y_TN = y_TN.mul_(scale_T[:, None])
    return (y_TN if w.bias_N is None else y_TN.add_(w.bias_N)).to(out_dtype)


def gemm_w8a8(
    x_TK: Tensor, scale_T: Tensor, w: W8Weight, out_dtype: torch.dtype, deterministic: bool = False
) -> Tensor:
    """y_TN in `out_dtype`; int8 results are deterministic always, fp8 ones where it is asked for."""
    assert x_TK.dtype == w.row_dtype, f"{x_TK.dtype=} {w.row_dtype=}"
    run = gemm_w8a8_triton if backend.runs_triton(x_TK.device) else gemm_w8a8_cpu
    return run(x_TK, scale_T, w, out_dtype, deterministic)


def _codes(rows: int, columns: int, c: Case, generator: torch.Generator) -> Tensor:
    if c.dims.get("fp8"):
        return torch.randn(rows, columns, generator=generator).mul_(100).clamp_(-448, 448).to(FP8)
    low = 127 if c.dims.get("extreme") else -127
    return torch.randint(low, 128, (rows, columns), generator=generator, dtype=torch.int8)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    T, N, K = c["T"], c["N"], c["K"]
    x, w = _codes(T, K, c, generator), _codes(N, K, c, generator)
    scale_T, scale_N = torch.rand(T, generator=generator) / 127, torch.rand(N, generator=generator) / 127
    bias = torch.randn(N, generator=generator).to(c.dtype) if c.dims.get("bias") else None
    return x, scale_T, w, scale_N, bias, c.dtype, bool(c.dims.get("fast"))


def _cost(c: Case) -> Cost:
    T, N, K = c["T"], c["N"], c["K"]
    return Cost(N * K + T * K + T * N * c.dtype.itemsize + 4 * (T + N), 2 * T * N * K)


def _prepare(form: str | None) -> Any:
    def prepare(
        x: Tensor, scale_T: Tensor, w: Tensor, scale_N: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, W8Weight, torch.dtype]:
        bias, out_dtype, fast = rest
        # a form for int8 says nothing of fp8, which a CPU has one way to multiply
        own = None if w.dtype == FP8 and form != "cuda" else form
        return x, scale_T, prepare_w8a8(w, scale_N, bias, own, fast), out_dtype

    return prepare


def _shapes(m: ModelShape) -> tuple[tuple[int, int, torch.dtype], ...]:
    """N, K and the type of the outputs: of qkv, o, gate_up, down, and of an 8-bit head, whose logits are float32."""
    bf16 = torch.bfloat16
    return (
        ((m.H + 2 * m.G) * m.K, m.D, bf16),
        (m.D, m.H * m.K, bf16),
        (2 * m.F, m.D, bf16),
        (m.D, m.F, bf16),
        (m.V, m.D, torch.float32),
    )


def _cases(m: ModelShape, rows: tuple[int, ...]) -> Iterator[Case]:
    for fp8, T, (N, K, dtype) in product((False, True), rows, _shapes(m)):
        # a step has a row of logits for each sequence, not for each token
        if T <= 512 or dtype == torch.bfloat16:
            yield case(dtype, T=T, N=N, K=K, fp8=fp8)


def _small(c: Case) -> Case:
    """As many tokens, which are cheap, and one tile of weights with the divisors of the real ones."""
    K = next(k for k, unit in ((512, 256), (384, 128), (400, 16), (401, 1)) if c["K"] % unit == 0)
    return Case(c.dtype, {**c.dims, "T": max(c["T"], 16), "N": 128 if c["N"] % 16 == 0 else 127, "K": K})


def _dims(c: Case) -> tuple[int, int, int, str]:
    codes = "int8" if not c.dims.get("fp8") else "fp8-fast" if c.dims.get("fast") else "fp8"
    return c["T"], c["N"], c["K"], codes


LLAMA_3_8B = ModelShape(D=4096, H=32, G=8, K=128, F=14336, V=128256)

SPEC = KernelSpec(
    name="gemm_w8a8",
    runs={"cpu": gemm_w8a8_cpu, "int_mm": gemm_w8a8_cpu, "float": gemm_w8a8_cpu, "triton": gemm_w8a8_triton},
    ref=gemm_w8a8_ref,
    make=_make,
    cost=_cost,
    row_args=(0, 1),
    prepare={
        "cpu": _prepare(None),
        "int_mm": _prepare("int_mm"),
        "float": _prepare("float"),
        "triton": _prepare("cuda"),
    },
    invariant={run: {"deterministic": True} for run in ("cpu", "int_mm", "float", "triton")},
    tests=(
        case(torch.float32, T=1, N=1, K=1),
        case(torch.float32, T=3, N=37, K=1),
        case(torch.float32, T=17, N=65, K=129, bias=True),
        case(torch.bfloat16, T=5, N=96, K=256, bias=True),
        case(torch.float16, T=65, N=37, K=200),
        case(torch.float32, T=2, N=16, K=2816, extreme=True),
        case(torch.bfloat16, T=0, N=8, K=32),
        case(torch.float32, T=3, N=65, K=1200, bias=True, fp8=True),
        case(torch.bfloat16, T=33, N=64, K=256, fp8=True),
        case(torch.float16, T=130, N=129, K=127, bias=True, fp8=True),
        case(torch.bfloat16, T=9, N=64, K=256, fp8=True, fast=True),
    ),
    compiles=tuple(
        case(torch.bfloat16, T=T, N=256, K=K, bias=T == 64) for T, K in ((16, 1024), (64, 256), (600, 256))
    ),
    benches=(
        *_cases(LLAMA_3_8B, (1, 16, 64, 2048, 4096)),
        *(
            case(dtype, T=4096, N=N, K=K, fp8=True, fast=True)
            for N, K, dtype in _shapes(LLAMA_3_8B)
            if dtype == torch.bfloat16
        ),
    ),
    serving=lambda m: tuple(_cases(m, (1, 16, 64, 256, 2048))),
    config=lambda c, gpu: W8Config.pick(gpu, *_dims(c)),
    candidates=lambda c, gpu: W8Config.candidates(gpu, *_dims(c)),
    small=_small,
    streams={"_gemm_w8a8_small_kernel": lambda c: c["BLOCK_N"] * c["BLOCK_K"]},
)
