"""The constant scales of a layer's keys and values: x = code * scale, after the rotation; one of the layer or one a head.

Scales of queries and of probabilities are read and dropped: queries are quantized by their own values at run time,
probabilities never.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from quant.formats.kv_scheme import (
    DROPPED,
    KEY,
    PAIR,
    SUFFIXES,
    VALUE,
    WHY_DROPPED,
    ZEROS,
    KvScheme,
    declared,
    scheme_args,
)

__all__ = [
    "DROPPED",
    "SUFFIXES",
    "WHY_DROPPED",
    "KvLayerScales",
    "KvScheme",
    "declared",
    "load",
    "scheme_args",
]


# fp16 rounds by 2^-11 above 2^-14 and by more below; a scale that is off by 2^-8 costs what bf16 scales cost
MAX_ROUNDING = 2.0**-8
MIN_SCALE, MAX_SCALE = 2.0**-17, 65504.0


class KvLayerScales(NamedTuple):
    """float32, one a KV head, equal where the file has one for the layer."""

    k_G: Tensor
    v_G: Tensor


def load(
    layer: str, fields: Mapping[str, Tensor], num_kv_heads: int, fmt: str = "fp8", plain: str = "auto"
) -> KvLayerScales:
    """The constant scales of one layer from its tensors by suffix, some of SUFFIXES.

    ValueError naming the layer where a scale is missing, not positive and finite, none that the cache can keep, or of
    another shape.  `plain` is the kv_dtype without quantization that the message proposes.
    """
    for suffix in ZEROS:
        if suffix in fields and bool(fields[suffix].float().any()):
            raise ValueError(f"{layer}.{suffix} must be 0: a KV cache with constant scales is symmetric")
    if (pair := fields.get(PAIR)) is not None:
        if pair.shape != (2,):
            raise ValueError(f"{layer}.{PAIR} must be 2 floats, got {pair.dtype} {list(pair.shape)}")
        fields = {KEY[0]: pair[0], VALUE[0]: pair[1]}
    instead = f"set kv_dtype to {fmt} for scales made at run time, or to {plain} for no quantization"
    k_G, v_G = (_scale(layer, fields, names, num_kv_heads, fmt, instead) for names in (KEY, VALUE))
    return KvLayerScales(k_G, v_G)


def _scale(
    layer: str,
    fields: Mapping[str, Tensor],
    names: tuple[str, ...],
    num_kv_heads: int,
    fmt: str,
    instead: str,
) -> Tensor:
    suffix = next((name for name in names if name in fields), None)
    if suffix is None:
        raise ValueError(
            f"{layer}.{names[0]} is missing, though the checkpoint declares a static {fmt} KV cache: {instead}"
        )
    value = fields[suffix]
    if not value.dtype.is_floating_point or value.numel() not in (1, num_kv_heads):
        raise ValueError(
            f"{layer}.{suffix} must be 1 or {num_kv_heads} floats, got {value.dtype} {list(value.shape)}"
        )
    scale_G = value.float().flatten()
    if not bool(torch.isfinite(scale_G).all()) or not bool((scale_G > 0).all()):
        raise ValueError(f"{layer}.{suffix} must be finite and above 0, got {scale_G.tolist()!s:.120}")
    rounded_by = float((scale_G.half().float() / scale_G - 1).abs().max())
    if not rounded_by <= MAX_ROUNDING:
        raise ValueError(
            f"{layer}.{suffix} must be {MIN_SCALE:.1g} to {MAX_SCALE:g}, since the cache keeps scales in fp16, "
            f"got {scale_G.tolist()!s:.120}: {instead}"
        )
    return scale_G.expand(num_kv_heads).contiguous()
