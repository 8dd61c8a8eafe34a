"""The int8 matmuls see codes, not floats; a matmul over the dequantized weight fails the same check."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gemm_w4a8 import gemm_w4a8, prepare_w4a8
from kernels.gemm_w8a8 import gemm_w8a8, prepare_w8a8
from kernels.quant_rows import quant_rows
from kernels.rmsnorm import rmsnorm
from kernels.silu_mul import silu_mul
from tests.quantized import same_for_twins

N, K, Q = 24, 64, 2
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Operator = Callable[[Tensor], Tensor]


def weights(low: int, high: int) -> Tensor:
    return torch.randint(low, high, (N, K), generator=torch.Generator().manual_seed(5)).to(torch.int8)


def w8a8(dtype: torch.dtype) -> tuple[Operator, Operator]:
    codes, scale = weights(-127, 128), torch.full((N,), 0.01)
    prepared = prepare_w8a8(codes, scale)
    dense = (codes * scale[:, None]).to(dtype)
    return lambda x: gemm_w8a8(*quant_rows(x), prepared, dtype), lambda x: F.linear(x, dense)


def w4a8(dtype: torch.dtype) -> tuple[Operator, Operator]:
    codes, scale = weights(-8, 8), torch.full((N, Q), 0.1)
    prepared = prepare_w4a8(codes, scale)
    dense = (codes * scale.repeat_interleave(K // Q, 1)).to(dtype)
    return lambda x: gemm_w4a8(*quant_rows(x), prepared, dtype), lambda x: F.linear(x, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [w8a8, w4a8])
def test_activations_are_truly_quantized(scheme, dtype):
    quantized, weight_only = scheme(dtype)
    assert same_for_twins(quantized, K, dtype)
    assert not same_for_twins(weight_only, K, dtype), "the check cannot tell the two apart"


@pytest.mark.parametrize("quant", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_codes_are_those_of_the_unfused_result(dtype, quant):
    """Quantizing inside rmsnorm and silu_mul is exactly quant_rows of what they return otherwise."""
    generator = torch.Generator().manual_seed(2)
    x, gu = (
        torch.randn(5, 96, generator=generator).to(dtype),
        torch.randn(5, 192, generator=generator).to(dtype),
    )
    w = torch.rand(96, generator=generator).to(dtype)
    for plain, fused in (
        (rmsnorm(x, w, 1e-5, x).y_TD, rmsnorm(x, w, 1e-5, x, quant=quant)),
        (silu_mul(gu).y_TF, silu_mul(gu, quant=quant)),
    ):
        codes, scale_T = quant_rows(plain, quant)
        assert fused[0].dtype == quant
        assert torch.equal(fused[0].view(torch.int8), codes.view(torch.int8))
        assert torch.equal(fused[-1], scale_T)


def test_a_row_of_zeros_and_a_tiny_row_quantize_without_nan():
    codes, scale_T = quant_rows(torch.tensor([[0.0, 0.0], [1e-38, -1e-38], [3e38, -1.0]]))
    assert codes[0].tolist() == [0, 0]
    assert scale_T[0] == 0
    assert codes[2].tolist() == [127, 0]
    assert torch.isfinite(scale_T).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_code_is_never_further_than_half_a_quantum(dtype):
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(3)).to(dtype)
    codes, scale_T = quant_rows(x)
    error = (codes.double() * scale_T.double()[:, None] - x.double()).abs() / scale_T.double()[:, None]
    assert error.max() <= 0.5 + 1e-4
    assert codes.min() == -127 or codes.max() == 127


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_fp8_code_is_within_half_a_step_of_its_mantissa(dtype):
    """Three bits of mantissa: a sixteenth of the value, or half of the smallest step 2^-9."""
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(3)).to(dtype)
    codes, scale_T = quant_rows(x, torch.float8_e4m3fn)
    scaled = x.double() / scale_T.double()[:, None]
    assert ((codes.double() - scaled).abs() <= (scaled.abs() / 16).clamp_min(2**-10) * (1 + 1e-4)).all()
    assert codes.double().abs().max() == 448


def test_true_means_int8_and_other_types_are_refused():
    x, w = torch.ones(1, 16), torch.ones(16)
    assert rmsnorm(x, w, 1e-5, quant=True).y_TD.dtype == torch.int8
    assert silu_mul(x, quant=False).scale_T is None
    with pytest.raises(AssertionError, match="float8_e5m2"):
        silu_mul(x, quant=torch.float8_e5m2)
