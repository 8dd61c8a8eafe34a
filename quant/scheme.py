"""Scheme and QuantWeight: one canonical form between every checkpoint format and every kernel packing.

Codes are one byte a weight, [N, K] in the order of the columns: int8 (4-bit codes are -8..7) or e4m3.
W = (codes - zero) * scale, or for progressive weights W = (codes * step - offset) * scale with integers inside.
Q groups a row, each of K / Q neighbouring columns; a scale per channel is Q = 1, per tensor too (repeated);
block scales are one for 128 x 128 weights.  `activations` says what the rows are rounded to; None leaves them alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.kinds import BLOCK, FP8_ROWS, GROUP_SIZES, INT8_ROWS, ONLINE, Activations, Scheme

__all__ = [
    "BLOCK", "FP8", "FP8_ROWS", "GROUP_SIZES", "INT8_ROWS", "ONLINE", "Activations", "QuantWeight", "Scheme", "fuse",
]  # fmt: skip
FP8 = torch.float8_e4m3fn
# a weight or an activation of more than fp16 holds is no model's, and of less than 2^-40 an empty layer's
MAX_SCALE, MIN_INPUT_SCALE = 65504.0, 2.0**-40


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """One quantized matrix.  `zero_NQ` is given exactly when the scheme is neither symmetric nor progressive.

    Progressive: `step_NQ` and `offset_NQ`, and scale [N, 1].  Block scales: [ceil(N / 128), ceil(K / 128)].
    `order_K`: the columns are those of x[:, order_K] (activation order).  Static activations bring `input_scale`,
    and `input_zero` where they are not symmetric: x = (code - zero) * scale.
    """

    scheme: Scheme
    codes_NK: Tensor  # int8, or e4m3
    scale_NQ: Tensor  # float32
    zero_NQ: Tensor | None = None  # int8, in the range of the codes
    step_NQ: Tensor | None = None  # int8, 0..17
    offset_NQ: Tensor | None = None  # int16: codes * step - offset is an int8
    order_K: Tensor | None = None  # int64, a permutation
    input_scale: float | None = None
    input_zero: int | None = None

    @property
    def num_groups(self) -> int:
        """Groups of columns that share a scale (or a step)."""
        return (self.scale_NQ if self.step_NQ is None else self.step_NQ).shape[1]

    def check(self) -> "QuantWeight":
        """Raises ValueError unless shapes, types and ranges are canonical; returns self."""
        K = self.codes_NK.shape[1]
        stored = FP8 if self.scheme.values == "fp8" else torch.int8
        if self.codes_NK.dtype != stored or self.scale_NQ.dtype != torch.float32:
            raise ValueError(
                f"codes must be {stored} and scales float32, got {self.codes_NK.dtype}, {self.scale_NQ.dtype}"
            )
        if list(self.scale_NQ.shape) != (want := self._scale_shape()):
            raise ValueError(f"scales must be {want} for {self.scheme}, got {list(self.scale_NQ.shape)}")
        if not bool(torch.isfinite(self.scale_NQ).all()) or bool((self.scale_NQ < 0).any()):
            raise ValueError("scales must be finite and not negative")
        self._check_sizes()
        # e4m3 has no infinity, and one NaN of each sign; floats would take four times the bytes
        if stored == FP8 and bool((self.codes_NK.view(torch.int8) & 127 == 127).any()):
            raise ValueError("fp8 weights must be finite")
        self._check_range("codes", self.codes_NK)
        self._check_zeros()
        self._check_steps()
        if self.order_K is not None and not torch.equal(
            self.order_K.sort().values, torch.arange(K, device=self.order_K.device)
        ):
            raise ValueError(f"the order of the columns must be a permutation of {K}")
        self._check_inputs()
        return self

    def _check_sizes(self) -> None:
        """What no model has, and what would answer with infinities or zeros."""
        if self.scale_NQ.numel() and float(self.scale_NQ.max()) > MAX_SCALE:
            raise ValueError(f"scales must be at most {MAX_SCALE:g}, got {float(self.scale_NQ.max()):.3g}")
        if self.step_NQ is None and not self.scale_NQ.any() and bool(self._codes_less_zero().any()):
            raise ValueError("all scales are 0, but not all codes are")

    def _codes_less_zero(self) -> Tensor:
        codes_NK = self.codes_NK.view(torch.int8)
        if self.scheme.values == "fp8":
            return codes_NK & 127
        if self.zero_NQ is None:
            return codes_NK
        return codes_NK.view(len(codes_NK), self.num_groups, -1) != self.zero_NQ[..., None]

    def _scale_shape(self) -> list[int]:
        N, K = self.codes_NK.shape
        if self.scheme.block:
            return [-(-N // BLOCK), -(-K // BLOCK)]
        group = self.scheme.group_size
        if group is not None and K % group:
            raise ValueError(f"{K} columns do not divide into groups of {group}")
        return [N, 1 if group is None or self.scheme.progressive else K // group]

    def _check_zeros(self) -> None:
        wanted = not (self.scheme.symmetric or self.scheme.progressive)
        if (self.zero_NQ is not None) != wanted:
            raise ValueError(f"zero points must be {'given' if wanted else 'absent'} for {self.scheme}")
        if self.zero_NQ is not None:
            if self.zero_NQ.dtype != torch.int8 or self.zero_NQ.shape != self.scale_NQ.shape:
                raise ValueError(
                    f"zero points must be int8 {list(self.scale_NQ.shape)}, got {self.zero_NQ.dtype} {list(self.zero_NQ.shape)}"
                )
            self._check_range("zero points", self.zero_NQ)

    def _check_steps(self) -> None:
        if (self.step_NQ is not None) != self.scheme.progressive or (self.offset_NQ is not None) != (
            self.step_NQ is not None
        ):
            raise ValueError(f"steps and offsets belong to progressive weights, and are {self.scheme}")
        if self.step_NQ is None or self.offset_NQ is None:
            return
        N, K = self.codes_NK.shape
        assert self.scheme.group_size is not None, f"{self.scheme}"
        if list(self.step_NQ.shape) != [N, K // self.scheme.group_size]:
            raise ValueError(
                f"steps must be {[N, K // self.scheme.group_size]}, got {list(self.step_NQ.shape)}"
            )
        # the ends of a group tell, at a byte a weight
        ends_2NQ = torch.stack(torch.aminmax(self.codes_NK.view(N, self.num_groups, -1), dim=-1))
        values = ends_2NQ.int() * self.step_NQ.int() - self.offset_NQ.int()
        if int(values.min()) < -128 or int(values.max()) > 127:
            raise ValueError(
                f"code * step - offset must be an int8, got {int(values.min())} to {int(values.max())}"
            )

    def _check_inputs(self) -> None:
        rows = self.scheme.activations
        static = rows is not None and not rows.dynamic
        if (self.input_scale is not None) != static:
            raise ValueError(
                f"an input scale must be {'given' if static else 'absent'} for {self.scheme}, got {self.input_scale}"
            )
        if self.input_scale is not None and not MIN_INPUT_SCALE <= self.input_scale <= MAX_SCALE:
            raise ValueError(
                f"the input scale must be above 0, from {MIN_INPUT_SCALE:.1g} to {MAX_SCALE:g}, got {self.input_scale}"
            )
        with_zero = static and rows is not None and not rows.symmetric
        if (self.input_zero is not None) != with_zero:
            raise ValueError(f"an input zero point must be {'given' if with_zero else 'absent'}")
        if self.input_zero is not None and not -128 <= self.input_zero <= 127:
            raise ValueError(f"the input zero point must be an int8, got {self.input_zero}")

    def _check_range(self, what: str, values: Tensor) -> None:
        if self.scheme.bits == 8 or not values.numel():
            return
        low, high = int(values.min()), int(values.max())
        if low < self.scheme.low or high > self.scheme.high:
            raise ValueError(
                f"4-bit {what} must be in [{self.scheme.low}, {self.scheme.high}], got {low} to {high}"
            )

    def integers(self) -> Tensor:
        """What the codes of a progressive weight stand for under its scale of a channel: int32 [N, K]."""
        assert self.step_NQ is not None, f"{self.scheme}"
        assert self.offset_NQ is not None, f"{self.scheme}"
        codes_NQg = self.codes_NK.view(len(self.codes_NK), self.num_groups, -1).int()
        values = codes_NQg * self.step_NQ[..., None].int() - self.offset_NQ[..., None].int()
        return values.view(self.codes_NK.shape)

    def dequantize(self) -> Tensor:
        """W_NK in float32, its columns in the order of x (whatever `order_K` is)."""
        w_NK = self._values()
        if self.order_K is None:
            return w_NK
        out_NK = torch.empty_like(w_NK)
        out_NK[:, self.order_K] = w_NK
        return out_NK

    def _values(self) -> Tensor:
        N, K = self.codes_NK.shape
        if self.scheme.block:
            scale_NK = self.scale_NQ.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
            return self.codes_NK.float() * scale_NK
        if self.scheme.progressive:
            return self.integers().float() * self.scale_NQ
        codes_NQg = self.codes_NK.float().view(N, self.num_groups, -1)
        if self.zero_NQ is not None:
            codes_NQg = codes_NQg - self.zero_NQ[..., None].float()
        return (codes_NQg * self.scale_NQ[..., None]).view(N, K)

    def to(self, device: torch.device | str) -> "QuantWeight":
        """A copy of its own memory on `device`."""
        moved = {
            name: value.to(device, copy=True)
            for name in ("codes_NK", "scale_NQ", "zero_NQ", "step_NQ", "offset_NQ", "order_K")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def fuse(parts: Iterable[QuantWeight]) -> QuantWeight | None:
    """The matrices stacked along their outputs, or None where they cannot be one: other schemes, orders or inputs."""
    parts = list(parts)
    first = parts[0]
    alike = all(
        p.scheme == first.scheme and (p.input_scale, p.input_zero) == (first.input_scale, first.input_zero)
        for p in parts
    )
    if not alike or not all(_same(p.order_K, first.order_K) for p in parts):
        return None
    if first.scheme.block and any(p.codes_NK.shape[0] % BLOCK for p in parts[:-1]):
        return None

    def joined(name: str) -> Tensor | None:
        given = [getattr(p, name) for p in parts if getattr(p, name) is not None]
        return torch.cat(given) if given else None

    return replace(
        first,
        codes_NK=torch.cat([p.codes_NK.view(torch.int8) for p in parts]).view(first.codes_NK.dtype),
        scale_NQ=torch.cat([p.scale_NQ for p in parts]),
        zero_NQ=joined("zero_NQ"),
        step_NQ=joined("step_NQ"),
        offset_NQ=joined("offset_NQ"),
    )


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
