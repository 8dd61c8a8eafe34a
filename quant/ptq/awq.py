"""Scaling by search, after AWQ (arXiv 2306.00978): of a family of channel scales the one that quantizes best.

For each pair s(r) = mean|x|^r (`plain`), mean|x|^r / mean|W|^(1 - r) (`duo`) or max|x|^r / max|W|^(1 - r) (`smooth`), for r
on a grid; that which leaves the least squared error of the outputs is folded, or none.  The error is E H E^T with
E = W - Q(W s) / s and H of the statistics, or is measured on the sampled rows where they are quantized too.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from quant.ptq.model import Layer, Shape
from quant.ptq.pairs import PAIRS, consumers, gather, move, pair_named, spread
from quant.ptq.smooth import LEAST
from quant.ptq.stats import InputStats, Stats

KINDS = ("plain", "duo", "smooth")
# name of the linear layer, W_NK -> the W_NK that its codes stand for
Quantizer = Callable[[str, Tensor], Tensor]
# x_TK -> what it is rounded to
Rows = Callable[[Tensor], Tensor]


class Objective(NamedTuple):
    """What the search is for: how weights are rounded, and rows of activations where they are.

    Of every matrix at most `outputs` rows, evenly spread, are looked at: enough to choose by, and much sooner done.
    """

    weight: Quantizer
    rows: Rows | None = None
    outputs: int = 1024


class Choice(NamedTuple):
    """The grid's ratio, None where no scale was best; squared errors without a scale and with this one."""

    ratio: float | None
    before: float
    after: float


def awq(
    layer: Layer,
    shape: Shape,
    stats: Stats,
    *,
    objective: Objective,
    kind: str = "duo",
    grid: int = 20,
    pairs: Iterable[str] = tuple(PAIRS),
    stored: torch.dtype | None = None,
) -> dict[str, Choice]:
    """Folds the best scale of each pair in place; `stats` follow.

    They must hold samples where rows are rounded, else Hessians.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    chosen: dict[str, Choice] = {}
    for name in pairs:
        pair = pair_named(name)
        inputs = stats.inputs[pair.consumers[0]]
        before = _loss(layer, shape, name, inputs, objective, None)
        best, best_s = Choice(None, before, before), None
        x_C, w_C = _sizes(layer, shape, name, inputs, kind)
        for i in range(grid + 1):
            s_C = _candidate(x_C, w_C, i / grid)
            after = _loss(layer, shape, name, inputs, objective, s_C)
            if after < best.after:
                best, best_s = Choice(i / grid, before, after), s_C
        if best_s is not None:
            move(layer, shape, name, best_s, stats, stored)
        chosen[name] = best
    return chosen


def _sizes(layer: Layer, shape: Shape, name: str, inputs: InputStats, kind: str) -> tuple[Tensor, Tensor]:
    """The magnitudes of the channels of inputs and of weights, of which a family's scales are made."""
    w_NK = consumers(layer, name).abs()
    if kind == "smooth":
        x_C, w_C = gather(shape, name, inputs.absmax_K), gather(shape, name, w_NK.amax(0))
    else:
        x_C = gather(shape, name, inputs.absmean_K, "mean")
        w_C = gather(shape, name, w_NK.mean(0), "mean")
    if kind == "plain":
        w_C = torch.ones_like(w_C)
    return x_C.clamp_min(LEAST), w_C.to(x_C.dtype).clamp_min(LEAST)


def _candidate(x_C: Tensor, w_C: Tensor, ratio: float) -> Tensor:
    s_C = x_C**ratio / w_C ** (1 - ratio)
    return s_C / (s_C.amax() * s_C.amin()).sqrt()


def _loss(
    layer: Layer,
    shape: Shape,
    name: str,
    inputs: InputStats,
    objective: Objective,
    s_C: Tensor | None,
) -> float:
    """Squared error of the consumers' outputs that are looked at, summed over rows (the sampled ones with `rows`)."""
    total = 0.0
    s_K = None if s_C is None else spread(shape, name, s_C)
    for consumer in pair_named(name).consumers:
        w_NK = layer[f"{consumer}.weight"]
        w_NK = w_NK[:: -(-len(w_NK) // objective.outputs)]
        rounded_NK = objective.weight(consumer, w_NK if s_K is None else w_NK * s_K).to(w_NK.dtype)
        if objective.rows is not None:
            if inputs.sample_TK is None:
                raise ValueError("a search with quantized rows needs statistics with a sample, got none")
            x_TK = inputs.sample_TK
            y_TN = objective.rows(x_TK if s_K is None else x_TK / s_K) @ rounded_NK.T
            total += float((y_TN - x_TK @ w_NK.T).square().sum())
        else:
            if inputs.hessian_KK is None:
                raise ValueError(
                    "a search needs statistics with Hessians, or a sample and rows to round, got neither"
                )
            error_NK = w_NK - (rounded_NK if s_K is None else rounded_NK / s_K)
            total += float(((error_NK @ inputs.hessian_KK.to(error_NK.dtype)) * error_NK).sum())
    return total
