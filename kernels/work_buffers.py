"""The tables of a step of single tokens at fixed addresses, with fixed room, so that one CUDA graph serves many steps.

What varies from step to step lies in device memory, counts included; grids are as large as the room.  A refill is one
copy from pinned memory, in the order of the stream.  Rows past the last sequence are padding: nothing is written for
them, neither to the pool nor to the output of attention, and what they hold is to be ignored.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.kv_layout import SPLIT_TOKENS, KvLayout
from kernels.kv_step import KvStep, make_spans
from kernels.kv_work import Routing, aligned_sizes, full_grid, plan_tables, split_tables
from kernels.launch import cdiv


class WorkBuffers:
    """Room for `rows` sequences of at most `blocks` blocks.  `step` is what to capture with: it has `rows` tokens."""

    def __init__(
        self,
        layout: KvLayout,
        slab_table_SL: Tensor,
        rows: int,
        blocks: int,
        device: torch.device | str,
        deterministic: bool = False,
    ) -> None:
        """`slab_table_SL` stays the caller's, on `device`, at this address."""
        assert rows > 0, f"{rows=}"
        assert blocks > 0, f"{blocks=}"
        device = torch.device(device)
        self.rows, self.blocks = rows, blocks
        self._layout = layout
        self._routing = Routing(deterministic, full_grid(layout, device))
        # a row more than fills the GPU adds one piece at most
        pieces = rows + self._routing.slots // layout.num_kv_heads
        if deterministic:
            pieces = rows * cdiv(blocks * layout.block_tokens, SPLIT_TOKENS)
        # in the order of a GpuWork's tables
        shapes = [
            (rows, blocks),
            (rows,),
            (rows, 4),
            (pieces, 8),
            (0, 8),
            (rows, 3),
            (0, 4),
            (0, 2),
            (0, 0),
            (4,),
        ]
        self._shapes: list[tuple[int, ...]] = shapes
        self._packed = torch.zeros(sum(aligned_sizes(shapes)), dtype=torch.int32, device=device)
        work = split_tables(self._packed, shapes, (pieces, rows, 0))
        spans = make_spans(layout, torch.zeros(rows, 1, dtype=torch.int32), [0] * rows, [1] * rows)
        self.step = KvStep(layout, spans, work.pos_T, slab_table_SL, deterministic, None, work)

    def refill(self, block_table_BN: Tensor, starts: list[int]) -> None:
        """Makes `step` that of single tokens at positions `starts`; row b of the host's int32 block table is b's."""
        assert 0 < len(starts) <= self.rows, f"{len(starts)} sequences, room for {self.rows}"
        spans = make_spans(self._layout, block_table_BN, starts, [1] * len(starts))
        most = spans.block_BN.shape[1]
        assert most <= self.blocks, f"a sequence of {most} blocks, room for {self.blocks}"
        tables, _ = plan_tables(self._layout, spans, self._routing)
        sizes = aligned_sizes(self._shapes)
        packed = np.zeros(sum(sizes), np.int32)
        for table, shape, at in zip(tables, self._shapes, np.cumsum(sizes) - sizes, strict=True):
            room = packed[at : at + int(np.prod(shape))].reshape(shape)
            room[tuple(slice(n) for n in table.shape)] = table
        host = torch.from_numpy(packed)
        if self._packed.device.type != "cpu":
            host = host.pin_memory()
        self._packed.copy_(host, non_blocking=True)
