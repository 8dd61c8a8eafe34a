"""int4 weights on a CPU, which has no 4-bit product: held as int8 codes, the zero point already taken off.

One product a group (`CpuGroups`), unless all groups share a channel's scale: then gemm_w8a8 serves the codes as they
are.  fp8 activations: codes of 3 mantissa bits times 4-bit integers are exact in float64, whatever the order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.w4_pack import FP8, Int4, widened
from kernels.w8_cpu import float_sum, onednn_int8, to_unsigned, zero_points


@dataclass(frozen=True, slots=True)
class CpuGroups:
    """`form`: onednn (one packed product a group), int_mm, float, or float64 for fp8 activations."""

    form: str
    codes: tuple[Tensor, ...]
    scale_QN: Tensor
    out_features: int
    group_size: int

    @property
    def nbytes(self) -> int:
        return self.out_features * self.scale_QN.shape[0] * self.group_size + self.scale_QN.nbytes


def prepare_groups(w: Int4, form: str) -> CpuGroups:
    (N, K), Q = w.codes_NK.shape, w.scale_NQ.shape[1]
    # -8..7 minus -8..7 fits in int8, so the product needs no correction
    codes_NQG = widened(w).to(torch.int8).view(N, Q, K // Q)
    if form == "onednn":
        prepack = torch.ops.onednn.qlinear_prepack
        codes = tuple(prepack(codes_NQG[:, q].contiguous(), [32, K // Q]) for q in range(Q))
    else:
        codes = (codes_NQG.reshape(N, K),)
    return CpuGroups(form, codes, w.scale_NQ.float().t().contiguous(), N, K // Q)


def _onednn_sum(x_TK: Tensor, w: CpuGroups) -> Tensor:
    """Each group's product is added to the total by oneDNN itself, in float32."""
    x_QTG = to_unsigned(x_TK).view(x_TK.shape[0], -1, w.group_size).transpose(0, 1).contiguous()
    add, zero_N = torch.ops.onednn.qlinear_pointwise.binary, zero_points(w.out_features)
    y = onednn_int8(x_QTG[0], w.codes[0], w.scale_QN[0])
    for x_TG, packed, scale_N in zip(x_QTG[1:], w.codes[1:], w.scale_QN[1:], strict=True):
        # the sum's scales and zero points: of y on both sides, then of the operation "sum"
        sum_of = (y, None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")
        y = add(x_TG, 1.0, 128, packed, scale_N, zero_N, *sum_of)
    return y


def _product(x_TG: Tensor, codes_NG: Tensor, form: str) -> Tensor:
    if form == "int_mm":
        return torch._int_mm(x_TG, codes_NG.t())
    if form == "float64":
        return x_TG.double() @ codes_NG.double().t()
    return float_sum(x_TG, codes_NG.float())


def group_sum(x_TK: Tensor, w: CpuGroups) -> Tensor:
    """The sum over groups, each times its scale, float32."""
    assert x_TK.dtype == (FP8 if w.form == "float64" else torch.int8), f"{x_TK.dtype=} {w.form=}"
    if w.form == "onednn":
        return _onednn_sum(x_TK, w)
    y = torch.zeros(x_TK.shape[0], w.out_features)
    for q, scale_N in enumerate(w.scale_QN):
        group = slice(q * w.group_size, (q + 1) * w.group_size)
        y.addcmul_(_product(x_TK[:, group].contiguous(), w.codes[0][:, group], w.form).float(), scale_N)
    return y
