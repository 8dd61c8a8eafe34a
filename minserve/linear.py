"""Linear: one projection, or several fused, over whichever matmul its weights were prepared for.

`wants` tells the op before it to hand over rows of codes (int8 or fp8) with one scale a row; float rows are accepted
too and quantized here.  Where fused shards differ in scheme they run one by one and their outputs are joined.
Layers whose rows are static, have zero points or come in another order are `Adjusted` parts; block-scaled ones quantize
their rows by blocks of columns here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from kernels.gemm_fp8_block import BlockWeight, gemm_fp8_block
from kernels.gemm_w4a8 import W4Weight, gemm_w4a8
from kernels.gemm_w8a8 import W8Weight, gemm_w8a8
from kernels.linear import PreparedLinear, linear
from kernels.quant_blocks import quant_blocks
from kernels.quant_rows import QuantRows, quant_rows
from minserve.rows import Rows, make_rows
from quant.scheme import Activations

Codes: TypeAlias = W8Weight | W4Weight


@dataclass(frozen=True, slots=True)
class Adjusted:
    """A matmul of codes with what its kernel knows nothing of, each None where there is none.

    `order_K`: columns of x in the order of the weight's.  `scale`, `zero`: [1] float32 of static rows.
    `row_sum_N`: sum_k W[n, k], for rows with zero points: (x - z) W^T = x W^T - z sum(W).
    `group_zero`: scale * zero [N, Q] of a weight whose kernel has no zero points; it multiplies the rows' sums a group.
    `bias_N` is added last where one of those two is.
    """

    inner: Codes
    rows: Activations
    order_K: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    row_sum_N: Tensor | None = None
    group_zero: PreparedLinear | None = None
    bias_N: Tensor | None = None

    @property
    def in_features(self) -> int:
        return self.inner.in_features

    @property
    def out_features(self) -> int:
        return self.inner.out_features

    @property
    def nbytes(self) -> int:
        own = (self.order_K, self.scale, self.zero, self.row_sum_N, self.bias_N)
        sums = 0 if self.group_zero is None else self.group_zero.nbytes
        return self.inner.nbytes + sums + sum(t.nbytes for t in own if t is not None)


Prepared: TypeAlias = PreparedLinear | W8Weight | W4Weight | BlockWeight | Adjusted


def row_dtype(part: Prepared) -> torch.dtype | None:
    """The codes of symmetric rows with a scale each that a part multiplies; None where it makes its rows from floats."""
    if isinstance(part, Adjusted):
        return part.inner.row_dtype if part.rows.dynamic and part.rows.symmetric else None
    return None if isinstance(part, PreparedLinear | BlockWeight) else part.row_dtype


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
        if isinstance(part, BlockWeight):
            return gemm_fp8_block(*quant_blocks(x_TK), part, self.out_dtype, deterministic=deterministic)
        dtype = row_dtype(part)
        if dtype is None:
            assert isinstance(part, Adjusted), f"{part}"
            made = make_rows(x_TK, part.rows, part.scale, part.zero)
            return _adjusted(part, made, self.out_dtype, deterministic)
        if dtype not in rows:
            rows[dtype] = quant_rows(x_TK, dtype)
        if isinstance(part, Adjusted):
            return _adjusted(part, Rows(*rows[dtype]), self.out_dtype, deterministic)
        return _multiply(part, rows[dtype], self.out_dtype, deterministic)


def _multiply(part: Codes, rows: QuantRows, out_dtype: torch.dtype, deterministic: bool) -> Tensor:
    codes_TK, scale_T = rows
    if isinstance(part, W8Weight):
        return gemm_w8a8(codes_TK, scale_T, part, out_dtype, deterministic=deterministic)
    return gemm_w4a8(codes_TK, scale_T, part, out_dtype, deterministic=deterministic)


def _adjusted(part: Adjusted, rows: Rows, out_dtype: torch.dtype, deterministic: bool) -> Tensor:
    codes_TK, scale_T, zero_T = rows
    if part.order_K is not None:
        # as bytes: fp8 has no gather of its own everywhere
        codes_TK = codes_TK.view(torch.int8).index_select(1, part.order_K).view(codes_TK.dtype)
    given = QuantRows(codes_TK, scale_T)
    if part.row_sum_N is None and part.group_zero is None:
        return _multiply(part.inner, given, out_dtype, deterministic)
    y_TN = _multiply(part.inner, given, torch.float32, deterministic)
    if part.row_sum_N is not None:
        assert zero_T is not None, f"{part.rows}"
        y_TN.addr_(scale_T * zero_T, part.row_sum_N, alpha=-1)
    if part.group_zero is not None:
        y_TN -= scale_T[:, None] * _group_sums(codes_TK, part.group_zero, deterministic)
    return (y_TN if part.bias_N is None else y_TN.add_(part.bias_N)).to(out_dtype)


def _group_sums(codes_TK: Tensor, group_zero: PreparedLinear, deterministic: bool) -> Tensor:
    """sum_q (sum of the codes of group q) * scale[n, q] * zero[n, q]; float64 adds e4m3 exactly, in any order."""
    codes_TQG = codes_TK.float().view(len(codes_TK), group_zero.in_features, -1)
    return linear(codes_TQG.sum(-1, dtype=torch.float64).float(), group_zero, deterministic=deterministic)
