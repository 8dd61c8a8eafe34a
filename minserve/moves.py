"""The copies of a step: blocks that compaction moves, made ahead of the layers and timed on the device itself."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.copy_blocks import copy_blocks
from kernels.launch import upload
from sched.step import Move


@dataclass(slots=True)
class Copies:
    """`blocks` copied in every layer.  `clock`: when they began and ended, on the host or as events of a GPU."""

    blocks: int
    clock: "tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event]"

    @property
    def seconds(self) -> float:
        """Of the device.  On a GPU, once a later event of the stream has fired."""
        began, ended = self.clock
        if isinstance(began, float):
            assert isinstance(ended, float)
            return ended - began
        assert isinstance(ended, torch.cuda.Event)
        return float(began.elapsed_time(ended)) / 1000


class BlockMover:
    """Of one model: `units_L` are the bytes of its blocks in each layer, in units of 16."""

    def __init__(self, pool: Tensor, slab_table_SL: Tensor, block_bytes: Sequence[int]) -> None:
        self._pool, self._table_SL = pool, slab_table_SL[:, : len(block_bytes)]
        self._units_L = (
            torch.tensor(block_bytes, dtype=torch.int32).div(16, rounding_mode="floor").to(pool.device)
        )

    def run(self, moves: Sequence[Move]) -> Copies | None:
        """Behind all that is enqueued, ahead of all that will be."""
        if not moves:
            return None
        moves_M2 = upload(torch.tensor(moves, dtype=torch.int32), self._pool.device)
        began = self._now()
        copy_blocks(self._pool, self._table_SL, self._units_L, moves_M2)
        return Copies(len(moves), (began, self._now()))  # type: ignore[arg-type]  # both are of one kind

    def _now(self) -> "float | torch.cuda.Event":
        if not self._pool.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
