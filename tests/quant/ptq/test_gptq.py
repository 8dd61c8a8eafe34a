"""GPTQ against the textbook's algorithm with an explicit inverse, and what refining promises."""

import itertools

import pytest
import torch
from torch import Tensor

from quant.ptq.gptq import Rounded, gptq, refine
from quant.ptq.grid import Grid, plain_grid
from quant.ptq.weight import Products, matched
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
