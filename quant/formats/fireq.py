"""FireQ (arXiv 2505.20839) layers: 4-bit weights in groups of 128 under e4m3 scales, for fp8 activations.

`weight` is int32 [N, K / 8], nibble i of word c the two's complement of column 8 c + i; `weight_scale` e4m3 (or, of the
variant without the next, bf16) [N, K / 128]; `per_tensor_scale_inv` [1], the inverse of a power of two that the matrix
and its bias were multiplied with before.  Attention may bring `post_k_smooth` and `post_q_smooth`: factors of some
channels of the keys and queries after RoPE.  There is no config: the tensors say it all.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.w4_pack import fireq_products
from quant.scheme import FP8, FP8_ROWS, QuantWeight, Scheme

NAME = "fireq"
SUFFIXES: tuple[str, ...] = ("weight", "weight_scale", "per_tensor_scale_inv")
# beside the attention module of a layer; the public code has them one module further in
POST_ROPE: tuple[str, ...] = tuple(
    f"{inside}post_{side}_smooth.{what}"
    for inside in ("", "qkv_supply.")
    for side in "kq"
    for what in ("smooth", "top_k_indices")
)
GROUP = 128
SCHEME = Scheme(4, GROUP, activations=FP8_ROWS)
E4M3_MAX = 448.0
# bf16 rounds a factor and its inverse: 2^-8 each
INVERSE_TOLERANCE = 2.0**-6


def detect(infos: Mapping[str, Any], raw: Mapping[str, Any] | None) -> bool:
    """By words of codes under the plain name of a weight, which no other format has.

    One such tensor among others, or under the config of another format, is an error of its layer's.
    """
    if any(n.endswith(".per_tensor_scale_inv") for n in infos):
        return True
    if raw is not None and raw.get("quant_method", NAME) != NAME:
        return False
    scaled = [i for n, i in infos.items() if n.endswith(".weight") and n + "_scale" in infos]
    words = sum(1 for i in scaled if i.dtype == torch.int32)
    return 2 * words > len(scaled)


def read_config(raw: Mapping[str, Any] | None) -> None:
    """There is nothing to read; ValueError where the config is one of another format."""
    if raw is not None and raw.get("quant_method", NAME) != NAME:
        raise ValueError(
            f"quantization_config: quant_method must be {NAME!r} or absent for FireQ's tensors, "
            f"got {raw['quant_method']!r:.80}"
        )


def load(
    module: str, fields: Mapping[str, Tensor], out_features: int, in_features: int, config: None
) -> QuantWeight:
    """The layer from its tensors by suffix; a bias is to be multiplied with `bias_factor`."""
    N, K = out_features, in_features
    if K % GROUP:
        raise ValueError(f"FireQ's groups of {GROUP} do not divide {K} inputs")
    if missing := {"weight", "weight_scale"} - set(fields):
        raise ValueError(f"{', '.join(sorted(missing))} missing; found {', '.join(fields)}")
    words, scale = fields["weight"], fields["weight_scale"]
    if words.dtype != torch.int32 or list(words.shape) != [N, K // 8]:
        raise ValueError(f"weight must be int32 {[N, K // 8]}, got {words.dtype} {list(words.shape)}")
    kinds = (FP8,) if "per_tensor_scale_inv" in fields else (FP8, torch.bfloat16, torch.float16)
    if scale.dtype not in kinds or list(scale.shape) != [N, K // GROUP]:
        names = " or ".join(str(k).removeprefix("torch.") for k in kinds)
        raise ValueError(
            f"weight_scale must be {names} {[N, K // GROUP]}, got {scale.dtype} {list(scale.shape)}"
        )
    scale_NQ = scale.float() * bias_factor(fields)
    return QuantWeight(SCHEME, _unpack(words), scale_NQ).check()


def targets(module: str, config: None) -> bool:
    """False: there is no config that could say it."""
    return False


def bias_factor(fields: Mapping[str, Tensor]) -> float:
    """What the layer's result, and its bias as stored, are multiplied with."""
    inverse = fields.get("per_tensor_scale_inv")
    if inverse is None:
        return 1.0
    if inverse.numel() != 1 or not inverse.dtype.is_floating_point:
        raise ValueError(f"per_tensor_scale_inv must be one float, got {inverse.dtype} {list(inverse.shape)}")
    factor = float(inverse.float())
    if not 0 < factor < math.inf:
        raise ValueError(f"per_tensor_scale_inv must be finite and above 0, got {factor}")
    return factor


def _unpack(words: Tensor) -> Tensor:
    stored = words.contiguous().view(torch.uint8)
    nibbles = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1).view(torch.int8)
    # the sign bit of four is worth -8
    return (nibbles ^ 8) - 8


def _pack(codes_NK: Tensor) -> Tensor:
    stored = codes_NK.view(torch.uint8) & 15
    return (stored[:, ::2] | stored[:, 1::2] << 4).contiguous().view(torch.int32)


def load_post_rope(
    fields: Mapping[str, Tensor], num_heads: int, num_kv_heads: int, head_dim: int
) -> Tensor | None:
    """channel_GK in float32: queries are multiplied with it after RoPE, keys divided; None where there is none.

    `fields` are the attention module's tensors with suffixes of `POST_ROPE`.  The query's factors, where they are
    stored too, must be the inverse of the key's of their group.
    """
    named = {s.removeprefix("qkv_supply."): t for s, t in fields.items()}
    if len(named) != len(fields):
        raise ValueError(f"post-RoPE factors are stored twice: {', '.join(fields)}")
    key_GK = _factors(named, "post_k_smooth", num_kv_heads, head_dim)
    query_HK = _factors(named, "post_q_smooth", num_heads, head_dim)
    if key_GK is None:
        if query_HK is not None:
            raise ValueError("post_k_smooth is missing beside post_q_smooth")
        return None
    if query_HK is not None:
        product = query_HK.view(num_kv_heads, -1, head_dim) * key_GK[:, None]
        if float((product - 1).abs().max()) > INVERSE_TOLERANCE:
            raise ValueError(
                "post_q_smooth must be the inverse of post_k_smooth for every query head of its group, "
                f"their product is {float(product.min()):.3g} to {float(product.max()):.3g}"
            )
    return key_GK.reciprocal()


def _factors(fields: Mapping[str, Tensor], name: str, heads: int, head_dim: int) -> Tensor | None:
    """float32 [heads, head_dim], 1 where no index points; an index may come twice with one factor."""
    parts = [fields.get(f"{name}.{what}") for what in ("smooth", "top_k_indices")]
    if parts == [None, None]:
        return None
    factor, index = parts
    if factor is None or index is None:
        raise ValueError(f"{name} needs smooth and top_k_indices")
    if factor.shape != index.shape or factor.ndim != 1 or index.is_floating_point():
        raise ValueError(
            f"{name} must hold as many factors as indices, got {list(factor.shape)}, {index.dtype} {list(index.shape)}"
        )
    size, index, factor = heads * head_dim, index.long(), factor.float()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(
            f"{name}.top_k_indices must be in [0, {size}), got {int(index.min())} to {int(index.max())}"
        )
    if not bool((torch.isfinite(factor) & (factor > 0)).all()):
        raise ValueError(f"{name}.smooth must be finite and above 0")
    out = torch.ones(size).index_put_((index,), factor)
    if not torch.equal(out[index], factor):
        raise ValueError(f"{name} has two factors for one channel")
    return out.view(heads, head_dim)


def save(weight: QuantWeight, factor: float | None = None) -> dict[str, Tensor]:
    """The tensors of one layer by suffix; its bias is to be stored times 1 / per_tensor_scale_inv.

    `factor` is the power of two of the matrix; None takes the largest at which the scales are e4m3 and the products
    with the codes too.  ValueError where there is none: scales must be e4m3 numbers times a power of two.
    """
    scheme = weight.scheme
    if scheme != SCHEME or weight.order_K is not None:
        raise ValueError(f"FireQ holds symmetric 4-bit groups of {GROUP} for fp8 rows, got {scheme}")
    scale_NQ = weight.scale_NQ
    most = float(scale_NQ.max())
    if factor is None:
        # 8 * scale <= 448 keeps the products in e4m3; a scale alone may be 8 times that
        top = math.floor(math.log2(E4M3_MAX / most)) if most > 0 else 0
        choices = [2.0**i for i in (top - 3, top - 2, top - 1, top)]
    else:
        choices = [factor]
    for p in choices:
        stored = (scale_NQ * p).clamp(max=E4M3_MAX).to(FP8)
        if torch.equal(stored.float() / p, scale_NQ):
            inverse = torch.tensor([1 / p], dtype=torch.bfloat16)
            if float(inverse) * p != 1:
                raise ValueError(f"the factor must be a power of two, got {p}")
            fields = {"weight": _pack(weight.codes_NK), "weight_scale": stored}
            return fields | {"per_tensor_scale_inv": inverse}
    raise ValueError(
        f"scales are not e4m3 numbers times a power of two (tried 1 / {', 1 / '.join(f'{p:g}' for p in choices)})"
    )


def rounded_products(weight: QuantWeight) -> QuantWeight:
    """What FireQ's own kernels multiply: code * scale rounded to e4m3, as an fp8 weight under one scale of the matrix.

    8 bits a weight; the kernels here multiply the codes themselves, which rounds once less.  Rounding does not depend
    on the power of two, so the largest is taken.  ValueError where `weight` is none that FireQ holds, or where 8 of its
    largest scale are no e4m3.  Source: arXiv 2505.20839, section 3, the variant with e4m3 scales.
    """
    fields = save(weight)
    codes_NK = fireq_products(weight.codes_NK, fields["weight_scale"])
    scale_N1 = fields["per_tensor_scale_inv"].float().expand(len(codes_NK), 1).contiguous()
    return QuantWeight(Scheme(8, activations=FP8_ROWS, values="fp8"), codes_NK, scale_N1).check()


def save_post_rope(channel_GK: Tensor, num_heads: int) -> dict[str, Tensor]:
    """The tensors beside an attention module for what `load_post_rope` returns: channels whose factor is not 1.

    Every head lists as many channels as the one with the most; factors are rounded to bf16, as FireQ stores them.
    """
    G, head_dim = channel_GK.shape
    moved_GK = channel_GK != 1
    count = int(moved_GK.sum(1).max())
    index_GI = moved_GK.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    factor_GI = channel_GK.gather(1, index_GI)
    fields = {}
    for side, heads, factor in (("k", G, factor_GI.reciprocal()), ("q", num_heads, factor_GI)):
        start = (torch.arange(heads) * head_dim)[:, None]
        index = (index_GI.repeat_interleave(heads // G, 0) + start).flatten()
        fields[f"qkv_supply.post_{side}_smooth.smooth"] = (
            factor.repeat_interleave(heads // G, 0).flatten().bfloat16()
        )
        fields[f"qkv_supply.post_{side}_smooth.top_k_indices"] = index.int()
    return fields
