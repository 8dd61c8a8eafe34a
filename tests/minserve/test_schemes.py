"""Every scheme as an operator: integers exactly as int64 has them, and activations that are truly rounded.

The codes of each weight are drawn, not made by a quantizer, and scales are powers of two, so that nothing is lost outside
of the integers: equality is exact.  `twins` lie in the same quantum everywhere; weight-only arithmetic tells them apart.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import backend
from minserve import prepare
from minserve.linear import Adjusted, Linear
from minserve.prepare import prepare_quantized
from quant.rtn import quantize
from quant.scheme import FP8, FP8_ROWS, INT8_ROWS, Activations, QuantWeight, Scheme
from tests.close import errors
from tests.quantized import MIN_ULPS, ulps_apart

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, K, N, GROUP = 5, 128, 33, 32  # K is one block, and four groups
ASYM = Activations("int8", symmetric=False)
STATIC = Activations("int8", dynamic=False)
STATIC_ASYM = Activations("int8", dynamic=False, symmetric=False)
STATIC_FP8 = Activations("fp8", dynamic=False)
FP8_BLOCKS = Activations("fp8", block=True)
W8, FP8_W = Scheme(8), Scheme(8, activations=FP8_ROWS, values="fp8")
G4 = Scheme(4, GROUP)
QOQ = Scheme(4, GROUP, False, progressive=True)
ORDER = {"order": True}
# name: scheme, and what is special about the weight
SCHEMES: dict[str, tuple[Scheme, dict[str, bool]]] = {
    "w8a8": (W8, {}),
    "w8a8-static": (replace(W8, activations=STATIC), {}),
    "w8a8-static-zeros": (replace(W8, activations=STATIC_ASYM), {}),
    "w8a8-rows-with-zeros": (replace(W8, activations=ASYM), {}),
    "w8a8-order": (W8, ORDER),
    "fp8": (FP8_W, {}),
    "fp8-static": (replace(FP8_W, activations=STATIC_FP8), {}),
    "fp8-block": (Scheme(8, activations=FP8_BLOCKS, values="fp8", block=True), {}),
    "w4a8-channel": (Scheme(4), {}),
    "w4a8-channel-zeros": (Scheme(4, symmetric=False), {}),
    "w4a8-group": (G4, {}),
    "w4a8-group-zeros": (Scheme(4, GROUP, False), {}),
    "w4a8-group-order": (G4, ORDER),
    "w4a8-group-static-zeros": (replace(G4, activations=STATIC_ASYM), {}),
    "w4a8-zeros-rows-with-zeros-order": (Scheme(4, GROUP, False, ASYM), ORDER),
    "w4a8-fp8": (replace(G4, activations=FP8_ROWS), {}),
    "w4a8-fp8-zeros": (Scheme(4, GROUP, False, FP8_ROWS), {}),
    "w4a8-fp8-static-order": (replace(G4, activations=STATIC_FP8), ORDER),
    "progressive": (QOQ, {}),
    "progressive-rows-with-zeros": (replace(QOQ, activations=ASYM), {}),
    "progressive-fp8": (replace(QOQ, activations=FP8_ROWS), {}),
    "progressive-wide": (QOQ, {"wide": True}),
}


def drawn(scheme: Scheme, order: bool = False, wide: bool = False) -> QuantWeight:
    """Random codes under scales of 1, 2 and 1/2; inputs are static at 1/128 and zero 7.  `wide`: offsets below 0."""
    g = torch.Generator().manual_seed(3)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.int8)

    Q = 1 if scheme.group_size is None else K // scheme.group_size
    codes_NK = integers(scheme.low, scheme.high + 1, N, K)
    more: dict[str, Any] = {}
    if scheme.values == "fp8":
        codes_NK = (integers(-15, 16, N, K).float() / 4).to(FP8)
    if scheme.progressive:
        step_NQ = integers(1, 9, N, Q)
        offset_NQ = (integers(-7, 7, N, Q) * step_NQ).short()
        if wide:
            step_NQ, offset_NQ = torch.ones_like(step_NQ), integers(-60, -20, N, Q).short()
        more = {"step_NQ": step_NQ, "offset_NQ": offset_NQ}
    elif not scheme.symmetric:
        more = {"zero_NQ": integers(-8, 8, N, Q)}
    shape = (1, 1) if scheme.block else (N, 1) if scheme.progressive else (N, Q)
    scale_NQ = 2.0 ** integers(-1, 2, *shape).float()
    rows = scheme.activations
    static = rows is not None and not rows.dynamic
    weight = QuantWeight(
        scheme,
        codes_NK,
        scale_NQ,
        order_K=torch.randperm(K, generator=g) if order else None,
        input_scale=1 / 128 if static else None,
        input_zero=7 if rows is not None and static and not rows.symmetric else None,
        **more,
    )
    return weight.check()


def on_device(
    weight: QuantWeight, bias_N: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Linear:
    bias_N = None if bias_N is None else bias_N.to(DEVICE)
    return Linear([prepare_quantized(weight.to(DEVICE), bias_N, dtype).part], dtype)


def grid(scheme: Scheme) -> Tensor:
    """int64 [T, K]: x in units of 1/128 that the rows' codes hold exactly, whatever kind of rows they are.

    Ends are the row's own: from -100 to 155 with zeros, else +-127; e4m3 rows have +-448 and few bits a value.
    """
    g = torch.Generator().manual_seed(5)
    rows = scheme.activations
    if rows is not None and rows.dtype == "fp8":
        x_TK = torch.randint(4, 8, (T, K), generator=g) * 2 ** torch.randint(0, 3, (T, K), generator=g)
        x_TK *= torch.randint(0, 2, (T, K), generator=g) * 2 - 1
        x_TK[:, 0] = 448
        return x_TK
    low, high = (-90, 110) if rows is not None and not rows.symmetric else (-127, 128)
    x_TK = torch.randint(low, high, (T, K), generator=g)
    x_TK[:, 0] = 127
    if rows is not None and not rows.symmetric and rows.dynamic:
        x_TK[:, 0], x_TK[:, 1] = 155, -100
    if rows is not None and not rows.symmetric and not rows.dynamic:
        x_TK[:, 0] = 120
    return x_TK


def oracle(x_TK: Tensor, w: QuantWeight) -> Tensor:
    """int64 sums of integers a group, then scales, all exact in float64: x in units of 1/128."""
    Q = w.num_groups
    order_K = torch.arange(K) if w.order_K is None else w.order_K
    x_QTG = x_TK[:, order_K].view(T, Q, -1).transpose(0, 1)
    if w.scheme.values == "fp8":
        values_NK, unit = (w.codes_NK.float() * 512).long(), 512
    else:
        values_NK, unit = (w.integers().long() if w.step_NQ is not None else w.codes_NK.long()), 1
    values_NQG = values_NK.view(N, Q, -1)
    if w.zero_NQ is not None:
        values_NQG = values_NQG - w.zero_NQ.long()[..., None]
    # int64 has no matmul of batches everywhere: sum of products
    sums_TNQ = (x_QTG.permute(1, 0, 2)[:, None] * values_NQG[None]).sum(-1)
    return (sums_TNQ.double() * w.scale_NQ.double()).sum(-1) / unit / 128


@pytest.mark.parametrize("where", ["torch", "triton"])
@pytest.mark.parametrize("name", SCHEMES)
def test_integers_are_exact(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, special = SCHEMES[name]
    weight = drawn(scheme, **special)
    if where == "triton":
        monkeypatch.setattr(backend, "runs_triton", lambda device: True)
    bias_N = torch.randint(-9, 9, (N,), generator=torch.Generator().manual_seed(1)).float()
    x_TK = grid(scheme)
    want = oracle(x_TK, weight) + bias_N.double()
    y = on_device(weight, bias_N)((x_TK / 128).to(DEVICE)).cpu()
    assert torch.equal(y.double(), want)


def twins(scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x on the grid, and every element but the ends moved by less than half a quantum and by at least 4 ulp."""
    rows = scheme.activations
    x_TK = grid(scheme)
    if rows is None or rows.dtype == "int8":
        ends = (x_TK == 155) | (x_TK == -100) | (x_TK.abs() == 127)
        x_TK = torch.where(ends, x_TK, x_TK % 8 + 5)
    else:
        ends = x_TK == 448
        # 5 to 7 times a power of two: both neighbours on the grid are an eighth of the power of two above away
        x_TK = torch.where(ends | (x_TK.abs().log2() % 1 != 0), x_TK, x_TK + x_TK // 4)
    a = (x_TK / 128).to(dtype)
    b = torch.where(ends, a.float(), a.float() * (1 + 2**-5)).to(dtype)
    assert bool((ulps_apart(a, b)[~ends] >= MIN_ULPS).all())
    return a.to(DEVICE), b.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_activations_are_truly_quantized(name: str, dtype: torch.dtype) -> None:
    scheme, special = SCHEMES[name]
    weight = drawn(scheme, **special)
    a, b = twins(scheme, dtype)
    linear = on_device(weight, dtype=dtype)
    assert torch.equal(linear(a), linear(b))
    assert not torch.equal(linear(a), linear((b * 1.5).to(dtype))), "blind to more than a quantum"
    plain = replace(weight, scheme=replace(scheme, activations=None), input_scale=None, input_zero=None)
    weight_only = on_device(plain, dtype=dtype)
    assert not torch.equal(weight_only(a), weight_only(b)), "the check cannot tell the two apart"


def test_weight_only_layers_are_dense() -> None:
    for scheme in (G4, Scheme(4, GROUP, False), W8, FP8_W, QOQ):
        weight = drawn(replace(scheme, activations=None), order=True)
        ready = prepare_quantized(weight, None, torch.float32)
        x_TK = torch.randn(T, K)
        y = Linear([ready.part], torch.float32)(x_TK)
        torch.testing.assert_close(y, x_TK @ weight.dequantize().t(), rtol=1e-5, atol=1e-4)
        assert ready.kernel == "linear"
        assert ready.note == "weight-only: dequantized to float32 at load"
        assert ready.part.nbytes == 4 * N * K


@pytest.mark.parametrize("name", ["fp8-static", "fp8-block", "w4a8-fp8-zeros"])
def test_a_gpu_without_fp8_runs_the_weights_and_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, special = SCHEMES[name]
    weight = drawn(scheme, **special)
    monkeypatch.setattr(prepare, "lacks_fp8", lambda device: True)
    ready = prepare_quantized(weight, None, torch.float32)
    assert (ready.kernel, ready.part.nbytes) == ("linear", 4 * N * K)
    assert (
        ready.note
        == "a GPU before sm_89 has no fp8: activations are not quantized: dequantized to float32 at load"
    )
    x_TK = torch.randn(T, K)
    want = x_TK @ weight.dequantize().t()
    torch.testing.assert_close(Linear([ready.part], torch.float32)(x_TK), want, rtol=1e-5, atol=1e-4)


def test_wide_offsets_run_as_the_int8_they_are() -> None:
    ready = prepare_quantized(drawn(QOQ, wide=True), None, torch.float32)
    assert ready.kernel == "gemm_w8a8"
    assert "int8 weights, of the same value" in ready.note
    assert prepare_quantized(drawn(QOQ), None, torch.float32).kernel == "gemm_w4a8"


@pytest.mark.parametrize(
    "name", ["w4a8-fp8-zeros", "fp8-block", "w8a8-rows-with-zeros", "w8a8-static", "w4a8-group-order"]
)
def test_deterministic_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    scheme, special = SCHEMES[name]
    linear = on_device(drawn(scheme, **special), dtype=torch.bfloat16)
    x_TK = torch.randn(70, K, generator=torch.Generator().manual_seed(2)).bfloat16().to(DEVICE)
    whole = linear(x_TK, deterministic=True)
    for cut in (1, 3, 17):
        pieces = [linear(piece, deterministic=True) for piece in x_TK.split(cut)]
        assert torch.equal(torch.cat(pieces), whole), f"rows in pieces of {cut}"


def test_who_hands_over_codes() -> None:
    """Orders and zeros of weights leave the rows to whoever normed them; static rows and zeros of rows do not."""
    wants = {name: on_device(drawn(scheme, **special)).wants for name, (scheme, special) in SCHEMES.items()}
    own = {name for name, dtype in wants.items() if dtype is None}
    assert own == {name for name in SCHEMES if "static" in name or "rows-with" in name or "block" in name}
    assert wants["w8a8-order"] == wants["progressive-wide"] == torch.int8
    assert wants["w4a8-fp8-zeros"] == wants["progressive-fp8"] == FP8
    ordered = drawn(G4)
    identity = replace(ordered, order_K=torch.arange(K))
    assert not isinstance(prepare_quantized(identity, None, torch.float32).part, Adjusted)


def test_real_weights_under_rows_of_every_kind() -> None:
    """What the engine computes is what the definition says, in float64, for weights a quantizer made."""
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(6))
    x_TK = torch.randn(T, K, generator=torch.Generator().manual_seed(7)) + 0.7
    for rows in (INT8_ROWS, ASYM, STATIC, STATIC_ASYM, FP8_ROWS, STATIC_FP8):
        for base in (
            Scheme(4, GROUP, False),
            Scheme(8, values="fp8" if rows.dtype == "fp8" else "int", activations=None),
        ):
            scheme = replace(base, activations=rows)
            weight = quantize(w_NK, scheme)
            if not rows.dynamic:
                limit = 448 if rows.dtype == "fp8" else 127
                weight = replace(weight, input_scale=4.0 / limit, input_zero=None if rows.symmetric else -40)
            rounded_TK = rounded(x_TK.double(), weight)
            want = rounded_TK @ weight.dequantize().double().t()
            assert errors(on_device(weight)(x_TK.to(DEVICE)).cpu(), want).worst < 1e-5, scheme


def rounded(x_TK: Tensor, w: QuantWeight) -> Tensor:
    """The rows after their rounding, by the definitions of quant/scheme.py."""
    rows = w.scheme.activations
    assert rows is not None
    limit, zero = (448.0, 0.0) if rows.dtype == "fp8" else (127.0, float(w.input_zero or 0))
    scale: Any = w.input_scale
    if rows.dynamic and rows.symmetric:
        scale = x_TK.abs().amax(1, keepdim=True) / limit
    elif rows.dynamic:
        low, high = x_TK.amin(1, keepdim=True).clamp_max(0), x_TK.amax(1, keepdim=True).clamp_min(0)
        scale = (high - low) / 255
        zero = (-128 - low / scale).round().clamp(-128, 127)
    scaled = x_TK / scale
    if rows.dtype == "fp8":
        return scaled.clamp(-448, 448).float().to(FP8).double() * scale
    return ((scaled.round() + zero).clamp(-128, 127) - zero) * scale
