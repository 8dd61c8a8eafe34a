"""Grid: the values that the codes of a matrix may stand for, a row and group at a time, for every scheme in one form.

value = (code - origin) * unit with low <= code <= high; e4m3 codes are rounded as floats.  Symmetric: origin 0; zero
points; progressive: unit = s1 * step and origin = offset / step; FireQ.  A `Ruler` holds what a matrix has one of (its
rounding, s1, p) and makes grids of the ranges of its groups, so that a search may shrink them as it likes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from quant.ptq.progressive import Steps, channel_scale, fireq_factor, fireq_scale, group_steps
from quant.rtn import FP8_MAX, SYMMETRIC_DIVISOR
from quant.scheme import FP8, QuantWeight, Scheme

DIVISORS = (7.0, 7.5, 8.0)
# elements of a matrix that are rounded at once: a few copies fit in a core's cache
CHUNK = 1 << 17
TensorMap: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a scheme's scales are made.  `divisor`: of symmetric int4, absmax / scale; None is 7.5.

    `fireq`: group scales are e4m3 times one power of two.  `free_offset`: of progressive steps, any whole number.
    `scale_dtype`: what the file stores; codes are made with the scales that it holds.
    """

    scheme: Scheme
    scale_dtype: torch.dtype = torch.float32
    divisor: float | None = None
    fireq: bool = False
    free_offset: bool = True

    def __post_init__(self) -> None:
        plain_int4 = self.scheme.bits == 4 and self.scheme.symmetric and not self.scheme.progressive
        if self.divisor is not None and (self.divisor not in DIVISORS or not plain_int4):
            raise ValueError(
                f"divisor must be one of {', '.join(map(str, DIVISORS))} and is for symmetric int4, "
                f"got {self.divisor} for {self.scheme}"
            )
        if self.fireq and (not plain_int4 or self.divisor not in (None, 7.0)):
            raise ValueError(f"FireQ's scales are for symmetric int4 over 7, got {self.scheme}")
        if self.scheme.block:
            raise ValueError(f"block scales are read from files, not made: {self.scheme}")

    def fit(self, in_features: int) -> "Rounding":
        """With a group size that divides `in_features`."""
        return replace(self, scheme=self.scheme.fit(in_features))


class Lattice(NamedTuple):
    """The grid points of groups; tensors of any shape that broadcasts against the weights."""

    unit: Tensor
    origin: Tensor | None
    low: Any  # numbers, or tensors: clamp_ takes a pair of either
    high: Any
    floating: bool  # codes are e4m3

    def nearest(self, w: Tensor) -> Tensor:
        """Codes, as floats of w's type."""
        codes = w / self.unit
        if self.floating:
            return codes.clamp_(self.low, self.high).to(FP8).to(w.dtype)
        if self.origin is not None:
            codes += self.origin
        return codes.round_().clamp_(self.low, self.high)

    def value(self, codes: Tensor) -> Tensor:
        return (codes if self.origin is None else codes - self.origin) * self.unit

    def mapped(self, f: TensorMap) -> "Lattice":
        def bound(x: Any) -> Any:
            return f(x) if isinstance(x, Tensor) else x

        origin = None if self.origin is None else f(self.origin)
        return Lattice(f(self.unit), origin, bound(self.low), bound(self.high), self.floating)


@dataclass(frozen=True, slots=True)
class Grid:
    """The lattice of a whole matrix, [N, Q], and what QuantWeight calls its parts."""

    ruler: "Ruler"
    lattice: Lattice
    scale_NQ: Tensor
    steps: Steps | None = None

    @property
    def scheme(self) -> Scheme:
        return self.ruler.rounding.scheme

    @property
    def num_groups(self) -> int:
        return self.lattice.unit.shape[1]

    def weight(self, codes_NK: Tensor) -> QuantWeight:
        """`codes_NK`: floats, in the range of the grid."""
        floating, origin_NQ = self.lattice.floating, self.lattice.origin
        codes_NK = codes_NK.to(FP8 if floating else torch.int8)
        if self.steps is not None:
            step_NQ, offset_NQ = self.steps.step_NQ.to(torch.int8), self.steps.offset_NQ.to(torch.int16)
            return QuantWeight(
                self.scheme, codes_NK, self.scale_NQ, step_NQ=step_NQ, offset_NQ=offset_NQ
            ).check()
        zero_NQ = None if origin_NQ is None else origin_NQ.to(torch.int8)
        return QuantWeight(self.scheme, codes_NK, self.scale_NQ, zero_NQ).check()

    def nearest(self, w_NK: Tensor) -> Tensor:
        """Codes of w_NK as float32, rounded one by one."""
        N, K = w_NK.shape
        codes_NK = torch.empty(N, K)
        for rows in row_chunks(N, K):
            part = self.lattice.mapped(lambda x, rows=rows: x[rows, :, None])  # type: ignore[misc]
            codes_NK[rows] = part.nearest(w_NK[rows].view(-1, self.num_groups, K // self.num_groups)).flatten(
                1
            )
        return codes_NK

    def value(self, codes_NK: Tensor) -> Tensor:
        """What the codes stand for, float32 [N, K]."""
        part = self.lattice.mapped(lambda x: x[..., None])
        return part.value(codes_NK.view(len(codes_NK), self.num_groups, -1)).view(codes_NK.shape)

    def turned(self) -> list[Lattice]:
        """The lattice [N] of each group of columns."""
        turned = self.lattice.mapped(lambda x: x.t().contiguous())
        return [turned.mapped(lambda x, q=q: x[q]) for q in range(self.num_groups)]  # type: ignore[misc]

    def with_scales(self, scale_NQ: Tensor) -> "Grid":
        """The same codes with other scales (of the channel where progressive), which `Ruler.stored` has made."""
        unit_NQ = scale_NQ if self.steps is None else scale_NQ * self.steps.step_NQ
        return replace(self, lattice=self.lattice._replace(unit=unit_NQ), scale_NQ=scale_NQ)


@dataclass(frozen=True, slots=True)
class Ruler:
    """`channel_N1`: s1 of progressive weights.  `factor`: FireQ's p."""

    rounding: Rounding
    channel_N1: Tensor | None = None
    factor: float = 1.0

    @classmethod
    def of(cls, low_NQ: Tensor, high_NQ: Tensor, rounding: Rounding) -> "Ruler":
        """For a matrix whose groups have these ranges."""
        most_NQ = torch.maximum(high_NQ, -low_NQ)
        if rounding.scheme.progressive:
            return cls(rounding, channel_scale(most_NQ.amax(1, keepdim=True), rounding.scale_dtype))
        return cls(rounding, factor=fireq_factor(most_NQ) if rounding.fireq else 1.0)

    def rows(self, rows: slice) -> "Ruler":
        return self if self.channel_N1 is None else replace(self, channel_N1=self.channel_N1[rows])

    def stored(self, scale: Tensor) -> Tensor:
        """The nearest scales that the file can hold."""
        if self.rounding.fireq:
            return fireq_scale(scale, self.factor)
        return storable(scale, self.rounding.scale_dtype)

    def grid(self, low_NQ: Tensor, high_NQ: Tensor) -> Grid:
        """The grid whose groups reach from low to high, as far as the scheme lets them."""
        r, scheme = self.rounding, self.rounding.scheme
        if scheme.progressive:
            return self._progressive(low_NQ, high_NQ)
        if not scheme.symmetric:
            # zero must be a code: the range always holds it
            low_NQ, high_NQ = low_NQ.clamp_max(0), high_NQ.clamp_min(0)
            scale_NQ = self.stored((high_NQ - low_NQ) / (2**scheme.bits - 1))
            zero_NQ = (scheme.low - low_NQ / scale_NQ).round_().clamp_(scheme.low, scheme.high)
            return Grid(self, Lattice(scale_NQ, zero_NQ, scheme.low, scheme.high, False), scale_NQ)
        most_NQ = torch.maximum(high_NQ, -low_NQ)
        if scheme.values == "fp8":
            scale_NQ = self.stored(most_NQ / FP8_MAX)
            return Grid(self, Lattice(scale_NQ, None, -FP8_MAX, FP8_MAX, True), scale_NQ)
        divisor = 7.0 if r.fireq else r.divisor or SYMMETRIC_DIVISOR[scheme.bits]
        scale_NQ = self.stored(most_NQ / divisor)
        # a row's int8 maximum is 127 at both ends, as the kernels have it
        low = -127 if scheme.bits == 8 else scheme.low
        return Grid(self, Lattice(scale_NQ, None, low, scheme.high, False), scale_NQ)

    def _progressive(self, low_NQ: Tensor, high_NQ: Tensor) -> Grid:
        s1_N1 = self.channel_N1
        assert s1_N1 is not None, f"{self.rounding}"
        low_NQ, high_NQ = (low_NQ.clamp_max(0) / s1_N1).round_(), (high_NQ.clamp_min(0) / s1_N1).round_()
        steps = group_steps(low_NQ, high_NQ, self.rounding.free_offset)
        origin_NQ = steps.offset_NQ / steps.step_NQ
        lattice = Lattice(steps.step_NQ * s1_N1, origin_NQ, steps.low_NQ, steps.high_NQ, False)
        return Grid(self, lattice, s1_N1, steps)


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows, of about CHUNK elements."""
    count = max(1, CHUNK // max(1, columns))
    return (slice(i, min(i + count, rows)) for i in range(0, rows, count))


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As `dtype` holds them, and never 0: an all-zero group has codes 0 whatever its scale, but not 0 / 0."""
    info = torch.finfo(dtype)
    return scale.clamp(max(info.tiny * info.eps, 1e-38), info.max).to(dtype).float()


def ranges(w_NK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, [N, Q]; ValueError where one is not finite or groups do not fit."""
    N, K = w_NK.shape
    group = scheme.group_size or K
    if K % group:
        raise ValueError(f"{K} columns do not divide into groups of {group}: see Scheme.fit")
    low_NQ, high_NQ = torch.aminmax(w_NK.view(N, K // group, group), dim=-1)
    if not bool(torch.isfinite(low_NQ).all() & torch.isfinite(high_NQ).all()):
        raise ValueError("weights must be finite to be quantized")
    return low_NQ, high_NQ


def plain_grid(w_NK: Tensor, rounding: Rounding) -> Grid:
    """The grid of plain rounding: each group reaches to its largest weights."""
    low_NQ, high_NQ = ranges(w_NK, rounding.scheme)
    return Ruler.of(low_NQ, high_NQ, rounding).grid(low_NQ, high_NQ)
