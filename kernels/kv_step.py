"""Who reads and writes what in one step: positions, lengths and block addresses, built once and shared by all layers.

Rows of the step are the new tokens of its sequences, one sequence after the other.  Decodes (one new token) come
first.  A sequence's blocks are named by its line of the block table; entries past its length are never looked at.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import backend
from kernels.kv_layout import KvLayout
from kernels.kv_rows import CpuRows, Spans, plan_rows
from kernels.kv_work import GpuWork, Routing, full_grid, plan_work


@dataclass(frozen=True, slots=True)
class KvStep:
    """Everything rope_kv_write and attention need besides q, k, v and the pool.  One of `rows` (CPU) and `work` (Triton)
    is there.  `deterministic`: a token's attention is bitwise independent of batch, chunk cuts and padding (slower)."""

    layout: KvLayout
    spans: Spans
    pos_T: Tensor
    slab_table_SL: Tensor
    deterministic: bool
    rows: CpuRows | None
    work: GpuWork | None

    @classmethod
    def build(
        cls,
        layout: KvLayout,
        slab_table_SL: Tensor,
        block_table_BN: Tensor,
        starts: list[int],
        counts: list[int],
        device: torch.device | str,
        deterministic: bool = False,
        triton: bool | None = None,
        **routing: Any,
    ) -> "KvStep":
        """`slab_table_SL`: int64 byte offsets, on `device`.  `block_table_BN`: int32 block ids, on the host.
        `triton` None: where the ops run on Triton; `routing`: heads_per_kv and scratch_blocks of kv_work.Routing."""
        spans = make_spans(layout, block_table_BN, starts, counts)
        device = torch.device(device)
        if triton or (triton is None and backend.runs_triton(device)):
            slots = full_grid(layout, device)
            work = plan_work(layout, spans, device, Routing(deterministic, slots, **routing))
            return cls(layout, spans, work.pos_T, slab_table_SL, deterministic, None, work)
        rows = plan_rows(layout, slab_table_SL.numpy(), spans, deterministic)
        first_T = np.repeat(spans.start_B - spans.row_B, spans.count_B)
        pos_T = torch.from_numpy(first_T + np.arange(len(first_T)))
        return cls(layout, spans, pos_T, slab_table_SL, deterministic, rows, None)

    def with_layout(self, layout: KvLayout) -> "KvStep":
        """The same step for layers that store their keys and values in another format, in blocks of as many tokens."""
        if layout == self.layout:
            return self
        assert layout.with_format(self.layout.fmt) == self.layout, f"{layout} {self.layout}"
        if self.work is not None:
            return replace(self, layout=layout)
        rows = plan_rows(layout, self.slab_table_SL.numpy(), self.spans, self.deterministic)
        return replace(self, layout=layout, rows=rows)

    @property
    def num_tokens(self) -> int:
        return self.pos_T.shape[0]


def make_spans(layout: KvLayout, block_table_BN: Tensor, starts: list[int], counts: list[int]) -> Spans:
    start_B, count_B = np.asarray(starts, np.int64), np.asarray(counts, np.int64)
    B, N = block_table_BN.shape
    assert len(start_B) == len(count_B) == B, f"{len(start_B)=} {len(count_B)=} {block_table_BN.shape=}"
    assert B, "a step without sequences"
    assert min(count_B.min(), start_B.min() + 1) > 0, f"{starts=} {counts=}"
    most = layout.blocks_for(int((start_B + count_B).max()))
    assert most <= N, f"{most} blocks are needed, the block table has room for {N}"
    num_decodes = B if count_B.max() == 1 else int((count_B > 1).argmax())
    block_BN = block_table_BN[:, :most].numpy().astype(np.int64)
    return Spans(start_B, count_B, np.cumsum(count_B) - count_B, block_BN, num_decodes)
