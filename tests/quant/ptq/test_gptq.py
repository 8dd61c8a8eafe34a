"""GPTQ against the textbook's algorithm with an explicit inverse, and what refining promises."""

import itertools

import pytest
import torch
from torch import Tensor

from quant.ptq.gptq import Rounded, gptq, refine
from quant.ptq.grid import Grid, plain_grid
from quant.ptq.recipe import parse
from quant.ptq.weight import Products, matched, quantize_weight
from tests.quant.ptq.test_grid import ROUNDINGS

N, K = 16, 192


def case(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of correlated inputs of different sizes."""
    g = torch.Generator().manual_seed(seed)
    x_TK = torch.randn(600, 40, generator=g) @ torch.randn(40, K, generator=g) / 6
    x_TK = (x_TK + torch.randn(600, K, generator=g) * 0.5) * torch.rand(K, generator=g).exp()
    return torch.randn(N, K, generator=g) * 0.05, x_TK.T @ x_TK


def loss(w_NK: Tensor, rounded: Rounded, h_KK: Tensor) -> float:
    e_NK = (rounded.grid.value(rounded.codes_NK) - w_NK).double()
    return float(((e_NK @ h_KK.double()) * e_NK).sum())


def textbook(w_NK: Tensor, grid: Grid, h_KK: Tensor, order: list[int], damp: float = 0.01) -> Tensor:
    """Column by column, every error spread over the rest through the Cholesky factor of the inverse; float64."""
    h = h_KK.double()[order][:, order]
    h += damp * h.diagonal().mean() * torch.eye(K)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, codes = w_NK.double()[:, order], torch.empty(N, K)
    lattices, width = grid.turned(), K // grid.num_groups
    for i, k in enumerate(order):
        at = lattices[k // width]
        codes[:, k] = at.nearest(w[:, i].float())
        error = (w[:, i] - at.value(codes[:, k]).double()) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return codes


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_equals_the_textbook(name: str, actorder: bool) -> None:
    w_NK, h_KK = case()
    grid = plain_grid(w_NK, ROUNDINGS[name])
    ours = gptq(w_NK, grid, h_KK, actorder=actorder)
    order = h_KK.diagonal().argsort(descending=True, stable=True) if actorder else torch.arange(K)
    theirs = textbook(w_NK, grid, h_KK, order.tolist())
    # a tie that falls to the other side moves the codes after it too: a few rows may differ, never many
    assert float((ours.codes_NK != theirs).any(1).float().mean()) <= 0.2
    assert loss(w_NK, ours, h_KK) == pytest.approx(loss(w_NK, Rounded(theirs, grid), h_KK), rel=0.02)
    assert not ours.fallback


@pytest.mark.parametrize("name", ROUNDINGS)
def test_beats_rounding_and_is_legal(name: str) -> None:
    w_NK, h_KK = case()
    grid = plain_grid(w_NK, ROUNDINGS[name])
    plain = loss(w_NK, Rounded(grid.nearest(w_NK), grid), h_KK)
    ours = gptq(w_NK, grid, h_KK, actorder=True)
    ours.grid.weight(ours.codes_NK)  # checks
    assert loss(w_NK, ours, h_KK) < 0.6 * plain


def test_uncorrelated_inputs_round_to_nearest() -> None:
    w_NK, _ = case()
    grid = plain_grid(w_NK, ROUNDINGS["group"])
    for actorder in (False, True):
        codes = gptq(w_NK, grid, torch.diag(torch.rand(K) + 0.5), actorder=actorder).codes_NK
        assert torch.equal(codes, grid.nearest(w_NK))


@pytest.mark.parametrize("name", ROUNDINGS)
def test_refining_only_lowers_the_loss(name: str) -> None:
    w_NK, h_KK = case(1)
    damped = h_KK + 0.01 * h_KK.diagonal().mean() * torch.eye(K)
    grid = plain_grid(w_NK, ROUNDINGS[name])
    start = gptq(w_NK, grid, h_KK, actorder=True)
    losses = [loss(w_NK, start, damped)]
    for sweeps in (1, 3):
        after = refine(w_NK, start, h_KK, sweeps=sweeps)
        after.grid.weight(after.codes_NK)
        losses.append(loss(w_NK, after, damped))
    assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(losses)), losses
    assert losses[1] < losses[0]
    fixed = refine(w_NK, start, h_KK, scales=False)
    assert torch.equal(fixed.grid.scale_NQ, grid.scale_NQ)
    if name == "fireq":
        scaled = after.grid.scale_NQ * after.grid.ruler.factor
        assert torch.equal(scaled.to(torch.float8_e4m3fn).float(), scaled)


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    w_NK, h_KK = case()
    h_KK[7], h_KK[:, 7] = 0, 0
    w_NK[:, 7] = 1e4  # would ruin everything it could spread to
    grid = plain_grid(case()[0], ROUNDINGS["group"])
    ours = refine(w_NK, gptq(w_NK, grid, h_KK), h_KK)
    assert not ours.grid.value(ours.codes_NK)[:, 7].any()
    assert loss(w_NK, ours, h_KK) < loss(case()[0], Rounded(grid.nearest(case()[0]), grid), h_KK)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda h: torch.where(torch.eye(K).bool(), h, 9 * h.diagonal().mean()), "not positive definite"),
        (lambda h: torch.full_like(h, float("nan")), "not finite"),
        (torch.zeros_like, "all 0"),
    ],
)
def test_falls_back_to_rounding_and_says_why(spoil, reason: str) -> None:
    w_NK, h_KK = case()
    grid = plain_grid(w_NK, ROUNDINGS["group"])
    ours = gptq(w_NK, grid, spoil(h_KK))
    assert reason in ours.fallback
    assert torch.equal(ours.codes_NK, grid.nearest(w_NK))


def test_bad_damping() -> None:
    w_NK, h_KK = case()
    with pytest.raises(ValueError, match=r"damp must be in \(0, 1\), got 0"):
        gptq(w_NK, plain_grid(w_NK, ROUNDINGS["group"]), h_KK, damp=0)


def test_matching_makes_up_for_changed_inputs() -> None:
    """Inputs that lost a part of themselves: what can be had of it from the rest is taken up by the weights."""
    g = torch.Generator().manual_seed(3)
    r_TK = torch.randn(4000, 8, generator=g) @ torch.randn(8, 24, generator=g)
    x_TK = r_TK * torch.linspace(0.5, 1.2, 24) + torch.randn(4000, 24, generator=g) * 0.3
    w_NK = torch.randn(5, 24, generator=g)
    products = Products(x_TK.T @ x_TK / 4000, (r_TK - x_TK).T @ x_TK / 4000)

    def error(strength: float) -> float:
        moved = matched(w_NK, products, damp=1e-4, strength=strength)
        return float((x_TK @ moved.T - r_TK @ w_NK.T).square().mean())

    assert torch.equal(matched(w_NK, products, damp=0.1, strength=0.0), w_NK)
    assert error(1.0) < error(0.5) < 0.5 * error(0.0)
    best = torch.linalg.lstsq(x_TK, r_TK @ w_NK.T).solution.T
    assert error(1.0) == pytest.approx(float((x_TK @ best.T - r_TK @ w_NK.T).square().mean()), rel=0.01)
    unchanged = Products(products.hessian_KK, torch.zeros(24, 24))
    assert torch.equal(matched(w_NK, unchanged, damp=0.1, strength=1.0), w_NK)
    with pytest.raises(ValueError, match=r"damp must be in \(0, 1\) and strength in \[0, 1\], got 0 and 2"):
        matched(w_NK, products, damp=0, strength=2)


BAD_INPUTS = {
    "zero": (torch.zeros(K, K), "all 0"),
    "nan": (torch.full((K, K), float("nan")), "not finite"),
    "inf": (torch.full((K, K), float("inf")), "not finite"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_refining_keeps_what_it_was_given_where_inputs_tell_nothing(bad: str) -> None:
    """All inputs 0 used to make all weights 0."""
    w_NK, _ = case()
    grid = plain_grid(w_NK, ROUNDINGS["group"])
    start = Rounded(grid.nearest(w_NK), grid)
    hessian_KK, reason = BAD_INPUTS[bad]
    after = refine(w_NK, start, hessian_KK)
    assert torch.equal(after.codes_NK, start.codes_NK)
    assert torch.equal(after.grid.scale_NQ, grid.scale_NQ)
    assert reason in after.fallback


HUGE = {"huge": (torch.eye(K) * 1e38, "too large to be added up")}


@pytest.mark.parametrize(
    "steps", ["refine", "match; clip(measure=output); refine", "clip", "match; gptq; refine"]
)
@pytest.mark.parametrize("bad", BAD_INPUTS | HUGE)
def test_bad_inputs_of_a_matrix_leave_it_rounded_by_itself(bad: str, steps: str) -> None:
    w_NK, _ = case()
    hessian_KK, reason = (BAD_INPUTS | HUGE)[bad]
    made = quantize_weight(w_NK, ROUNDINGS["group"], parse(steps), Products(hessian_KK, hessian_KK))
    plain = quantize_weight(
        w_NK, ROUNDINGS["group"], parse("clip(measure=weight)" if "clip" in steps else "rtn"), None
    )
    assert reason in made.note
    assert torch.equal(made.weight.codes_NK, plain.weight.codes_NK)
    assert made.output_error is None
    assert made.weight_error < 0.02


def test_the_output_error_is_that_of_the_matrix_as_it_was() -> None:
    """What `match` makes of a matrix is not what its rounding is measured against."""
    w_NK, h_KK = case()
    drift_KK = 0.05 * h_KK
    made = quantize_weight(
        w_NK, ROUNDINGS["group"], parse("match; gptq"), Products(h_KK / 600, drift_KK / 600)
    )
    e_NK = made.weight.dequantize() - w_NK
    want = float(((e_NK @ h_KK) * e_NK).sum() / ((w_NK @ h_KK) * w_NK).sum())
    assert made.output_error == pytest.approx(want, rel=1e-3)
    assert made.output_error > 0.05**2 / 2


@pytest.mark.parametrize("given", [{"damp": -5.0}, {"damp": float("nan")}, {"sweeps": -1}])
def test_refining_refuses_what_it_cannot_do(given: dict) -> None:
    w_NK, h_KK = case()
    grid = plain_grid(w_NK, ROUNDINGS["group"])
    with pytest.raises(ValueError, match=r"damp must be in \(0, 1\) and sweeps at least 1"):
        refine(w_NK, Rounded(grid.nearest(w_NK), grid), h_KK, **given)
