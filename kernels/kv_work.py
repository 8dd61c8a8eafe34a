"""The GPU's plan of a step: small int32 tables that the Triton kernels walk, packed on the host and copied at once.

Decode work is cut into pieces of SPLIT_TOKENS keys, whatever the batch: a row's result cannot depend on its neighbours.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.kv_layout import KvLayout
from kernels.kv_rows import Spans
from kernels.launch import upload

SPLIT_TOKENS = 512
# int32 in 16 bytes: Triton compiles a kernel anew for a pointer that is not aligned to that, which would be a stall
ALIGN = 4
CHUNK_TOKENS = 64  # tokens of a chunk item; the prefill kernel cuts it further to fit its tile


class GpuWork(NamedTuple):
    """Device tables; an item is a line."""

    block_BN: Tensor
    pos_T: Tensor
    touch_X4: (
        Tensor  # (block id, first lane, lanes, first row): blocks written to, one program a block and head
    )
    piece_X4: Tensor  # (sequence, row, first key, end of keys): decode pieces
    merge_X3: Tensor  # (row, first piece, pieces)
    chunk_X4: Tensor  # (sequence, first row, rows, first position)


def plan_work(layout: KvLayout, spans: Spans, device: torch.device, deterministic: bool) -> GpuWork:
    """`deterministic`: every token is a decode of its own, so no chunk can matter."""
    seq_T = np.repeat(np.arange(len(spans.count_B)), spans.count_B)
    row_T = np.arange(len(seq_T))
    pos_T = row_T + (spans.start_B - spans.row_B)[seq_T]
    num_rows = len(row_T) if deterministic else spans.num_decodes
    piece_X4, merge_X3 = _pieces(seq_T[:num_rows], row_T[:num_rows], pos_T[:num_rows] + 1)
    chunk_X4 = np.zeros((0, 4), np.int64) if deterministic else _chunks(spans)
    tables = (spans.block_BN, pos_T, _touches(layout, spans), piece_X4, merge_X3, chunk_X4)
    sizes = [-(-t.size // ALIGN) * ALIGN for t in tables]
    packed = np.zeros(sum(sizes), np.int32)
    for t, at in zip(tables, np.cumsum(sizes) - sizes, strict=True):
        packed[at : at + t.size] = t.reshape(-1)
    parts = upload(torch.from_numpy(packed), device).split(sizes)
    return GpuWork(*(part[: t.size].view(t.shape) for part, t in zip(parts, tables, strict=True)))


def _pieces(seq_X: np.ndarray, row_X: np.ndarray, end_X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count_X = -(-end_X // SPLIT_TOKENS)
    first_X = np.cumsum(count_X) - count_X
    of = np.repeat(np.arange(len(seq_X)), count_X)
    low = (np.arange(len(of)) - first_X[of]) * SPLIT_TOKENS
    pieces = np.stack((seq_X[of], row_X[of], low, np.minimum(low + SPLIT_TOKENS, end_X[of])), axis=1)
    return pieces, np.stack((row_X, first_X, count_X), axis=1)


def _chunks(spans: Spans) -> np.ndarray:
    seqs = np.arange(spans.num_decodes, len(spans.count_B))
    tiles_B = -(-spans.count_B[seqs] // CHUNK_TOKENS)
    of = np.repeat(np.arange(len(seqs)), tiles_B)
    skip = (np.arange(len(of)) - (np.cumsum(tiles_B) - tiles_B)[of]) * CHUNK_TOKENS
    b = seqs[of]
    rows = np.minimum(CHUNK_TOKENS, spans.count_B[b] - skip)
    return np.stack((b, spans.row_B[b] + skip, rows, spans.start_B[b] + skip), axis=1)


def _touches(layout: KvLayout, spans: Spans) -> np.ndarray:
    P = layout.block_tokens
    low_B, high_B = spans.start_B // P, (spans.end_B - 1) // P
    of = np.repeat(np.arange(len(low_B)), high_B - low_B + 1)
    blocks_B = high_B - low_B + 1
    index = low_B[of] + np.arange(len(of)) - (np.cumsum(blocks_B) - blocks_B)[of]
    begin = np.maximum(spans.start_B[of], index * P)
    end = np.minimum(spans.end_B[of], (index + 1) * P)
    row = spans.row_B[of] + begin - spans.start_B[of]
    return np.stack((spans.block_BN[of, index], begin - index * P, end - begin, row), axis=1)
