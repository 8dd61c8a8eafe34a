"""SmoothQuant (arXiv 2211.10438): range moves from activations into the weights that read them, channel by channel.

s = max|x|^alpha / max|W|^beta with beta = 1 - alpha; x / s is what the consumers then see, W s what they hold.
On the pair `down` with alpha near 0 and given beta it is QoQ's smoothing of the block output (arXiv 2405.04532).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from quant.ptq.model import Layer, Shape
from quant.ptq.pairs import PAIRS, consumers, gather, move, pair_named
from quant.ptq.stats import Stats

LEAST = 1e-5  # of a scale


def smooth_scale(x_C: Tensor, w_C: Tensor, alpha: float, beta: float) -> Tensor:
    """max|x|^alpha / max|W|^beta of each channel; 1 where either is all zero."""
    s_C = (x_C**alpha / w_C.clamp_min(torch.finfo(w_C.dtype).tiny) ** beta).clamp_min(LEAST)
    return torch.where((x_C > 0) & (w_C > 0) & torch.isfinite(s_C), s_C, torch.ones_like(s_C))


def smooth(
    layer: Layer,
    shape: Shape,
    stats: Stats,
    *,
    alpha: float = 0.5,
    beta: float | None = None,
    pairs: Iterable[str] = ("qkv", "gate_up"),
    stored: torch.dtype | None = None,
) -> None:
    """Smooths the `pairs` in place; `stats` follow.  `stored`: see `move`."""
    if not 0 <= alpha <= 1 or (beta is not None and not 0 <= beta <= 1):
        raise ValueError(f"alpha and beta must be in [0, 1], got {alpha} and {beta}")
    # up is a producer and a consumer: its columns are weighed before its rows change
    for name in sorted(pairs, key=lambda name: list(PAIRS).index(name) if name in PAIRS else -1):
        pair = pair_named(name)
        x_C = gather(shape, name, stats.inputs[pair.consumers[0]].absmax_K)
        w_C = gather(shape, name, consumers(layer, name).abs().amax(0))
        s_C = smooth_scale(x_C, w_C.to(x_C.dtype), alpha, 1 - alpha if beta is None else beta)
        move(layer, shape, name, s_C, stats, stored)
