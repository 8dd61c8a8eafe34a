"""Scheme and Activations: what a quantized matrix is, and what its rows are rounded to, in words.

No torch: whoever only reads configs (the agent that plans pools, the checks of a configuration) does without it.
"""

from dataclasses import dataclass, replace

GROUP_SIZES = (128, 64, 32, 16)  # the best first: what a column count may be cut in
BLOCK = 128  # rows and columns of a block scale, and the columns of its activations' scale


@dataclass(frozen=True, slots=True)
class Activations:
    """`dynamic`: a scale a token, made at run time; else one stored scale for all tokens.

    Symmetric, or (int8 alone) with a zero point that goes the way of the scale.  `block`: a scale a token and 128
    columns, which only block-scaled fp8 weights have.
    """

    dtype: str = "int8"
    dynamic: bool = True
    symmetric: bool = True
    block: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("int8", "fp8"):
            raise ValueError(f"activations must be int8 or fp8, got {self.dtype!r}")
        if self.dtype == "fp8" and not self.symmetric:
            raise ValueError("fp8 activations must be symmetric")
        if self.block and (self.dtype != "fp8" or not self.dynamic):
            raise ValueError(f"a scale for 128 columns is for dynamic fp8 activations, got {self}")

    def __str__(self) -> str:
        kind = f"{'dynamic' if self.dynamic else 'static'} {self.dtype}"
        return (
            kind
            + ("" if self.symmetric else " with zero points")
            + (f" by {BLOCK} columns" if self.block else "")
        )


INT8_ROWS, FP8_ROWS = Activations("int8"), Activations("fp8")


@dataclass(frozen=True, slots=True)
class Scheme:
    """`group_size` None means one scale a channel (output row), or one a block where `block`."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    activations: Activations | None = INT8_ROWS
    values: str = "int"  # or fp8
    block: bool = False
    progressive: bool = False  # QoQ: integer steps in groups under one scale a channel

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")
        if self.values not in ("int", "fp8"):
            raise ValueError(f"values must be int or fp8, got {self.values!r}")
        if self.bits == 8 and (self.group_size is not None or not self.symmetric):
            raise ValueError(f"8-bit weights must be symmetric with one scale a channel, got {self}")
        if self.values == "fp8" and self.bits != 8:
            raise ValueError(f"fp8 weights have 8 bits, got {self.bits}")
        if self.block and self.values != "fp8":
            raise ValueError(f"block scales are for fp8 weights, got {self}")
        if self.progressive and (self.bits != 4 or self.group_size is None):
            raise ValueError(f"progressive weights have 4 bits and groups, got {self}")
        rows = self.activations
        if rows and self.bits == 8 and (rows.dtype == "fp8") != (self.values == "fp8"):
            raise ValueError(f"8-bit weights and activations must be of one kind, got {self}")
        if self.block and (rows is not None) and not rows.block:
            raise ValueError(
                f"block-scaled weights need activations with a scale for 128 columns, got {self}"
            )

    @property
    def name(self) -> str:
        """What `quantization` calls it."""
        if self.activations is None:
            return f"w{self.bits}a16"
        return f"w{self.bits}a8-{self.activations.dtype}"

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
        if not smaller and self.progressive:
            raise ValueError(
                f"progressive weights need groups, but none of {GROUP_SIZES} divides {in_features}"
            )
        return replace(self, group_size=smaller[0] if smaller else None)

    def __str__(self) -> str:
        grain = "channel" if self.group_size is None else f"group {self.group_size}"
        if self.block:
            grain = f"block {BLOCK}x{BLOCK}"
        words = [grain, "symmetric" if self.symmetric else "zero points"]
        words += ["progressive"] * self.progressive
        if self.activations not in (None, INT8_ROWS, FP8_ROWS):
            words.append(f"rows {self.activations}")
        return f"{self.name} ({', '.join(words)})"


ONLINE = {
    "w8a8-int8": Scheme(8),
    "w8a8": Scheme(8),
    "w8a8-fp8": Scheme(8, activations=FP8_ROWS, values="fp8"),
    "w4a8-int8": Scheme(4, 128),
    "w4a8": Scheme(4, 128),
    "w4a8-fp8": Scheme(4, 128, activations=FP8_ROWS),
}
