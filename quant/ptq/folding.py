"""Applies the folds of a recipe to one layer, in their order, with the statistics that they ask for.

`Target` says what the model is going to run in (weights, rows, KV format, the type of what stays plain), which the
searching folds look at.  A fold leaves the function as it is, but for the scale of keys at run time that it may return.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.ptq import fake
from quant.ptq.attention_scales import search_attention, smooth_attention
from quant.ptq.awq import Objective, awq
from quant.ptq.fireq_scales import equalize, scale_keys_for_cache, scale_values
from quant.ptq.grid import Rounding, plain_grid
from quant.ptq.model import Layer, Shape
from quant.ptq.recipe import AUTO, BLIND_FOLDS, Recipe, Step
from quant.ptq.reorder import reorder
from quant.ptq.smooth import smooth
from quant.ptq.stats import Stats

SAMPLE = 1024  # rows of the searches that round activations or keys


@dataclass(frozen=True, slots=True)
class Target:
    """`kv`: a KV format of the kernels, None to leave keys and values alone.  `stored`: of norms, biases and head."""

    rounding: Rounding
    kv: str | None
    stored: torch.dtype
    queries: str | None = None  # fp8: rounded too, as FireQ's prefill has them

    def rows(self, x: Tensor) -> Tensor:
        """Activations as the matmuls round them."""
        return fake.rows(x, self.rounding.scheme.activations)


@dataclass(frozen=True, slots=True)
class Needs:
    """What folds want of `stats.collect`, beyond the ranges."""

    hessian: bool
    sample: int


def needs(recipe: Recipe) -> Needs | None:
    """None where no fold looks at data."""
    seeing = [s for s in recipe.folds if s.name not in BLIND_FOLDS]
    if not seeing:
        return None
    hessian = any(s.name == "awq" and not s.options["rows"] for s in seeing)
    sampled = any(
        (s.name == "awq" and s.options["rows"])
        or (s.name == "smooth_attention" and s.options["alpha"] == AUTO)
        for s in seeing
    )
    return Needs(hessian, SAMPLE if sampled else 0)


def fold(layer: Layer, shape: Shape, step: Step, stats: Stats | None, target: Target) -> Tensor | None:
    """Applies one step in place; `stats` follow.  Returns channel_GK of keys where the step has one."""
    o: dict[str, Any] = dict(step.options)
    if step.name == "equalize":
        kind = o.pop("kind")
        pairs = {name: None if c == AUTO else c for name, c in o.items() if c != 0}
        equalize(layer, shape, pairs=pairs, kind=kind, stats=stats, stored=target.stored)
        return None
    if step.name == "scale_values":
        scale_values(layer, shape, o["factor"], stats)
        return None
    assert stats is not None, f"{step} without statistics"
    if step.name == "scale_keys":
        return scale_keys_for_cache(layer, shape, stats, **o)
    if step.name == "smooth":
        o["beta"] = None if o["beta"] == AUTO else o["beta"]
        smooth(layer, shape, stats, **o, stored=target.stored)
    elif step.name == "awq":
        rows = target.rows if o.pop("rows") else None
        objective = Objective(lambda _, w_NK: _plain(w_NK, target.rounding), rows)
        awq(layer, shape, stats, **o, objective=objective, stored=target.stored)
    elif step.name == "smooth_attention" and o["alpha"] == AUTO:
        search_attention(layer, shape, stats, quantize=lambda k: _cached_keys(k, target))
    elif step.name == "smooth_attention":
        smooth_attention(layer, shape, stats, **o)
    elif step.name == "reorder":
        reorder(layer, shape, stats, **o)
    return None


def _plain(w_NK: Tensor, rounding: Rounding) -> Tensor:
    """What plain rounding makes of a matrix."""
    grid = plain_grid(w_NK, rounding.fit(w_NK.shape[1]))
    return grid.value(grid.nearest(w_NK))


def _cached_keys(k_TGK: Tensor, target: Target) -> Tensor:
    # a scale searched for a float cache would find nothing to choose by
    return fake.kv(target.kv if target.kv in ("int4", "int4z") else "int4", k_TGK, k_TGK)[0]
