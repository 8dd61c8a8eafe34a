"""Scales and constants as checkpoints store them, brought to the canonical shapes of `QuantWeight`.

Of any float type and rank: a scale a tensor is [1] or [], a channel [N, 1] or [N], a group [N, K / g], a block of
128 x 128 [ceil(N / 128), ceil(K / 128)].  Whatever has another shape is a ValueError that names the tensor.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.scheme import BLOCK, FP8, Activations


def row_scales(name: str, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """float32 [N, Q]; one scale for the whole tensor is repeated a row."""
    N, K = shape
    _check_float(name, scale)
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).repeat(N, 1)
    if scale.shape == (N,):
        return scale.float()[:, None]
    if scale.ndim != 2 or scale.shape[0] != N or not scale.shape[1] or K % scale.shape[1]:
        raise ValueError(f"{name} must be [1], [{N}, 1] or [{N}, groups of {K}], got {list(scale.shape)}")
    return scale.float()


def block_shape(shape: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def block_scales(name: str, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """float32 [ceil(N / 128), ceil(K / 128)]."""
    _check_float(name, scale)
    if scale.shape != block_shape(shape):
        raise ValueError(
            f"{name} must be {list(block_shape(shape))}, one a block of {BLOCK} x {BLOCK}, got {list(scale.shape)}"
        )
    return scale.float()


def _check_float(name: str, scale: Tensor) -> None:
    if not scale.dtype.is_floating_point or scale.dtype == FP8:
        raise ValueError(f"{name} must be a float tensor, got {scale.dtype}")


def input_constants(fields: Mapping[str, Tensor], rows: Activations | None) -> dict[str, Any]:
    """`input_scale` and `input_zero` of a QuantWeight whose rows are `rows`, from tensors of these names.

    ValueError where one is missing, or present though nothing would use it.
    """
    scale, zero = fields.get("input_scale"), fields.get("input_zero_point")
    static = rows is not None and not rows.dynamic
    if (scale is not None) != static:
        state = "missing, which" if static else "present, but"
        verb = "need" if static else "have no use for it"
        raise ValueError(f"input_scale is {state} activations {rows or 'that stay floats'} {verb}")
    code = None if zero is None else _one("input_zero_point", zero)
    if code is not None and not code.is_integer():
        raise ValueError(f"input_zero_point must be an integer, got {code}")
    if not static or (rows is not None and rows.symmetric):
        if code:
            raise ValueError(f"input_zero_point is {code:.0f}, but the activations are {rows}")
        return {} if scale is None else {"input_scale": _one("input_scale", scale)}
    if code is None:
        raise ValueError(f"input_zero_point is missing, which activations {rows} need")
    assert scale is not None, f"{rows}"
    return {"input_scale": _one("input_scale", scale), "input_zero": int(code)}


def _one(name: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise ValueError(f"{name} must be one value for the tensor, got {list(value.shape)}")
    number = float(value.float().item())
    if not torch.isfinite(torch.tensor(number)):
        raise ValueError(f"{name} must be finite, got {number}")
    return number
