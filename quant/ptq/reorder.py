"""Channel reordering (QoQ): inputs of alike magnitude become neighbours, so that a group of weights fits one scale.

Folded offline: a permutation of a matrix's inputs is one of its producer's outputs.  `down`: the rows of gate and up.  `o`:
the rows of v, inside each head and alike for all KV heads' query heads; it mixes no heads, so it helps groups shorter
than a head only.  The inputs of qkv and gate_up are the residual stream: they cannot move alone, but one permutation
of the whole model can (`permute_layer`, `permute_outer`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from quant.ptq.model import ATTENTION_NORM, EMBED, FINAL_NORM, HEAD, MLP_NORM, Layer, Shape
from quant.ptq.pairs import PAIRS, gather, spread
from quant.ptq.stats import Stats

FOLDABLE = ("o", "down")


def reorder(layer: Layer, shape: Shape, stats: Stats, *, pairs: Iterable[str] = FOLDABLE) -> None:
    """Inputs of o and down by their largest activation, the largest first, in place; `stats` follow."""
    for name in pairs:
        if name not in FOLDABLE:
            raise ValueError(f"inputs can be reordered of {', '.join(FOLDABLE)} alone, got {name!r}")
        inputs = stats.inputs[PAIRS[name].consumers[0]]
        if name == "down":
            order_F = inputs.absmax_K.argsort(descending=True)
            _permute_rows(layer, ("mlp.gate_proj", "mlp.up_proj"), order_F)
            _permute_columns(layer, ("mlp.down_proj",), order_F)
            inputs.permute(order_F)
            continue
        G, K = shape.kv_heads, shape.head_dim
        inside_GK = gather(shape, name, inputs.absmax_K).view(G, K).argsort(dim=1, descending=True)
        _permute_rows(layer, ("self_attn.v_proj",), _at_heads(inside_GK))
        per_head_HK = spread(shape, name, inside_GK.flatten()).view(shape.heads, K)
        order_X = _at_heads(per_head_HK)
        _permute_columns(layer, ("self_attn.o_proj",), order_X)
        inputs.permute(order_X)
        stats.heads.value_GK = stats.heads.value_GK.gather(1, inside_GK)


def _at_heads(inside_XK: Tensor) -> Tensor:
    """Orders inside each head as one order of all channels."""
    heads, K = inside_XK.shape
    return (torch.arange(heads, device=inside_XK.device)[:, None] * K + inside_XK).flatten()


def residual_order(absmax_LD: Tensor) -> Tensor:
    """One order of the residual channels for the whole model: by the mean rank over the norms' outputs, largest first."""
    return absmax_LD.argsort(dim=1).argsort(dim=1).double().mean(0).argsort(descending=True)


def permute_layer(layer: Layer, order_D: Tensor, stats: Stats | None = None) -> None:
    """The residual stream in the order `order_D`, in place; every layer and `permute_outer` must follow."""
    for norm in (ATTENTION_NORM, MLP_NORM):
        layer[norm] = layer[norm][order_D]
    for pair in ("qkv", "gate_up"):
        _permute_columns(layer, PAIRS[pair].consumers, order_D)
        if stats is not None:
            stats.inputs[PAIRS[pair].consumers[0]].permute(order_D)
    _permute_rows(layer, ("self_attn.o_proj", "mlp.down_proj"), order_D)


def permute_outer(outer: dict[str, Tensor], order_D: Tensor) -> None:
    """Embeddings, last norm and head likewise; a tied head stays tied."""
    for name in (EMBED, FINAL_NORM, HEAD):
        if name in outer:
            outer[name] = outer[name][..., order_D]


def _permute_rows(layer: Layer, names: Iterable[str], order_N: Tensor) -> None:
    for name in names:
        layer[f"{name}.weight"] = layer[f"{name}.weight"][order_N]
        if (bias := layer.get(f"{name}.bias")) is not None:
            layer[f"{name}.bias"] = bias[order_N]


def _permute_columns(layer: Layer, names: Iterable[str], order_K: Tensor) -> None:
    for name in names:
        layer[f"{name}.weight"] = layer[f"{name}.weight"][:, order_K]
