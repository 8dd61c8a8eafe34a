"""From a QuantWeight to what a kernel eats: one repack a matrix, and in words how it will be computed.

Every scheme of quant/scheme.py ends here.  Weights without quantized activations are dequantized and multiplied as floats;
so are fp8 ones on a GPU that has no fp8.  What the kernels lack (zero points of rows, orders of columns, zero points under
fp8 rows) becomes an `Adjusted` part.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.gemm_fp8_block import prepare_fp8_block
from kernels.gemm_w4a8 import W4Weight, prepare_w4a8, prepare_w4a8_progressive
from kernels.gemm_w8a8 import W8Weight, prepare_w8a8
from kernels.launch import gpu_facts
from kernels.linear import prepare_linear
from minserve.linear import Adjusted, Codes, Prepared
from quant.scheme import BLOCK, Activations, QuantWeight


class Ready(NamedTuple):
    """A part, the kernel that multiplies it, and what the load report says of its arithmetic and of surprises."""

    part: Prepared
    kernel: str
    arithmetic: str
    note: str = ""


def prepare_plain(weight_NK: Tensor, bias_N: Tensor | None) -> Ready:
    """A float weight, multiplied as it is."""
    part = prepare_linear(weight_NK, bias_N)
    dtype = short(weight_NK.dtype)
    if part.form == "upcast":
        return Ready(part, "linear", f"{dtype} weights, float32 sums", "this CPU has no 16-bit instructions")
    return Ready(part, "linear", f"{dtype} rows x {dtype} weights, float32 sums")


def prepare_quantized(w: QuantWeight, bias_N: Tensor | None, dtype: torch.dtype) -> Ready:
    """`dtype` is the model's: of weights that are dequantized.  ValueError for what no kernel here computes."""
    rows, device = w.scheme.activations, w.codes_NK.device
    if rows is None or (needs_fp8(w) and lacks_fp8(device)):
        weight_NK = w.dequantize()
        if problem := overflow(weight_NK, rounded_NK := weight_NK.to(dtype)):
            raise ValueError(f"the dequantized weight {problem}")
        ready = prepare_plain(rounded_NK, bias_N)
        why = (
            "weight-only" if rows is None else "a GPU before sm_89 has no fp8: activations are not quantized"
        )
        return ready._replace(note=f"{why}: dequantized to {short(dtype)} at load")
    if w.scheme.block:
        if w.order_K is not None:
            raise ValueError(f"{w.scheme} must have its columns in the order of x: no format stores another")
        blocks = prepare_fp8_block(w.codes_NK, w.scale_NQ, bias_N)
        return Ready(blocks, "gemm_fp8_block", arithmetic(w, rows))
    late_bias = not rows.symmetric or _taken_off(w) is not None
    inner, note = _codes(w, None if late_bias else bias_N)
    kernel = "gemm_w8a8" if isinstance(inner, W8Weight) else "gemm_w4a8"
    part = _adjust(inner, w, rows, bias_N if late_bias else None)
    return Ready(part, kernel, arithmetic(w, rows), note)


def overflow(value: Tensor, rounded: Tensor) -> str:
    """What to say where `value` in fp16, which ends at 65504, is not finite: it would answer NaN.  Empty where all is well."""
    if rounded.dtype != torch.float16 or torch.isfinite(rounded).all():
        return ""
    return f"does not fit float16 (largest {value.abs().max().item():.3g}): choose bfloat16"


def needs_fp8(w: QuantWeight) -> bool:
    return w.scheme.activations is not None and w.scheme.activations.dtype == "fp8"


def lacks_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and gpu_facts(device).capability < 89


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _codes(w: QuantWeight, bias_N: Tensor | None) -> tuple[Codes, str]:
    """The packed codes, and what is unusual about them."""
    part: Codes
    note = ""
    if w.scheme.bits == 8:
        return prepare_w8a8(w.codes_NK, w.scale_NQ[:, 0].contiguous(), bias_N), note
    if needs_fp8(w):
        scale_NQ = w.scale_NQ if w.step_NQ is None else w.scale_NQ * w.step_NQ
        part = prepare_w4a8(w.codes_NK, scale_NQ, None, bias_N, kind="fp8")
    elif w.step_NQ is not None:
        part, note = _progressive(w, bias_N)
    else:
        part = prepare_w4a8(w.codes_NK, w.scale_NQ, w.zero_NQ, bias_N)
    if isinstance(part, W4Weight) and part.bits_stored != 4:
        note = f"int4 weights are unpacked to int{part.bits_stored} on the {w.codes_NK.device.type.upper()}"
    return part, note


def _taken_off(w: QuantWeight) -> Tensor | None:
    """Of 4-bit weights under fp8 rows, what is taken off each group, in units of the weight: the kernel has no zeros."""
    if not needs_fp8(w) or w.scheme.bits == 8:
        return None
    zero = w.zero_NQ if w.offset_NQ is None else w.offset_NQ
    return None if zero is None else w.scale_NQ * zero.float()


def _progressive(w: QuantWeight, bias_N: Tensor | None) -> tuple[Codes, str]:
    assert w.step_NQ is not None, f"{w.scheme}"
    assert w.offset_NQ is not None, f"{w.scheme}"
    scale_N = w.scale_NQ[:, 0].contiguous()
    wide_NQ = w.offset_NQ.int() + 8 * w.step_NQ.int()
    if int(wide_NQ.min()) >= 0 and int(wide_NQ.max()) <= 255:
        packed = prepare_w4a8_progressive(
            w.codes_NK, scale_N, w.step_NQ, bias_N=bias_N, offset_NQ=w.offset_NQ
        )
        return packed, ""
    # the kernel keeps offsets in a byte; the integers themselves always are one
    part = prepare_w8a8(w.integers().to(torch.int8), scale_N, bias_N)
    return part, "offsets do not fit the packed form: int8 weights, of the same value"


def _adjust(inner: Codes, w: QuantWeight, rows: Activations, bias_N: Tensor | None) -> Prepared:
    """`inner` itself where its kernel does all."""
    device = w.codes_NK.device
    order_K = w.order_K
    if order_K is not None and torch.equal(order_K, torch.arange(len(order_K), device=order_K.device)):
        order_K = None
    part = Adjusted(inner, rows, order_K, bias_N=bias_N)
    if w.input_scale is not None:
        part = replace(part, scale=torch.tensor([w.input_scale], dtype=torch.float32, device=device))
    if w.input_zero is not None:
        part = replace(part, zero=torch.tensor([float(w.input_zero)], device=device))
    if not rows.symmetric:
        part = replace(part, row_sum_N=w.dequantize().sum(1, dtype=torch.float64).float())
    if (taken_NQ := _taken_off(w)) is not None:
        part = replace(part, group_zero=prepare_linear(taken_NQ))
    plain = rows.dynamic and rows.symmetric and order_K is None and part.group_zero is None
    return inner if plain else part


def arithmetic(w: QuantWeight, rows: Activations) -> str:
    """What multiplies what, and where sums are exact."""
    weights = "fp8" if w.scheme.values == "fp8" else f"int{w.scheme.bits}"
    exact = "int32 sums" if rows.dtype == "int8" else "float32 sums"
    if w.num_groups > 1 and (rows.dtype == "fp8" or not w.scheme.progressive):
        groups = f"blocks of {BLOCK}" if w.scheme.block else f"groups of {w.scheme.group_size}"
        exact += f" within {groups}, float32 over them"
    return f"{rows} rows x {weights} weights, {exact}"
