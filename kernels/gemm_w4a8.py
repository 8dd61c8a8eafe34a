"""int8 x int4 matmul, groups of inputs: y = scale_x[t] * sum_q scale[q,n] * sum_{k in q} x[t,k] * (w[n,k] - zero[q,n]).

T tokens, N outputs, K inputs, Q groups of K/Q inputs.  The inner sums are exact in int32, the outer one is float32 in
the order of the groups, so no batch can change a row.  GPU: reads N*K/2 bytes; a byte holds one element of each of two
neighbouring groups (the even one below), so either half feeds a dot over one whole group.  CPU: no 4-bit product exists
there, the weight is held as int8 with the zero point already taken off (`bits_stored` is 8).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv
from kernels.spec import Case, Cost, KernelSpec, case
from kernels.w8_cpu import float_sum, onednn_int8, pick_int8_form, to_unsigned, zero_points

# a wider group is cut on the GPU, its scale repeated: the operands of one dot must fit in registers
MAX_GROUP = 128


@dataclass(frozen=True)
class W4Config:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @classmethod
    def pick(cls, rows: int) -> "W4Config":
        """Tiles by rows alone; not tuned on hardware yet, only free of spills (tests/kernels/test_aot.py)."""
        if rows <= 16:
            return cls(16, 64, num_warps=4, num_stages=3)
        return cls(64, 64, num_warps=4, num_stages=3)


@dataclass(frozen=True, slots=True)
class W4Weight:
    """`form`: cuda, onednn, int_mm or float; `codes` is one tensor, or one packed product a group (onednn).

    `group_size` and Q are those of the stored form: cut to MAX_GROUP and padded to an even Q for cuda.
    """

    form: str
    codes: tuple[Tensor, ...]
    scale_QN: Tensor
    zero_QN: Tensor | None
    bias_N: Tensor | None
    out_features: int
    in_features: int
    group_size: int

    @property
    def row_dtype(self) -> torch.dtype:
        """Of the activations' codes."""
        return torch.int8

    @property
    def bits_stored(self) -> int:
        return 4 if self.form == "cuda" else 8

    @property
    def nbytes(self) -> int:
        rest = sum(t.nbytes for t in (self.zero_QN, self.bias_N) if t is not None)
        return self.out_features * self.in_features * self.bits_stored // 8 + self.scale_QN.nbytes + rest


def gemm_w4a8_ref(
    x_TK: Tensor,
    scale_T: Tensor,
    codes_NK: Tensor,
    scale_NQ: Tensor,
    zero_NQ: Tensor | None,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    T, (N, Q) = x_TK.shape[0], scale_NQ.shape
    w_NQG = codes_NK.double().view(N, Q, -1)
    if zero_NQ is not None:
        w_NQG = w_NQG - zero_NQ.double()[:, :, None]
    partial_TNQ = torch.einsum(
        "tqg,nqg->tnq", x_TK.double().view(T, Q, w_NQG.shape[2]), w_NQG
    )  # exact integers
    y = (partial_TNQ.to(scale_NQ.dtype) * scale_NQ).sum(-1) * scale_T[:, None]
    return (y if bias_N is None else y + bias_N).to(out_dtype)


@triton.jit(do_not_specialize=["T"])
def _gemm_w4a8_kernel(
    y,
    x,
    w,
    scale_t,
    scale_qn,
    zero_qn,
    bias,
    T,
    N,
    K,
    pairs,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    i_m = tl.program_id(0) % tl.cdiv(T, BLOCK_M)
    i_n = tl.program_id(0) // tl.cdiv(T, BLOCK_M)
    o_m = i_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_g = tl.arange(0, BLOCK_G)
    m_m = o_m < T
    m_n = o_n < N
    m_g = o_g < G
    p_x = x + o_m[:, None] * K + o_g[None, :]
    p_w = w + o_n[:, None] * pairs * G + o_g[None, :]
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_p in tl.range(0, pairs, num_stages=NUM_STAGES):
        # x is masked, so what the padding of w decodes to does not matter; the last pair may lack its odd group
        b_w = tl.load(p_w, mask=m_n[:, None] & m_g[None, :], other=0)
        b_x0 = tl.load(p_x, mask=m_m[:, None] & m_g[None, :], other=0)
        m_odd = m_g & (o_g < K - (2 * i_p + 1) * G)
        b_x1 = tl.load(p_x + G, mask=m_m[:, None] & m_odd[None, :], other=0)
        b_w0 = (b_w & 15).to(tl.int8) - 8
        b_w1 = (b_w >> 4).to(tl.int8) - 8
        o_q = 2 * i_p * N + o_n
        if HAS_ZERO:
            b_w0 -= tl.load(zero_qn + o_q, mask=m_n, other=0)[:, None]
            b_w1 -= tl.load(zero_qn + o_q + N, mask=m_n, other=0)[:, None]
        b_s0 = tl.load(scale_qn + o_q, mask=m_n, other=0.0)
        b_s1 = tl.load(scale_qn + o_q + N, mask=m_n, other=0.0)
        b_acc += tl.dot(b_x0, tl.trans(b_w0), out_dtype=tl.int32).to(tl.float32) * b_s0[None, :]
        b_acc += tl.dot(b_x1, tl.trans(b_w1), out_dtype=tl.int32).to(tl.float32) * b_s1[None, :]
        p_x += 2 * G
        p_w += G
    b_y = b_acc * tl.load(scale_t + o_m, mask=m_m, other=0.0)[:, None]
    if HAS_BIAS:
        b_y += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = y + o_m[:, None] * N + o_n[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


def gemm_w4a8_triton(
    x_TK: Tensor, scale_T: Tensor, w: W4Weight, out_dtype: torch.dtype, config: W4Config | None = None
) -> Tensor:
    T, N, K = x_TK.shape[0], w.out_features, w.in_features
    assert x_TK.is_contiguous(), f"{x_TK.stride()=}"
    assert w.form == "cuda", f"{w.form=}"
    c = config or W4Config.pick(T)
    y_TN = torch.empty(T, N, dtype=out_dtype, device=x_TK.device)
    if T:
        _gemm_w4a8_kernel[(cdiv(T, c.block_m) * cdiv(N, c.block_n),)](
            y_TN,
            x_TK,
            w.codes[0],
            scale_T,
            w.scale_QN,
            w.scale_QN if w.zero_QN is None else w.zero_QN,
            w.scale_QN if w.bias_N is None else w.bias_N,
            T,
            N,
            K,
            w.scale_QN.shape[0] // 2,
            G=w.group_size,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_G=max(32, triton.next_power_of_2(w.group_size)),
            HAS_ZERO=w.zero_QN is not None,
            HAS_BIAS=w.bias_N is not None,
            NUM_STAGES=c.num_stages,
            num_warps=c.num_warps,
        )
    return y_TN


def cut_group(group_size: int) -> int:
    """The widest divisor that one dot of the GPU takes."""
    return next(g for g in range(min(group_size, MAX_GROUP), 0, -1) if group_size % g == 0)


def pack_pairs(codes_NK: Tensor, group_size: int) -> Tensor:
    """uint8 [N, ceil(Q/2) * group]: byte j of pair p is element j of group 2p | element j of group 2p+1 << 4, code + 8."""
    N, K = codes_NK.shape
    odd = K // group_size % 2 * group_size
    halves = (torch.nn.functional.pad(codes_NK, (0, odd)) + 8).view(torch.uint8).view(N, -1, 2, group_size)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(N, -1)


def pad_even(x_QN: Tensor) -> Tensor:
    return torch.nn.functional.pad(x_QN, (0, 0, 0, x_QN.shape[0] % 2)).contiguous()


def _prepare_cuda(
    codes_NK: Tensor, scale_NQ: Tensor, zero_NQ: Tensor | None, bias_N: Tensor | None
) -> W4Weight:
    N, K = codes_NK.shape
    whole = K // scale_NQ.shape[1]
    group = cut_group(whole)

    def spread(x_NQ: Tensor) -> Tensor:
        return pad_even(x_NQ.repeat_interleave(whole // group, dim=1).t())

    zero_QN = None if zero_NQ is None else spread(zero_NQ.to(torch.int8))
    codes = (pack_pairs(codes_NK, group),)
    return W4Weight("cuda", codes, spread(scale_NQ.float()), zero_QN, bias_N, N, K, group)


def _prepare_cpu(
    codes_NK: Tensor, scale_NQ: Tensor, zero_NQ: Tensor | None, bias_N: Tensor | None, form: str
) -> W4Weight:
    (N, K), Q = codes_NK.shape, scale_NQ.shape[1]
    group = K // Q
    codes_NQG = codes_NK.reshape(N, Q, group)
    if zero_NQ is not None:
        # -8..7 minus -8..7 fits in int8, so the product needs no correction
        codes_NQG = codes_NQG - zero_NQ.to(torch.int8)[:, :, None]
    if form == "onednn":
        prepack = torch.ops.onednn.qlinear_prepack
        codes = tuple(prepack(codes_NQG[:, q].contiguous(), [32, group]) for q in range(Q))
    else:
        codes = (codes_NQG.reshape(N, K),)
    return W4Weight(form, codes, scale_NQ.float().t().contiguous(), None, bias_N, N, K, group)


def prepare_w4a8(
    codes_NK: Tensor,
    scale_NQ: Tensor,
    zero_NQ: Tensor | None = None,
    bias_N: Tensor | None = None,
    form: str | None = None,
) -> W4Weight:
    """Takes int8 codes in -8..7, one scale (and zero point in -8..7) a group; the caller drops its codes."""
    K, Q = codes_NK.shape[1], scale_NQ.shape[1]
    assert codes_NK.dtype == torch.int8, f"{codes_NK.dtype=}"
    assert K % Q == 0, f"{K} inputs do not divide into {Q} groups"
    form = form or ("cuda" if codes_NK.is_cuda else pick_int8_form())
    if form == "cuda":
        return _prepare_cuda(codes_NK, scale_NQ, zero_NQ, bias_N)
    return _prepare_cpu(codes_NK, scale_NQ, zero_NQ, bias_N, form)


def _onednn_sum(x_TK: Tensor, w: W4Weight) -> Tensor:
    """Each group's product is added to the total by oneDNN itself, in float32."""
    T, G = x_TK.shape[0], w.group_size
    x_QTG = to_unsigned(x_TK).view(T, -1, G).transpose(0, 1).contiguous()
    add, zero_N = torch.ops.onednn.qlinear_pointwise.binary, zero_points(w.out_features)
    y = onednn_int8(x_QTG[0], w.codes[0], w.scale_QN[0])
    for q in range(1, len(w.codes)):
        scale_N = w.scale_QN[q]
        packed = w.codes[q]
        y = add(
            x_QTG[q],
            1.0,
            128,
            packed,
            scale_N,
            zero_N,
            y,
            None,
            1.0,
            0,
            torch.float32,
            1.0,
            0,
            "sum",
            1.0,
            "none",
            [],
            "",
        )
    return y


def _plain_sum(x_TK: Tensor, w: W4Weight) -> Tensor:
    y = torch.zeros(x_TK.shape[0], w.out_features)
    for q, scale_N in enumerate(w.scale_QN):
        group = slice(q * w.group_size, (q + 1) * w.group_size)
        x, codes = x_TK[:, group].contiguous(), w.codes[0][:, group]
        total = torch._int_mm(x, codes.t()) if w.form == "int_mm" else float_sum(x, codes.float())
        y.addcmul_(total.float(), scale_N)
    return y


def gemm_w4a8_cpu(x_TK: Tensor, scale_T: Tensor, w: W4Weight, out_dtype: torch.dtype) -> Tensor:
    if x_TK.shape[0] == 0:
        return torch.zeros(0, w.out_features, dtype=out_dtype)
    total = _onednn_sum if w.form == "onednn" else _plain_sum
    y_TN = total(x_TK.contiguous(), w).mul_(scale_T[:, None])
    return (y_TN if w.bias_N is None else y_TN.add_(w.bias_N)).to(out_dtype)


def gemm_w4a8(
    x_TK: Tensor, scale_T: Tensor, w: W4Weight, out_dtype: torch.dtype, deterministic: bool = False
) -> Tensor:
    """y_TN in `out_dtype`; always deterministic, the argument is there because the other matmuls have it."""
    run = gemm_w4a8_triton if x_TK.is_cuda else gemm_w4a8_cpu
    return run(x_TK, scale_T, w, out_dtype)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    T, N, K, Q = c["T"], c["N"], c["K"], c["Q"]
    x = torch.randint(-127, 128, (T, K), generator=generator).to(torch.int8)
    w = torch.randint(-8, 8, (N, K), generator=generator).to(torch.int8)
    scale_T = torch.rand(T, generator=generator) / 127
    scale_NQ = (torch.rand(N, Q, generator=generator) + 0.5) / 8
    zero = torch.randint(-8, 8, (N, Q), generator=generator).to(torch.int8) if c.dims.get("zero") else None
    bias = torch.randn(N, generator=generator).to(c.dtype) if c.dims.get("bias") else None
    return x, scale_T, w, scale_NQ, zero, bias, c.dtype


def _cost(c: Case) -> Cost:
    T, N, K = c["T"], c["N"], c["K"]
    return Cost(N * K // 2 + 4 * N * c["Q"] + T * K + T * N * c.dtype.itemsize, 2 * T * N * K)


def _prepare(form: str | None) -> Any:
    def prepare(x: Tensor, scale_T: Tensor, *weight: Any) -> Any:
        *parts, out_dtype = weight
        return x, scale_T, prepare_w4a8(*parts, form=form), out_dtype

    return prepare


SPEC = KernelSpec(
    name="gemm_w4a8",
    runs={"cpu": gemm_w4a8_cpu, "int_mm": gemm_w4a8_cpu, "float": gemm_w4a8_cpu, "triton": gemm_w4a8_triton},
    ref=gemm_w4a8_ref,
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
        case(torch.float32, T=1, N=1, K=2, Q=1),
        case(torch.float32, T=17, N=65, K=256, Q=2, zero=True, bias=True),
        case(torch.bfloat16, T=5, N=96, K=384, Q=3, bias=True),
        case(torch.float16, T=65, N=37, K=160, Q=5, zero=True),
        case(torch.bfloat16, T=3, N=33, K=288, Q=1),
        case(torch.float32, T=2, N=8, K=144, Q=3, zero=True),
        case(torch.bfloat16, T=0, N=8, K=64, Q=2),
    ),
    compiles=(
        case(torch.bfloat16, T=16, N=256, K=256, Q=2),
        case(torch.bfloat16, T=64, N=256, K=256, Q=2, zero=True),
    ),
    benches=(
        case(torch.bfloat16, T=1, N=6144, K=4096, Q=32),
        case(torch.bfloat16, T=32, N=28672, K=4096, Q=32),
        case(torch.bfloat16, T=2048, N=4096, K=14336, Q=112),
    ),
)
