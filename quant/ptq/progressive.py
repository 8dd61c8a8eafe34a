"""Two-level scales of 4-bit groups: QoQ's integer steps under an int8 channel, FireQ's e4m3 scales under a power of two.

QoQ (arXiv 2405.04532, section 4.1): w / s1 with s1 = max|row| / 119 is an int8; a group of it is code * step - offset
with a whole step.  A code's value may pass its group's range by half a step of up to 17, and 119 + 8.5 < 128.
FireQ (arXiv 2505.20839): the group scale max|group| * p / 7 is an e4m3, p one power of two of the whole matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quant.scheme import FP8

PROTECTED = 119.0
MAX_STEP = 17
FIREQ_MAX = 448.0
FIREQ_TINIEST = 2.0**-9  # the smallest e4m3 above 0
FIREQ_DOUBLINGS = 15


class Steps(NamedTuple):
    """step_NQ, offset_NQ, and the codes whose value is an int8: low_NQ to high_NQ; whole numbers in float32."""

    step_NQ: Tensor
    offset_NQ: Tensor
    low_NQ: Tensor
    high_NQ: Tensor


def channel_scale(most_N1: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """s1 [N, 1] of rows whose largest magnitude is `most_N1`, as `scale_dtype` holds it."""
    scale_N1 = (most_N1 / PROTECTED).clamp_min(torch.finfo(scale_dtype).tiny)
    return scale_N1.to(scale_dtype).float()


def group_steps(low_NQ: Tensor, high_NQ: Tensor, free_offset: bool) -> Steps:
    """For groups of integers (w / s1) that lie in [low, high].

    The offset is whole, or where not `free_offset` a multiple of the step, as files of the first writers have it.
    """
    step_NQ = ((high_NQ - low_NQ) / 15).round_().clamp_(1, MAX_STEP)
    if free_offset:
        # codes -8..7 lie about the middle of the range: nothing is lost to one end
        offset_NQ = (-(high_NQ + low_NQ) / 2 - step_NQ / 2).round_()
    else:
        offset_NQ = ((-low_NQ / step_NQ).round_().clamp_(0, 15) - 8) * step_NQ
    least_NQ = ((offset_NQ - 128) / step_NQ).ceil_().clamp_(-8, 7)
    most_NQ = ((offset_NQ + 127) / step_NQ).floor_().clamp_(-8, 7)
    return Steps(step_NQ, offset_NQ, least_NQ, most_NQ)


def fireq_factor(most_NQ: Tensor) -> float:
    """p: the smallest power of two at which the fewest group scales fall below e4m3, and none leaves it.

    `most_NQ` holds the largest magnitude of each group.  1 where already the matrix itself leaves e4m3.
    """
    best, least = 1.0, float("inf")
    limit = 7 * FIREQ_TINIEST
    for i in range(FIREQ_DOUBLINGS):
        scaled_NQ = most_NQ * 2.0**i
        if bool((scaled_NQ > FIREQ_MAX).any()):
            break
        lost = ((limit - scaled_NQ).clamp_min_(0) / limit).sum().item()
        if lost < least:
            best, least = 2.0**i, lost
    return best


def fireq_scale(scale: Tensor, factor: float) -> Tensor:
    """The nearest scales in float32 whose product with `factor` is an e4m3 above 0; what is too large is cut to 448."""
    return (scale * factor).clamp(FIREQ_TINIEST, FIREQ_MAX).to(FP8).float() / factor
