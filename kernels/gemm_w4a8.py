"""8-bit x int4 matmul: y = scale_x[t] * sum_q scale[q,n] * sum_{k in q} x[t,k] * (w[n,k] - zero[q,n]) * step[q,n].

T tokens, N outputs, K inputs, Q groups of K/Q inputs.  Reads N*K/2 bytes.  Kinds of weight: `group`, a float32 scale a
group, whose sums are exact in int32 and added in float32 in the order of the groups; `progressive` (QoQ), an integer
step a group and one scale a channel, exact over all K; `channel`, one scale a channel, exact; `fp8`, as `group` for e4m3
rows, the int4 codes being exact in e4m3.  Exact sums depend on no batch; the others not where `deterministic`.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kernels import backend
from kernels.gemm_w4a8_tile import _gemm_w4a8_kernel
from kernels.gemm_w8a8 import W8Weight, gemm_w8a8_cpu, gemm_w8a8_triton, prepare_w8a8
from kernels.launch import aligned, cdiv, gpu_facts, launch
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case
from kernels.w4_config import W4Config
from kernels.w4_cpu import CpuGroups, group_sum, prepare_groups
from kernels.w4_pack import FP8, Int4, Packed4, cut_group, pack, progressive_offset, unit, widened
from kernels.w4_to_w8 import w4_to_w8
from kernels.w8_cpu import pick_int8_form


@dataclass(frozen=True, slots=True)
class W4Weight:
    """`form`: cuda, or how a CPU multiplies it: onednn, int_mm, float, float64 (fp8).  `held` is the one copy."""

    form: str
    kind: str
    held: Packed4 | W8Weight | CpuGroups
    bias_N: Tensor | None
    out_features: int
    in_features: int

    @property
    def row_dtype(self) -> torch.dtype:
        """Of the activations' codes."""
        return FP8 if self.kind == "fp8" else torch.int8

    @property
    def bits_stored(self) -> int:
        if self.form == "cuda":
            return 4
        return 32 if self.form == "float" and isinstance(self.held, W8Weight) else 8

    @property
    def nbytes(self) -> int:
        return self.held.nbytes + (0 if self.bias_N is None else self.bias_N.nbytes)


def _prepare(kind: str, w: Int4, bias_N: Tensor | None, form: str | None) -> W4Weight:
    N, K = w.codes_NK.shape
    if backend.runs_triton(w.codes_NK.device):
        form = form or "cuda"
    held: Packed4 | W8Weight | CpuGroups
    if form == "cuda":
        held = pack(kind, w)
        bias_N = None if bias_N is None else aligned(bias_N)
    elif kind == "fp8":
        form = "float64"
        held = prepare_groups(w, form)
    else:
        form = form or pick_int8_form()
        if kind == "group":
            held = prepare_groups(w, form)
        else:
            held = prepare_w8a8(widened(w).to(torch.int8), w.scale_NQ[:, 0].contiguous(), None, form)
    return W4Weight(form, kind, held, bias_N, N, K)


def prepare_w4a8(
    codes_NK: Tensor,
    scale_NQ: Tensor,
    zero_NQ: Tensor | None = None,
    bias_N: Tensor | None = None,
    form: str | None = None,
    kind: str | None = None,
) -> W4Weight:
    """Takes int8 codes in -8..7, one scale (and zero point in -8..7) a group; the caller drops its codes.

    `kind`: group or channel (one group), by the number of groups if None; fp8, where activations are to be e4m3.
    """
    (N, K), Q = codes_NK.shape, scale_NQ.shape[1]
    assert codes_NK.dtype == torch.int8, f"{codes_NK.dtype=}"
    assert K % Q == 0, f"{K} inputs do not divide into {Q} groups"
    assert scale_NQ.shape == (N, Q), f"{scale_NQ.shape=} {codes_NK.shape=}"
    kind = kind or ("channel" if Q == 1 else "group")
    choices = ("group", "channel", "fp8") if Q == 1 else ("group", "fp8")
    if kind not in choices:
        raise ValueError(f"kind must be one of {', '.join(choices)} for {Q} groups, got {kind!r}")
    if kind == "fp8" and zero_NQ is not None:
        raise ValueError("kind fp8 has no zero points: quantize symmetrically or use kind group")
    return _prepare(kind, Int4(codes_NK, scale_NQ, zero_NQ), bias_N, form)


def prepare_w4a8_progressive(
    codes_NK: Tensor,
    scale_N: Tensor,
    step_NQ: Tensor,
    zero_NQ: Tensor | None = None,
    bias_N: Tensor | None = None,
    form: str | None = None,
    offset_NQ: Tensor | None = None,
) -> W4Weight:
    """A weight scale * step * (code - zero): codes and zeros as in `prepare_w4a8`, `step_NQ` integers 0..17.

    `offset_NQ` in place of zeros: scale * (code * step - offset).  ValueError where a value would not be an int8.
    """
    (N, K), Q = codes_NK.shape, step_NQ.shape[1]
    assert codes_NK.dtype == torch.int8, f"{codes_NK.dtype=}"
    assert K % Q == 0, f"{K} inputs do not divide into {Q} groups"
    assert zero_NQ is None or offset_NQ is None, "zeros and offsets are one or the other"
    w = Int4(codes_NK, scale_N.reshape(N, 1).float(), zero_NQ, step_NQ, offset_NQ)
    progressive_offset(w)
    return _prepare("progressive", w, bias_N, form)


def quantize_progressive(w_NK: Tensor, group_size: int) -> Int4:
    """Legal progressive weights near `w_NK`, to the nearest: no error is weighed (that is quant/'s affair).

    int8 of a channel stays within 119, so that a group's rounding, half a step of 16, cannot leave int8.
    """
    N, K = w_NK.shape
    scale_N1 = (w_NK.float().abs().amax(1, keepdim=True) / 119).clamp_min(1e-12)
    wide_NQG = (w_NK.float() / scale_N1).round().view(N, -1, group_size)
    low, high = wide_NQG.amin(2).clamp_max(0), wide_NQG.amax(2).clamp_min(0)
    step_NQ = ((high - low) / 15).round().clamp_min(1)
    zero_NQ = (-low / step_NQ).round().clamp(0, 15) - 8
    codes_NQG = (wide_NQG / step_NQ[:, :, None] + zero_NQ[:, :, None]).round().clamp(-8, 7)
    codes_NK = codes_NQG.view(N, K).to(torch.int8)
    return Int4(codes_NK, scale_N1, zero_NQ.to(torch.int8), step_NQ.to(torch.int8))


def _hopper_sum(x_TG: Tensor, w_NG: Tensor) -> Tensor:
    """What torch itself loses on sm_90, whose tensor cores add fp8 products 32 at a time and keep 13 bits."""
    part_TN = torch.zeros(x_TG.shape[0], w_NG.shape[0], device=x_TG.device)
    for i in range(0, x_TG.shape[1], 32):
        part_TN += x_TG[:, i : i + 32].float() @ w_NG[:, i : i + 32].float().t()
        part_TN.view(torch.int32).bitwise_and_(-1024)
    return part_TN


def gemm_w4a8_ref(
    x_TK: Tensor,
    scale_T: Tensor,
    codes_NK: Tensor,
    scale_NQ: Tensor,
    zero_NQ: Tensor | None,
    step_NQ: Tensor | None,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """float64 adds integer products exactly; fp64 scales make the result the truth."""
    (N, Q), K = scale_NQ.shape, x_TK.shape[1]
    values_NQG = widened(Int4(codes_NK, scale_NQ, zero_NQ, step_NQ)).view(N, Q, K // Q)
    y = scale_NQ.new_zeros(x_TK.shape[0], N)
    for x_TG, w_NG, scale_N in zip(
        x_TK.split(K // Q, 1), values_NQG.unbind(1), scale_NQ.unbind(1), strict=True
    ):
        partial_TN = _hopper_sum(x_TG, w_NG) if x_TK.dtype == FP8 else x_TG.double() @ w_NG.double().t()
        y += partial_TN.to(scale_NQ.dtype) * scale_N
    y *= scale_T[:, None]
    return (y if bias_N is None else y + bias_N).to(out_dtype)


def _launch(y_TN: Tensor, x_TK: Tensor, scale_T: Tensor, w: W4Weight, c: W4Config) -> None:
    (T, K), N, held = x_TK.shape, w.out_features, w.held
    assert isinstance(held, Packed4), f"{w.form=}"
    assert max(T * K, held.codes.numel()) < 1 << 32, f"offsets of 32 bits do not reach: {T=} {N=} {K=}"
    tiles = cdiv(T, c.block_t) * cdiv(N, c.block_n)
    # a config for fewer rows may come with more tiles than there are counters
    splits = c.split_k if tiles <= held.arrivals.numel() else 1
    partials = y_TN
    if splits > 1:
        sum_type = torch.float32 if held.by_group else torch.int32
        size = tiles * splits * c.block_t * c.block_n
        partials = torch.empty(size, dtype=sum_type, device=x_TK.device)
    launch(
        _gemm_w4a8_kernel,
        (tiles * splits,),
        y_TN,
        partials,
        held.arrivals,
        x_TK,
        held.codes,
        scale_T,
        held.scale,
        held.arrivals if held.meta_PN is None else held.meta_PN,
        held.scale if w.bias_N is None else w.bias_N,
        T,
        N // unit(N),
        K // unit(K),
        splits,
        DECODE=held.decode,
        BY_GROUP=held.by_group,
        GROUP=held.group,
        CHUNK=held.chunk,
        BLOCK_T=c.block_t,
        BLOCK_N=c.block_n,
        N_UNIT=unit(N),
        K_UNIT=unit(K),
        WHOLE=held.group == held.chunk and K % (2 * held.group) == 0,
        HAS_BIAS=w.bias_N is not None,
        HAS_SPLITS=splits > 1,
        NUM_STAGES=c.num_stages,
        num_warps=c.num_warps,
    )


def gemm_w4a8_triton(
    x_TK: Tensor,
    scale_T: Tensor,
    w: W4Weight,
    out_dtype: torch.dtype,
    deterministic: bool = False,
    config: W4Config | None = None,
) -> Tensor:
    (T, K), N, held = x_TK.shape, w.out_features, w.held
    assert x_TK.is_contiguous(), f"{x_TK.stride()=}"
    assert isinstance(held, Packed4), f"{w.form=}"
    gpu = gpu_facts(x_TK.device)
    c = config or W4Config.pick(gpu, T, N, K, w.kind, held.group, deterministic)
    if c.expand and T:
        codes = w4_to_w8(held, N, K)
        wide = W8Weight("cuda", codes, held.scale, w.bias_N, N, K, torch.int8, held.arrivals)
        return gemm_w8a8_triton(x_TK, scale_T, wide, out_dtype, deterministic)
    y_TN = torch.empty(T, N, dtype=out_dtype, device=x_TK.device)
    if T:
        _launch(y_TN, x_TK, scale_T, w, c)
    return y_TN


def gemm_w4a8_cpu(
    x_TK: Tensor, scale_T: Tensor, w: W4Weight, out_dtype: torch.dtype, deterministic: bool = False
) -> Tensor:
    if x_TK.shape[0] == 0:
        return torch.zeros(0, w.out_features, dtype=out_dtype)
    if isinstance(w.held, W8Weight):
        y_TN = gemm_w8a8_cpu(x_TK, scale_T, w.held, torch.float32)
    else:
        assert isinstance(w.held, CpuGroups), f"{w.form=}"
        y_TN = group_sum(x_TK.contiguous(), w.held).mul_(scale_T[:, None])
    return (y_TN if w.bias_N is None else y_TN.add_(w.bias_N)).to(out_dtype)


def gemm_w4a8(
    x_TK: Tensor, scale_T: Tensor, w: W4Weight, out_dtype: torch.dtype, deterministic: bool = False
) -> Tensor:
    """y_TN in `out_dtype`, from rows of `w.row_dtype`."""
    assert x_TK.dtype == w.row_dtype, f"{x_TK.dtype=} {w.row_dtype=}"
    run = gemm_w4a8_triton if backend.runs_triton(x_TK.device) else gemm_w4a8_cpu
    return run(x_TK, scale_T, w, out_dtype, deterministic)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    T, N, K, Q = c["T"], c["N"], c["K"], c["Q"]
    kind = c["kind"]
    if kind == "fp8":
        x = torch.randn(T, K, generator=generator).mul_(100).clamp_(-448, 448).to(FP8)
    else:
        x = torch.randint(-127, 128, (T, K), generator=generator, dtype=torch.int8)
    scale_T = torch.rand(T, generator=generator) / 127
    bias = torch.randn(N, generator=generator).to(c.dtype) if c.dims.get("bias") else None
    codes = torch.randint(-8, 8, (N, K), generator=generator, dtype=torch.int8)
    groups = 1 if kind == "progressive" else Q
    scale_NQ = (torch.rand(N, groups, generator=generator) + 0.5) / 8
    zero = torch.randint(-8, 8, (N, Q), generator=generator, dtype=torch.int8) if c.dims.get("zero") else None
    step = None
    if kind == "progressive":
        # within -120..120 whatever code and zero
        step = torch.randint(1, 9, (N, Q), generator=generator, dtype=torch.int8)
    return x, scale_T, codes, scale_NQ, zero, step, bias, c.dtype


def _cost(c: Case) -> Cost:
    T, N, K = c["T"], c["N"], c["K"]
    scales = {"channel": 0, "progressive": 2}.get(c["kind"], 4) * N * c["Q"]
    return Cost(N * K // 2 + scales + T * K + T * N * c.dtype.itemsize, 2 * T * N * K)


def _prepare_case(form: str | None) -> Any:
    def prepare(x: Tensor, scale_T: Tensor, *weight: Any) -> Any:
        codes, scale, zero, step, bias, out_dtype = weight
        if step is not None:
            w = prepare_w4a8_progressive(codes, scale[:, 0], step, zero, bias, form)
        else:
            w = prepare_w4a8(codes, scale, zero, bias, form, "fp8" if x.dtype == FP8 else None)
        return x, scale_T, w, out_dtype

    return prepare


def _shapes(m: ModelShape) -> tuple[tuple[int, int], ...]:
    """N and K of qkv, o, gate_up and down."""
    return ((m.H + 2 * m.G) * m.K, m.D), (m.D, m.H * m.K), (2 * m.F, m.D), (m.D, m.F)


VARIANTS: tuple[tuple[str, bool], ...] = (
    ("group", False),
    ("group", True),
    ("progressive", True),
    ("channel", False),
    ("fp8", False),
)


def _cases(shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> tuple[Case, ...]:
    return tuple(
        case(torch.bfloat16, T=T, N=N, K=K, Q=1 if kind == "channel" else cdiv(K, 128), kind=kind, zero=zero)
        for (kind, zero), T, (N, K) in product(VARIANTS, rows, shapes)
    )


def _dims(c: Case) -> tuple[int, int, int, str, int]:
    group = cut_group(c["K"] if c["kind"] == "channel" else c["K"] // c["Q"])
    return c["T"], c["N"], c["K"], c["kind"], group


def _small(c: Case) -> Case:
    """One tile of outputs, two turns, with the divisors of the real one."""
    group = c["K"] // c["Q"]
    K, Q = (512, 1) if c["kind"] == "channel" else (4 * group, 4)
    whole = c["K"] % 256 == 0 if c["kind"] == "channel" else c["Q"] % 2 == 0
    if not whole:
        K, Q = (c["K"], 1) if c["kind"] == "channel" else (3 * group, 3)
    return Case(
        c.dtype, {**c.dims, "T": max(16, c["T"]), "N": 128 if c["N"] % 16 == 0 else 127, "K": K, "Q": Q}
    )


def _stream(c: Any) -> int:
    """Codes, integers and scales of one pair of groups."""
    meta = 4 if c["DECODE"] in ("zeros", "progressive") else 0
    return c["BLOCK_N"] * (c["CHUNK"] + meta + (8 if c["BY_GROUP"] else 0))


LLAMA_3_8B = ModelShape(D=4096, H=32, G=8, K=128, F=14336, V=128256)

SPEC = KernelSpec(
    name="gemm_w4a8",
    runs={"cpu": gemm_w4a8_cpu, "int_mm": gemm_w4a8_cpu, "float": gemm_w4a8_cpu, "triton": gemm_w4a8_triton},
    ref=gemm_w4a8_ref,
    make=_make,
    cost=_cost,
    row_args=(0, 1),
    prepare={
        "cpu": _prepare_case(None),
        "int_mm": _prepare_case("int_mm"),
        "float": _prepare_case("float"),
        "triton": _prepare_case("cuda"),
    },
    invariant={run: {"deterministic": True} for run in ("cpu", "int_mm", "float", "triton")},
    tests=(
        case(torch.float32, T=1, N=1, K=2, Q=1, kind="channel"),
        case(torch.float32, T=17, N=65, K=256, Q=2, kind="group", zero=True, bias=True),
        case(torch.bfloat16, T=5, N=96, K=384, Q=3, kind="group", bias=True),
        case(torch.float16, T=65, N=37, K=160, Q=5, kind="group", zero=True),
        case(torch.bfloat16, T=3, N=33, K=288, Q=1, kind="channel", zero=True),
        case(torch.float32, T=2, N=8, K=144, Q=3, kind="group", zero=True),
        case(torch.float32, T=3, N=16, K=512, Q=1, kind="channel", bias=True),
        case(torch.float32, T=33, N=40, K=512, Q=4, kind="progressive", zero=True),
        case(torch.bfloat16, T=2, N=130, K=320, Q=5, kind="progressive", bias=True),
        case(torch.float32, T=18, N=65, K=256, Q=4, kind="fp8", bias=True),
        case(torch.bfloat16, T=3, N=16, K=384, Q=3, kind="fp8"),
        case(torch.bfloat16, T=0, N=8, K=64, Q=2, kind="group"),
    ),
    compiles=tuple(
        case(torch.bfloat16, T=T, N=256, K=1024, Q=1 if kind == "channel" else 8, kind=kind, zero=zero)
        for (kind, zero), T in product(VARIANTS[:4], (16, 64))
    ),
    benches=_cases(_shapes(LLAMA_3_8B), (1, 16, 64, 2048)),
    serving=lambda m: _cases(_shapes(m), (1, 16, 64, 256, 2048)),
    config=lambda c, gpu: W4Config.pick(gpu, *_dims(c)),
    candidates=lambda c, gpu: W4Config.candidates(gpu, *_dims(c)),
    small=_small,
    streams={"_gemm_w4a8_kernel": _stream},
)
