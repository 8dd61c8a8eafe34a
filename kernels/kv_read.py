"""Keys and values of a pool as tensors: the inverse of what `rope_kv_write` stores.

For references, tests and debugging; the layout itself is `kv_layout`'s.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.kv_layout import SLOT_BITS, SLOT_MASK, KvLayout

FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StoredKv(NamedTuple):
    """What blocks hold, X = N * P tokens: codes in the format's type (int4 unpacked to int8), fp16 scales or None."""

    key_XGK: Tensor
    value_XGK: Tensor
    key_scale_XG: Tensor | None
    value_scale_XG: Tensor | None


def read_stored(
    pool: Tensor, layout: KvLayout, slab_table_SL: Tensor, block_ids: list[int], layer: int
) -> StoredKv:
    """On the host, one block at a time.  Lanes that nobody wrote hold whatever the pool holds."""
    blocks = []
    for block in block_ids:
        at = int(slab_table_SL[block >> SLOT_BITS, layer]) + (block & SLOT_MASK) * layout.block_bytes
        blocks.append(_read_block(pool[at : at + layout.block_bytes].cpu(), layout))
    if layout.quantized:
        return StoredKv(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
    key, value = (torch.cat(parts) for parts in list(zip(*blocks, strict=True))[:2])
    return StoredKv(key, value, None, None)


def _read_block(block: Tensor, lay: KvLayout) -> StoredKv:
    P, K = lay.block_tokens, lay.head_dim
    parts = block.view(lay.num_kv_heads, lay.head_bytes).split(
        [lay.key_bytes, lay.value_bytes, lay.scale_bytes], dim=1
    )
    k, v, scales = (part.clone() for part in parts)
    if not lay.quantized:
        dtype = FLOAT_DTYPES[lay.fmt]
        k_GPK, v_GPK = k.view(dtype).view(-1, P, K), v.view(dtype).view(-1, P, K)
        return StoredKv(k_GPK.transpose(0, 1), v_GPK.transpose(0, 1), None, None)
    if lay.fmt == "int8":
        k_GPK, v_GPK = k.view(torch.int8).view(-1, P, K), v.view(torch.int8).view(-1, K, P).mT
    else:
        k, v = k.view(-1, P, K // 2), v.view(-1, K, P // 2)
        k_GPK = torch.cat([k & 15, k >> 4], dim=2).view(torch.int8) - 8
        v_GPK = (torch.cat([v & 15, v >> 4], dim=2).view(torch.int8) - 8).mT
    s_PG2 = scales.view(torch.float16).view(-1, P, 2).transpose(0, 1)
    return StoredKv(k_GPK.transpose(0, 1), v_GPK.transpose(0, 1), s_PG2[..., 0], s_PG2[..., 1])


def read_kv(
    pool: Tensor, layout: KvLayout, slab_table_SL: Tensor, block_ids: list[int], layer: int
) -> tuple[Tensor, Tensor]:
    """Keys and values dequantized to fp32: two [N * P, G, K]."""
    stored = read_stored(pool, layout, slab_table_SL, block_ids, layer)
    key, value = stored.key_XGK.float(), stored.value_XGK.float()
    if stored.key_scale_XG is None or stored.value_scale_XG is None:
        return key, value
    return key * stored.key_scale_XG[..., None].float(), value * stored.value_scale_XG[..., None].float()
