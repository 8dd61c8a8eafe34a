"""How rows become codes where a checkpoint wants more than a symmetric scale made of each row.

Static scales and zero points are the checkpoint's: code = clamp(round(x / scale) + zero).  Dynamic rows with a zero point
are cut from their minimum to their maximum, 0 among them, in 255 steps (compressed-tensors' grid of int8 with zeros).
T tokens, K columns.  Everything is elementwise or within a row: no batch can change a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.quant_rows import LIMITS, TINIEST_SCALE, quant_rows
from quant.scheme import FP8, Activations

ROW_DTYPES = {"int8": torch.int8, "fp8": FP8}


class Rows(NamedTuple):
    """x = (codes - zero) * scale; `zero_T` None: zeros are 0.  Scales and zeros are float32."""

    codes_TK: Tensor
    scale_T: Tensor
    zero_T: Tensor | None = None


def make_rows(
    x_TK: Tensor, kind: Activations, scale: Tensor | None = None, zero: Tensor | None = None
) -> Rows:
    """Rows of `kind`; `scale` and `zero` are the [1] float32 tensors of static ones."""
    assert (scale is None) == kind.dynamic, f"{kind} and {scale=}"
    if scale is not None:
        return _static(x_TK, ROW_DTYPES[kind.dtype], scale, zero)
    if not kind.symmetric:
        return _between(x_TK)
    return Rows(*quant_rows(x_TK, ROW_DTYPES[kind.dtype]))


def rounded_in_fp8(x_THK: Tensor) -> Tensor:
    """x as e4m3 over a scale for each token and head, in x's type: how FireQ's kernels take queries (2505.20839)."""
    codes_XK, scale_X = quant_rows(x_THK.flatten(0, 1), FP8)
    return (codes_XK.float() * scale_X[:, None]).to(x_THK.dtype).view_as(x_THK)


def _static(x_TK: Tensor, dtype: torch.dtype, scale: Tensor, zero: Tensor | None) -> Rows:
    T = len(x_TK)
    # float32, as scale is: a 16-bit quotient would be rounded before it is a code
    scaled_TK = x_TK / scale
    scale_T = scale.expand(T).contiguous()
    if dtype == FP8:
        return Rows(scaled_TK.clamp_(-LIMITS[FP8], LIMITS[FP8]).to(FP8), scale_T)
    codes_TK = scaled_TK.round_()
    if zero is not None:
        codes_TK += zero
    codes_TK = codes_TK.clamp_(-128, 127).to(torch.int8)
    return Rows(codes_TK, scale_T, None if zero is None else zero.expand(T).contiguous())


def _between(x_TK: Tensor) -> Rows:
    low_T, high_T = torch.aminmax(x_TK, dim=-1)
    low_T, high_T = low_T.float().clamp_max(0), high_T.float().clamp_min(0)
    scale_T = ((high_T - low_T) / 255).clamp_min_(TINIEST_SCALE)
    zero_T = (-128 - low_T / scale_T).round_().clamp_(-128, 127)
    codes_TK = (x_TK / scale_T[:, None]).round_() + zero_T[:, None]
    return Rows(codes_TK.clamp_(-128, 127).to(torch.int8), scale_T, zero_T)
