"""One matrix to its QuantWeight by the rounding steps of a recipe: a grid, clipped or not, then codes on it."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from quant.ptq.clip import clipped_grid
from quant.ptq.gptq import Rounded, gptq, refine
from quant.ptq.grid import Rounding, plain_grid
from quant.ptq.recipe import AUTO, Recipe
from quant.scheme import QuantWeight

LARGEST = 1e30  # of a Hessian: sums of its products must stay below float32's end


class Made(NamedTuple):
    """`weight_error` and `output_error`: squared, relative to the weight's own; the latter None without a Hessian.

    The output error is that of the matrix as it was given, on the inputs of the calibration: what `match` made of it
    in between does not count.  `note`: why it was rounded to nearest after all, else empty.
    """

    weight: QuantWeight
    weight_error: float
    output_error: float | None
    note: str


class Products(NamedTuple):
    """Means over the rows x that a matrix multiplies: x x^T, and (r - x) x^T where r is what x was without rounding."""

    hessian_KK: Tensor
    drift_KK: Tensor | None = None


def rounding_of(recipe: Recipe, rounding: Rounding) -> Rounding:
    """The rounding with what the recipe's `grid` step changes."""
    grid = recipe.find("grid")
    if grid is None:
        return rounding
    divisor = rounding.divisor if grid["divisor"] == AUTO else grid["divisor"]
    return replace(rounding, divisor=divisor, fireq=grid["e4m3"], free_offset=not grid["multiples"])


def quantize_weight(w_NK: Tensor, rounding: Rounding, recipe: Recipe, products: Products | None) -> Made:
    """`w_NK` in float32; `products` of its inputs, which match, gptq and refine need.

    The group size gives way to one that divides the inputs.
    """
    rounding = rounding.fit(w_NK.shape[1])
    note = "" if products is None else unusable(products)
    if note:
        recipe, products = recipe.without_data(), None
    hessian_KK = None if products is None else products.hessian_KK
    wanted_NK = w_NK.contiguous()
    if (options := recipe.find("match")) is not None:
        assert products is not None, "match without calibration"
        wanted_NK = matched(wanted_NK, products, **options)
    clip = recipe.find("clip")
    grid = (
        plain_grid(wanted_NK, rounding)
        if clip is None
        else clipped_grid(wanted_NK, rounding, hessian_KK, **clip)
    )
    if (options := recipe.find("gptq")) is not None:
        rounded = gptq(wanted_NK, grid, _given(hessian_KK, "gptq"), **options)
    else:
        rounded = Rounded(grid.nearest(wanted_NK), grid)
    if (options := recipe.find("refine")) is not None:
        rounded = refine(wanted_NK, rounded, _given(hessian_KK, "refine"), **options)
    weight = rounded.grid.weight(rounded.codes_NK)
    error_NK = weight.dequantize().sub_(w_NK)
    output_error = None if hessian_KK is None else _ratio(error_NK, w_NK, hessian_KK)
    return Made(weight, _ratio(error_NK, w_NK, None), output_error, note or rounded.fallback)


def unusable(products: Products) -> str:
    """Why nothing can be learnt from these inputs; empty where something can."""
    for part in products:
        # NaN is handed on to both ends, and is not below anything
        if part is not None and not all(abs(x) < LARGEST for x in torch.stack(torch.aminmax(part)).tolist()):
            return "the inputs of the calibration are not finite, or too large to be added up"
    return "" if float(products.hessian_KK.diagonal().sum()) > 0 else "the inputs are all 0"


def matched(w_NK: Tensor, products: Products, *, damp: float, strength: float) -> Tensor:
    """The matrix that makes of the inputs x what w makes of the inputs r that x should have been, in least squares.

    w + strength * w D (H + damp mean)^-1 with D = (r - x) x^T: GPTAQ's asymmetric calibration (arXiv 2504.02692).
    Unchanged where H has no factorization.
    """
    if not 0 < damp < 1 or not 0 <= strength <= 1:
        raise ValueError(f"damp must be in (0, 1) and strength in [0, 1], got {damp} and {strength}")
    hessian_KK, drift_KK = products
    assert drift_KK is not None, "match without references"
    damped_KK = hessian_KK.clone()
    damped_KK.diagonal().add_(damp * hessian_KK.diagonal().mean())
    lower_KK, info = torch.linalg.cholesky_ex(damped_KK)
    if info or not bool(torch.isfinite(lower_KK).all()):
        return w_NK
    return w_NK + strength * torch.cholesky_solve((w_NK @ drift_KK).T, lower_KK).T


def _given(hessian_KK: Tensor | None, step: str) -> Tensor:
    if hessian_KK is None:
        raise ValueError(f"{step} needs calibration data: give --calib or --calib-tokens")
    return hessian_KK


def _ratio(error_NK: Tensor, w_NK: Tensor, hessian_KK: Tensor | None) -> float:
    """|error|^2 / |w|^2, both through the Hessian where there is one."""
    if hessian_KK is None:
        return (error_NK.square().sum() / w_NK.square().sum().clamp_min(1e-30)).item()
    cost, whole = (torch.sum((x_NK @ hessian_KK) * x_NK) for x_NK in (error_NK, w_NK))
    return (cost / whole.clamp_min(1e-30)).item()
