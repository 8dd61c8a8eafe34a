"""Products of 8-bit codes on a CPU: int8 sums are exact, fp8 sums are float32.

int8: oneDNN's prepacked product of *unsigned* activations (x + 128, taken back through the zero point): with signed
ones it runs its reference loop, a thousand times slower, on every CPU without AMX.  fp8: no CPU multiplies it, the
codes are widened some outputs at a time.
"""

import functools

import torch
from torch import Tensor

from kernels.launch import cpu_facts

# the partial sums of |x|, |w| <= 128 stay below 2^24 for this many products, so float32 adds them exactly
EXACT_IN_FLOAT = 1024
# fp8 weights widened at a time: 2 MiB of float32
WIDENED_WEIGHTS = 1 << 19


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


def fp8_sum(x_TK: Tensor, codes_NK: Tensor, tile: int) -> Tensor:
    """In float32; `tile` rows of x at a time, so that a row's result depends on its tile alone."""
    wide_TK, (T, K), N = x_TK.float(), x_TK.shape, codes_NK.shape[0]
    y_TN = torch.zeros(T, N)
    width = max(64, WIDENED_WEIGHTS // K // 64 * 64)
    for n in range(0, N, width):
        wide_KM = codes_NK[n : n + width].float().t()
        for t in range(0, T, tile):
            y_TN[t : t + tile, n : n + width] = wide_TK[t : t + tile] @ wide_KM
    return y_TN


def prepack(form: str, codes_NK: Tensor) -> Tensor:
    """The one copy of the codes, as `form` reads it."""
    if form == "onednn":
        return torch.ops.onednn.qlinear_prepack(codes_NK, [32, codes_NK.shape[1]])
    return codes_NK.float() if form == "float" else codes_NK


def scaled_int8(form: str, x_TK: Tensor, codes: Tensor, scale_N: Tensor) -> Tensor:
    """The exact sum times the weights' scales, float32."""
    if form == "onednn":
        return onednn_int8(to_unsigned(x_TK), codes, scale_N)
    if form != "int_mm":
        total = float_sum(x_TK, codes)
    elif codes.shape[1] == 1:
        total = x_TK.int() * codes.t().int()  # torch 2.13 leaves what _int_mm returns unwritten here
    else:
        total = torch._int_mm(x_TK, codes.t())
    return total.float().mul_(scale_N)
