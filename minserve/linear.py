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
from kernels.quant_rows import quant_rows

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
        codes_TK, scale_T = x_TK, x_scale_T
        if x_scale_T is not None:
            assert self.wants_int8, "int8 rows came to a Linear with a float part"
        elif self._has_int8:
            codes_TK, scale_T = quant_rows(x_TK)
        outputs = []
        for part in self.parts:
            if isinstance(part, PreparedLinear):
                outputs.append(linear(x_TK, part, deterministic=deterministic))
            else:
                gemm = gemm_w8a8 if isinstance(part, W8Weight) else gemm_w4a8
                outputs.append(gemm(codes_TK, scale_T, part, self.out_dtype, deterministic=deterministic))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
