"""SmoothAttention (QoQ, arXiv 2405.04532 section 4.2): keys with fewer outliers for a 4-bit cache, at no cost.

Keys are divided and queries multiplied by a scale of each channel, alike in both channels that RoPE turns into each
other and in all query heads of a KV head; so it goes into the rows of the k and q matrices, and the scores stay.
lambda = max|k|^alpha after rotation, tied over the pair by its larger one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quant.ptq.model import Layer, Shape
from quant.ptq.stats import HeadStats, Stats

Q_PROJ, K_PROJ = "self_attn.q_proj", "self_attn.k_proj"


def tied(x_GK: Tensor) -> Tensor:
    """The larger of both channels of each RoPE pair, in both places."""
    half = x_GK.shape[-1] // 2
    most_GI = torch.maximum(x_GK[..., :half], x_GK[..., half:])
    return torch.cat((most_GI, most_GI), dim=-1)


def scale_keys(layer: Layer, shape: Shape, m_GK: Tensor, stats: Stats | None = None) -> None:
    """Keys times `m_GK`, queries divided by it, in place; both halves of `m_GK` must be alike.  `stats` follow."""
    half = shape.head_dim // 2
    assert torch.equal(m_GK[:, :half], m_GK[:, half:]), "scales must be alike in both channels of a RoPE pair"
    assert bool((m_GK > 0).all() & torch.isfinite(m_GK).all()), "scales must be positive and finite"
    rows = {K_PROJ: m_GK.flatten(), Q_PROJ: 1 / m_GK.repeat_interleave(shape.heads_per_kv, 0).flatten()}
    for name, s_N in rows.items():
        layer[f"{name}.weight"] *= s_N[:, None]
        if (bias := layer.get(f"{name}.bias")) is not None:
            bias *= s_N
    if stats is not None:
        stats.heads.scale_keys(m_GK)


def attention_scale(heads: HeadStats, alpha: float) -> Tensor:
    """lambda_GK; 1 where a pair is all zero."""
    most_GK = tied(heads.after_GK)
    return torch.where(most_GK > 0, most_GK**alpha, torch.ones_like(most_GK))


def smooth_attention(layer: Layer, shape: Shape, stats: Stats, *, alpha: float = 0.5) -> None:
    """Divides keys by max|k|^alpha in place."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    scale_keys(layer, shape, 1 / attention_scale(stats.heads, alpha), stats)


def search_attention(
    layer: Layer, shape: Shape, stats: Stats, *, quantize: Callable[[Tensor], Tensor], grid: int = 20
) -> Tensor:
    """SmoothAttention with the best alpha of a grid over [0, 1] for each KV head; returns alpha_G.

    `quantize` rounds keys [..., K] as the cache will.  Least squared error of the scores of the sampled keys with
    the queries' sum of products; `stats` must hold both (a Collector's `sample`).
    """
    heads = stats.heads
    if heads.keys_TGK is None or heads.query_gram_GKK is None:
        raise ValueError("a search of alpha needs statistics with a sample of the keys, got none")
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    best_G = torch.full((shape.kv_heads,), float("inf"), dtype=heads.keys_TGK.dtype)
    alpha_G, scale_GK = torch.zeros_like(best_G), torch.ones_like(heads.after_GK)
    for i in range(grid + 1):
        candidate_GK = attention_scale(heads, i / grid)
        error_TGK = quantize(heads.keys_TGK / candidate_GK) * candidate_GK - heads.keys_TGK
        loss_G = torch.einsum("tgk,gkl,tgl->g", error_TGK, heads.query_gram_GKK, error_TGK)
        better_G = loss_G < best_G
        best_G, alpha_G = torch.where(better_G, loss_G, best_G), torch.where(better_G, i / grid, alpha_G)
        scale_GK = torch.where(better_G[:, None], candidate_GK, scale_GK)
    scale_keys(layer, shape, 1 / scale_GK, stats)
    return alpha_G
