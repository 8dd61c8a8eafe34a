"""Linear over every scheme: its arithmetic is the integer one, and its activations are truly quantized.

Logits cannot tell whether activations were ever quantized (the difference drowns in rounding noise), so the operator
is asked: inputs that differ by less than one quantum must give equal outputs, and a weight-only path must not pass.
"""

import pytest
import torch
from torch import Tensor

from kernels.gemm_w4a8 import prepare_w4a8
from kernels.gemm_w8a8 import prepare_w8a8
from kernels.linear import prepare_linear
from kernels.quant_rows import quant_rows
from minserve.linear import Linear, Prepared
from quant.rtn import quantize
from quant.scheme import QuantWeight, Scheme
from tests.close import errors

T, K, N = 5, 128, 48
SCHEMES = {
    "w8a8": Scheme(8),
    "w4a8-channel": Scheme(4),
    "w4a8-group": Scheme(4, 32),
    "w4a8-zeros": Scheme(4, 32, False),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def prepare(w: QuantWeight, bias: Tensor | None = None) -> Prepared:
    if w.scheme.bits == 8:
        return prepare_w8a8(w.codes_NK, w.scale_NQ[:, 0].contiguous(), bias)
    return prepare_w4a8(w.codes_NK, w.scale_NQ, w.zero_NQ, bias)


def weight(scheme: Scheme, seed: int = 0, rows: int = N) -> QuantWeight:
    return quantize(torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)), scheme)


def truth(x_TK: Tensor, w: QuantWeight, bias: Tensor | None) -> Tensor:
    """The definition in fp64: quantize the rows, multiply integers, scale."""
    rows = quant_rows(x_TK)
    y = (rows.codes_TD.double() * rows.scale_T.double()[:, None]) @ w.dequantize().double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integer_arithmetic(scheme: str, has_bias: bool, dtype: torch.dtype) -> None:
    w = weight(SCHEMES[scheme])
    bias = torch.randn(N).to(dtype) if has_bias else None
    linear = Linear([prepare(w, bias)], dtype)
    x_TK = torch.randn(T, K).to(dtype)
    y = linear(x_TK)
    assert linear.wants == torch.int8
    assert y.dtype == dtype
    want = truth(x_TK, w, bias)
    assert errors(y, want).worst < {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    rows = quant_rows(x_TK)
    assert torch.equal(linear(rows.codes_TD, rows.scale_T), y), "codes given and codes made here differ"


def nearby_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two inputs, every element but the largest apart by at least 4 ulp and by less than one quantum."""
    quantum = 0.125
    codes_TK = torch.randint(2, 14, (T, K), generator=torch.Generator().manual_seed(3)).float()
    low, high = (codes_TK - 0.25) * quantum, (codes_TK + 0.25) * quantum
    low[:, 0] = high[:, 0] = 127 * quantum
    low, high = low.to(dtype), high.to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    ulps = high[:, 1:].contiguous().view(bits) - low[:, 1:].contiguous().view(bits)
    assert int(ulps.min()) >= 4, f"{int(ulps.min())} ulp apart only"
    assert float((high - low).max()) < quantum
    return low, high


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_activations_are_truly_quantized(scheme: str, dtype: torch.dtype) -> None:
    low, high = nearby_inputs(dtype)
    w = weight(SCHEMES[scheme])
    linear = Linear([prepare(w)], dtype)
    assert torch.equal(linear(low), linear(high))
    # the same weights without quantized activations do not pass this test
    weight_only = Linear([prepare_linear(w.dequantize().to(dtype), None)], dtype)
    assert not torch.equal(weight_only(low), weight_only(high))
    # and a whole quantum is seen
    assert not torch.equal(linear(low), linear((high + 0.125).to(dtype)))


def test_parts_of_different_schemes_run_one_by_one() -> None:
    a, b = weight(Scheme(8), 1), weight(Scheme(4, 32), 2, 16)
    plain = torch.randn(8, K)
    x_TK = torch.randn(T, K)
    rows = quant_rows(x_TK)
    alone = [Linear([p], torch.float32)(x_TK) for p in (prepare(a), prepare(b), prepare_linear(plain, None))]
    mixed = Linear([prepare(a), prepare(b), prepare_linear(plain, None)], torch.float32)
    assert mixed.wants is None
    assert mixed.out_features == N + 16 + 8
    assert torch.equal(mixed(x_TK), torch.cat(alone, dim=1))
    with pytest.raises(AssertionError, match="wants None"):
        mixed(rows.codes_TD, rows.scale_T)
    both = Linear([prepare(a), prepare(b)], torch.float32)
    assert both.wants == torch.int8
    assert torch.equal(both(rows.codes_TD, rows.scale_T), torch.cat(alone[:2], dim=1))


@pytest.mark.parametrize("scheme", [*SCHEMES, "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_rows_do_not_depend_on_their_neighbours(scheme: str, dtype: torch.dtype) -> None:
    w = weight(SCHEMES.get(scheme, Scheme(8)))
    part = prepare_linear(w.dequantize().to(dtype), None) if scheme == "plain" else prepare(w)
    linear = Linear([part], dtype)
    x_TK = torch.randn(70, K).to(dtype)
    whole = linear(x_TK, deterministic=True)
    for cut in (1, 3, 17, 64):
        pieces = [linear(piece, deterministic=True) for piece in x_TK.split(cut)]
        assert torch.equal(torch.cat(pieces), whole), f"rows in pieces of {cut}"


def test_fp8_weights_want_fp8_rows() -> None:
    x_TK, w_NK = torch.randn(T, K), torch.randn(N, K)
    fp8, int8 = (prepare_w8a8(*quant_rows(w_NK, dtype)) for dtype in (torch.float8_e4m3fn, torch.int8))
    linear = Linear([fp8], torch.float32)
    assert linear.wants == torch.float8_e4m3fn
    rows = quant_rows(x_TK, torch.float8_e4m3fn)
    y = linear(x_TK)
    assert torch.equal(linear(*rows), y), "codes given and codes made here differ"
    stored = (rows.codes_TD.double() * rows.scale_T.double()[:, None]) @ (
        fp8.codes.double() * fp8.scale_N.double()[:, None]
    ).t()
    assert errors(y, stored).worst < 1e-5
    both = Linear([fp8, int8], torch.float32)
    assert both.wants is None
    assert torch.equal(both(x_TK), torch.cat([y, Linear([int8], torch.float32)(x_TK)], dim=1))
    with pytest.raises(AssertionError, match="wants"):
        linear(rows.codes_TD.to(torch.int8), rows.scale_T)
