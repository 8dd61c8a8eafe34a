"""y = x w^T + bias in the model's dtype, the weight prepared once into the one form its device multiplies fastest.

T tokens, N outputs, K inputs.  Reads N*K: bandwidth-bound until T is in the hundreds.  A prepared weight holds a single
copy; the caller drops the checkpoint's.  Forms: `dense` (CUDA, float32: the library's own), `packed` (a CPU with bf16
instructions: oneDNN's layout), `upcast` (16 bit on any other CPU: w^T, widened to float32 some outputs at a time,
because such a CPU emulates 16-bit products of several rows at a fraction of the speed of float32 ones).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import cpu_facts
from kernels.spec import Case, Cost, KernelSpec, case

# weights widened at a time: 2 MiB of float32 stay in the L2 cache.  All linears of a 150M step on two cores with AVX-512
# but no bf16, T = 1 / 8 / 32: 14 / 52 / 75 ms; float32 weights 18 / 48 / 61; F.linear in bf16 19 / 64 at 1 / 8 (docs/log.md)
UPCAST_WEIGHTS = 1 << 19
# so few rows go one by one through the bf16 product, which reads half the bytes
FEW_ROWS = 3
# deterministic results are computed in tiles of this many rows, so that no row sees how many others there are
TILE_ROWS = 16


@dataclass(frozen=True, slots=True)
class PreparedLinear:
    form: str
    weight: Tensor
    bias_N: Tensor | None
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        bias = 0 if self.bias_N is None else self.bias_N.nbytes
        return self.out_features * self.in_features * self.weight.dtype.itemsize + bias


def pick_form(weight_NK: Tensor) -> str:
    if weight_NK.is_cuda or weight_NK.dtype not in (torch.bfloat16, torch.float16):
        return "dense"
    packs = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    if weight_NK.dtype == torch.bfloat16 and cpu_facts().bf16 and packs:
        return "packed"
    return "upcast"


def prepare_linear(
    weight_NK: Tensor, bias_N: Tensor | None = None, form: str | None = None
) -> PreparedLinear:
    """`form="dense"` keeps the tensor given, for a weight that something else reads too (a tied embedding)."""
    N, K = weight_NK.shape
    form = form or pick_form(weight_NK)
    weight = weight_NK
    if form == "packed":
        weight = torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous(), 2 * TILE_ROWS)
    elif form == "upcast":
        weight = weight_NK.t().contiguous()
    return PreparedLinear(form, weight, bias_N, N, K)


def linear_ref(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return F.linear(x_TK, weight_NK, bias_N)


def _upcast(x_TK: Tensor, p: PreparedLinear, tile: int) -> Tensor:
    """In float32; `tile` rows of x at a time, so that a row's result depends on its tile alone."""
    T, K, N = x_TK.shape[0], p.in_features, p.out_features
    wide_TK, y_TN = x_TK.float(), torch.empty(T, N)
    width = max(64, UPCAST_WEIGHTS // K // 64 * 64)
    buffer = torch.empty(K * min(width, N))
    for n in range(0, N, width):
        m = min(width, N - n)
        block_KM = buffer[: K * m].view(K, m).copy_(p.weight[:, n : n + m])
        for t in range(0, T, tile):
            y_TN[t : t + tile, n : n + m] = wide_TK[t : t + tile] @ block_KM
    return (y_TN if p.bias_N is None else y_TN.add_(p.bias_N)).to(x_TK.dtype)


def _multiply(x_TK: Tensor, p: PreparedLinear) -> Tensor:
    if p.form == "packed":
        return torch.ops.mkldnn._linear_pointwise(x_TK, p.weight, p.bias_N, "none", [], "")
    if p.form == "dense":
        return F.linear(x_TK, p.weight, p.bias_N)
    T = x_TK.shape[0]
    if T > FEW_ROWS or x_TK.dtype != torch.bfloat16:
        return _upcast(x_TK, p, T)
    rows = x_TK.split(1)
    if p.bias_N is None:
        return torch.cat([row @ p.weight for row in rows])
    # a sum that is rounded before the bias is off by twice as much
    return torch.cat([torch.addmm(p.bias_N, row, p.weight) for row in rows])


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """x with rows of zeros below it, up to a multiple: a fresh buffer, so that alignment is the same every time."""
    padded = x.new_zeros(-(-x.shape[0] // multiple) * multiple, *x.shape[1:])
    padded[: x.shape[0]] = x
    return padded


def linear(x_TK: Tensor, p: PreparedLinear, deterministic: bool = False) -> Tensor:
    """y_TN in x's dtype.  `deterministic`: a row of y is bitwise the same whatever the other rows and their number."""
    T = x_TK.shape[0]
    if not deterministic or T == 0:
        return _multiply(x_TK, p) if T else x_TK.new_zeros(0, p.out_features)
    padded = pad_rows(x_TK, TILE_ROWS)
    if p.form == "upcast":
        return _upcast(padded, p, TILE_ROWS)[:T]
    return torch.cat([_multiply(tile.clone(), p) for tile in padded.split(TILE_ROWS)])[:T]


def _make(c: Case, generator: torch.Generator) -> tuple[Tensor | None, ...]:
    T, N, K = c["T"], c["N"], c["K"]
    x = torch.randn(T, K, generator=generator).to(c.dtype)
    w = (torch.randn(N, K, generator=generator) * K**-0.5).to(c.dtype)
    return x, w, torch.randn(N, generator=generator).to(c.dtype) if c.dims.get("bias") else None


def _prepare(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> tuple[Tensor, PreparedLinear]:
    return x_TK, prepare_linear(weight_NK, bias_N)


def _cost(c: Case) -> Cost:
    T, N, K = c["T"], c["N"], c["K"]
    return Cost((N * K + T * (N + K)) * c.dtype.itemsize, 2 * T * N * K)


SPEC = KernelSpec(
    name="linear",
    runs={"cpu": linear},
    ref=linear_ref,
    make=_make,
    cost=_cost,
    prepare={"cpu": _prepare},
    invariant={"cpu": {"deterministic": True}},
    tests=(
        case(torch.float32, T=1, N=1, K=1),
        case(torch.float32, T=19, N=37, K=129, bias=True),
        case(torch.bfloat16, T=1, N=96, K=257, bias=True),
        case(torch.bfloat16, T=33, N=129, K=200, bias=True),
        case(torch.float16, T=5, N=64, K=65),
        case(torch.bfloat16, T=0, N=8, K=8),
    ),
    benches=(case(torch.bfloat16, T=1, N=5632, K=1024), case(torch.bfloat16, T=32, N=5632, K=1024)),
)
