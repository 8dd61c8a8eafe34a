"""The canonical form: what a scheme may be, what a weight must hold, and what it stands for."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from quant.rtn import quantize
from quant.scheme import BLOCK, FP8, FP8_ROWS, ONLINE, Activations, QuantWeight, Scheme, fuse

N, K = 6, 64
FP8_CHANNEL = Scheme(8, activations=FP8_ROWS, values="fp8")
FP8_BLOCK = Scheme(8, activations=Activations("fp8", block=True), values="fp8", block=True)
STATIC = Scheme(8, activations=Activations("int8", dynamic=False, symmetric=False))
PROGRESSIVE = Scheme(4, 16, progressive=True)


def progressive(n: int = N) -> QuantWeight:
    g = torch.Generator().manual_seed(n)
    codes = torch.randint(-8, 8, (n, K), generator=g, dtype=torch.int8)
    step = torch.randint(1, 8, (n, 4), generator=g, dtype=torch.int8)
    offset = torch.randint(-60, 60, (n, 4), generator=g, dtype=torch.int16)
    return QuantWeight(
        PROGRESSIVE, codes, torch.rand(n, 1, generator=g), step_NQ=step, offset_NQ=offset
    ).check()


def block(n: int, k: int) -> QuantWeight:
    scale = torch.rand(-(-n // BLOCK), -(-k // BLOCK))
    return QuantWeight(FP8_BLOCK, torch.randn(n, k).to(FP8), scale).check()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bits": 3}, "bits must be 4 or 8"),
        ({"bits": 8, "group_size": 32}, "one scale a channel"),
        ({"bits": 4, "values": "fp8"}, "8 bits"),
        ({"bits": 8, "block": True}, "block scales are for fp8"),
        ({"bits": 4, "progressive": True}, "groups"),
        ({"bits": 8, "activations": FP8_ROWS}, "of one kind"),
        ({"bits": 8, "values": "fp8"}, "of one kind"),
        (
            {"bits": 8, "values": "fp8", "block": True, "activations": FP8_ROWS},
            "scale for 128 columns",
        ),
        ({"bits": 8, "values": "fp4"}, "int or fp8"),
    ],
)
def test_schemes_that_are_none(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"dtype": "int4"},
        {"dtype": "fp8", "symmetric": False},
        {"dtype": "int8", "block": True},
        {"dtype": "fp8", "dynamic": False, "block": True},
    ],
)
def test_activations_that_are_none(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="activations"):
        Activations(**keys)


def test_values_of_every_form() -> None:
    p = progressive()
    row, col = 3, 37
    code, step = int(p.codes_NK[row, col]), int(p.step_NQ[row, col // 16])
    want = (code * step - int(p.offset_NQ[row, col // 16])) * float(p.scale_NQ[row, 0])
    assert float(p.dequantize()[row, col]) == pytest.approx(want, rel=1e-6)

    b = block(200, 300)
    assert float(b.dequantize()[199, 130]) == float(b.codes_NK[199, 130].float() * b.scale_NQ[1, 1])

    w = torch.randn(N, K)
    f = quantize(w, FP8_CHANNEL).check()
    error = (f.dequantize() - w).abs()
    # half a step of three bits of mantissa; below the smallest normal, half of the smallest subnormal
    assert bool((error <= (w.abs() / 16).maximum(f.scale_NQ * 2.0**-10)).all())
    assert bool((error > 0).any())


def test_columns_in_another_order() -> None:
    w, order = torch.randn(N, K), torch.randperm(K)
    q = quantize(w[:, order], Scheme(4, 16))
    turned = replace(q, order_K=order).check()
    assert torch.equal(turned.dequantize()[:, order], q.dequantize())
    with pytest.raises(ValueError, match="permutation"):
        replace(q, order_K=torch.zeros(K, dtype=torch.int64)).check()


def test_what_a_weight_must_hold() -> None:
    w, p = quantize(torch.randn(N, K), Scheme(8)), progressive()
    zeros, f = quantize(torch.randn(N, K), Scheme(4, 16, False)), quantize(torch.randn(N, K), FP8_CHANNEL)
    wrong: list[tuple[QuantWeight, str]] = [
        (replace(w, scheme=STATIC), "input scale must be given"),
        (replace(w, scheme=STATIC, input_scale=0.5), "zero point must be given"),
        (replace(w, scheme=STATIC, input_scale=-1.0, input_zero=3), "above 0"),
        (replace(w, scheme=STATIC, input_scale=1e-40, input_zero=3), "above 0"),
        (replace(w, scheme=STATIC, input_scale=1e38, input_zero=3), "to 65504, got 1e"),
        (replace(w, scheme=STATIC, input_scale=0.5, input_zero=300), "an int8"),
        (replace(w, scale_NQ=w.scale_NQ * 1e38), "scales must be at most 65504, got"),
        (replace(w, scale_NQ=w.scale_NQ * 0), "all scales are 0, but not all codes are"),
        (replace(zeros, scale_NQ=zeros.scale_NQ * 0), "all scales are 0"),
        (replace(f, scale_NQ=f.scale_NQ * 0), "all scales are 0"),
        (replace(w, input_scale=0.5), "input scale must be absent"),
        (replace(w, step_NQ=p.step_NQ, offset_NQ=p.offset_NQ), "belong to progressive"),
        (replace(p, step_NQ=None), "belong to progressive"),
        (replace(p, step_NQ=p.step_NQ[:, :2]), "steps must be"),
        (replace(p, offset_NQ=p.offset_NQ + 200), "must be an int8"),
        (replace(block(200, 300), scale_NQ=torch.ones(2, 2)), "scales must be"),
        (replace(quantize(torch.randn(N, K), FP8_CHANNEL), codes_NK=torch.full((N, K), float("nan")).to(FP8)), "finite"),
    ]  # fmt: skip
    for weight, message in wrong:
        with pytest.raises(ValueError, match=message):
            weight.check()
    replace(w, scheme=STATIC, input_scale=0.5, input_zero=3).check()
    # a matrix of zeros is one, and so is one of the codes that mean it
    replace(w, scale_NQ=w.scale_NQ * 0, codes_NK=w.codes_NK * 0).check()
    assert zeros.zero_NQ is not None
    nothing = zeros.zero_NQ.repeat_interleave(16, 1)
    replace(zeros, scale_NQ=zeros.scale_NQ * 0, codes_NK=nothing).check()
    replace(f, scale_NQ=f.scale_NQ * 0, codes_NK=torch.zeros(N, K).to(FP8)).check()


@pytest.mark.parametrize("parts", [(progressive(3), progressive(5)), (block(128, 64), block(40, 64))])
def test_fused_is_stacked(parts: tuple[QuantWeight, ...]) -> None:
    fused = fuse(parts)
    assert fused is not None
    assert torch.equal(fused.check().dequantize(), torch.cat([p.dequantize() for p in parts]))


def test_what_does_not_fuse() -> None:
    w = quantize(torch.randn(N, K), Scheme(8))
    static = replace(w, scheme=STATIC, input_scale=0.5, input_zero=3)
    assert fuse((static, replace(static, input_scale=0.25))) is None
    assert fuse((static, replace(static, input_zero=4))) is None
    assert fuse((w, replace(w, order_K=torch.randperm(K)))) is None
    assert fuse((block(40, 64), block(128, 64))) is None, "a block of the second would begin inside one"


def test_names_say_what_runs() -> None:
    assert {ONLINE[name].name for name in ONLINE} == {"w8a8-int8", "w8a8-fp8", "w4a8-int8", "w4a8-fp8"}
    assert Scheme(4, 128, activations=None).name == "w4a16"
    assert "progressive" in str(PROGRESSIVE)
    assert "128x128" in str(FP8_BLOCK)
    assert "static int8 with zero points" in str(STATIC)
