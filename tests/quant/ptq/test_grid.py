"""Grids and their search: the same codes as plain rounding, legal two-level scales, never a worse error."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant import rtn
from quant.ptq.clip import MEASURES, clipped_grid
from quant.ptq.grid import Rounding, plain_grid
from quant.ptq.progressive import fireq_factor
from quant.scheme import FP8_ROWS, ONLINE, QuantWeight, Scheme

N, K = 24, 256
STEPS = Scheme(4, 64, progressive=True)
ROUNDINGS = {
    "int8": Rounding(Scheme(8)),
    "fp8": Rounding(ONLINE["w8a8-fp8"]),
    "group": Rounding(Scheme(4, 64), torch.bfloat16),
    "seven": Rounding(Scheme(4, 64), divisor=7.0),
    "channel": Rounding(Scheme(4), torch.float16),
    "zeros": Rounding(Scheme(4, 64, symmetric=False)),
    "channel-zeros": Rounding(Scheme(4, symmetric=False)),
    "progressive": Rounding(STEPS, torch.float16),
    "progressive-multiples": Rounding(STEPS, free_offset=False),
    "fireq": Rounding(Scheme(4, 64, activations=FP8_ROWS), fireq=True),
}


def weights(seed: int = 0) -> Tensor:
    """Rows of very different size, one with an outlier, one all zero, one group all of one sign."""
    g = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(N, K, generator=g) * torch.rand(N, 1, generator=g) * 0.05
    w_NK[3, 5], w_NK[4], w_NK[5, :64] = 1.0, 0.0, w_NK[5, :64].abs()
    return w_NK


def rounded(w_NK: Tensor, rounding: Rounding) -> QuantWeight:
    grid = plain_grid(w_NK, rounding)
    return grid.weight(grid.nearest(w_NK))


def squared_error(w_NK: Tensor, q: QuantWeight) -> float:
    return float((q.dequantize() - w_NK).square().sum())


@pytest.mark.parametrize("name", ["int8", "fp8", "group", "channel", "zeros", "channel-zeros"])
def test_the_plain_grid_is_that_of_rounding_to_nearest(name: str) -> None:
    rounding = ROUNDINGS[name]
    ours, plain = rounded(weights(), rounding), rtn.quantize(weights(), rounding.scheme, rounding.scale_dtype)
    live = torch.arange(N) != 4  # what the scale of a row of zeros is does not matter
    assert torch.equal(ours.codes_NK.float()[live], plain.codes_NK.float()[live])
    assert torch.equal(ours.scale_NQ[live], plain.scale_NQ[live])
    assert not ours.dequantize()[4].any()


@pytest.mark.parametrize("name", ROUNDINGS)
def test_value_is_what_the_codes_dequantize_to(name: str) -> None:
    grid = plain_grid(weights(), ROUNDINGS[name])
    codes_NK = grid.nearest(weights())
    torch.testing.assert_close(grid.value(codes_NK), grid.weight(codes_NK).dequantize(), rtol=1e-5, atol=1e-8)
    again = grid.nearest(grid.value(codes_NK))
    torch.testing.assert_close(grid.value(again), grid.value(codes_NK), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["progressive", "progressive-multiples"])
def test_progressive_values_stay_in_int8_even_far_outside_the_range(name: str) -> None:
    w_NK = weights()
    grid = plain_grid(w_NK, ROUNDINGS[name])
    # GPTQ asks for values that no weight had
    for times in (1, 3, -3):
        values = grid.weight(grid.nearest(w_NK * times)).integers()
        assert int(values.min()) >= -128
        assert int(values.max()) <= 127
    assert int(grid.weight(grid.nearest(w_NK)).integers().abs().max()) <= 119 + 9


def test_offsets_that_are_multiples_of_the_step_are() -> None:
    q = rounded(weights(), ROUNDINGS["progressive-multiples"])
    assert not (q.offset_NQ % q.step_NQ).any()
    assert squared_error(weights(), rounded(weights(), ROUNDINGS["progressive"])) < squared_error(
        weights(), q
    )


def test_the_example_that_needs_the_protective_range() -> None:
    """A group from -113 to 120 of an int8 over 127 overflows to 128; over 119 it cannot."""
    row = torch.linspace(-113, 120, 64) / 120
    q = rounded(row[None], Rounding(STEPS))
    assert int(q.integers().max()) <= 127
    assert float(q.scale_NQ) == pytest.approx(1 / 119)


def test_fireq_takes_the_smallest_power_of_two_without_underflow() -> None:
    most = torch.tensor([[7 * 2.0**-12, 0.5]])
    assert fireq_factor(most) == 8.0  # 2^-12 becomes 2^-9
    assert fireq_factor(torch.tensor([[1.0]])) == 1.0
    # 448 would be left before the smallest group is reached: the largest that fits
    assert fireq_factor(torch.tensor([[2.0**-14, 100.0]])) == 4.0
    q = rounded(weights() * 2**-6, ROUNDINGS["fireq"])
    factors = {2.0**i for i in range(15)}
    fit = [
        p for p in factors if torch.equal((q.scale_NQ * p).to(torch.float8_e4m3fn).float(), q.scale_NQ * p)
    ]
    assert fit, "no power of two makes all scales e4m3"


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("name", ROUNDINGS)
def test_clipping_never_costs_what_it_measures(name: str, measure: str) -> None:
    w_NK, rounding = weights(), ROUNDINGS[name]
    x_TK = torch.randn(512, K, generator=torch.Generator().manual_seed(1)) * torch.rand(K).exp()
    h_KK = x_TK.T @ x_TK
    groups = plain_grid(w_NK, rounding).num_groups

    def cost(sides: bool = False, points: int = 1) -> float:
        grid = clipped_grid(w_NK, rounding, h_KK, measure=measure, points=points, sides=sides)
        e_QNg = (grid.value(grid.nearest(w_NK)) - w_NK).view(N, groups, -1).transpose(0, 1)
        h_QKg = h_KK.view(groups, K // groups, groups, K // groups).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        if measure == "weight":
            h_QKg = torch.eye(K // groups).expand_as(h_QKg)
        if measure == "diagonal":
            h_QKg = torch.diag_embed(h_QKg.diagonal(dim1=1, dim2=2))
        return float(torch.einsum("qng,qgh,qnh->", e_QNg, h_QKg, e_QNg))

    plain, searched = cost(), cost(points=20)
    assert searched <= plain * (1 + 1e-5)
    assert cost(points=20, sides=True) <= searched * (1 + 1e-5)
    if ROUNDINGS[name].scheme.bits == 4:
        assert searched < 0.98 * plain


def test_what_cannot_be_rounded() -> None:
    with pytest.raises(ValueError, match="finite"):
        plain_grid(torch.tensor([[float("nan")] * 64]), ROUNDINGS["group"])
    with pytest.raises(ValueError, match="65 columns do not divide into groups of 64"):
        plain_grid(torch.ones(1, 65), ROUNDINGS["group"])
    with pytest.raises(ValueError, match=r"divisor must be one of 7.0, 7.5, 8.0 .* got 6"):
        replace(ROUNDINGS["group"], divisor=6.0)
    with pytest.raises(ValueError, match="is for symmetric int4"):
        replace(ROUNDINGS["zeros"], divisor=7.0)
    with pytest.raises(ValueError, match="FireQ's scales are for symmetric int4"):
        Rounding(Scheme(8), fireq=True)
    with pytest.raises(ValueError, match="measure must be one of weight, diagonal, output, got 'x'"):
        clipped_grid(weights(), ROUNDINGS["group"], measure="x")
    with pytest.raises(ValueError, match="points must be 1 to 1000"):
        clipped_grid(weights(), ROUNDINGS["group"], points=0)
