"""Keys and values of a pool as tensors: the inverse of what `rope_kv_write` stores.

For references, tests and debugging; the layout itself is `kv_layout`'s.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.kv_layout import BIAS, SLOT_BITS, SLOT_MASK, KvLayout

FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StoredKv(NamedTuple):
    """What blocks hold, X = N * P tokens: codes in the format's type (int8 and 4 bit as int8, without any bias), fp16
    scales and zeros, or None where the format has none."""

    key_XGK: Tensor
    value_XGK: Tensor
    key_scale_XG: Tensor | None = None
    value_scale_XG: Tensor | None = None
    key_zero_XG: Tensor | None = None
    value_zero_XG: Tensor | None = None


def read_stored(
    pool: Tensor, layout: KvLayout, slab_table_SL: Tensor, block_ids: list[int], layer: int
) -> StoredKv:
    """On the host, one block at a time.  Lanes that nobody wrote hold whatever the pool holds."""
    blocks = []
    for block in block_ids:
        at = int(slab_table_SL[block >> SLOT_BITS, layer]) + (block & SLOT_MASK) * layout.block_bytes
        blocks.append(_read_block(pool[at : at + layout.block_bytes].cpu(), layout))
    return StoredKv(*(None if p[0] is None else torch.cat(p) for p in zip(*blocks, strict=True)))


def _read_block(block: Tensor, lay: KvLayout) -> StoredKv:
    P = lay.block_tokens
    k, v, scales, zeros = (
        part.clone()
        for part in block.view(lay.num_kv_heads, lay.head_bytes).split(
            [lay.key_bytes, lay.value_bytes, lay.scale_bytes, lay.zero_bytes], dim=1
        )
    )
    key_GPK, value_GPK = _codes(k, v, lay)
    pairs: list[Tensor | None] = [None] * 4
    if lay.quantized:
        pairs[:2] = scales.view(torch.float16).view(-1, P, 2).transpose(0, 1).unbind(-1)
    if lay.zero_bytes:
        pairs[2:] = zeros.view(torch.float16).view(-1, P, 2).transpose(0, 1).unbind(-1)
    return StoredKv(key_GPK.transpose(0, 1), value_GPK.transpose(0, 1), *pairs)


def _codes(k: Tensor, v: Tensor, lay: KvLayout) -> tuple[Tensor, Tensor]:
    """[G, P, K] each, of the bytes of all heads."""
    P, K = lay.block_tokens, lay.head_dim
    if not lay.quantized:
        dtype = FLOAT_DTYPES[lay.fmt]
        return k.view(dtype).view(-1, P, K), v.view(dtype).view(-1, P, K)
    if lay.fmt == "fp8":
        return k.view(torch.float8_e4m3fn).view(-1, P, K), v.view(torch.float8_e4m3fn).view(-1, K, P).mT
    if lay.fmt == "int8":
        return k.view(torch.int8).view(-1, P, K), (v ^ 128).view(torch.int8).view(-1, K, P).mT
    k, v, bias = k.view(-1, P, K // 2), v.view(-1, K, P // 2), BIAS[lay.fmt]
    key_GPK = torch.cat([k & 15, k >> 4], dim=2).view(torch.int8) - bias
    return key_GPK, (torch.cat([v & 15, v >> 4], dim=2).view(torch.int8) - bias).mT


def read_kv(
    pool: Tensor, layout: KvLayout, slab_table_SL: Tensor, block_ids: list[int], layer: int
) -> tuple[Tensor, Tensor]:
    """Keys and values dequantized to fp32: two [N * P, G, K]."""
    stored = read_stored(pool, layout, slab_table_SL, block_ids, layer)
    return (
        _dequantized(stored.key_XGK, stored.key_scale_XG, stored.key_zero_XG),
        _dequantized(stored.value_XGK, stored.value_scale_XG, stored.value_zero_XG),
    )


def _dequantized(code_XGK: Tensor, scale_XG: Tensor | None, zero_XG: Tensor | None) -> Tensor:
    x = code_XGK.float()
    if scale_XG is not None:
        x = x * scale_XG[..., None].float()
    return x if zero_XG is None else x + zero_XG[..., None].float()
