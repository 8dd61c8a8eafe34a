"""Clip search: how far each group's range should reach, by trying shrunken ranges and keeping the least error.

For every ratio r of 1 down to `least`, a group's range is r times its own; what is outside is clamped, the rest gets
finer steps.  The error is that of the weights, of the outputs with the inputs taken as uncorrelated (the Hessian's
diagonal), or of the outputs through the Hessian's block of the group: e H e of its columns.
"""

import torch
from torch import Tensor

from quant.ptq.grid import Grid, Rounding, Ruler, ranges, row_chunks

MEASURES = ("weight", "diagonal", "output")


def clipped_grid(
    w_NK: Tensor,
    rounding: Rounding,
    hessian_KK: Tensor | None = None,
    *,
    measure: str = "diagonal",
    points: int = 40,
    least: float = 0.5,
    sides: bool = False,
) -> Grid:
    """The grid of the ranges with the least error.  Without a Hessian every measure is that of the weights.

    `points` ratios from 1 to `least`; `sides`: then each end by itself (zero points only), the other kept.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    if not 1 <= points <= 1000 or not 0 < least <= 1:
        raise ValueError(f"points must be 1 to 1000 and least in (0, 1], got {points} and {least}")
    low_NQ, high_NQ = ranges(w_NK, rounding.scheme)
    ruler = Ruler.of(low_NQ, high_NQ, rounding)
    K, Q = w_NK.shape[1], low_NQ.shape[1]
    cost = None if hessian_KK is None or measure == "weight" else _cost(hessian_KK, Q, measure)
    ratios = torch.linspace(1, least, points).tolist()
    one_sided = sides and not (rounding.scheme.symmetric and not rounding.scheme.progressive)
    for rows in row_chunks(len(w_NK), K):
        w_nQg, part = w_NK[rows].view(-1, Q, K // Q), ruler.rows(rows)
        low, high = low_NQ[rows], high_NQ[rows]
        low, high = _best(w_nQg, part, cost, [(low * r, high * r) for r in ratios])
        if one_sided:
            low, high = _best(w_nQg, part, cost, [(low * r, high) for r in ratios])
            low, high = _best(w_nQg, part, cost, [(low, high * r) for r in ratios])
        low_NQ[rows], high_NQ[rows] = low, high
    return ruler.grid(low_NQ, high_NQ)


def _cost(hessian_KK: Tensor, groups: int, measure: str) -> Tensor:
    """[Q, g]: what an error in a column costs; or [Q, g, g]: what a pair of them does."""
    if measure == "diagonal":
        return hessian_KK.diagonal().float().reshape(groups, -1)
    g = hessian_KK.shape[0] // groups
    return torch.stack([hessian_KK[q * g : (q + 1) * g, q * g : (q + 1) * g] for q in range(groups)])


def _best(
    w_NQg: Tensor, ruler: Ruler, cost: Tensor | None, tried: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """For each group the first pair of ends with the least error."""
    best_low, best_high = (x.clone() for x in tried[0])
    least_NQ = torch.full_like(best_low, float("inf"))
    for low_NQ, high_NQ in tried:
        error_NQ = _error(w_NQg, ruler.grid(low_NQ, high_NQ), cost)
        better = error_NQ < least_NQ
        least_NQ = torch.where(better, error_NQ, least_NQ)
        best_low, best_high = torch.where(better, low_NQ, best_low), torch.where(better, high_NQ, best_high)
    return best_low, best_high


def _error(w_NQg: Tensor, grid: Grid, cost: Tensor | None) -> Tensor:
    lattice = grid.lattice.mapped(lambda x: x[..., None])
    e_NQg = lattice.value(lattice.nearest(w_NQg)).sub_(w_NQg)
    if cost is None:
        return e_NQg.square_().sum(-1)
    if cost.ndim == 2:
        return torch.einsum("nqg,nqg,qg->nq", e_NQg, e_NQg, cost)
    eh_QNg = torch.bmm(e_NQg.transpose(0, 1), cost)
    return (eh_QNg * e_NQg.transpose(0, 1)).sum(-1).t()
