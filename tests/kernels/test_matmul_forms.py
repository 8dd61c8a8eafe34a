"""The forms a weight is prepared into: exact integers, one copy, and what the machine decides."""

import gc

import pytest
import torch
import torch.nn.functional as F

from kernels.gemm_w4a8 import gemm_w4a8, gemm_w4a8_triton, prepare_w4a8
from kernels.gemm_w8a8 import gemm_w8a8, gemm_w8a8_triton, prepare_w8a8
from kernels.linear import PreparedLinear, linear, prepare_linear
from kernels.w8_cpu import pick_int8_form
from tests.close import assert_no_worse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def codes(rows: int, columns: int, low: int = -127, high: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(
        torch.int8
    )


@pytest.mark.parametrize("form", [None, "int_mm", "float", "cuda"])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"), [(1, 1, 1), (3, 33, 127), (17, 64, 1000), (2, 20, 1040)]
)
def test_the_integer_sum_is_exact(form, rows, outputs, inputs):
    x, w = codes(rows, inputs), codes(outputs, inputs, -128, 128, seed=1)
    device = DEVICE if form == "cuda" else "cpu"
    prepared = prepare_w8a8(w.to(device), torch.ones(outputs, device=device), form=form)
    run = gemm_w8a8_triton if form == "cuda" else gemm_w8a8
    y = run(x.to(device), torch.ones(rows, device=device), prepared, torch.float32).cpu()
    expected = x.long() @ w.long().t()
    assert expected.abs().max() < 2**24, "float32 could not hold the sum"
    assert torch.equal(y.long(), expected)


@pytest.mark.parametrize("form", [None, "int_mm", "float", "cuda"])
@pytest.mark.parametrize("group", [32, 48, 128, 256])
def test_the_sum_of_a_group_is_exact(form, group):
    """Scales that are powers of two keep the sum over groups exact too."""
    Q = 3
    x, w, zero = codes(5, Q * group), codes(19, Q * group, -8, 8, seed=1), codes(19, Q, -8, 8, seed=2)
    scale = torch.tensor([1.0, 0.5, 2.0]).repeat(19, 1)
    device = DEVICE if form == "cuda" else "cpu"
    prepared = prepare_w4a8(w.to(device), scale.to(device), zero.to(device), form=form)
    run = gemm_w4a8_triton if form == "cuda" else gemm_w4a8
    y = run(x.to(device), torch.ones(5, device=device), prepared, torch.float32).cpu()
    shifted = w.long() - zero.long().repeat_interleave(group, 1)
    twice = (2 * scale).long().repeat_interleave(group, 1)
    assert torch.equal((2 * y).long(), x.long() @ (shifted * twice).t())


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(f, torch.bfloat16) for f in ("dense", "packed", "upcast")]
    + [("upcast", torch.float16), ("dense", torch.float32)],
)
def test_every_form_of_a_linear_is_right(form, dtype):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 130, generator=generator), torch.randn(70, 130, generator=generator)
    bias = torch.randn(70, generator=generator)
    x, w, bias = x.to(dtype), w.to(dtype), bias.to(dtype)
    prepared = prepare_linear(w, bias, form)
    truth = F.linear(x.double(), w.double(), bias.double())
    assert_no_worse(linear(x, prepared), F.linear(x, w, bias), truth)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("dense", torch.float32),
        ("packed", torch.bfloat16),
        ("upcast", torch.bfloat16),
        ("upcast", torch.float16),
    ],
)
def test_a_deterministic_row_is_the_same_in_every_batch(form, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 256, generator=generator).to(dtype)
    prepared = prepare_linear(torch.randn(384, 256, generator=generator).to(dtype), form=form)
    whole = linear(x, prepared, deterministic=True)
    for start in (0, 1, 15, 16, 33, 69):
        for stop in {start + 1, min(start + 17, 70), 70}:
            assert torch.equal(linear(x[start:stop], prepared, deterministic=True), whole[start:stop])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_deterministic_row_is_the_same_in_every_batch_on_a_gpu(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 512, generator=generator).to(dtype).cuda()
    prepared = prepare_linear(torch.randn(384, 512, generator=generator).to(dtype).cuda())
    whole = linear(x, prepared, deterministic=True)
    for start, stop in ((0, 1), (33, 50), (69, 70), (1, 70)):
        assert torch.equal(linear(x[start:stop], prepared, deterministic=True), whole[start:stop])


def live_bytes(prepared: PreparedLinear) -> int:
    return sum(t.untyped_storage().nbytes() for t in (prepared.weight, prepared.bias_N) if t is not None)


def test_one_copy_of_a_weight_is_kept():
    w = torch.randn(256, 128).bfloat16()
    prepared = prepare_linear(w, form="upcast")
    assert live_bytes(prepared) == w.nbytes == prepared.nbytes
    gc.collect()
    assert not any(r is prepared for r in gc.get_referrers(w)), "the checkpoint's tensor is held"
    dense = prepare_linear(w, form="dense")
    assert dense.weight.data_ptr() == w.data_ptr(), "a shared weight was copied"


def test_stored_bytes_are_said():
    w8 = prepare_w8a8(codes(16, 64), torch.ones(16), form="int_mm")
    assert w8.nbytes == 16 * 64 + 4 * 16
    w4 = prepare_w4a8(codes(16, 64, -8, 8), torch.ones(16, 2), form="cuda")
    assert (w4.bits_stored, w4.nbytes) == (4, 16 * 32 + 4 * 32 + w4.held.arrivals.nbytes)
    assert w4.held.codes.nbytes == 16 * 32
    assert prepare_w4a8(codes(16, 64, -8, 8), torch.ones(16, 2), form=pick_int8_form()).bits_stored == 8
