"""What each op is compared with: torch's own way to the same result, and FlashInfer's where it can be imported.

A baseline takes the op's canonical arguments on the device and gives named calls without arguments; what the library
wants prepared (padding, a dense copy of the context) is prepared outside the call.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import scaled_mm
from kernels.kv_case import Paged
from kernels.kv_layout import KvLayout
from kernels.rope_kv_write import rope_kv_write
from kernels.spec import Case

Calls = dict[str, Callable[[], Any]]
INT_MM_ROWS = 32  # torch._int_mm takes more than 16 rows


def bf16_linear(x_TK: Tensor, w_NK: Tensor) -> Callable[[], Any]:
    x, w = x_TK.to(torch.bfloat16), w_NK.to(torch.bfloat16)
    return lambda: F.linear(x, w)


def int_mm(
    x_TK: Tensor, w_NK: Tensor, scale_T: Tensor, scale_N: Tensor, dtype: torch.dtype
) -> Callable[[], Any]:
    """With the same epilogue as ours."""
    T = x_TK.shape[0]
    x = F.pad(x_TK, (0, 0, 0, max(0, INT_MM_ROWS - T)))
    return lambda: (torch._int_mm(x, w_NK.t())[:T].float() * scale_T[:, None] * scale_N).to(dtype)


def gemm_w8a8(case: Case, args: tuple[Any, ...]) -> Calls:
    x, scale_T, w, scale_N, _, dtype, fast = args
    calls: Calls = {"cublas bf16": bf16_linear(x, w)}
    if w.dtype == torch.int8:
        calls["int_mm"] = int_mm(x, w, scale_T, scale_N, dtype)
    elif x.is_cuda:
        # scales a row and a column: into bf16 only
        calls["scaled_mm"] = lambda: scaled_mm(x, w, scale_T, scale_N, torch.bfloat16, fast)
    return calls


def gemm_w4a8(case: Case, args: tuple[Any, ...]) -> Calls:
    """The same product with 16-bit weights, whatever the codes mean."""
    x = next(a for a in args if isinstance(a, Tensor) and a.dim() == 2)
    w = torch.randn(case["N"], case["K"], device=x.device)
    return {"cublas bf16": bf16_linear(x.float(), w)}


def linear(case: Case, args: tuple[Any, ...]) -> Calls:
    x, w, bias = args
    return {"cublas": lambda: F.linear(x, w, bias)}


def rmsnorm(case: Case, args: tuple[Any, ...]) -> Calls:
    x, w, eps, residual = args[:4]
    D = (x.shape[-1],)

    def call() -> Any:
        total = x if residual is None else x + residual
        y = F.rms_norm(total, D, w, eps)
        return quantized(y) if len(args) > 4 and args[4] else y

    return {"torch eager": call}


def quantized(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = y.abs().amax(-1, keepdim=True).float() / 127
    return (y / scale).round().to(torch.int8), scale


def silu_mul(case: Case, args: tuple[Any, ...]) -> Calls:
    gate, up = args[0].chunk(2, -1)

    def call() -> Any:
        y = F.silu(gate) * up
        return quantized(y) if len(args) > 1 and args[1] else y

    return {"torch eager": call}


def quant_rows(case: Case, args: tuple[Any, ...]) -> Calls:
    return {"torch eager": lambda: quantized(args[0])}


def attention(case: Case, args: tuple[Any, ...]) -> Calls:
    """On a dense copy of the context in the queries' type: sequences of one length, or one chunk alone."""
    q_THK, place_T2, paged, scale = args[:4]
    seq_T, pos_T = place_T2.T.to("cpu")
    num = int(seq_T.max()) + 1
    lengths = {int(pos_T[seq_T == b].max()) + 1 for b in range(num)}
    if len(lengths) > 1:
        return {}
    context, rows = lengths.pop(), len(place_T2) // num
    if rows not in (1, context):
        return {}
    G, K = paged.layout.num_kv_heads, paged.layout.head_dim
    q = q_THK.view(num, rows, -1, K).transpose(1, 2)
    key, value = (
        torch.randn(num, context, G, K, device=q.device, dtype=q.dtype).transpose(1, 2) for _ in "kv"
    )

    def sdpa() -> Any:
        return F.scaled_dot_product_attention(q, key, value, is_causal=rows > 1, scale=scale, enable_gqa=True)

    calls: Calls = {"sdpa": sdpa}
    if rows == 1 and q.is_cuda and importlib.util.find_spec("flashinfer"):
        calls["flashinfer"] = flashinfer_decode(q_THK, paged.layout, num, context)
    return calls


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


BASELINES: dict[str, Callable[[Case, tuple[Any, ...]], Calls]] = {
    "attention": attention,
    "gemm_w4a8": gemm_w4a8,
    "gemm_w8a8": gemm_w8a8,
    "linear": linear,
    "quant_rows": quant_rows,
    "rmsnorm": rmsnorm,
    "silu_mul": silu_mul,
}


def filled_pool(case: Case, device: torch.device) -> Paged:
    """A pool with random keys and values of every sequence in layer 1, written on the device by the engine's own op."""
    layout = KvLayout(case["fmt"], case["G"], case["K"])
    g = torch.Generator().manual_seed(0)
    lengths = sequence_lengths(case)
    paged = Paged.make(layout, lengths, g).to(device)
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
    decodes = (case.dims.get("context", 0),) * case.dims.get("decodes", 0)
    return (*decodes, case["chunk"]) if "chunk" in case.dims else decodes


def big_attention(case: Case, device: torch.device) -> tuple[Any, ...]:
    """What `attention.SPEC.make` builds, for contexts that would take minutes on the host."""
    paged = filled_pool(case, device)
    decodes = case.dims.get("decodes", 0)
    new = case.dims.get("tokens", 1)
    rows = [(b, case["context"] - new + i) for b in range(decodes) for i in range(new)]
    rows += [(decodes, i) for i in range(case.dims.get("chunk", 0))]
    q_THK = torch.randn(len(rows), case["H"], case["K"], device=device, dtype=case.dtype)
    return q_THK, torch.tensor(rows), paged, case["K"] ** -0.5, case.dims.get("int8_qk", False)
