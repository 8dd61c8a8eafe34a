"""Where the keys and values of a block lie in the pool: one block = P tokens of one layer, all KV heads, contiguous.

A head's part is K codes | V codes | scales | zeros (int4z), every part a multiple of 16 bytes.  16 and 32 bit: K and V
are [P, K].  8 bit: K is [P, K], V [K, P] (int8: stored + 128).  4 bit: K is [P, K/2], byte d = dim d | dim d + K/2 << 4;
V is [K, P/2], byte t = token t | token t + P/2 << 4.
Scales are [P] int32: the key's fp16 scale in the low half, the value's in the high half; zeros (fp16 too) likewise.

x = code * scale, symmetric codes: int8 -127..127, int4 -7..7 stored + 8, fp8 = e4m3.  int4z: x = code * scale + zero,
codes 0..15.  Numbers only, no torch: the agent plans pools with it.
"""

from dataclasses import dataclass

SLOT_BITS = 12  # block id = set << SLOT_BITS | slot
SLOT_MASK = (1 << SLOT_BITS) - 1
FLOAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CODE_BITS = {"fp8": 8, "int8": 8, "int4": 4, "int4z": 4}
QMAX = {"fp8": 448, "int8": 127, "int4": 7, "int4z": 15}  # largest code
BIAS = {"int8": 128, "int4": 8, "int4z": 0}  # stored value = code + bias; of int8 only V's
KV_FORMATS = (*FLOAT_BYTES, *CODE_BITS)
# what the decode kernel takes in a turn; with 32 tokens of 4 bit its softmax costs a sixth more instructions a byte
DEFAULT_BLOCK_TOKENS = dict.fromkeys(KV_FORMATS, 32) | {"fp32": 16, "int4": 64, "int4z": 64}
MAX_BLOCK_TOKENS = 256  # decode pieces are whole blocks
SPLIT_TOKENS = 512  # keys of a piece in a deterministic step
# of keys and values of one layer in 16 bit that prefill may have dequantized: 64k tokens of Llama-3-8B
SCRATCH_BYTES = 256 << 20
MIN_SCALE, MAX_SCALE = 2.0**-24, 65504.0  # what fp16 can hold, and never 0: codes are x / scale


def wide_tokens(head_dim: int, heads_per_kv: int) -> int:
    """Tokens of a sequence in one work item of the decode kernel; their (token, head) pairs are its columns.

    Accumulators of 64 columns fill the registers up to 128 dims.
    """
    return max(1, (64 if head_dim <= 128 else 32) // heads_per_kv)


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
        least = self.least_block_tokens
        if not least <= self.block_tokens <= MAX_BLOCK_TOKENS or self.block_tokens & (self.block_tokens - 1):
            raise ValueError(
                f"block_tokens={self.block_tokens}: {self.fmt} needs a power of two from {least} to {MAX_BLOCK_TOKENS}"
            )

    @property
    def quantized(self) -> bool:
        return self.fmt in CODE_BITS

    @property
    def bits(self) -> int:
        """Of one element of a key or value."""
        return CODE_BITS[self.fmt] if self.quantized else 8 * FLOAT_BYTES[self.fmt]

    @property
    def least_block_tokens(self) -> int:
        """4 bit dots run over P/2 tokens, and tensor cores want 16."""
        return 32 if self.bits == 4 else 16

    @property
    def row_bytes(self) -> int:
        """Bytes of the key of one token and head."""
        return self.head_dim * self.bits // 8

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
    def zero_bytes(self) -> int:
        return self.scale_bytes if self.fmt == "int4z" else 0

    @property
    def head_bytes(self) -> int:
        return self.key_bytes + self.value_bytes + self.scale_bytes + self.zero_bytes

    @property
    def block_bytes(self) -> int:
        return self.head_bytes * self.num_kv_heads

    def with_format(self, fmt: str) -> "KvLayout":
        """Of as many heads, dims and tokens a block, in another format."""
        return KvLayout(fmt, self.num_kv_heads, self.head_dim, self.block_tokens)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)
