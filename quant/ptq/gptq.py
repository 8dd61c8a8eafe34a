"""GPTQ (arXiv 2210.17323): round column by column, each allowing for the errors already made, so that outputs agree.

In the form of arXiv 2307.13304 (section 4), which rounds to the same codes with one factorization and no inverse: with
H = R R^T and R upper triangular, column k is rounded at w_k + sum over j < k of (w_j - q_j) R_jk / R_kk.
`refine` then goes over the columns again: each moves to where the error of the outputs is least, the others fixed, and
scales to theirs, which never raises that error.  Cost: N K^2 products a matrix, and as much twice a sweep.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quant.ptq.grid import Grid, Lattice

BLOCK = 128
DAMP = 0.01


class Rounded(NamedTuple):
    """`codes_NK` as floats; `fallback`: why they are those of plain rounding, else empty."""

    codes_NK: Tensor
    grid: Grid
    fallback: str = ""


class Columns(NamedTuple):
    """A matrix turned, [K, N], its columns in the order they are rounded in, with the lattice of each."""

    w_KN: Tensor
    lattices: list[Lattice]


def gptq(
    w_NK: Tensor, grid: Grid, hessian_KK: Tensor, *, damp: float = DAMP, actorder: bool = False
) -> Rounded:
    """Codes of w_NK on `grid`; `hessian_KK` is X^T X of the inputs, times any factor.

    `actorder`: columns with the largest inputs first; groups stay those of neighbouring columns.  Where H has no
    factorization even with ten times the damping, rounds to nearest and says so.
    """
    if not 0 < damp < 1:
        raise ValueError(f"damp must be in (0, 1), got {damp}")
    K = w_NK.shape[1]
    order_K = hessian_KK.diagonal().argsort(descending=True, stable=True) if actorder else torch.arange(K)
    h_KK, w_KN = _prepared(w_NK, hessian_KK, order_K)
    factor_KK, why = _factor(h_KK, damp)
    del h_KK  # of a wide matrix it is the largest thing here
    if factor_KK is None:
        return Rounded(grid.nearest(w_NK), grid, why)
    codes_KN = _round_columns(Columns(w_KN, _lattices(grid, order_K)), factor_KK)
    codes_NK = torch.empty_like(w_NK)
    codes_NK[:, order_K] = codes_KN.t()
    return Rounded(codes_NK, grid)


def _prepared(w_NK: Tensor, hessian_KK: Tensor, order_K: Tensor) -> tuple[Tensor, Tensor]:
    """H and W^T in the order of rounding; inputs that are always 0 cost nothing and keep no weight."""
    h_KK = hessian_KK.float()[order_K][:, order_K]
    w_KN = w_NK.t()[order_K]
    dead_K = h_KK.diagonal() == 0
    w_KN[dead_K] = 0
    return h_KK, w_KN


def _factor(h_KK: Tensor, damp: float) -> tuple[Tensor | None, str]:
    """R of H = R R^T (upper triangular) with its columns divided by its diagonal; or None and the reason."""
    if not bool(torch.isfinite(h_KK).all()):
        return None, "the Hessian is not finite"
    diagonal = h_KK.diagonal()
    mean = diagonal.mean()
    if not mean > 0:
        return None, "the inputs are all 0"
    dead_K = diagonal == 0
    for times in (1, 10):
        # turned around both ways, the lower factor becomes the upper one
        flipped = h_KK.flip(0, 1)
        flipped.diagonal().add_(dead_K.flip(0) * mean + damp * times * mean)
        lower, info = torch.linalg.cholesky_ex(flipped)
        del flipped
        if not info:
            upper = lower.flip(0, 1)
            del lower
            return upper.div_(upper.diagonal().clone()), ""
    return None, f"the Hessian is not positive definite with damp {damp} nor {10 * damp}"


def _lattices(grid: Grid, order_K: Tensor) -> list[Lattice]:
    groups, width = grid.turned(), len(order_K) // grid.num_groups
    return [groups[k // width] for k in order_K.tolist()]


def _round_columns(columns: Columns, r_KK: Tensor) -> Tensor:
    w_KN, lattices = columns
    K = len(w_KN)
    error_KN, codes_KN = torch.zeros_like(w_KN), torch.empty_like(w_KN)
    for start in range(0, K, BLOCK):
        end = min(start + BLOCK, K)
        # what all earlier blocks leave to this one, in one product
        target_BN = torch.addmm(w_KN[start:end], r_KK[:start, start:end].t(), error_KN[:start])
        r_BB = r_KK[start:end, start:end]
        for i in range(end - start):
            k = start + i
            codes_KN[k] = lattices[k].nearest(target_BN[i])
            error_KN[k] = w_KN[k] - lattices[k].value(codes_KN[k])
            target_BN[i + 1 :].addr_(r_BB[i, i + 1 :], error_KN[k])
    return codes_KN


def refine(
    w_NK: Tensor,
    rounded: Rounded,
    hessian_KK: Tensor,
    *,
    sweeps: int = 2,
    scales: bool = True,
    damp: float = DAMP,
) -> Rounded:
    """`sweeps` passes of coordinate descent over the codes and, where `scales`, of least squares over the scales.

    Starts from any rounding; what it minimizes is e (H + damp mean) e of the error e of each row.  That rounding stays
    as it is where H is not finite or all 0, and the result says so.
    """
    if not 0 < damp < 1 or sweeps < 1:
        raise ValueError(f"damp must be in (0, 1) and sweeps at least 1, got {damp} and {sweeps}")
    K = w_NK.shape[1]
    whole = float(hessian_KK.diagonal().sum())
    if not whole > 0 or not bool(torch.isfinite(hessian_KK).all()):
        why = "the inputs are all 0" if whole == 0 else "the Hessian is not finite"
        return rounded._replace(fallback=rounded.fallback or why)
    h_KK, w_KN = _prepared(w_NK, hessian_KK, torch.arange(K))
    h_KK.diagonal().add_(damp * h_KK.diagonal().mean().clamp_min(1e-30))
    codes_KN, grid = rounded.codes_NK.t().contiguous(), rounded.grid
    for _ in range(sweeps):
        if scales:
            grid = _fit_scales(w_KN, codes_KN, grid, h_KK)
        _descend(Columns(w_KN, _lattices(grid, torch.arange(K))), codes_KN, h_KK)
    return Rounded(codes_KN.t().contiguous(), grid, rounded.fallback)


def _descend(columns: Columns, codes_KN: Tensor, h_KK: Tensor) -> None:
    """One sweep over the columns, in place."""
    w_KN, lattices = columns
    K = len(w_KN)
    error_KN = torch.empty_like(w_KN)
    for k in range(K):
        error_KN[k] = w_KN[k] - lattices[k].value(codes_KN[k])
    for start in range(0, K, BLOCK):
        end = min(start + BLOCK, K)
        slope_BN = h_KK[start:end] @ error_KN
        h_BB = h_KK[start:end, start:end]
        for i in range(end - start):
            k = start + i
            old_N = w_KN[k] - error_KN[k]
            codes_KN[k] = lattices[k].nearest(old_N + slope_BN[i] / h_BB[i, i])
            new_N = lattices[k].value(codes_KN[k])
            error_KN[k] = w_KN[k] - new_N
            slope_BN[i + 1 :].addr_(h_BB[i + 1 :, i], old_N - new_N)


def _fit_scales(w_KN: Tensor, codes_KN: Tensor, grid: Grid, h_KK: Tensor) -> Grid:
    """The scale of each group where the error is least, the codes and the other groups' scales fixed."""
    scale_QN = grid.scale_NQ.t().contiguous()
    Q, K = len(scale_QN), len(w_KN)
    lattices = _lattices(grid, torch.arange(K))
    # what is multiplied by the scale: whole numbers, or e4m3
    whole_KN = torch.stack([lattices[k].value(codes_KN[k]) for k in range(K)])
    error_KN = w_KN - whole_KN
    whole_KN.view(Q, -1, whole_KN.shape[1]).div_(scale_QN[:, None])
    for q, cols in enumerate(torch.arange(K).view(Q, -1).unbind()):
        part = slice(int(cols[0]), int(cols[-1]) + 1)
        whole_gN = whole_KN[part]
        gain_N = (whole_gN * (h_KK[part] @ error_KN)).sum(0)
        cost_N = (whole_gN * (h_KK[part, part] @ whole_gN)).sum(0)
        new_N = scale_QN[q] + gain_N / cost_N.clamp_min(1e-30)
        moved_N = grid.ruler.stored(new_N) - scale_QN[q]
        # not where the file's rounding takes back what was gained, nor to a scale that is none
        worth_N = (new_N > 0) & (2 * moved_N * gain_N > moved_N.square() * cost_N)
        moved_N *= worth_N
        error_KN[part] -= whole_gN * moved_N
        scale_QN[q] += moved_N
    return grid.with_scales(scale_QN.t().contiguous())
