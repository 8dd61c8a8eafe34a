"""Linear: one projection, or several fused, over whichever matmul its weights were prepared for.

`wants` tells the op before it to hand over rows of codes (int8 or fp8) with one scale a row; float rows are accepted
too and quantized here.  Where fused shards differ in scheme they run one by one and their outputs are joined.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kernels.gemm_w4a8 import W4Weight, gemm_w4a8
from kernels.gemm_w8a8 import W8Weight, gemm_w8a8
from kernels.linear import PreparedLinear, linear
from kernels.quant_rows import QuantRows, quant_rows

Prepared: TypeAlias = PreparedLinear | W8Weight | W4Weight


def row_dtype(part: Prepared) -> torch.dtype | None:
    """The codes a part multiplies; None where it takes the floats themselves."""
    return None if isinstance(part, PreparedLinear) else part.row_dtype


class Linear:
    """y_TN = x_TK W^T + bias; N is the sum over `parts`, which share K."""

    __slots__ = ("in_features", "out_dtype", "out_features", "parts", "wants")

    def __init__(self, parts: Sequence[Prepared], out_dtype: torch.dtype) -> None:
        """`out_dtype` is that of quantized parts; plain ones answer in the type of x."""
        assert parts, "a Linear needs at least one part"
        assert len({p.in_features for p in parts}) == 1, f"parts differ: {[p.in_features for p in parts]}"
        self.parts = tuple(parts)
        self.out_dtype = out_dtype
        self.in_features = parts[0].in_features
        self.out_features = sum(p.out_features for p in parts)
        # parts that differ need the float rows, each to make its own of them
        kinds = {row_dtype(p) for p in parts}
        self.wants = kinds.pop() if len(kinds) == 1 else None

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)

    def __call__(self, x_TK: Tensor, x_scale_T: Tensor | None = None, deterministic: bool = False) -> Tensor:
        """`x_scale_T` is given exactly when `x_TK` holds codes, of the type that `wants` names."""
        rows: dict[torch.dtype, QuantRows] = {}
        if x_scale_T is not None:
            assert self.wants == x_TK.dtype, f"{x_TK.dtype} rows came to a Linear that wants {self.wants}"
            rows[x_TK.dtype] = QuantRows(x_TK, x_scale_T)
        outputs = [self._run(part, x_TK, rows, deterministic) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _run(
        self, part: Prepared, x_TK: Tensor, rows: dict[torch.dtype, QuantRows], deterministic: bool
    ) -> Tensor:
        if isinstance(part, PreparedLinear):
            return linear(x_TK, part, deterministic=deterministic)
        if part.row_dtype not in rows:
            rows[part.row_dtype] = quant_rows(x_TK, part.row_dtype)
        codes_TK, scale_T = rows[part.row_dtype]
        if isinstance(part, W8Weight):
            return gemm_w8a8(codes_TK, scale_T, part, self.out_dtype, deterministic=deterministic)
        return gemm_w4a8(codes_TK, scale_T, part, self.out_dtype, deterministic=deterministic)
