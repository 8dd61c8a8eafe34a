"""The launch shapes of the 8-bit matmul: T tokens, N outputs, K inputs, codes of int8 or fp8."""

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

    `promote`: fp8 sums leave the tensor core, which keeps some 14 bits on Hopper, after every 128 products.
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
        cls, gpu: GpuFacts, T: int, N: int, K: int, fp8: bool = False, deterministic: bool = False
    ) -> "W8Config":
        """What was measured, else by shape: free of spills and counted (`python -m bench.aot`), not timed."""
        if fp8 and deterministic:
            return cls(True, 64, 64, 128, 1, num_warps=4, num_stages=4)
        return tuned(cls, "gemm_w8a8", gpu, T=T, N=N, K=K, fp8=fp8) or cls._by_shape(gpu, T, N, K, fp8)

    @classmethod
    def _by_shape(cls, gpu: GpuFacts, T: int, N: int, K: int, fp8: bool) -> "W8Config":
        little_shared = gpu.shared_bytes < 131072
        if T <= 128:
            block_t = 16 if T <= 16 else 32 if T <= 32 else 64 if T <= 64 else 128
            warps, stages = (8, 3 if little_shared else 4) if block_t == 128 else (4, 4)
            return cls(True, block_t, 128, 128, split(gpu, N, K), warps, stages)
        # promoted sums take twice the registers; int8 of sm_100 and 16x8 tiles of sm_80 have none to spare either
        wide = gpu.capability == 90 and not fp8 and cdiv(T, 128) * cdiv(N, 256) >= gpu.num_sms
        if wide:
            return cls(False, 128, 256, 128, 1, num_warps=8, num_stages=3)
        return cls(False, 128, 128, 128, 1, num_warps=8, num_stages=3 if little_shared else 4)

    @classmethod
    def candidates(cls, gpu: GpuFacts, T: int, N: int, K: int, fp8: bool = False) -> Iterator["W8Config"]:
        """What a tuner may try for this shape."""
        if T <= 256:
            widths = [t for t in (16, 32, 64, 128) if t < 2 * max(T, 16) and t >= min(T, 64)]
            splits = sorted({1, 2, 3, 4, 6, 8, split(gpu, N, K)})
            for t, n, k, s in product(widths, (64, 128), (128, 256), splits):
                if s == 1 or K // k >= 2 * s:
                    for stages in (3, 4, 5):
                        yield cls(True, t, n, k, s, 8 if t * n >= 128 * 128 else 4, stages)
        if T > 64:
            for (t, n, warps), stages, flatten, tma in product(
                ((64, 128, 4), (128, 128, 4), (128, 128, 8), (64, 256, 8), (128, 256, 8)),
                (3, 4),
                (False, True),
                (False, True) if gpu.capability >= 90 and K % 16 == 0 else (False,),
            ):
                if not (fp8 and n * t == 128 * 256):
                    yield cls(False, t, n, 128, 1, warps, stages, tma=tma, flatten=flatten)

    @property
    def programs_per_sm(self) -> int:
        """Of the persistent kernel: two where registers and shared memory leave room for both."""
        return 2 if self.num_warps == 4 else 1


def split(gpu: GpuFacts, N: int, K: int) -> int:
    """Into how many programs K is split: three for every two SMs, as far as K goes round."""
    tiles, turns = cdiv(N, 128), cdiv(K, 128)
    wanted = min(cdiv(3 * gpu.num_sms, 2 * tiles), turns // MIN_TURNS)
    # equal shares: the last one may be shorter, none is empty
    return cdiv(turns, cdiv(turns, wanted)) if wanted > 1 else 1
