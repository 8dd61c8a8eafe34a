"""int8 x int8 matmul: y = (sum_k x[t,k] * w[n,k]) * scale_w[n] * scale_x[t] + bias, the sum exact in int32.

T tokens, N outputs, K inputs.  Reads N*K bytes: bandwidth-bound for small T.  Since the sum is exact, no tiling and no
batch can change a row.  CPU: oneDNN's prepacked product of *unsigned* activations (x + 128, taken back through the zero
point): with signed ones it runs its reference loop, a thousand times slower, on every CPU without AMX.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, cpu_facts
from kernels.spec import Case, Cost, KernelSpec, case

# the partial sums of |x|, |w| <= 128 stay below 2^24 for this many products, so float32 adds them exactly
EXACT_IN_FLOAT = 1024


@dataclass(frozen=True)
class GemmConfig:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def pick(cls, rows: int) -> "GemmConfig":
        """Tiles by rows alone; not tuned on hardware yet, only free of spills (tests/kernels/test_aot.py)."""
        if rows <= 16:
            return cls(16, 64, 128, num_warps=4, num_stages=4)
        if rows <= 64:
            return cls(64, 64, 128, num_warps=4, num_stages=4)
        return cls(128, 128, 128, num_warps=8, num_stages=3)


@dataclass(frozen=True, slots=True)
class W8Weight:
    """`form`: cuda, onednn, int_mm or float; the one copy of the codes lies as that form wants it."""

    form: str
    codes: Tensor
    scale_N: Tensor
    bias_N: Tensor | None
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        bias = 0 if self.bias_N is None else self.bias_N.nbytes
        return (
            self.out_features * self.in_features * (4 if self.form == "float" else 1)
            + self.scale_N.nbytes
            + bias
        )


def gemm_w8a8_ref(
    x_TK: Tensor,
    scale_T: Tensor,
    codes_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """float64 adds the integer products exactly; fp64 scales make the result the truth."""
    y = (x_TK.double() @ codes_NK.double().t()).to(scale_N.dtype) * scale_N * scale_T[:, None]
    return (y if bias_N is None else y + bias_N).to(out_dtype)


@triton.jit(do_not_specialize=["T"])
def _gemm_w8a8_kernel(
    y,
    x,
    w,
    scale_t,
    scale_n,
    bias,
    T,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    # neighbours share a block of w: it is the larger operand
    i_m = tl.program_id(0) % tl.cdiv(T, BLOCK_M)
    i_n = tl.program_id(0) // tl.cdiv(T, BLOCK_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < T
    m_n = o_n < N
    p_x = x + o_m[:, None] * K + o_k[None, :]
    p_w = w + o_n[:, None] * K + o_k[None, :]
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for i_k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        m_k = o_k < K - i_k
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0)
        b_w = tl.load(p_w, mask=m_n[:, None] & m_k[None, :], other=0)
        b_acc = tl.dot(b_x, tl.trans(b_w), b_acc, out_dtype=tl.int32)
        p_x += BLOCK_K
        p_w += BLOCK_K
    b_sn = tl.load(scale_n + o_n, mask=m_n, other=0.0)
    b_st = tl.load(scale_t + o_m, mask=m_m, other=0.0)
    b_y = b_acc.to(tl.float32) * b_sn[None, :] * b_st[:, None]
    if HAS_BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = y + o_m[:, None] * N + o_n[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def gemm_w8a8_triton(
    x_TK: Tensor, scale_T: Tensor, w: W8Weight, out_dtype: torch.dtype, config: GemmConfig | None = None
) -> Tensor:
    T, N, K = x_TK.shape[0], w.out_features, w.in_features
    assert x_TK.is_contiguous(), f"{x_TK.stride()=}"
    assert w.form == "cuda", f"{w.form=}"
    c = config or GemmConfig.pick(T)
    y_TN = torch.empty(T, N, dtype=out_dtype, device=x_TK.device)
    if T:
        _gemm_w8a8_kernel[(cdiv(T, c.block_m) * cdiv(N, c.block_n),)](
            y_TN,
            x_TK,
            w.codes,
            scale_T,
            w.scale_N,
            w.scale_N if w.bias_N is None else w.bias_N,
            T,
            N,
            K,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            HAS_BIAS=w.bias_N is not None,
            NUM_STAGES=c.num_stages,
            num_warps=c.num_warps,
        )
    return y_TN


@functools.cache
def zero_points(out_features: int) -> Tensor:
    return torch.zeros(out_features, dtype=torch.int64)


def to_unsigned(codes: Tensor) -> Tensor:
    """codes + 128 as uint8: the sign bit flipped."""
    return codes.view(torch.uint8).bitwise_xor(128)


def onednn_int8(x_TK: Tensor, packed: Tensor, scale_N: Tensor) -> Tensor:
    """The exact sum times scale_N, in float32; x_TK as `to_unsigned` gives it."""
    zero_N = zero_points(scale_N.shape[0])
    call = torch.ops.onednn.qlinear_pointwise
    return call(x_TK, 1.0, 128, packed, scale_N, zero_N, None, 1.0, 0, torch.float32, "none", [], "")


@functools.cache
def pick_int8_form() -> str:
    """The fastest CPU product that is exact here.  Old CPUs saturate pairs of int8 products at 16 bits: tried, not assumed."""
    x = torch.tensor([[127, -127], [-127, -127]], dtype=torch.int8).repeat(1, 64)
    w = torch.tensor([[127, 127], [-128, 127]], dtype=torch.int8).repeat(8, 64)
    exact = (x.double() @ w.double().t()).float()
    ops = torch.ops.onednn
    if cpu_facts().vnni and hasattr(ops, "qlinear_prepack") and hasattr(ops, "qlinear_pointwise"):
        packed = ops.qlinear_prepack(w, [2, 128])
        if torch.equal(onednn_int8(to_unsigned(x), packed, torch.ones(16)), exact):
            return "onednn"
    if hasattr(torch, "_int_mm") and torch.equal(torch._int_mm(x, w.t()).float(), exact):
        return "int_mm"
    return "float"


def float_sum(x_TK: Tensor, wide_NK: Tensor) -> Tensor:
    """The sum as float64: float32 products are exact within a chunk, float64 adds the chunks."""
    y = torch.zeros(x_TK.shape[0], wide_NK.shape[0], dtype=torch.float64)
    for k in range(0, x_TK.shape[1], EXACT_IN_FLOAT):
        y += x_TK[:, k : k + EXACT_IN_FLOAT].float() @ wide_NK[:, k : k + EXACT_IN_FLOAT].t()
    return y


def prepare_w8a8(
    codes_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None, form: str | None = None
) -> W8Weight:
    """Takes int8 codes and one float32 scale a row; the caller drops its codes."""
    N, K = codes_NK.shape
    assert codes_NK.dtype == torch.int8, f"{codes_NK.dtype=}"
    assert scale_N.shape == (N,), f"{scale_N.shape=} {N=}"
    form = form or ("cuda" if codes_NK.is_cuda else pick_int8_form())
    codes = codes_NK.contiguous()
    if form == "onednn":
        codes = torch.ops.onednn.qlinear_prepack(codes, [32, K])
    elif form == "float":
        codes = codes.float()
    return W8Weight(form, codes, scale_N.float(), bias_N, N, K)


def scaled(x_TK: Tensor, w: W8Weight) -> Tensor:
    """The exact sum times the weights' scales, float32."""
    if w.form == "onednn":
        return onednn_int8(to_unsigned(x_TK), w.codes, w.scale_N)
    total = torch._int_mm(x_TK, w.codes.t()) if w.form == "int_mm" else float_sum(x_TK, w.codes)
    return total.float().mul_(w.scale_N)


def gemm_w8a8_cpu(x_TK: Tensor, scale_T: Tensor, w: W8Weight, out_dtype: torch.dtype) -> Tensor:
    if x_TK.shape[0] == 0:
        return torch.zeros(0, w.out_features, dtype=out_dtype)
    y_TN = scaled(x_TK.contiguous(), w).mul_(scale_T[:, None])
    return (y_TN if w.bias_N is None else y_TN.add_(w.bias_N)).to(out_dtype)


def gemm_w8a8(
    x_TK: Tensor, scale_T: Tensor, w: W8Weight, out_dtype: torch.dtype, deterministic: bool = False
) -> Tensor:
    """y_TN in `out_dtype`; always deterministic, the argument is there because the other matmuls have it."""
    run = gemm_w8a8_triton if x_TK.is_cuda else gemm_w8a8_cpu
    return run(x_TK, scale_T, w, out_dtype)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    T, N, K = c["T"], c["N"], c["K"]
    low = 127 if c.dims.get("extreme") else -127
    x = torch.randint(low, 128, (T, K), generator=generator).to(torch.int8)
    w = torch.randint(low, 128, (N, K), generator=generator).to(torch.int8)
    scale_T, scale_N = torch.rand(T, generator=generator) / 127, torch.rand(N, generator=generator) / 127
    bias = torch.randn(N, generator=generator).to(c.dtype) if c.dims.get("bias") else None
    return x, scale_T, w, scale_N, bias, c.dtype


def _cost(c: Case) -> Cost:
    T, N, K = c["T"], c["N"], c["K"]
    return Cost(N * K + T * K + T * N * c.dtype.itemsize + 4 * (T + N), 2 * T * N * K)


def _prepare(form: str | None) -> Any:
    def prepare(
        x: Tensor, scale_T: Tensor, w: Tensor, scale_N: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Any:
        return x, scale_T, prepare_w8a8(w, scale_N, bias, form), out_dtype

    return prepare


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
    tests=(
        case(torch.float32, T=1, N=1, K=1),
        case(torch.float32, T=17, N=65, K=129, bias=True),
        case(torch.bfloat16, T=5, N=96, K=256, bias=True),
        case(torch.float16, T=65, N=37, K=200),
        case(torch.float32, T=2, N=16, K=2816, extreme=True),
        case(torch.bfloat16, T=0, N=8, K=32),
    ),
    compiles=tuple(case(torch.bfloat16, T=T, N=256, K=256, bias=T == 64) for T in (16, 64, 128)),
    benches=(
        case(torch.bfloat16, T=1, N=6144, K=4096),
        case(torch.bfloat16, T=32, N=28672, K=4096),
        case(torch.bfloat16, T=2048, N=4096, K=14336),
    ),
)
