"""The int8 matmuls see codes, not floats; a matmul over the dequantized weight fails the same check."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.catalog import SPECS
from kernels.gemm_w4a8 import gemm_w4a8, prepare_w4a8
from kernels.gemm_w8a8 import gemm_w8a8, prepare_w8a8
from kernels.quant_rows import quant_rows
from kernels.rmsnorm import rmsnorm
from kernels.silu_mul import silu_mul
from kernels.spec import case
from tests.quantized import same_for_twins

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


RUNS = ["cpu", "triton"]
QUANTS = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("quant", QUANTS, ids=str)
@pytest.mark.parametrize("op", ["quant_rows", "rmsnorm", "silu_mul"])
def test_rows_that_are_not_finite_have_scales_that_are_not(op: str, quant: torch.dtype, run: str):
    """Finite codes would hide that a model has come apart; other rows are as they were."""
    whole = torch.randn(5, 96, generator=torch.Generator().manual_seed(2)).half()
    broken = whole.clone()
    broken[1, 95], broken[3, 0] = float("nan"), float("-inf")
    broken[3, 48] = float("inf")

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(DEVICE if run == "triton" else "cpu")
        args = {"quant_rows": (quant,), "silu_mul": (quant,)}.get(op, (torch.ones_like(x[0]), 1e-5, x, quant))
        out = next(s for s in SPECS if s.name == op).runs[run](x, *args)
        return out[0].cpu().float(), out[-1].cpu()

    (codes, scale_T), (wanted, wanted_T) = quantized(broken), quantized(whole)
    assert torch.isfinite(scale_T).tolist() == [True, False, True, False, True]
    assert torch.equal(codes[::2], wanted[::2])
    assert torch.equal(scale_T[::2], wanted_T[::2])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("fmt", ["fp8", "int8", "int4", "int4z"])
def test_a_key_with_nan_is_stored_with_a_scale_of_nan(fmt: str, run: str):
    spec = next(s for s in SPECS if s.name == "rope_kv_write")
    given = spec.make(case(torch.float32, H=1, G=1, K=32, fmt=fmt), torch.Generator().manual_seed(0))
    device = DEVICE if run == "triton" else "cpu"
    qkv_TX, *rest = (a.to(device) if isinstance(a, torch.Tensor) else a for a in given)
    whole = spec.runs[run](qkv_TX, *rest)
    qkv_TX = qkv_TX.clone()
    qkv_TX[2, 40] = float("nan")
    broken = spec.runs[run](qkv_TX, *rest)
    before_T, scale_T = (out[3].cpu().flatten().view(torch.float16) for out in (whole, broken))
    assert torch.isfinite(before_T).all()
    assert torch.isfinite(scale_T).logical_not().nonzero().flatten().tolist() == [2]
