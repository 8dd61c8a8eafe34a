"""Where the keys and values of a block lie in the pool: one block = P tokens of one layer, all KV heads, contiguous.

A head's part is K codes | V codes | scales, every part a multiple of 16 bytes:
- K is [P, K] row-major; int4 packs dim d in the low and dim d + K/2 in the high nibble of byte d.
- V is [P, K] for 16 and 32 bit, [K, P] for int8, and [K, P/2] for int4: token t low, token t + P/2 high.
- scales (int8, int4) are [P] int32: the key's fp16 scale in the low half, the value's in the high half.

Codes are symmetric: int8 in -127..127, int4 in -7..7 stored as code + 8.  This file knows no tensor of the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SLOT_BITS = 12  # block id = set << SLOT_BITS | slot
SLOT_MASK = (1 << SLOT_BITS) - 1
FLOAT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QMAX = {"int8": 127, "int4": 7}
KV_FORMATS = (*FLOAT_DTYPES, *QMAX)
DEFAULT_BLOCK_TOKENS = {"fp32": 16, "bf16": 32, "fp16": 32, "int8": 32, "int4": 32}
MIN_SCALE, MAX_SCALE = 2.0**-24, 65504.0  # what fp16 can hold, and never 0: codes are x / scale


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Block geometry of one model.  `block_tokens` 0 takes the format's default."""

    fmt: str
    num_kv_heads: int
    head_dim: int
    block_tokens: int = 0

    def __post_init__(self) -> None:
        if self.fmt not in KV_FORMATS:
            raise ValueError(f"kv format {self.fmt!r} is unknown: choose one of {', '.join(KV_FORMATS)}")
        if self.num_kv_heads < 1 or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}: need >= 1 and an even number")
        if not self.block_tokens:
            object.__setattr__(self, "block_tokens", DEFAULT_BLOCK_TOKENS[self.fmt])
        least = 32 if self.fmt == "int4" else 16  # int4 dots run over P/2 tokens, and tensor cores want 16
        if self.block_tokens < least or self.block_tokens & (self.block_tokens - 1):
            raise ValueError(f"block_tokens={self.block_tokens}: a power of two >= {least} is needed for {self.fmt}")

    @property
    def quantized(self) -> bool:
        return self.fmt in QMAX

    @property
    def row_bytes(self) -> int:
        """Bytes of the key of one token and head."""
        if self.quantized:
            return self.head_dim if self.fmt == "int8" else self.head_dim // 2
        return self.head_dim * FLOAT_DTYPES[self.fmt].itemsize

    @property
    def key_bytes(self) -> int:
        return self.row_bytes * self.block_tokens

    @property
    def value_bytes(self) -> int:
        return self.key_bytes

    @property
    def scale_bytes(self) -> int:
        return 4 * self.block_tokens if self.quantized else 0

    @property
    def head_bytes(self) -> int:
        return self.key_bytes + self.value_bytes + self.scale_bytes

    @property
    def block_bytes(self) -> int:
        return self.head_bytes * self.num_kv_heads

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)


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
