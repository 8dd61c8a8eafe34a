"""The scales of FireQ (arXiv 2505.20839), for 4-bit weights, fp8 activations and a 4-bit cache.

`equalize` (channel-wise scaling): lambda_j = c / mean|W_:j|, so that the columns of a group are of one size; the range
goes into the activations, which fp8 bears.  `scale_keys_for_cache`: keys to about `alpha` before RoPE, folded, and the few
largest channels to `beta` after it, at run time.  The power of two of each matrix belongs to its quantizer (progressive.py).
"""

import torch
from torch import Tensor

from quant.ptq.attention_scales import scale_keys, tied
from quant.ptq.model import Layer, Shape
from quant.ptq.pairs import PAIRS, consumers, gather, move, pair_named
from quant.ptq.smooth import LEAST
from quant.ptq.stats import Stats

KINDS = ("mean", "max")
# what FireQ ships for Llama-3-8B: the pairs it scales, and their constants
LLAMA3_8B = {"gate_up": 0.0096, "down": 0.015}
VALUE_FACTOR = 0.9  # and this of v, taken back by o


def equalize(
    layer: Layer,
    shape: Shape,
    *,
    pairs: dict[str, float | None],
    kind: str = "mean",
    stats: Stats | None = None,
    stored: torch.dtype | None = None,
) -> None:
    """Columns of each pair's consumers to one mean (or largest) magnitude, in place: no data.  `stats` follow.

    `pairs`: pair -> constant c, or None for the geometric mean of the columns, which leaves the matrix as large as it
    was (the published constants are of one model).  Pairs qkv, gate_up, o, down; for o, where query heads
    share a KV head, lambda is averaged over them for each channel of the head.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    for name in sorted(pairs, key=lambda name: list(PAIRS).index(name) if name in PAIRS else -1):
        pair_named(name)
        constant = pairs[name]
        if constant is not None and not 0 < constant < float("inf"):
            raise ValueError(f"the constant of {name} must be above 0 and finite, got {constant}")
        w_NK = consumers(layer, name).abs()
        size_K = (w_NK.amax(0) if kind == "max" else w_NK.mean(0)).clamp_min(LEAST * w_NK.mean())
        c = float(size_K.log().mean().exp()) if constant is None else constant
        # a matrix of zeros has nothing to equalize
        if bool((size_K > 0).all()):
            move(layer, shape, name, gather(shape, name, c / size_K, "mean"), stats, stored)


def scale_values(
    layer: Layer, shape: Shape, factor: float = VALUE_FACTOR, stats: Stats | None = None
) -> None:
    """v times `factor`, o divided by it (`v_mul`)."""
    if not 0 < factor < float("inf"):
        raise ValueError(f"factor must be above 0 and finite, got {factor}")
    like = layer["self_attn.v_proj.weight"]
    move(layer, shape, "o", like.new_full((shape.kv_heads * shape.head_dim,), 1 / factor), stats)


def scale_keys_for_cache(
    layer: Layer, shape: Shape, stats: Stats, *, alpha: float = 8.0, beta: float = 8.0, top_k: int = 8
) -> Tensor:
    """Folds the scaling before RoPE in place and returns that after it: channel_GK, by which keys are divided and
    queries multiplied at run time (FireQ stores its inverse).

    The `top_k` largest channels of each KV head after RoPE and their partners come to `beta` at run time and are
    left alone before it; every other pair's largest norm comes to `alpha`.  top_k 0: folded alone, channel_GK is ones.
    """
    K = shape.head_dim
    if not 0 <= top_k <= K:
        raise ValueError(f"top_k must be in [0, head_dim = {K}], got {top_k}")
    if not 0 < alpha < float("inf") or not 0 < beta < float("inf"):
        raise ValueError(f"alpha and beta must be above 0 and finite, got {alpha} and {beta}")
    heads = stats.heads
    at_GX = heads.after_GK.topk(top_k, dim=1).indices
    picked_GK = torch.zeros_like(heads.after_GK).scatter_(1, at_GX, 1.0)
    picked_GK = tied(picked_GK) > 0
    ones_GK = torch.ones_like(heads.after_GK)
    channel_GK = torch.where(picked_GK & (heads.after_GK > 0), heads.after_GK / beta, ones_GK)
    pair_GK = torch.cat((heads.pair_GI, heads.pair_GI), dim=1)
    m_GK = torch.where(~picked_GK & (pair_GK > 0), alpha / pair_GK, ones_GK)
    scale_keys(layer, shape, m_GK, stats)
    return channel_GK
