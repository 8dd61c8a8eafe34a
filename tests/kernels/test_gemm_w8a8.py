"""Every kernel and launch shape of the 8-bit matmul: exact integers, fp8 sums in an order of their own, whole rows."""

from itertools import product

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from kernels.gemm_w4a8 import prepare_w4a8
from kernels.gemm_w8a8 import (
    FP8,
    SPEC,
    W8Weight,
    gemm_w8a8,
    gemm_w8a8_ref,
    gemm_w8a8_triton,
    prepare_w8a8,
)
from kernels.launch import ASSUMED, gpu_facts
from kernels.w8_config import W8Config, shares
from tests.close import assert_no_worse, errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = W8Config(True, 16, 64, 128, 1, num_warps=4, num_stages=3)
LARGE = W8Config(False, 64, 64, 128, 1, num_warps=4, num_stages=3, group_t=2)


def random_codes(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return torch.randn(rows, columns, generator=generator).to(FP8)


def changed(base: W8Config, **fields: int | bool) -> W8Config:
    return W8Config(**(vars(base) | fields))


CONFIGS = {
    "split2": changed(SMALL, split_k=2),
    "split5": changed(SMALL, split_k=5),
    "more splits than turns": changed(SMALL, split_k=8, block_k=256),
    "tokens32": changed(SMALL, block_t=32),
    "large": LARGE,
    "large, one loop": changed(LARGE, flatten=True),
    "engine": changed(LARGE, tma=True),
    "engine, one loop": changed(LARGE, tma=True, flatten=True),
}


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_launch_shape_is_right(name: str, dtype: torch.dtype):
    T, N, K = 70 if "large" in name or "engine" in name else 19, 70, 592
    x, w = random_codes(T, K, dtype), random_codes(N, K, dtype, seed=1)
    scale_T, scale_N = torch.rand(T), torch.rand(N)
    bias_N = torch.randn(N)
    moved = [t.to(DEVICE) for t in (x, scale_T, w, scale_N, bias_N)]
    prepared = prepare_w8a8(*moved[2:], form="cuda")
    for _ in range(2):  # the second launch finds the counters as the first one left them
        y = gemm_w8a8_triton(moved[0], moved[1], prepared, torch.float32, config=CONFIGS[name]).cpu()
        args = (x, scale_T, w, scale_N, bias_N)
        truth = gemm_w8a8_ref(*(t.double() for t in args), torch.float64)
        assert_no_worse(y, gemm_w8a8_ref(*args, torch.float32), truth)
        assert not prepared.arrivals.any(), "a counter was not set back"


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_a_row_of_a_split_sum_does_not_see_its_neighbours(dtype: torch.dtype):
    """At one config, whatever the other rows and however many; small numbers of any magnitude, so order would show."""
    x, w = random_codes(37, 640, dtype).to(DEVICE), random_codes(70, 640, dtype, seed=1).to(DEVICE)
    scale_T, prepared = (
        torch.rand(37, device=DEVICE),
        prepare_w8a8(w, torch.rand(70, device=DEVICE), form="cuda"),
    )
    config = changed(SMALL, split_k=3)
    whole = gemm_w8a8_triton(x, scale_T, prepared, torch.float32, config=config)
    for start, stop in ((0, 1), (15, 18), (36, 37)):
        rows = slice(start, stop)
        piece = gemm_w8a8_triton(
            x[rows].clone(), scale_T[rows].clone(), prepared, torch.float32, config=config
        )
        assert torch.equal(piece, whole[rows])


def test_deterministic_fp8_has_one_config():
    gpu = ASSUMED[90]
    for codes, (N, K) in product(("fp8", "fp8-fast"), ((6144, 4096), (4096, 14336))):
        picked = {W8Config.pick(gpu, T, N, K, codes, deterministic=True) for T in (1, 16, 64, 2048)}
        assert len(picked) == 1
        assert all(c.split_k == 1 for c in picked)


def test_a_config_for_fewer_rows_serves_more_tiles_than_it_has_counters_for():
    x, w = random_codes(150, 256, torch.int8).to(DEVICE), random_codes(20, 256, torch.int8, seed=1).to(DEVICE)
    prepared = prepare_w8a8(w, torch.ones(20, device=DEVICE), form="cuda")
    assert prepared.arrivals.numel() < 10
    config = changed(SMALL, split_k=2)
    y = gemm_w8a8_triton(x, torch.ones(150, device=DEVICE), prepared, torch.float32, config=config)
    assert torch.equal(y.cpu().long(), x.cpu().long() @ w.cpu().long().t())


def test_splits_have_equal_shares_and_none_is_empty():
    for K, most in product((4096, 14336, 1040, 8192, 8320, 127), range(1, 20)):
        turns, splits = -(-K // 128), shares(K, most)
        share = -(-turns // splits)
        assert splits == 1 or (splits <= most and share >= 4 and (splits - 1) * share < turns)
    # some 1 to 2 programs an SM of an H200: gate_up has them, qkv, o and down do not
    shapes = {(28672, 4096): 1, (6144, 4096): 4, (4096, 4096): 8, (4096, 14336): 8}
    for (N, K), splits in shapes.items():
        assert W8Config.pick(ASSUMED[90], 16, N, K).split_k == splits


def test_what_is_picked_depends_on_the_next_power_of_two_alone():
    for gpu, codes, (N, K) in product(
        ASSUMED.values(), ("int8", "fp8"), ((6144, 4096), (4096, 14336), (1000, 200))
    ):
        picked = {T: W8Config.pick(gpu, T, N, K, codes) for T in (*range(1, 1100), 2048)}
        for T, config in picked.items():
            assert T > 1024 or config == picked[1 << (T - 1).bit_length()], T


def test_candidates_are_distinct_and_begin_with_what_is_picked():
    for gpu, c in product(ASSUMED.values(), SPEC.benches):
        tried = list(SPEC.candidates(c, gpu))
        assert tried[0] == SPEC.config(c, gpu)
        assert len(set(tried)) == len(tried) < 100


@pytest.mark.parametrize("form", ["float8", "cuda"])
def test_fp8_codes_keep_one_copy_and_one_scale_may_serve_all(form: str):
    x, w = random_codes(3, 64, FP8).to(DEVICE), random_codes(5, 64, FP8, seed=1).to(DEVICE)
    if form == "float8":
        x, w = x.cpu(), w.cpu()
    prepared = prepare_w8a8(w, torch.tensor(0.5, device=w.device), form=form)
    assert prepared.codes.data_ptr() == w.data_ptr(), "the codes were copied"
    ones = torch.ones(3, device=x.device)
    run = gemm_w8a8_triton if form == "cuda" else gemm_w8a8
    y = run(x, ones, prepared, torch.float32)
    expected = 0.5 * (x.cpu().double() @ w.cpu().double().t())
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-3, atol=1e-3)  # Hopper's 13 bits


SERVED = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (32001, 2048), (1000, 200))


def on_gpu(
    T: int, N: int, K: int, dtype: torch.dtype, fast: bool = False
) -> tuple[Tensor, Tensor, W8Weight, Tensor]:
    """x, its scales, the weight (all scales 1) and the exact product."""
    generator = torch.Generator(device="cuda").manual_seed(T + N)
    x, w = (torch.randint(-127, 128, (rows, K), generator=generator, device="cuda") for rows in (T, N))
    x, w = x.to(torch.int8), w.to(torch.int8)
    if dtype == FP8:
        x, w = (x / 16).to(FP8), (w / 16).to(FP8)
    weight = prepare_w8a8(w, torch.ones(N, device="cuda"), form="cuda", fast=fast)
    return x, torch.ones(T, device="cuda"), weight, x.double() @ w.double().t()


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 16, 33, 64, 100, 256, 300, 2048])
@pytest.mark.parametrize(("N", "K"), SERVED)
def test_served_sizes_on_a_gpu(T: int, N: int, K: int):
    x, scale_T, weight, truth = on_gpu(T, N, K, torch.int8)
    assert torch.equal(gemm_w8a8_triton(x, scale_T, weight, torch.float32), truth.float())
    if torch.cuda.get_device_capability() < (8, 9):
        return
    for fast, bound in ((False, 5e-4), (True, 2e-3)):  # what Hopper keeps of 128 and of all K products
        x, scale_T, weight, truth = on_gpu(T, N, K, FP8, fast)
        y = gemm_w8a8_triton(x, scale_T, weight, torch.float32)
        assert errors(y, truth).rms < bound, errors(y, truth)
        assert torch.equal(y, gemm_w8a8_triton(x, scale_T, weight, torch.float32)), "two launches differ"
        one = gemm_w8a8_triton(
            x[-1:].clone(), scale_T[-1:].clone(), weight, torch.float32, deterministic=True
        )
        assert torch.equal(one, gemm_w8a8_triton(x, scale_T, weight, torch.float32, deterministic=True)[-1:])


@pytest.mark.gpu
def test_every_candidate_on_a_gpu():
    """Whatever a tuner may choose is right, or does not fit the GPU."""
    gpu = gpu_facts(torch.device("cuda"))
    for T, (N, K) in product((16, 64, 256, 1000), ((4096, 4096), (1008, 208))):
        x, scale_T, weight, truth = on_gpu(T, N, K, torch.int8)
        for config in W8Config.candidates(gpu, T, N, K):
            try:
                y = gemm_w8a8_triton(x, scale_T, weight, torch.float32, config=config)
            except OutOfResources:
                continue
            assert torch.equal(y, truth.float()), config


@pytest.mark.gpu
def test_split_sums_never_race():
    """The last of the splits to arrive adds them all: a thousand times the same, in a graph too."""
    x, scale_T, weight, truth = on_gpu(16, 4096, 14336, torch.int8)
    config = W8Config.pick(gpu_facts(x.device), 16, 4096, 14336)
    assert config.split_k > 1
    gemm_w8a8_triton(x, scale_T, weight, torch.float32, config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [gemm_w8a8_triton(x, scale_T, weight, torch.float32, config=config) for _ in range(10)]
    for _ in range(100):
        graph.replay()
        assert all(torch.equal(y, truth.float()) for y in results)
    assert not weight.arrivals.any()


def test_what_a_kernel_reads_starts_on_16_bytes():
    """A slice of a fused bias may not, and would compile a variant of its own while serving."""
    w, scale_N, bias = torch.ones(5, 64, dtype=torch.int8), torch.ones(6)[1:], torch.ones(6)[1:]
    eight = prepare_w8a8(w, scale_N, bias, form="cuda")
    four = prepare_w4a8(w, torch.ones(5, 2), bias_N=bias, form="cuda")
    for tensor in (eight.codes, eight.scale_N, eight.bias_N, four.bias_N):
        assert tensor is not None
        assert tensor.data_ptr() % 16 == 0
