"""Scheme and QuantWeight: one canonical form between every checkpoint format and every kernel packing.

Codes are signed int8, one a weight, in the order of the columns; 4-bit codes are -8..7.  W = (codes - zero) * scale.
Q groups a row, each of in_features / Q neighbouring columns; a scale per channel is Q = 1, per tensor too (repeated).
Activations are always int8, one scale a token, computed at run time.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZES = (128, 64, 32, 16)  # the best first: what a column count may be cut in


@dataclass(frozen=True, slots=True)
class Scheme:
    """`group_size` None means one scale a channel (output row)."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        if self.bits == 8 and (self.group_size is not None or not self.symmetric):
            raise ValueError(f"8-bit weights must be symmetric with one scale a channel, got {self}")

    @property
    def name(self) -> str:
        return f"w{self.bits}a8-int8"

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def fit(self, in_features: int) -> "Scheme":
        """This scheme with a group size that divides `in_features`: the next smaller one, or one scale a channel."""
        if self.group_size is None or in_features % self.group_size == 0:
            return self
        smaller = [g for g in GROUP_SIZES if g < self.group_size and in_features % g == 0]
        return Scheme(self.bits, smaller[0] if smaller else None, self.symmetric)

    def __str__(self) -> str:
        grain = "channel" if self.group_size is None else f"group {self.group_size}"
        return f"{self.name} ({grain}, {'symmetric' if self.symmetric else 'zero points'})"


ONLINE = {
    "w8a8-int8": Scheme(8),
    "w8a8": Scheme(8),
    "w4a8-int8": Scheme(4, 128),
    "w4a8": Scheme(4, 128),
}


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """One quantized matrix.  `zero_NQ` is None exactly when the scheme is symmetric."""

    scheme: Scheme
    codes_NK: Tensor  # int8
    scale_NQ: Tensor  # float32
    zero_NQ: Tensor | None = None  # int8, in the range of the codes

    @property
    def num_groups(self) -> int:
        return self.scale_NQ.shape[1]

    def check(self) -> "QuantWeight":
        """Raises ValueError unless shapes, types and ranges are canonical; returns self."""
        (N, K), Q = self.codes_NK.shape, self.scale_NQ.shape[-1]
        groups = 1 if self.scheme.group_size is None else K // self.scheme.group_size
        if self.codes_NK.dtype != torch.int8 or self.scale_NQ.dtype != torch.float32:
            raise ValueError(
                f"codes must be int8 and scales float32, got {self.codes_NK.dtype}, {self.scale_NQ.dtype}"
            )
        if self.scale_NQ.shape != (N, groups) or K % Q:
            raise ValueError(
                f"scales must be [{N}, {groups}] for {self.scheme}, got {list(self.scale_NQ.shape)}"
            )
        if not bool(torch.isfinite(self.scale_NQ).all()) or bool((self.scale_NQ < 0).any()):
            raise ValueError("scales must be finite and not negative")
        self._check_range("codes", self.codes_NK)
        if (self.zero_NQ is None) != self.scheme.symmetric:
            raise ValueError(
                f"zero points must be {'absent' if self.scheme.symmetric else 'given'} for {self.scheme}"
            )
        if self.zero_NQ is not None:
            if self.zero_NQ.dtype != torch.int8 or self.zero_NQ.shape != self.scale_NQ.shape:
                raise ValueError(
                    f"zero points must be int8 {list(self.scale_NQ.shape)}, got {self.zero_NQ.dtype} {list(self.zero_NQ.shape)}"
                )
            self._check_range("zero points", self.zero_NQ)
        return self

    def _check_range(self, what: str, values: Tensor) -> None:
        if self.scheme.bits == 8 or not values.numel():
            return
        low, high = int(values.min()), int(values.max())
        if low < self.scheme.low or high > self.scheme.high:
            raise ValueError(
                f"4-bit {what} must be in [{self.scheme.low}, {self.scheme.high}], got {low} to {high}"
            )

    def dequantize(self) -> Tensor:
        """W_NK in float32."""
        N, K = self.codes_NK.shape
        codes_NQg = self.codes_NK.view(N, self.num_groups, -1).float()
        if self.zero_NQ is not None:
            codes_NQg = codes_NQg - self.zero_NQ[..., None].float()
        return (codes_NQg * self.scale_NQ[..., None]).view(N, K)


def fuse(parts: Iterable[QuantWeight]) -> QuantWeight | None:
    """The matrices stacked along their outputs, or None where their schemes differ."""
    parts = list(parts)
    if any(p.scheme != parts[0].scheme for p in parts):
        return None
    zeros = [p.zero_NQ for p in parts if p.zero_NQ is not None]
    return QuantWeight(
        parts[0].scheme,
        torch.cat([p.codes_NK for p in parts]),
        torch.cat([p.scale_NQ for p in parts]),
        torch.cat(zeros) if zeros else None,
    )
