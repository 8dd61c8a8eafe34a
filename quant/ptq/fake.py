"""Fake quantization: floats in, the floats that the kernels would compute with out; by the kernels' own rounding.

Rows of activations (int8 or e4m3; a scale a token, a token and 128 columns, or one for all; zero points), queries, and
keys and values in the grids of `kernels.kv_layout`.  Calibration and the choice of recipes see through these what runs.
"""

import torch
from torch import Tensor

from kernels.kv_layout import FLOAT_BYTES, KV_FORMATS, MAX_SCALE, MIN_SCALE
from kernels.quant_rows import LIMITS, quant_rows_cpu
from kernels.rope_kv_write import quantize_heads
from quant.scheme import BLOCK, FP8, Activations

CODES = {"int8": torch.int8, "fp8": FP8}
KV_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATIC_KV = ("int8", "fp8")


def rows(
    x: Tensor, activations: Activations | None, scale: float | None = None, zero: int | None = None
) -> Tensor:
    """x [..., D] rounded as a matmul with these activations rounds it, in the type of x; None leaves it.

    Static activations bring their `scale` and, where not symmetric, `zero`.
    """
    if activations is None:
        return x
    static = not activations.dynamic
    if (scale is not None) != static or (zero is not None) != (static and not activations.symmetric):
        raise ValueError(f"a scale or zero point does not go with {activations}: got {scale} and {zero}")
    if scale is not None:
        return _static(x, activations.dtype, scale, zero or 0)
    if not activations.symmetric:
        return _with_zeros(x)
    width = BLOCK if activations.block else x.shape[-1]
    if x.shape[-1] % width:
        raise ValueError(f"{x.shape[-1]} columns do not divide into {width}")
    codes_TD, scale_T = quant_rows_cpu(x.reshape(-1, width), CODES[activations.dtype])
    return (codes_TD.to(x.dtype) * scale_T[:, None].to(x.dtype)).view(x.shape)


def _static(x: Tensor, dtype: str, scale: float, zero: int) -> Tensor:
    limit = LIMITS[CODES[dtype]]
    if dtype == "fp8":
        return (x / scale).clamp_(-limit, limit).to(FP8).to(x.dtype) * scale
    # codes about a zero point use the whole byte, those about 0 stay symmetric
    low = -128 if zero else -limit
    return ((x / scale + zero).round_().clamp_(low, limit) - zero) * scale


def _with_zeros(x: Tensor) -> Tensor:
    """int8 from the smallest to the largest of each row, 0 among them."""
    low, high = x.amin(-1, keepdim=True).clamp_max_(0), x.amax(-1, keepdim=True).clamp_min_(0)
    scale = ((high - low) / 255).clamp_min_(1e-30)
    zero = (-128 - low / scale).round_()
    return ((x / scale + zero).round_().clamp_(-128, 127) - zero) * scale


def queries(q_BTHK: Tensor) -> Tensor:
    """e4m3 with a scale a token and head, as prefill in fp8 has them."""
    return rows(q_BTHK, Activations("fp8"))


def kv(
    fmt: str,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    channel_GK: Tensor | None = None,
    static: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys (after rotation) and values as a cache of format `fmt` (of kernels.kv_layout) gives them back.

    `channel_GK`: keys are divided by it before they are rounded, and queries multiplied.  Here the keys come back
    multiplied, so that queries stay as they are.  `static`: constant scales of keys and values (int8 and fp8).
    """
    if fmt not in KV_FORMATS:
        raise ValueError(f"kv format must be one of {', '.join(KV_FORMATS)}, got {fmt!r}")
    if static is not None and fmt not in STATIC_KV:
        raise ValueError(f"static scales are for {' and '.join(STATIC_KV)}, got {fmt!r}")
    fixed = (None, None) if static is None else static
    if channel_GK is None:
        return _cached(k_BTGK, fmt, fixed[0]), _cached(v_BTGK, fmt, fixed[1])
    divided = _cached(k_BTGK / channel_GK.to(k_BTGK.dtype), fmt, fixed[0])
    return divided * channel_GK.to(k_BTGK.dtype), _cached(v_BTGK, fmt, fixed[1])


def _cached(x: Tensor, fmt: str, static: float | None) -> Tensor:
    if fmt in FLOAT_BYTES:
        return x.to(KV_FLOATS[fmt]).to(x.dtype)
    flat_XK = x.reshape(-1, x.shape[-1])
    scale_X = None
    if static is not None:
        scale_X = torch.full((len(flat_XK),), static).clamp_(MIN_SCALE, MAX_SCALE).half()
    code_XK, scale_X, zero_X = quantize_heads(flat_XK, fmt, scale_X)
    out_XK = code_XK.to(x.dtype) * scale_X[:, None].to(x.dtype)
    return (out_XK if zero_X is None else out_XK + zero_X[:, None].to(x.dtype)).view(x.shape)
