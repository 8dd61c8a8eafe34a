"""A pool full of NaN bytes, sets of slabs at random places in it, and sequences with blocks at random places in the sets."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.kv_layout import SLOT_BITS, KvLayout
from kernels.kv_step import KvStep

SLOTS = 3  # blocks a slab has room for


@dataclass
class Scene:
    layout: KvLayout
    lengths: list[int]  # the most tokens each sequence will have
    num_layers: int = 2
    seed: int = 0
    triton: bool | None = None
    rng: torch.Generator = field(init=False)
    pool: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(self.seed)
        lay, L = self.layout, self.num_layers
        blocks_B = [lay.blocks_for(n) for n in self.lengths]
        num_sets = -(-sum(blocks_B) // SLOTS) + 1
        slab_bytes = -(-SLOTS * lay.block_bytes // 4096) * 4096
        num_slabs = num_sets * L + 3
        self.pool = torch.full((num_slabs * slab_bytes,), 255, dtype=torch.uint8)
        slabs = torch.randperm(num_slabs, generator=self.rng)[: num_sets * L]
        self.slab_table_SL = slabs.view(num_sets, L) * slab_bytes
        places = torch.randperm(num_sets * SLOTS, generator=self.rng)
        # an id that would be far outside the pool stands where no block is
        self.block_table_BN = torch.full((len(blocks_B), max(blocks_B)), 2**30, dtype=torch.int32)
        used = 0
        for b, blocks in enumerate(blocks_B):
            place = places[used : used + blocks]
            self.block_table_BN[b, :blocks] = (place // SLOTS << SLOT_BITS | place % SLOTS).int()
            used += blocks

    def step(self, spans: list[tuple[int, int, int]], **options) -> KvStep:
        """`spans`: (sequence, start, count)."""
        seqs, starts, counts = (list(x) for x in zip(*spans, strict=True))
        table = self.block_table_BN[seqs]
        options.setdefault("triton", self.triton)
        return KvStep.build(self.layout, self.slab_table_SL, table, starts, counts, self.pool.device, **options)

    def blocks(self, seq: int, num_tokens: int) -> list[int]:
        return self.block_table_BN[seq, : self.layout.blocks_for(num_tokens)].tolist()

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.rng).to(dtype).to(self.pool.device)


def rope_tables(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    inverse = 10000.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(num_positions).float()[:, None] * torch.cat((inverse, inverse))
    return angle.cos(), angle.sin()
