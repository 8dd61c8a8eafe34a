"""The 4-bit matmul beyond its cases: exact integers in every kind and split, the same bits by any way, what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.gemm_w4a8 import (
    W4Weight,
    gemm_w4a8,
    gemm_w4a8_cpu,
    gemm_w4a8_triton,
    prepare_w4a8,
    prepare_w4a8_progressive,
)
from kernels.launch import ASSUMED
from kernels.w4_config import EXPAND_ROWS, W4Config, split
from kernels.w4_pack import FP8, Int4, Packed4, widened
from kernels.w4_to_w8 import w4_to_w8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = ASSUMED[90]


def random(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)


def weight(
    kind: str, N: int, K: int, Q: int, form: str | None = "cuda", zeros: bool = True
) -> tuple[W4Weight, Tensor]:
    """One whose scales are powers of two, and its true values."""
    device = DEVICE if form == "cuda" else "cpu"
    codes, zero = random(-8, 8, N, K, seed=1), random(-8, 8, N, Q, seed=2)
    scale = torch.tensor([1.0, 0.5, 2.0]).repeat(Q)[:Q].repeat(N, 1)
    step = random(1, 9, N, Q, seed=3) if kind == "progressive" else None
    if kind == "fp8" or not zeros:
        zero = torch.zeros_like(zero)
    if kind in ("channel", "progressive"):
        scale = scale[:, :1]
    given = [t.to(device) for t in (codes, scale, zero)]
    if step is not None:
        w = prepare_w4a8_progressive(given[0], given[1][:, 0], step.to(device), given[2], form=form)
    else:
        taken = given[2] if zeros and kind != "fp8" else None
        w = prepare_w4a8(given[0], given[1], taken, form=form, kind=kind)
    values = widened(Int4(codes, scale, zero, step)) * scale.repeat_interleave(K // scale.shape[1], 1)
    return w, values


def rows(T: int, K: int, kind: str) -> Tensor:
    """fp8: integers it holds exactly."""
    x = random(-4, 5, T, K) if kind == "fp8" else random(-127, 128, T, K)
    return x.float().to(FP8) if kind == "fp8" else x


def check_exact(w: W4Weight, values: Tensor, x: Tensor, **options: object) -> None:
    run, device = (gemm_w4a8_triton, DEVICE) if w.form == "cuda" else (gemm_w4a8_cpu, "cpu")
    ones = torch.ones(x.shape[0], device=device)
    y = run(x.to(device), ones, w, torch.float32, **options).cpu()
    expected = x.double() @ values.double().t()
    assert expected.abs().max() < 2**24, "float32 could not hold the sum"
    assert torch.equal(y.double(), expected)


@pytest.mark.parametrize("form", [None, "cuda"])
@pytest.mark.parametrize(
    ("kind", "Q", "group"),
    [
        ("progressive", 4, 128),
        ("progressive", 3, 64),
        ("progressive", 5, 48),
        ("channel", 1, 384),
        ("channel", 1, 100),
        ("fp8", 3, 128),
        ("fp8", 4, 32),
        ("fp8", 1, 256),
    ],
)
def test_the_sum_of_every_kind_is_exact(form: str | None, kind: str, Q: int, group: int):
    check_exact(*weight(kind, 19, Q * group, Q, form), rows(5, Q * group, kind))


@pytest.mark.parametrize(("kind", "Q"), [("group", 7), ("progressive", 8), ("channel", 1), ("fp8", 8)])
@pytest.mark.parametrize("splits", [2, 5])
def test_sums_split_over_programs_are_exact(kind: str, Q: int, splits: int):
    """Five splits of four turns leave one without work; a second launch finds the counters as the first did."""
    K = 64 * Q if Q > 1 else 512
    w, values = weight(kind, 65, K, Q)
    config = W4Config(16, 64, splits, num_warps=4, num_stages=3)
    for sign in (1, -1):
        x = rows(3, K, kind)
        check_exact(w, values, (sign * x.float()).to(x.dtype), config=config)
    assert isinstance(w.held, Packed4)
    assert not w.held.arrivals.any()


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("kind", "Q", "K"), [("progressive", 4, 512), ("channel", 1, 320)])
def test_writing_the_weight_out_as_int8_changes_no_bit(kind: str, Q: int, K: int, zeros: bool):
    w, values = weight(kind, 70, K, Q, zeros=zeros)
    assert isinstance(w.held, Packed4)
    wide = w4_to_w8(w.held, 70, K).cpu().double() * w.held.scale.cpu().double()[:, None]
    assert torch.equal(wide, values.double())
    x, scale = rows(5, K, kind).to(DEVICE), torch.rand(5).to(DEVICE)
    own = W4Config.pick(H200, 5, 70, K, kind, 128)
    y = gemm_w4a8_triton(x, scale, w, torch.float32, config=own)
    assert torch.equal(gemm_w4a8_triton(x, scale, w, torch.float32, config=replace(own, expand=True)), y)
    on_cpu, _ = weight(kind, 70, K, Q, None, zeros)
    assert torch.equal(gemm_w4a8_cpu(x.cpu(), scale.cpu(), on_cpu, torch.float32), y.cpu())


@pytest.mark.parametrize(("kind", "Q"), [("group", 4), ("progressive", 4), ("channel", 1), ("fp8", 4)])
def test_a_deterministic_row_is_the_same_in_every_batch(kind: str, Q: int):
    """Across the tiles and splits that are picked for 1 to 70 rows."""
    K = 512
    w, _ = weight(kind, 33, K, Q)
    generator = torch.Generator().manual_seed(0)
    x, scale = rows(70, K, kind).to(DEVICE), torch.rand(70, generator=generator).to(DEVICE)
    whole = gemm_w4a8_triton(x, scale, w, torch.float32, deterministic=True)
    for start, stop in ((0, 1), (17, 50), (69, 70)):
        part = gemm_w4a8_triton(x[start:stop], scale[start:stop], w, torch.float32, deterministic=True)
        assert torch.equal(part, whole[start:stop]), f"rows {start}..{stop} differ"


def test_rows_of_the_wrong_kind_are_refused():
    for kind, wanted in (("group", torch.int8), ("fp8", FP8)):
        w = prepare_w4a8(random(-8, 8, 4, 64), torch.ones(4, 2), kind=kind)
        assert w.row_dtype == wanted
        other = torch.zeros(1, 64).to(torch.int8 if kind == "fp8" else FP8)
        with pytest.raises(AssertionError, match="row_dtype"):
            gemm_w4a8(other, torch.ones(1), w, torch.float32)


def test_kinds_that_cannot_be_are_refused():
    codes = random(-8, 8, 4, 64)
    with pytest.raises(ValueError, match="group, fp8 for 2 groups, got 'channel'"):
        prepare_w4a8(codes, torch.ones(4, 2), kind="channel")
    with pytest.raises(ValueError, match="fp8 has no zero points"):
        prepare_w4a8(codes, torch.ones(4, 2), random(-8, 8, 4, 2), kind="fp8")


def test_additive_offsets_need_not_be_multiples_of_the_step():
    """As deepcompressor's post-scale zero points are."""
    codes, step, offset = random(-8, 8, 9, 128), random(1, 8, 9, 4, seed=1), random(-7, 50, 9, 4, seed=2)
    values = codes.int() * step.repeat_interleave(32, 1) - offset.repeat_interleave(32, 1)
    assert (offset % step).any()
    for form in (None, "cuda"):
        device = DEVICE if form else "cpu"
        parts = [t.to(device) for t in (codes, torch.ones(9), step)]
        w = prepare_w4a8_progressive(*parts, form=form, offset_NQ=offset.to(device))
        check_exact(w, values, rows(4, 128, "progressive"))


def test_what_is_picked_by_shape():
    def pick(
        T: int, kind: str = "progressive", N: int = 6144, gpu: object = H200, **options: bool
    ) -> W4Config:
        return W4Config.pick(gpu, T, N, 4096, kind, 128, **options)

    assert [pick(T).block_t for T in (1, 16, 17, 64, 65, 4096)] == [16, 16, 32, 64, 128, 128]
    assert pick(1).split_k > 1
    assert pick(1, N=128256).split_k == 1
    assert pick(EXPAND_ROWS).expand
    # plain groups are no int8 times one scale
    assert not pick(EXPAND_ROWS, "group").expand
    assert not pick(EXPAND_ROWS, "fp8").expand
    assert {pick(T, "fp8", deterministic=True) for T in (1, 64, 4096)} == {
        pick(64, "fp8", deterministic=True)
    }
    for T in (1, 64, 300):
        assert pick(T, "group", deterministic=True).split_k == 1
        for gpu in ASSUMED.values():
            assert list(W4Config.candidates(gpu, T, 6144, 4096, "group", 128))
    # every share has work
    for N, K in ((4096, 14336), (6144, 4096), (2048, 8192)):
        pairs, splits = K // 256, split(H200, 16, N, K, 128)
        assert -(-pairs // splits) * (splits - 1) < pairs
