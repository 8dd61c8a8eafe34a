"""Linear: one projection, or several fused, over whichever matmul its weights were prepared for.

`wants_int8` tells the op before it to hand over int8 rows with one scale a row; float rows are accepted too and
quantized here.  Where fused shards differ in scheme they run one by one and their outputs are joined.
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


class Linear:
    """y_TN = x_TK W^T + bias; N is the sum over `parts`, which share K."""

    __slots__ = ("_has_int8", "in_features", "out_dtype", "out_features", "parts", "wants_int8")

    def __init__(self, parts: Sequence[Prepared], out_dtype: torch.dtype) -> None:
        assert parts, "a Linear needs at least one part"
        assert len({p.in_features for p in parts}) == 1, f"parts differ: {[p.in_features for p in parts]}"
        self.parts = tuple(parts)
        self.out_dtype = out_dtype
        self.in_features = parts[0].in_features
        self.out_features = sum(p.out_features for p in parts)
        plain = [isinstance(p, PreparedLinear) for p in parts]
        # one plain shard is enough to need the float rows
        self.wants_int8 = not any(plain)
        self._has_int8 = not all(plain)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)

    def __call__(self, x_TK: Tensor, x_scale_T: Tensor | None = None, deterministic: bool = False) -> Tensor:
        """`x_scale_T` is given exactly when `x_TK` holds int8 codes, which needs `wants_int8`."""
        rows = None
        if x_scale_T is not None:
            assert self.wants_int8, "int8 rows came to a Linear with a float part"
            rows = QuantRows(x_TK, x_scale_T)
        elif self._has_int8:
            rows = quant_rows(x_TK)
        outputs = [self._run(part, x_TK, rows, deterministic) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _run(self, part: Prepared, x_TK: Tensor, rows: QuantRows | None, deterministic: bool) -> Tensor:
        if isinstance(part, PreparedLinear):
            return linear(x_TK, part, deterministic=deterministic)
        assert rows is not None, "an int8 part without int8 rows"
        if isinstance(part, W8Weight):
            return gemm_w8a8(rows.codes_TD, rows.scale_T, part, self.out_dtype, deterministic=deterministic)
        return gemm_w4a8(rows.codes_TD, rows.scale_T, part, self.out_dtype, deterministic=deterministic)
