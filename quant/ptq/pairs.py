"""Pairs of a producer and its consumers between which a scale of each channel can be moved without any effect.

`move` divides the producer's channels by s and multiplies the consumers' columns by it.  A norm feeds q, k and v, or gate
and up; v feeds o through the heads, where the query heads of a KV head share its scale; up feeds down past the SiLU.
`inject_outliers` uses the same move to make activations hard to quantize: x F in some channels of every norm.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.ptq.model import ATTENTION_NORM, EMBED, FINAL_NORM, HEAD, MLP_NORM, Layer, Shape
from quant.ptq.stats import Stats


@dataclass(frozen=True, slots=True)
class Pair:
    producer: str  # a norm's weight, or a linear layer whose outputs are meant
    consumers: tuple[str, ...]

    @property
    def is_norm(self) -> bool:
        return self.producer.endswith("norm.weight")


PAIRS = {
    "qkv": Pair(ATTENTION_NORM, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "o": Pair("self_attn.v_proj", ("self_attn.o_proj",)),
    "gate_up": Pair(MLP_NORM, ("mlp.gate_proj", "mlp.up_proj")),
    "down": Pair("mlp.up_proj", ("mlp.down_proj",)),
}


def pair_named(name: str) -> Pair:
    if name not in PAIRS:
        raise ValueError(f"pair must be one of {', '.join(PAIRS)}, got {name!r}")
    return PAIRS[name]


def spread(shape: Shape, name: str, s: Tensor) -> Tensor:
    """The producer's channels as the consumers' columns: of o, each query head's are its KV head's."""
    if name != "o":
        return s
    return s.view(shape.kv_heads, 1, shape.head_dim).expand(-1, shape.heads_per_kv, -1).flatten()


def gather(shape: Shape, name: str, x_K: Tensor, how: str = "max") -> Tensor:
    """The consumers' columns as the producer's channels: of o, the largest or the mean of the query heads."""
    if name != "o":
        return x_K
    per_head = x_K.view(shape.kv_heads, shape.heads_per_kv, shape.head_dim)
    return (per_head.amax(1) if how == "max" else per_head.mean(1)).flatten()


def consumers(layer: Layer, name: str) -> Tensor:
    """The matrices of all consumers, stacked along their outputs."""
    return torch.cat([layer[f"{c}.weight"] for c in pair_named(name).consumers])


def move(
    layer: Layer,
    shape: Shape,
    name: str,
    s: Tensor,
    stats: Stats | None = None,
    stored: torch.dtype | None = None,
) -> Tensor:
    """Divides the channels of pair `name` by `s`; the function stays.  `stats` follow.  Returns the scale used.

    Where the checkpoint will be `stored` in fewer bits, the scale of a norm is bent so that the norm's new weight is
    exactly one of that type: rounded afterwards, it would no longer undo what its consumers were multiplied by.
    """
    pair = pair_named(name)
    assert bool((s > 0).all() & torch.isfinite(s).all()), f"scales of {name} must be positive and finite"
    if pair.is_norm:
        s = _storable(layer[pair.producer], s, stored)
        layer[pair.producer] /= s
    else:
        layer[f"{pair.producer}.weight"] /= s[:, None]
        if (bias := layer.get(f"{pair.producer}.bias")) is not None:
            bias /= s
    columns_K = spread(shape, name, s)
    for consumer in pair.consumers:
        layer[f"{consumer}.weight"] *= columns_K
    if stats is not None:
        stats.inputs[pair.consumers[0]].divide(columns_K)
        if name == "o":
            stats.heads.value_GK = stats.heads.value_GK / s.view(shape.kv_heads, shape.head_dim)
    return s


def _storable(norm_D: Tensor, s_D: Tensor, stored: torch.dtype | None) -> Tensor:
    if stored is None:
        return s_D
    bent_D = norm_D / (norm_D / s_D).to(stored).to(norm_D.dtype)
    # a weight of zero, or one that the type cannot hold, is left as it is
    return torch.where(torch.isfinite(bent_D) & (bent_D > 0), bent_D, torch.ones_like(s_D))


def inject_outliers(layer: Layer, shape: Shape, channels: Iterable[int], factor: float) -> None:
    """Both norms put out `factor` times as much in `channels`, and what reads them takes it back: no effect but range."""
    s_D = _injection(layer[ATTENTION_NORM], shape, channels, factor)
    for name in ("qkv", "gate_up"):
        move(layer, shape, name, s_D)


def inject_outer_outliers(
    outer: dict[str, Tensor], shape: Shape, channels: Iterable[int], factor: float
) -> None:
    """The same for the last norm and the head, which becomes a matrix of its own where it was tied."""
    s_D = _injection(outer[FINAL_NORM], shape, channels, factor)
    head_VD = outer[HEAD] if HEAD in outer else outer[EMBED]
    outer[FINAL_NORM] = outer[FINAL_NORM] / s_D
    outer[HEAD] = head_VD * s_D


def _injection(like_D: Tensor, shape: Shape, channels: Iterable[int], factor: float) -> Tensor:
    at = sorted(set(channels))
    if not at or at[0] < 0 or at[-1] >= shape.hidden:
        raise ValueError(f"channels must be some of [0, {shape.hidden}), got {at}")
    if not 0 < factor < float("inf"):
        raise ValueError(f"factor must be above 0 and finite, got {factor}")
    s_D = torch.ones_like(like_D)
    s_D[at] = 1 / factor
    return s_D
