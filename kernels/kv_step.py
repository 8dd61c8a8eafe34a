"""Who reads and writes what in one step: positions, lengths and block addresses, built once and shared by all layers.

Rows of the step are the new tokens of its sequences, one sequence after the other.  Decodes (one new token) come
first.  A sequence's blocks are named by its row of the block table; entries past its length are never looked at.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.kv_layout import KvLayout


@dataclass(frozen=True, slots=True)
class KvStep:
    """Everything rope_kv_write and attention need besides q, k, v and the pool.  `deterministic`: a token's attention
    is bitwise independent of the batch, of chunk cuts and of padding (slower)."""

    layout: KvLayout
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    pos_T: Tensor
    slab_table_SL: Tensor
    deterministic: bool

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
    ) -> "KvStep":
        """`slab_table_SL` int64 byte offsets, on `device`; `block_table_BN` int32 block ids, on the host: it is copied."""
        assert len(starts) == len(counts) == block_table_BN.shape[0], f"{len(starts)=} {len(counts)=} {block_table_BN.shape=}"
        start_B, count_B = np.asarray(starts, np.int64), np.asarray(counts, np.int64)
        row_B = np.cumsum(count_B) - count_B
        pos_T = np.arange(count_B.sum()) + np.repeat(start_B - row_B, count_B)
        pos = torch.from_numpy(pos_T).to(device)
        return cls(layout, tuple(starts), tuple(counts), pos, slab_table_SL, deterministic)

    @property
    def num_tokens(self) -> int:
        return self.pos_T.shape[0]
