"""The GPU's plan of a step: small int32 tables that the Triton kernels walk, packed on the host and copied at once.

Single tokens and short chunks go to the decode kernel in pieces of the keys; longer chunks are items of the prefill
kernel.  A deterministic step has single tokens only, in pieces of SPLIT_TOKENS keys whatever the batch, so that a row's
result cannot depend on its neighbours.  Otherwise pieces are as long as fills the GPU once.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.kv_layout import SCRATCH_BYTES, SPLIT_TOKENS, KvLayout, wide_tokens
from kernels.kv_rows import Spans
from kernels.launch import gpu_facts, upload

LEAST_SPLIT = 256  # a piece costs about ten blocks of keys besides its own
# int32 in 16 bytes: Triton compiles a kernel anew for a pointer that is not aligned to that, which would be a stall
ALIGN = 4
CHUNK_TOKENS = 256  # tokens of a chunk item; the prefill kernel cuts it further to fit its tile
# decode programs on an SM that the length of pieces is chosen for; counted from registers and shared memory at K = 128
PROGRAMS = {"fp32": 2, "bf16": 6, "fp16": 6, "fp8": 8, "int8": 8, "int4": 8, "int4z": 8}


class GpuWork(NamedTuple):
    """Device tables, an item a line; what the host must know to launch.

    Pieces, longest first: (sequence, first row, its position, rows, first key, end of keys, slot, pieces).  Row r of
    an item leaves its part in slot + r * pieces.
    """

    block_BN: Tensor
    pos_T: Tensor
    touch_X4: (
        Tensor  # (block id, first lane, lanes, first row): blocks written to, one program a block and head
    )
    piece_X8: Tensor  # of single tokens
    wide_X8: Tensor  # of short chunks
    merge_X3: Tensor  # (row, first slot, pieces): rows of several pieces come first
    chunk_X4: Tensor  # (sequence, first row, rows, first position)
    scratch_X2: Tensor  # quantized formats: (block id, valid lanes) of the chunks' blocks, in the order of the scratch
    scratch_BN: Tensor  # their numbers in the scratch
    count_X: Tensor  # lines of piece_X8, lines of wide_X8, rows of several pieces, all rows of pieces
    num_slots: int
    num_split: int  # rows of several pieces, or room for them
    wide_tokens: int  # most rows of an item of wide_X8


class Routing(NamedTuple):
    """How a step's rows are cut.  `heads_per_kv`: query heads of a KV head; `slots`: items that fill the GPU once.

    `scratch_blocks`: dequantized blocks of one layer that there is room for; chunks beyond it take the decode kernel.
    None: what SCRATCH_BYTES hold.
    """

    deterministic: bool
    slots: int
    heads_per_kv: int = 4
    scratch_blocks: int | None = None


def full_grid(layout: KvLayout, device: torch.device) -> int:
    """Work items (pieces times KV heads) that occupy all that this process may use of the GPU."""
    return gpu_facts(device).num_sms * PROGRAMS[layout.fmt]


class _Groups(NamedTuple):
    """Rows that share their work items: `count` rows from `row`, the last of which sees `end` keys."""

    seq_X: np.ndarray
    row_X: np.ndarray
    pos_X: np.ndarray
    count_X: np.ndarray

    @property
    def end_X(self) -> np.ndarray:
        return self.pos_X + self.count_X


def piece_tokens(end_X: np.ndarray, layout: KvLayout, slots: int) -> int:
    """Keys of a piece: the fewest, in whole blocks and from LEAST_SPLIT on, with no more items than slots.

    More rows than slots: the mean share of a slot, so that only sequences far longer than others are cut.
    """
    P, G = layout.block_tokens, layout.num_kv_heads
    least = -(-LEAST_SPLIT // P)
    if len(end_X) * G >= slots:
        return P * max(least, -(-int(end_X.sum()) * G // (slots * P)))
    low, high = least, max(least, -(-int(end_X.max(initial=1)) // P))
    while low < high:
        middle = (low + high) // 2
        if int((-(-end_X // (middle * P))).sum()) * G <= slots:
            high = middle
        else:
            low = middle + 1
    return P * low


def plan_tables(
    layout: KvLayout, spans: Spans, routing: Routing
) -> tuple[tuple[np.ndarray, ...], tuple[int, int, int]]:
    """The tables and the numbers of a GpuWork, on the host."""
    seq_T = np.repeat(np.arange(len(spans.count_B)), spans.count_B)
    row_T = np.arange(len(seq_T))
    pos_T = row_T + (spans.start_B - spans.row_B)[seq_T]
    num_rows = len(row_T) if routing.deterministic else spans.num_decodes
    single = _Groups(seq_T[:num_rows], row_T[:num_rows], pos_T[:num_rows], np.ones(num_rows, np.int64))
    wide, chunked = _route(layout, spans, routing)
    split = SPLIT_TOKENS
    if not routing.deterministic:
        split = piece_tokens(np.concatenate((single.end_X, wide.end_X)), layout, routing.slots)
    piece_X8, merge_X3, single_slots = _pieces(single, split, 0)
    wide_X8, wide_merge_X3, num_slots = _pieces(wide, split, single_slots)
    merge_X3 = np.concatenate((merge_X3, wide_merge_X3))
    merge_X3 = merge_X3[np.argsort(merge_X3[:, 2] == 1, kind="stable")]
    num_split = int((merge_X3[:, 2] > 1).sum())
    count_X = np.array([len(piece_X8), len(wide_X8), num_split, len(merge_X3)])
    touch_X4 = _touches(layout, spans)
    chunks = (chunk_items(spans, chunked), *scratch_tables(layout, spans, chunked))
    tables = (spans.block_BN, pos_T, touch_X4, piece_X8, wide_X8, merge_X3, *chunks, count_X)
    return tables, (num_slots, num_split, int(wide.count_X.max(initial=0)))


def plan_work(layout: KvLayout, spans: Spans, device: torch.device, routing: Routing) -> GpuWork:
    tables, numbers = plan_tables(layout, spans, routing)
    sizes = aligned_sizes([t.shape for t in tables])
    packed = np.zeros(sum(sizes), np.int32)
    for t, at in zip(tables, np.cumsum(sizes) - sizes, strict=True):
        packed[at : at + t.size] = t.reshape(-1)
    return split_tables(upload(torch.from_numpy(packed), device), [t.shape for t in tables], numbers)


def aligned_sizes(shapes: list[tuple[int, ...]]) -> list[int]:
    return [-(-int(np.prod(shape)) // ALIGN) * ALIGN for shape in shapes]


def split_tables(packed: Tensor, shapes: list[tuple[int, ...]], numbers: tuple[int, int, int]) -> GpuWork:
    """The tables that lie in `packed` one after the other."""
    parts = packed.split(aligned_sizes(shapes))
    tables = (part[: int(np.prod(shape))].view(shape) for part, shape in zip(parts, shapes, strict=True))
    return GpuWork(*tables, *numbers)


def _route(layout: KvLayout, spans: Spans, routing: Routing) -> tuple[_Groups, np.ndarray]:
    """Short chunks and those without room for their context, in groups of columns; the sequences of all the others."""
    none = np.zeros(0, np.int64)
    if routing.deterministic:
        return _Groups(none, none, none, none), none
    seqs = np.arange(spans.num_decodes, len(spans.count_B))
    tokens = wide_tokens(layout.head_dim, routing.heads_per_kv)
    here = spans.count_B[seqs] <= tokens
    room = scratch_room(layout) if routing.scratch_blocks is None else routing.scratch_blocks
    if layout.quantized or routing.scratch_blocks is not None:
        blocks = np.where(here, 0, -(-spans.end_B[seqs] // layout.block_tokens))
        here |= np.cumsum(blocks) > room
    wide_X4 = _cut(spans, seqs[here], tokens)
    return _Groups(wide_X4[:, 0], wide_X4[:, 1], wide_X4[:, 3], wide_X4[:, 2]), seqs[~here]


def scratch_room(layout: KvLayout) -> int:
    """Blocks of one layer that the scratch holds at 16 bit."""
    return SCRATCH_BYTES // (4 * layout.block_tokens * layout.num_kv_heads * layout.head_dim)


def scratch_tables(layout: KvLayout, spans: Spans, seqs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scratch_X2 and scratch_BN of the chunks of these sequences."""
    if not layout.quantized or not len(seqs):
        return np.zeros((0, 2), np.int64), np.zeros((0, 0), np.int64)
    P, end_X = layout.block_tokens, spans.end_B[seqs]
    blocks_X = -(-end_X // P)
    of = np.repeat(np.arange(len(seqs)), blocks_X)
    index = np.arange(len(of)) - (np.cumsum(blocks_X) - blocks_X)[of]
    number_BN = np.zeros_like(spans.block_BN)
    number_BN[seqs[of], index] = np.arange(len(of))
    lanes = np.minimum(P, end_X[of] - index * P)
    return np.stack((spans.block_BN[seqs[of], index], lanes), axis=1), number_BN


def chunk_items(spans: Spans, seqs: np.ndarray) -> np.ndarray:
    """The new tokens of these sequences as items of the prefill kernel, [X, 4]."""
    items = _cut(spans, seqs, CHUNK_TOKENS)
    # most keys first: what begins last should end soon
    return items[np.argsort(-(items[:, 2] + items[:, 3]), kind="stable")]


def _cut(spans: Spans, seqs: np.ndarray, most: int) -> np.ndarray:
    """(sequence, first row, rows, first position) of runs of at most `most` rows."""
    runs_B = -(-spans.count_B[seqs] // most)
    of = np.repeat(np.arange(len(seqs)), runs_B)
    skip = (np.arange(len(of)) - (np.cumsum(runs_B) - runs_B)[of]) * most
    b = seqs[of]
    rows = np.minimum(most, spans.count_B[b] - skip)
    return np.stack((b, spans.row_B[b] + skip, rows, spans.start_B[b] + skip), axis=1)


def _pieces(groups: _Groups, split: int, first_slot: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Lines of pieces, lines of merges, and the first slot that is free behind them."""
    parts_X = -(-groups.end_X // split)
    slots_X = parts_X * groups.count_X
    slot_X = first_slot + np.cumsum(slots_X) - slots_X
    of = np.repeat(np.arange(len(parts_X)), parts_X)
    index = np.arange(len(of)) - (np.cumsum(parts_X) - parts_X)[of]
    low = index * split
    end = np.minimum(low + split, groups.end_X[of])
    lines = (groups.seq_X[of], groups.row_X[of], groups.pos_X[of], groups.count_X[of], low, end)
    pieces = np.stack((*lines, slot_X[of] + index, parts_X[of]), axis=1)
    pieces = pieces[np.argsort(low - end, kind="stable")]
    row_of = np.repeat(np.arange(len(parts_X)), groups.count_X)
    lane = np.arange(len(row_of)) - (np.cumsum(groups.count_X) - groups.count_X)[row_of]
    slot = slot_X[row_of] + lane * parts_X[row_of]
    merges = np.stack((groups.row_X[row_of] + lane, slot, parts_X[row_of]), axis=1)
    return pieces, merges, first_slot + int(slots_X.sum())


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
