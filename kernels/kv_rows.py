"""The CPU's plan of a step: for every layer, where to gather key and value parts from and where to write tokens to.

torch on a CPU gathers rows at memory speed from an overlapping view whose row stride is one word, so an address is just
an index.  All layers' indices are computed here at once, in numpy, so that a layer only picks its line.
Decodes are sorted by length and cut into groups: little padding inside a group, and a group's keys fit in the cache.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.kv_layout import SLOT_BITS, SLOT_MASK, KvLayout

# fp32 bytes of the keys of a group (L2 is 1-2 MB a core): 32 sequences of 288 tokens in one piece cost 15 % more than in groups of 4
GROUP_KEY_BYTES = 1 << 20
# sequences share a group while the longest has at most this many times the blocks of the shortest
GROUP_STRETCH = 1.5


class Spans(NamedTuple):
    """Host arrays of a step: sequence b has new tokens [start, start + count) in rows [row, row + count)."""

    start_B: np.ndarray
    count_B: np.ndarray
    row_B: np.ndarray
    block_BN: np.ndarray
    num_decodes: int

    @property
    def end_B(self) -> np.ndarray:
        return self.start_B + self.count_B


class WriteRows(NamedTuple):
    """Indices of the new tokens' places, [L, rows]: rows in order (token, k/v, head), or (token, head) if quantized."""

    word: int  # bytes of the words that key rows (and value rows of 16 and 32 bit) are written in
    key_LX: Tensor
    value_LX: Tensor  # 8 and 4 bit: byte address of a token's first value code
    scale_LX: Tensor  # its zero lies P words further
    half_X: (
        tuple[Tensor, Tensor] | None
    )  # 4 bit: rows (token, head) whose values go to low and to high nibbles


class DecodeGroup(NamedTuple):
    """Decodes `first .. first + size` of the sorted ones, padded to `num_blocks` blocks."""

    first: int
    size: int
    num_blocks: int
    head_LX: Tensor  # [L, size * G * num_blocks] word address of a head's part of a block
    past_BT: Tensor  # lanes past the length
    clean: int  # lanes before this one are inside the length for the whole group
    tail_X: Tensor  # flat (sequence, head, lane) indices of all lanes past the length


class Chunk(NamedTuple):
    row: int
    count: int
    start: int
    head_LX: Tensor


class CpuRows(NamedTuple):
    write: WriteRows
    order_B: Tensor | None  # None: the decodes are taken as they come
    back_B: Tensor | None
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]


def plan_rows(layout: KvLayout, slab_table_SL: np.ndarray, spans: Spans, deterministic: bool) -> CpuRows:
    write = _write_rows(layout, slab_table_SL, spans)
    num_decodes = 0 if deterministic else spans.num_decodes
    blocks_B = -(-spans.end_B // layout.block_tokens)
    order, groups = _group_decodes(layout, slab_table_SL, spans, blocks_B, num_decodes)
    chunks = []
    for b in range(num_decodes, len(blocks_B)):
        head_LX = _head_words(layout, slab_table_SL, spans.block_BN[b : b + 1, : blocks_B[b]])
        chunks.append(Chunk(int(spans.row_B[b]), int(spans.count_B[b]), int(spans.start_B[b]), head_LX))
    if order is None:
        return CpuRows(write, None, None, groups, tuple(chunks))
    return CpuRows(write, torch.from_numpy(order), torch.from_numpy(np.argsort(order)), groups, tuple(chunks))


def _head_bytes(layout: KvLayout, slab_table_SL: np.ndarray, block_X: np.ndarray) -> np.ndarray:
    """Byte address of each block of `block_X` in each layer, [L, *block_X.shape]."""
    slab_XL = slab_table_SL[block_X >> SLOT_BITS]
    return np.moveaxis(slab_XL, -1, 0) + (block_X & SLOT_MASK) * layout.block_bytes


def _head_words(layout: KvLayout, slab_table_SL: np.ndarray, block_BN: np.ndarray) -> Tensor:
    """Address of every head's part, in 8-byte words, [L, B * G * N] in (sequence, head, block) order."""
    at_LBN = _head_bytes(layout, slab_table_SL, block_BN)
    head_G = np.arange(layout.num_kv_heads) * layout.head_bytes
    at_LBGN = at_LBN[:, :, None, :] + head_G[:, None]
    return torch.from_numpy((at_LBGN >> 3).reshape(len(at_LBGN), -1))


def _write_rows(layout: KvLayout, slab_table_SL: np.ndarray, spans: Spans) -> WriteRows:
    P, start_T = layout.block_tokens, np.repeat(spans.start_B - spans.row_B, spans.count_B)
    pos_T = start_T + np.arange(len(start_T))
    seq_T = np.repeat(np.arange(len(spans.start_B)), spans.count_B)
    at_LT = _head_bytes(layout, slab_table_SL, spans.block_BN[seq_T, pos_T // P])
    lane_T1 = (pos_T % P)[:, None]
    at_LTG = at_LT[:, :, None] + np.arange(layout.num_kv_heads) * layout.head_bytes
    word = math.gcd(layout.row_bytes, 8)
    key_LTG = at_LTG + lane_T1 * layout.row_bytes
    value_LTG = at_LTG + layout.key_bytes

    def flat(at: np.ndarray, unit: int) -> Tensor:
        return torch.from_numpy((at // unit).reshape(len(at), -1))

    if not layout.quantized:
        both_LT2G = np.stack((key_LTG, key_LTG + layout.key_bytes), axis=2)
        rows = flat(both_LT2G, word)
        return WriteRows(word, rows, rows, rows, None)
    scales = flat(value_LTG + layout.value_bytes + lane_T1 * 4, 4)
    if layout.bits == 8:
        return WriteRows(word, flat(key_LTG, word), flat(value_LTG + lane_T1, 1), scales, None)
    high_TG = np.broadcast_to(lane_T1 >= P // 2, (len(pos_T), layout.num_kv_heads)).reshape(-1)
    halves = (torch.from_numpy(np.flatnonzero(~high_TG)), torch.from_numpy(np.flatnonzero(high_TG)))
    return WriteRows(word, flat(key_LTG, word), flat(value_LTG + lane_T1 % (P // 2), 1), scales, halves)


def _group_decodes(
    layout: KvLayout, slab_table_SL: np.ndarray, spans: Spans, blocks_B: np.ndarray, num_decodes: int
) -> tuple[np.ndarray | None, tuple[DecodeGroup, ...]]:
    order = None
    if num_decodes and blocks_B[:num_decodes].max() > GROUP_STRETCH * blocks_B[:num_decodes].mean():
        order = np.argsort(blocks_B[:num_decodes], kind="stable")
    order_B = np.arange(num_decodes) if order is None else order
    token_bytes = 4 * layout.num_kv_heads * layout.head_dim * layout.block_tokens
    budget = max(1, GROUP_KEY_BYTES * torch.get_num_threads() // token_bytes)
    groups, first = [], 0
    while first < num_decodes:
        sorted_N = blocks_B[order_B[first:]].tolist()
        size, least, most = 0, sorted_N[0], 0
        for blocks in sorted_N:
            least, longest = min(least, blocks), max(most, blocks)
            if size and (
                (size + 1) * longest > budget or (order is not None and longest > GROUP_STRETCH * least + 1)
            ):
                break
            size, most = size + 1, longest
        groups.append(_decode_group(layout, slab_table_SL, spans, first, order_B[first : first + size]))
        first += size
    return order, tuple(groups)


def _decode_group(
    layout: KvLayout, slab_table_SL: np.ndarray, spans: Spans, first: int, seqs: np.ndarray
) -> DecodeGroup:
    P, G, end_B = layout.block_tokens, layout.num_kv_heads, spans.end_B[seqs]
    blocks_B = -(-end_B // P)
    N = int(blocks_B.max())
    # past its end a sequence reads its first block again: an address that exists, masked below
    block_BN = np.where(np.arange(N) < blocks_B[:, None], spans.block_BN[seqs, :N], spans.block_BN[seqs, :1])
    past_BT = np.arange(N * P) >= end_B[:, None]
    past_BGT = np.broadcast_to(past_BT[:, None, :], (len(seqs), G, N * P))
    return DecodeGroup(
        first,
        len(seqs),
        N,
        _head_words(layout, slab_table_SL, block_BN),
        torch.from_numpy(past_BT),
        int(end_B.min()),
        torch.from_numpy(np.flatnonzero(past_BGT)),
    )
