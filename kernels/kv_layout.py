"""Where the keys and values of a block lie in the pool: one block = P tokens of one layer, all KV heads, contiguous.

A head's part is K codes | V codes | scales, every part a multiple of 16 bytes:
- K is [P, K] row-major; int4 packs dim d in the low and dim d + K/2 in the high nibble of byte d.
- V is [P, K] for 16 and 32 bit, [K, P] for int8, and [K, P/2] for int4: token t low, token t + P/2 high.
- scales (int8, int4) are [P] int32: the key's fp16 scale in the low half, the value's in the high half.

Codes are symmetric: int8 in -127..127, int4 in -7..7 stored as code + 8.  Numbers only, no torch: the agent plans pools
with it.
"""

from dataclasses import dataclass

SLOT_BITS = 12  # block id = set << SLOT_BITS | slot
SLOT_MASK = (1 << SLOT_BITS) - 1
FLOAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
QMAX = {"int8": 127, "int4": 7}
KV_FORMATS = (*FLOAT_BYTES, *QMAX)
DEFAULT_BLOCK_TOKENS = {"fp32": 16, "bf16": 32, "fp16": 32, "int8": 32, "int4": 32}
MAX_BLOCK_TOKENS = 256  # decode pieces are whole blocks
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
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}: need >= 1 and an even number"
            )
        if not self.block_tokens:
            object.__setattr__(self, "block_tokens", DEFAULT_BLOCK_TOKENS[self.fmt])
        least = 32 if self.fmt == "int4" else 16  # int4 dots run over P/2 tokens, and tensor cores want 16
        if not least <= self.block_tokens <= MAX_BLOCK_TOKENS or self.block_tokens & (self.block_tokens - 1):
            raise ValueError(
                f"block_tokens={self.block_tokens}: {self.fmt} needs a power of two from {least} to {MAX_BLOCK_TOKENS}"
            )

    @property
    def quantized(self) -> bool:
        return self.fmt in QMAX

    @property
    def row_bytes(self) -> int:
        """Bytes of the key of one token and head."""
        if self.quantized:
            return self.head_dim if self.fmt == "int8" else self.head_dim // 2
        return self.head_dim * FLOAT_BYTES[self.fmt]

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
