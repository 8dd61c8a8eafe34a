"""One matrix to its QuantWeight by the rounding steps of a recipe: a grid, clipped or not, then codes on it."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.ptq.clip import clipped_grid
from quant.ptq.gptq import Rounded, gptq, refine
from quant.ptq.grid import Rounding, plain_grid
from quant.ptq.recipe import AUTO, Recipe
from quant.scheme import QuantWeight


class Made(NamedTuple):
    """`weight_error` and `output_error`: squared, relative to the weight's own; the latter None without a Hessian."""

    weight: QuantWeight
    weight_error: float
    output_error: float | None
    note: str


def rounding_of(recipe: Recipe, rounding: Rounding) -> Rounding:
    """The rounding with what the recipe's `grid` step changes."""
    grid = recipe.find("grid")
    if grid is None:
        return rounding
    divisor = rounding.divisor if grid["divisor"] == AUTO else grid["divisor"]
    return replace(rounding, divisor=divisor, fireq=grid["e4m3"], free_offset=not grid["multiples"])


def quantize_weight(w_NK: Tensor, rounding: Rounding, recipe: Recipe, hessian_KK: Tensor | None) -> Made:
    """`w_NK` in float32; `hessian_KK` is X^T X of its inputs, which gptq and refine need.

    The group size gives way to one that divides the inputs.
    """
    rounding = rounding.fit(w_NK.shape[1])
    w_NK = w_NK.contiguous()
    clip = recipe.find("clip")
    grid = plain_grid(w_NK, rounding) if clip is None else clipped_grid(w_NK, rounding, hessian_KK, **clip)
    if (options := recipe.find("gptq")) is not None:
        rounded = gptq(w_NK, grid, _given(hessian_KK, "gptq"), **options)
    else:
        rounded = Rounded(grid.nearest(w_NK), grid)
    if (options := recipe.find("refine")) is not None:
        rounded = refine(w_NK, rounded, _given(hessian_KK, "refine"), **options)
    weight = rounded.grid.weight(rounded.codes_NK)
    error_NK = weight.dequantize().sub_(w_NK)
    return Made(weight, _ratio(error_NK, w_NK, None), _ratio(error_NK, w_NK, hessian_KK), rounded.fallback)


def _given(hessian_KK: Tensor | None, step: str) -> Tensor:
    if hessian_KK is None:
        raise ValueError(f"{step} needs calibration data: give --calib or --calib-tokens")
    return hessian_KK


def _ratio(error_NK: Tensor, w_NK: Tensor, hessian_KK: Tensor | None) -> Any:
    """|error|^2 / |w|^2, both through the Hessian where there is one."""
    if hessian_KK is None:
        return (error_NK.square().sum() / w_NK.square().sum().clamp_min(1e-30)).item()
    cost, whole = (torch.sum((x_NK @ hessian_KK) * x_NK) for x_NK in (error_NK, w_NK))
    return (cost / whole.clamp_min(1e-30)).item()
