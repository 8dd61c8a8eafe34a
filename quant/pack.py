"""Offset-binary packing of int4 and int8 codes into int32 words, along either dimension, with its inverse.

A row is a little-endian bit stream: element i of a row occupies bits [i b, (i+1) b), so for 4 bits nibble i & 7 of
word i >> 3.  The stored value is code + 2^(b-1): 8 means 0.  A row that does not fill its last word is padded with
zero bits.  Layout: compressed-tensors' `pack-quantized`; `dim` 1 packs inputs (weights), 0 outputs (zero points).
"""

import sys

import torch
from torch import Tensor

WORD_BITS = 32

# words are read as bytes, lowest first
assert sys.byteorder == "little", f"{sys.byteorder=} is not supported"


def num_words(count: int, bits: int) -> int:
    return -(-count * bits // WORD_BITS)


def pack(codes: Tensor, bits: int, dim: int = 1) -> Tensor:
    """int32 words of 2-d int8 `codes`, which must be in the range of `bits` (4 or 8)."""
    if dim == 0:
        return pack(codes.t(), bits).t().contiguous()
    rows, count = codes.shape
    stored = codes.new_zeros(rows, num_words(count, bits) * WORD_BITS // bits, dtype=torch.uint8)
    stored[:, :count] = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        stored = stored[:, ::2] | stored[:, 1::2] << 4
    return stored.view(torch.int32)


def unpack(words: Tensor, bits: int, count: int, dim: int = 1) -> Tensor:
    """int8 codes [rows, count] (dim 1) or [count, columns] (dim 0) of int32 `words`; the inverse of `pack`."""
    if dim == 0:
        return unpack(words.t(), bits, count).t().contiguous()
    assert words.shape[1] == num_words(count, bits), f"{words.shape=} cannot hold {count=} codes of {bits=}"
    stored = words.contiguous().view(torch.uint8)
    if bits == 4:
        stored = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)
    # adding half the range modulo 256 takes it away again: 8-bit codes wrap, 4-bit ones fit
    offset = 1 << (bits - 1)
    return (stored[:, :count] - offset).view(torch.int8)
