"""The launch shapes of the 4-bit matmul: T tokens, N outputs, K inputs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from kernels.launch import GpuFacts, cdiv
from kernels.table import tuned
from kernels.w4_pack import chunk_of

# kinds whose groups have a float32 scale each: a product a group, added up in float32
BY_GROUP = ("group", "fp8")
# splits are worth their partial sums while K leaves each this many turns of the loop
MIN_TURNS = 2
# from so many rows on, int8 codes of the whole weight are written first and multiplied by gemm_w8a8: it costs what
# 200 rows do (1.5 N K bytes at 4.3 TB/s against 1200 TOP/s; counted, not timed)
EXPAND_ROWS = 1024


@dataclass(frozen=True)
class W4Config:
    """`expand`: write the weight out as int8 and leave the product to gemm_w8a8; the rest is unused then."""

    block_t: int
    block_n: int
    split_k: int
    num_warps: int
    num_stages: int
    expand: bool = False

    @classmethod
    def pick(
        cls, gpu: GpuFacts, T: int, N: int, K: int, kind: str, group: int, deterministic: bool = False
    ) -> "W4Config":
        """What was measured, else by shape: free of spills and counted (`python -m bench.aot`), not timed."""
        by_group = kind in BY_GROUP
        if kind == "fp8" and deterministic:
            # the order inside an fp8 product is the tile's
            return replace(cls._by_shape(gpu, 64, N, K, by_group, group), split_k=1)
        # words: another K is split elsewhere, another group makes tiles of another size
        c = tuned(cls, "gemm_w4a8", gpu, T=T, N=N, K=f"K{K}", kind=kind, group=f"g{group}")
        c = c or cls._by_shape(gpu, T, N, K, by_group, group)
        # another split adds the groups in another order
        return replace(c, split_k=1) if by_group and deterministic else c

    @classmethod
    def _by_shape(cls, gpu: GpuFacts, T: int, N: int, K: int, by_group: bool, group: int) -> "W4Config":
        wgmma = gpu.capability == 90
        block_t = 16 if T <= 16 else 32 if T <= 32 else 64 if T <= 64 else 128
        if by_group and not wgmma:
            # int32 sums of a group beside the float32 total: wider tiles spill where operands lie in registers too
            block_t = min(block_t, 64)
        # the narrower a group, the less one turn of the loop brings in
        stages = {32: 6, 64: 4}.get(chunk_of(group), 3)
        if T > 64:
            block_n = 256 if wgmma and not by_group and T > 128 else 128
            return cls(block_t, block_n, 1, 8, stages, expand=not by_group and T >= EXPAND_ROWS)
        warps = 8 if block_t == 64 and not wgmma else 4
        return cls(block_t, 128, split(gpu, block_t, N, K, group), warps, stages)

    @classmethod
    def candidates(cls, gpu: GpuFacts, T: int, N: int, K: int, kind: str, group: int) -> Iterator["W4Config"]:
        """What a tuner may try for this shape."""
        by_group = kind in BY_GROUP
        if T <= 256:
            widths = [t for t in (16, 32, 64, 128) if t < 2 * max(T, 16) and t >= min(T, 64)]
            splits = sorted({1, 2, 3, 4, 6, 8, split(gpu, min(T, 64), N, K, group)})
            for t, n, s, stages in product(widths, (64, 128), splits, (2, 3, 4)):
                if s == 1 or cdiv(K, 2 * group) >= MIN_TURNS * s:
                    yield cls(t, n, s, 8 if t == 128 and n == 128 and by_group else 4, stages)
        if T > 64:
            for (t, n, warps), stages in product(
                ((64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8)), (2, 3)
            ):
                # two sums of a tile, one of them for a group, fit in registers up to here
                if not by_group or t * n <= 2048 * warps:
                    yield cls(t, n, 1, warps, stages)
        if T >= 256 and not by_group:
            yield cls(128, 128, 1, 8, 3, expand=True)


def split(gpu: GpuFacts, block_t: int, N: int, K: int, group: int) -> int:
    """Into how many programs K is split: two for every SM, if the partial sums stay a quarter of the weight."""
    tiles, turns = cdiv(N, 128), cdiv(K, 2 * group)
    wanted = min(cdiv(2 * gpu.num_sms, tiles), turns // MIN_TURNS, K // (32 * block_t))
    # a power of two, or a few less where that leaves shares equal and none empty
    wanted = 1 << max(wanted, 1).bit_length() - 1
    return cdiv(turns, cdiv(turns, wanted))
