"""Round to nearest: a matrix and a scheme in, a QuantWeight out; no data, no search.

Symmetric int8 divides by 127, so that the row maximum meets the last code.  Symmetric int4 divides by 7.5 and clamps
to [-8, 7]: half a step of clipping at one end buys 7 % finer steps everywhere, 0.5 dB at group 128.  e4m3 divides by 448.
"""

import torch
from torch import Tensor

from quant.scheme import FP8, QuantWeight, Scheme

SYMMETRIC_DIVISOR = {4: 7.5, 8: 127.0}
FP8_MAX = 448.0


def quantize(w_NK: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.float32) -> QuantWeight:
    """The group size of `scheme` must divide K.  Codes use the scales as rounded to `scale_dtype`, the file's type."""
    N, K = w_NK.shape
    group = scheme.group_size or K
    assert K % group == 0, f"{K=} is not a multiple of {group=}: see Scheme.fit"
    w_NQg = w_NK.float().reshape(N, K // group, group)
    low_NQ, high_NQ = torch.aminmax(w_NQg, dim=-1)
    if not bool(torch.isfinite(low_NQ).all() & torch.isfinite(high_NQ).all()):
        raise ValueError("weights must be finite to be quantized")
    zero_NQ = None
    if scheme.values == "fp8":
        assert not scheme.block, f"block scales are read from files, not made: {scheme}"
        scale_NQ = _storable(torch.maximum(high_NQ, -low_NQ) / FP8_MAX, scale_dtype)
        codes_NQg = (w_NQg / scale_NQ[..., None]).clamp_(-FP8_MAX, FP8_MAX)
        return QuantWeight(scheme, codes_NQg.to(FP8).view(N, K), scale_NQ)
    if scheme.symmetric:
        scale_NQ = _storable(torch.maximum(high_NQ, -low_NQ) / SYMMETRIC_DIVISOR[scheme.bits], scale_dtype)
    else:
        # zero must be a code: the range always holds it
        low_NQ, high_NQ = low_NQ.clamp_max(0), high_NQ.clamp_min(0)
        scale_NQ = _storable((high_NQ - low_NQ) / (2**scheme.bits - 1), scale_dtype)
        zero_NQ = (scheme.low - low_NQ / scale_NQ).round().clamp(scheme.low, scheme.high)
    codes_NQg = (w_NQg / scale_NQ[..., None]).round_()
    if zero_NQ is not None:
        codes_NQg += zero_NQ[..., None]
    codes_NK = codes_NQg.clamp_(scheme.low, scheme.high).to(torch.int8).view(N, K)
    return QuantWeight(scheme, codes_NK, scale_NQ, None if zero_NQ is None else zero_NQ.to(torch.int8))


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    # an all-zero group has codes 0 whatever its scale; a scale of 0 would make them 0 / 0
    return scale.clamp_min(torch.finfo(dtype).tiny).to(dtype).float()
