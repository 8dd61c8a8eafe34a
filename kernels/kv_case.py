"""Paged cases for the specs, the tests and the benches: a pool full of NaN bytes and sequences scattered over it.

Slabs of a set and blocks of a sequence lie in random order; a block id that leads far outside the pool stands where a
sequence has no block.  Rows are (sequence, position) pairs, so that any cut of them is a step of its own.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.kv_layout import SLOT_BITS, KvLayout
from kernels.kv_read import StoredKv, read_stored
from kernels.kv_step import KvStep

NO_BLOCK = 2**30


@dataclass(frozen=True, slots=True)
class Paged:
    """`lengths` is the room each sequence has."""

    layout: KvLayout
    lengths: tuple[int, ...]
    pool: Tensor
    slab_table_SL: Tensor
    block_table_BN: Tensor

    @classmethod
    def make(
        cls,
        layout: KvLayout,
        lengths: tuple[int, ...],
        generator: torch.Generator,
        num_layers: int = 2,
        slots: int = 3,
        device: torch.device | str = "cpu",
    ) -> "Paged":
        """`device`: of the pool and the slab table."""
        blocks_B = [layout.blocks_for(n) for n in lengths]
        num_sets = -(-sum(blocks_B) // slots) + 1
        slab_bytes = -(-slots * layout.block_bytes // 4096) * 4096
        num_slabs = num_sets * num_layers + 3
        slabs = torch.randperm(num_slabs, generator=generator)[: num_sets * num_layers]
        places = torch.randperm(num_sets * slots, generator=generator)
        table = torch.full((len(lengths), max(blocks_B)), NO_BLOCK, dtype=torch.int32)
        for b, blocks in enumerate(blocks_B):
            place, places = places[:blocks], places[blocks:]
            table[b, :blocks] = (place // slots << SLOT_BITS | place % slots).int()
        pool = torch.full((num_slabs * slab_bytes,), 255, dtype=torch.uint8, device=device)
        offsets_SL = (slabs.view(num_sets, num_layers) * slab_bytes).to(device)
        return cls(layout, tuple(lengths), pool, offsets_SL, table)

    def to(self, device: torch.device | str) -> "Paged":
        """A copy on `device`; the block table stays on the host."""
        pool = self.pool.clone() if self.pool.device == torch.device(device) else self.pool.to(device)
        return replace(self, pool=pool, slab_table_SL=self.slab_table_SL.to(device))

    def step(
        self, place_T2: Tensor, triton: bool | None = None, deterministic: bool = False, **routing: Any
    ) -> KvStep:
        """The step of these rows; consecutive positions of a sequence are one chunk."""
        spans: list[list[int]] = []
        for seq, pos in place_T2.tolist():
            if spans and spans[-1][0] == seq and spans[-1][1] + spans[-1][2] == pos:
                spans[-1][2] += 1
            else:
                spans.append([seq, pos, 1])
        seqs, starts, counts = (list(x) for x in zip(*spans, strict=True))
        table, device = self.block_table_BN[seqs], self.pool.device
        return KvStep.build(
            self.layout, self.slab_table_SL, table, starts, counts, device, deterministic, triton, **routing
        )

    def stored(self, place_T2: Tensor, layer: int) -> StoredKv:
        """What the pool holds for these rows."""
        rows = []
        for seq, pos in place_T2.tolist():
            block = int(self.block_table_BN[seq, pos // self.layout.block_tokens])
            held = read_stored(self.pool, self.layout, self.slab_table_SL, [block], layer)
            rows.append([None if part is None else part[pos % self.layout.block_tokens] for part in held])
        return StoredKv(
            *(None if parts[0] is None else torch.stack(parts) for parts in zip(*rows, strict=True))
        )


def places(*spans: tuple[int, int, int]) -> Tensor:
    """Rows of (sequence, start, count) spans, [T, 2]."""
    return torch.tensor([(seq, start + i) for seq, start, count in spans for i in range(count)])


def rope_tables(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of plain rotary embedding with theta 10000, fp32 [positions, K]."""
    inverse = 10000.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(num_positions).float()[:, None] * torch.cat((inverse, inverse))
    return angle.cos(), angle.sin()
