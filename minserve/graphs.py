"""CUDA graphs: steps of single tokens, captured once for each of some batch sizes and replayed with whatever varies.

What varies lies in device memory: where each row's token stands in the history, and the tables of `WorkBuffers`.  A
step takes the next larger batch size; the rows left over read a token that is always 0, and write nothing.  From the
embedding to the last layer all is captured; the head and the sampler, a dozen launches, follow as in any other step.
Steps with chunks, larger batches and longer contexts are not for graphs: `run` says so by returning None.
"""

import bisect
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.kv_layout import KvLayout
from kernels.launch import upload
from kernels.work_buffers import WorkBuffers
from minserve.inputs import RowTable, StepInputs
from minserve.memory import TABLE_ENTRIES
from minserve.models import Llama

log = logging.getLogger(__name__)

Hidden = tuple[Tensor, Tensor]
# runs a step once and returns its results and what runs it again into them
Capture = Callable[[Callable[[], Hidden]], tuple[Hidden, Callable[[], None]]]


def cuda_capture() -> Capture:
    """Captures into graphs that share their memory: they run one after the other, and nothing is kept between two."""
    pool = torch.cuda.graph_pool_handle()
    # a green context's stream: what is captured elsewhere runs on all of the GPU
    current = torch.cuda.current_stream()
    own = None if current == torch.cuda.default_stream() else current

    def capture(run: Callable[[], Hidden]) -> tuple[Hidden, Callable[[], None]]:
        side = own or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # libraries set themselves up at their first call on a stream, which cannot be captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=own, capture_error_mode="thread_local"):
            out = run()
        return out, graph.replay

    return capture


class _Graph(NamedTuple):
    """Inputs at fixed addresses, outputs at fixed addresses, and the way from one to the other."""

    index_B: Tensor
    tables: WorkBuffers
    hidden: Hidden
    replay: Callable[[], None]


class DecodeGraphs:
    """The graphs of one runner.  They hold on to its slab table and its pool: those stay where they are."""

    def __init__(
        self,
        model: Llama,
        layout: KvLayout,
        pool: Tensor,
        slab_table_SL: Tensor,
        rows: RowTable,
        sizes: list[int],
        capture: Capture,
    ) -> None:
        self.num_replays = 0
        self._rows = rows
        self._sizes = sorted(sizes)
        self._graphs: dict[int, _Graph] = {}
        start = time.monotonic()
        # the largest first: the smaller ones then fit into its memory
        for size in reversed(self._sizes):
            blocks = min(rows.max_blocks, max(1, TABLE_ENTRIES // size))
            tables = WorkBuffers(layout, slab_table_SL, size, blocks, pool.device)
            index_B = torch.full((size,), rows.zero_index, dtype=torch.int64, device=pool.device)

            def run(index_B: Tensor = index_B, tables: WorkBuffers = tables) -> Hidden:
                return model.hidden(rows.tokens[index_B], tables.step, pool)

            self._graphs[size] = _Graph(index_B, tables, *capture(run))
        log.info("%d decode graphs in %.1f s", len(sizes), time.monotonic() - start)

    def run(self, inputs: StepInputs) -> Hidden | None:
        """The rows of this step, valid until the next one; None where no graph is for it."""
        n = len(inputs.counts)
        at = bisect.bisect_left(self._sizes, n)
        if at == len(self._sizes) or not inputs.single_tokens:
            return None
        g = self._graphs[self._sizes[at]]
        if inputs.block_table_BN.shape[1] > g.tables.blocks:
            return None
        index_B = np.full(self._sizes[at], self._rows.zero_index, np.int64)
        index_B[:n] = inputs.history_index_T
        g.index_B.copy_(upload(torch.from_numpy(index_B), g.index_B.device))
        g.tables.refill(torch.from_numpy(inputs.block_table_BN), inputs.starts)
        g.replay()
        self.num_replays += 1
        x_BD, residual_BD = g.hidden
        return x_BD[:n], residual_BD[:n]
