"""What each op is compared with: torch's own way to the same result, and FlashInfer's where it can be imported.

A baseline takes the op's canonical arguments on the device and gives a call without arguments, None where it is not for
this case; what the library wants prepared (padding, a dense copy of the context) is prepared outside the call.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import scaled_mm
from kernels.kv_case import Paged
from kernels.kv_layout import KvLayout
from kernels.rope_kv_write import rope_kv_write
from kernels.spec import Case, KernelSpec

Baseline = Callable[[Case, tuple[Any, ...]], Callable[[], Any] | None]
INT_MM_ROWS = 32  # torch._int_mm takes more than 16 rows


def bf16_linear(x_TK: Tensor, w_NK: Tensor) -> Callable[[], Any]:
    x, w = x_TK.to(torch.bfloat16), w_NK.to(torch.bfloat16)
    return lambda: F.linear(x, w)


def w8_bf16(case: Case, args: tuple[Any, ...]) -> Callable[[], Any]:
    return bf16_linear(args[0], args[2])


def int_mm(case: Case, args: tuple[Any, ...]) -> Callable[[], Any] | None:
    """With the same epilogue as ours."""
    x_TK, scale_T, w_NK, scale_N, _, dtype, _ = args
    if w_NK.dtype != torch.int8:
        return None
    T = x_TK.shape[0]
    x = F.pad(x_TK, (0, 0, 0, max(0, INT_MM_ROWS - T)))
    return lambda: (torch._int_mm(x, w_NK.t())[:T].float() * scale_T[:, None] * scale_N).to(dtype)


def row_scaled_mm(case: Case, args: tuple[Any, ...]) -> Callable[[], Any] | None:
    """Scales a row and a column: into bf16 only."""
    x, scale_T, w, scale_N, _, _, fast = args
    if w.dtype == torch.int8 or not x.is_cuda:
        return None
    return lambda: scaled_mm(x, w, scale_T, scale_N, torch.bfloat16, fast)


def w4_bf16(case: Case, args: tuple[Any, ...]) -> Callable[[], Any]:
    """The same product with 16-bit weights, whatever the codes mean."""
    x = args[0]
    w = torch.randn(case["N"], case["K"], device=x.device, dtype=torch.bfloat16)
    return bf16_linear(x.float(), w)


def linear(case: Case, args: tuple[Any, ...]) -> Callable[[], Any]:
    x, w, bias = args
    return lambda: F.linear(x, w, bias)


def rmsnorm(case: Case, args: tuple[Any, ...]) -> Callable[[], Any]:
    x, w, eps, residual = args[:4]
    D = (x.shape[-1],)

    def call() -> Any:
        total = x if residual is None else x + residual
        y = F.rms_norm(total, D, w, eps)
        return quantized(y) if len(args) > 4 and args[4] else y

    return call


def quantized(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = y.abs().amax(-1, keepdim=True).float() / 127
    return (y / scale).round().to(torch.int8), scale


def silu_mul(case: Case, args: tuple[Any, ...]) -> Callable[[], Any]:
    gate, up = args[0].chunk(2, -1)

    def call() -> Any:
        y = F.silu(gate) * up
        return quantized(y) if len(args) > 1 and args[1] else y

    return call


def quant_rows(case: Case, args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: quantized(args[0])


class Dense(NamedTuple):
    """Sequences of one length each, of which the last rows, or all, are asked about."""

    num: int
    rows: int
    context: int


def dense(args: tuple[Any, ...]) -> Dense | None:
    seq_T, pos_T = args[1].T.to("cpu")
    num = int(seq_T.max()) + 1
    lengths = {int(pos_T[seq_T == b].max()) + 1 for b in range(num)}
    rows = len(seq_T) // num
    if len(lengths) > 1 or rows not in (1, max(lengths)):
        return None
    return Dense(num, rows, lengths.pop())


def sdpa(case: Case, args: tuple[Any, ...]) -> Callable[[], Any] | None:
    """On a dense copy of the context in the queries' type."""
    (q_THK, _, paged, scale), d = args[:4], dense(args)
    if d is None:
        return None
    G, K = paged.layout.num_kv_heads, paged.layout.head_dim
    q = q_THK.view(d.num, d.rows, -1, K).transpose(1, 2)
    key, value = (
        torch.randn(d.num, d.context, G, K, device=q.device, dtype=q.dtype).transpose(1, 2) for _ in "kv"
    )
    return lambda: F.scaled_dot_product_attention(
        q, key, value, is_causal=d.rows > 1, scale=scale, enable_gqa=True
    )


def flashinfer(case: Case, args: tuple[Any, ...]) -> Callable[[], Any] | None:
    q_THK, d = args[0], dense(args)
    if d is None or d.rows != 1 or not q_THK.is_cuda or not importlib.util.find_spec("flashinfer"):
        return None
    return flashinfer_decode(q_THK, args[2].layout, d.num, d.context)


def flashinfer_decode(q_THK: Tensor, layout: KvLayout, num: int, context: int) -> Callable[[], Any]:
    import flashinfer

    P, device = 16, q_THK.device
    pages = -(-context // P)
    cache = torch.randn(
        num * pages, 2, P, layout.num_kv_heads, layout.head_dim, device=device, dtype=q_THK.dtype
    )
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=device), "NHD"
    )
    wrapper.plan(
        torch.arange(0, num * pages + 1, pages, dtype=torch.int32, device=device),
        torch.randperm(num * pages, device=device).int(),
        torch.full((num,), (context - 1) % P + 1, dtype=torch.int32, device=device),
        q_THK.shape[1],
        layout.num_kv_heads,
        layout.head_dim,
        P,
        q_data_type=q_THK.dtype,
        kv_data_type=q_THK.dtype,
    )
    return lambda: wrapper.run(q_THK, cache)


BASELINES: dict[str, dict[str, Baseline]] = {
    "attention": {"sdpa": sdpa, "flashinfer": flashinfer},
    "attn_prefill": {"sdpa": sdpa},
    "gemm_w4a8": {"cublas bf16": w4_bf16},
    "gemm_w8a8": {"cublas bf16": w8_bf16, "int_mm": int_mm, "scaled_mm": row_scaled_mm},
    "linear": {"cublas": linear},
    "quant_rows": {"torch eager": quant_rows},
    "rmsnorm": {"torch eager": rmsnorm},
    "silu_mul": {"torch eager": silu_mul},
}


def filled_pool(case: Case, device: torch.device) -> Paged:
    """A pool with random keys and values of every sequence in layer 1, written on the device by the engine's own op."""
    layout = KvLayout(case["fmt"], case["G"], case["K"])
    lengths = sequence_lengths(case)
    paged = Paged.make(layout, lengths, torch.Generator().manual_seed(0), device=device)
    one_MK = torch.ones(max(lengths), layout.head_dim, device=device)
    for b, length in enumerate(lengths):
        place_T2 = torch.stack((torch.full((length,), b), torch.arange(length)), 1)
        qkv_TX = torch.randn(
            length, 3 * layout.num_kv_heads * layout.head_dim, device=device, dtype=case.dtype
        )
        step = paged.step(place_T2)
        rope_kv_write(
            qkv_TX, one_MK, torch.zeros_like(one_MK), paged.pool, step, 1, num_heads=layout.num_kv_heads
        )
    return paged


def sequence_lengths(case: Case) -> tuple[int, ...]:
    """Of the decodes, and of a fresh chunk beside them or of a chunk after its context."""
    if "decodes" not in case.dims:
        return (case.dims.get("context", 0) + case["chunk"],) if "chunk" in case.dims else ()
    decodes = (case["context"],) * case["decodes"]
    return (*decodes, case["chunk"]) if "chunk" in case.dims else decodes


def big_attention(spec: KernelSpec, case: Case, device: torch.device) -> tuple[Any, ...]:
    """What `make` of attention and attn_prefill builds, for contexts that would take minutes on the host."""
    paged, lengths = filled_pool(case, device), sequence_lengths(case)
    decodes, new = case.dims.get("decodes", 0), case.dims.get("tokens", 1)
    rows = [(b, case["context"] - new + i) for b in range(decodes) for i in range(new)]
    chunk = case.dims.get("chunk", 0)
    rows += [(decodes, lengths[-1] - chunk + i) for i in range(chunk)]
    q_THK = torch.randn(len(rows), case["H"], case["K"], device=device, dtype=case.dtype)
    way = case.dims.get("int8_qk" if spec.name == "attention" else "fp8", False)
    return q_THK, torch.tensor(rows), paged, case["K"] ** -0.5, way
