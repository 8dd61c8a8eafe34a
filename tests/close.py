"""How close is close: a result may err at most `slack` times as much as torch itself errs in the same dtype.

Truth is the reference run in float64.  Two norms: the rms catches a fault spread over everything (accumulation in
bf16), the worst element catches a fault in one place (a stale column).  There is no table of tolerances.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.spec import Bound


def is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of canonical arguments, what a reference makes the truth of: codes that are floats become wide floats too."""

    def widened(a: Any) -> Any:
        if isinstance(a, Tensor) and a.is_floating_point():
            return a.double()
        # the dtype of a result, but not that of codes
        return torch.float64 if isinstance(a, torch.dtype) and is_float(a) else a

    return tuple(map(widened, args))


def ordered(codes: Tensor) -> Tensor:
    """Integers in the order of the codes, neighbours one apart; both zeros of fp8 are 0."""
    if not codes.is_floating_point():
        return codes.int()
    raw = codes.view(torch.int8).int()
    return torch.where(raw < 0, -(raw & 127), raw)


class Errors(NamedTuple):
    rms: float
    worst: float


def errors(out: Tensor, truth: Tensor) -> Errors:
    """Relative errors in fp64; elements smaller than the tensor's rms are measured against that rms."""
    if truth.numel() == 0:
        return Errors(0.0, 0.0)
    truth = truth.double()
    diff = (out.double() - truth).abs()
    rms = truth.square().mean().sqrt().clamp_min(1e-30)
    return Errors((diff.square().mean().sqrt() / rms).item(), (diff / truth.abs().maximum(rms)).max().item())


def assert_no_worse(out: Tensor, ref: Tensor, truth: Tensor, slack: float = 2.0, floor: float = 1e-6) -> None:
    """`ref` is what torch computes in the dtype under test, `truth` the same in fp64."""
    assert out.shape == truth.shape, f"{out.shape=} {truth.shape=}"
    assert out.dtype == ref.dtype, f"{out.dtype=} {ref.dtype=}"
    assert torch.isfinite(out).all(), (
        f"{int((~torch.isfinite(out)).sum())} of {out.numel()} values are not finite"
    )
    for norm, got, own in zip(Errors._fields, errors(out, truth), errors(ref, truth), strict=True):
        allowed = max(slack * own, floor)
        assert got <= allowed, f"{norm} error {got:.1e} > {allowed:.1e} (torch itself: {own:.1e})"


def assert_within(out: Tensor, bound: Bound) -> None:
    """For an op that rounds on purpose: no element and no root mean square beyond what that rounding does."""
    assert out.shape == bound.truth.shape, f"{out.shape=} {bound.truth.shape=}"
    off = (out.double() - bound.truth.double()).abs()
    far = off / bound.each
    # a NaN is not within anything
    assert (off <= bound.each).all(), f"{far.max()} times the bound of an element"
    rms = off.square().mean().sqrt().item()
    assert not out.numel() or rms <= bound.rms, f"rms error {rms:.2e} > {bound.rms:.2e}"
