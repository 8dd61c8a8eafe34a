"""Keys and values of a pool as tensors: the inverse of what `rope_kv_write` stores.

For references, tests and debugging; the layout itself is `kv_layout`'s.
"""

import torch
from torch import Tensor

from kernels.kv_layout import SLOT_BITS, SLOT_MASK, KvLayout

FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def read_kv(
    pool: Tensor, layout: KvLayout, slab_table_SL: Tensor, block_ids: list[int], layer: int
) -> tuple[Tensor, Tensor]:
    """Keys and values as stored, dequantized to fp32: two [N * P, G, K].  For tests and debugging, one block at a time.

    Lanes that nobody wrote hold whatever the pool holds.
    """
    P, K, lay = layout.block_tokens, layout.head_dim, layout
    keys, values = [], []
    for block in block_ids:
        at = int(slab_table_SL[block >> SLOT_BITS, layer]) + (block & SLOT_MASK) * lay.block_bytes
        heads = pool[at : at + lay.block_bytes].cpu().view(lay.num_kv_heads, lay.head_bytes)
        k, v, scales = heads.split([lay.key_bytes, lay.value_bytes, lay.scale_bytes], dim=1)
        k, v = k.contiguous(), v.contiguous()
        if not lay.quantized:
            dtype = FLOAT_DTYPES[lay.fmt]
            keys.append(k.view(dtype).view(-1, P, K).float())
            values.append(v.view(dtype).view(-1, P, K).float())
            continue
        if lay.fmt == "int8":
            k_GPK, v_GPK = k.view(torch.int8).view(-1, P, K), v.view(torch.int8).view(-1, K, P).mT
        else:
            k, v = k.view(-1, P, K // 2).char(), v.view(-1, K, P // 2).char()
            k_GPK = torch.cat([k & 15, k >> 4 & 15], dim=2) - 8
            v_GPK = (torch.cat([v & 15, v >> 4 & 15], dim=2) - 8).mT
        s_GP2 = scales.contiguous().view(torch.float16).view(-1, P, 2).float()
        keys.append(k_GPK * s_GP2[:, :, :1])
        values.append(v_GPK * s_GP2[:, :, 1:])
    return torch.cat(keys, 1).transpose(0, 1).contiguous(), torch.cat(values, 1).transpose(0, 1).contiguous()
