"""The launch shapes of the 8-bit matmul: T tokens, N outputs, K inputs.

`codes` are int8, fp8, or fp8-fast: fp8 whose sums stay in the tensor core, which keeps some 14 bits of them on Hopper.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from kernels.launch import GpuFacts, cdiv
from kernels.table import tuned

# splits are worth their partial sums while K leaves each this many turns of the loop
MIN_TURNS = 4


@dataclass(frozen=True)
class W8Config:
    """`swap`: weights are the rows of the tensor core's tile (gemm_w8a8_small), else tokens are, and `split_k` is 1.

    `promote`: fp8 sums leave the tensor core after every 128 products.  `tma`: the copy engine loads both operands.
    """

    swap: bool
    block_t: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    promote: bool = True
    tma: bool = False
    flatten: bool = False
    group_t: int = 8

    @classmethod
    def pick(
        cls, gpu: GpuFacts, T: int, N: int, K: int, codes: str = "int8", deterministic: bool = False
    ) -> "W8Config":
        """What was measured, else by shape: free of spills and counted (`python -m bench.aot`), not timed.

        T counts as the next power of two, so a warm-up at those compiles whatever serving will launch.
        """
        if deterministic and codes != "int8":
            # few outputs a program, or a decode step would have too few programs; many tokens, for the prefill
            return cls(True, 128, 64, 128, 1, num_warps=4, num_stages=4)
        T = max(16, 1 << (T - 1).bit_length())
        # a word: another K is split elsewhere, and may not be what a descriptor takes
        found = tuned(cls, "gemm_w8a8", gpu, T=T, N=N, K=f"K{K}", codes=codes)
        return found or cls._by_shape(gpu, T, N, K, codes)

    @classmethod
    def _by_shape(cls, gpu: GpuFacts, T: int, N: int, K: int, codes: str) -> "W8Config":
        promote = codes == "fp8"
        sms, engine = gpu.num_sms, gpu.capability >= 90 and K % 16 == 0
        stages = 3 if gpu.shared_bytes < 131072 else 4
        if T <= 64:
            # two or three programs fit an SM
            split_k = shares(K, 2 * sms / cdiv(N, 128))
            return cls(True, T, 128, 128, split_k, 4, stages, promote)
        tiles = cdiv(T, 128) * cdiv(N, 128)
        if T <= 128 or (T <= 512 and tiles < sms):
            return cls(True, 128, 128, 128, shares(K, sms / tiles), 8, stages, promote)
        if gpu.capability == 90 and engine:
            # promoted sums take twice the registers; two programs an SM hide each other's turns at them
            wide = not promote and cdiv(T, 128) * cdiv(N, 256) >= sms
            block_n, warps, stages = (256, 8, 4) if wide else (128, 4, 3)
            return cls(False, 128, block_n, 128, 1, warps, stages, promote, tma=True)
        return cls(False, 128, 128, 128, 1, 8, stages, promote, tma=engine)

    @classmethod
    def candidates(cls, gpu: GpuFacts, T: int, N: int, K: int, codes: str = "int8") -> Iterator["W8Config"]:
        """What a tuner may try for this shape."""
        T = max(16, 1 << (T - 1).bit_length())
        own = cls._by_shape(gpu, T, N, K, codes)
        yield own
        tries = []
        if T <= 512:
            s = own.split_k
            splits = sorted({1, max(1, s // 2), max(1, s - 1), s, s + 1, shares(K, 2 * s)})
            widths = [t for t in (16, 32, 64, 128) if min(T, 64) <= t <= T]
            shapes = ((64, 128, 5), (64, 256, 4), (128, 128, 4), (128, 128, 5), (128, 256, 3))
            for t, (n, k, stages), split_k in product(widths, shapes, splits):
                warps = 8 if t * n == 128 * 128 else 4
                tries.append(cls(True, t, n, k, split_k, warps, stages, own.promote))
        if T > 64:
            tiles = ((64, 128, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
            loads = (
                [(False, False), (True, False), (True, True)] if gpu.capability >= 90 else [(False, False)]
            )
            for (t, n, warps), stages, (tma, flatten) in product(tiles, (3, 4), loads):
                tries.append(cls(False, t, n, 128, 1, warps, stages, own.promote, tma, flatten))
        yield from (c for c in tries if c != own)

    @property
    def programs_per_sm(self) -> int:
        """Of the persistent kernel: two where registers leave room for both."""
        return 2 if self.num_warps == 4 else 1


def shares(K: int, at_most: float) -> int:
    """Into how many equal parts K is split, a power of two: the last may be shorter, none is empty."""
    turns, parts = cdiv(K, 128), 1
    while 2 * parts <= min(at_most, turns / MIN_TURNS):
        parts *= 2
    return cdiv(turns, cdiv(turns, parts))
