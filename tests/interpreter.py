"""Makes Triton's interpreter compute what a GPU computes, so that kernels can be judged without one.

Triton 3.6 keeps bf16 and fp8 values as bare bit patterns there: it adds and multiplies them as integers, truncates
casts to them, rounds an fma twice, and under numpy >= 2.4 cannot run a loop whose bound is known at run time only.
After `repair()` such values pass through float32 and torch's own casts (nearest even; fp8 saturates, as from sm_89 on).
Inline PTX is executed (tests/ptx.py); descriptors of host tensors are right as they are.  Not repaired, so not to
be used in our kernels: libdevice, tl.dot_scaled, autotune.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from triton._utils import validate_block_shape
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

from tests import ptx

TORCH_DTYPE = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
# the types numpy does not know: held as unsigned integers of the same width
HELD_AS_BITS = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
SATURATES = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
BITS = {
    1: (torch.uint8, np.uint8),
    2: (torch.int16, np.uint16),
    4: (torch.int32, np.uint32),
    8: (torch.int64, np.uint64),
}

STOCK_NUMPY_DTYPE = interpreter._get_np_dtype


def convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any = None) -> np.ndarray:
    """The bits of `data` (an array that holds `source` values) as `target` values; the shape stays."""
    data = np.asarray(data)
    raw = np.array(data, order="C").view(f"i{data.dtype.itemsize}")
    values = torch.from_numpy(raw).view(TORCH_DTYPE[source])
    if target in SATURATES:
        limit = SATURATES[target]
        values = values.float()
        values = torch.where(values.isnan(), values, values.clamp(-limit, limit))
    values = values.to(TORCH_DTYPE[target])
    torch_bits, numpy_bits = BITS[values.element_size()]
    return values.view(torch_bits).numpy().view(numpy_bits).reshape(data.shape)


def widen(handle: TensorHandle) -> np.ndarray:
    """The float32 values of a handle."""
    if handle.dtype.scalar not in HELD_AS_BITS:
        return handle.data.astype(np.float32)
    return convert_float(handle.data, handle.dtype.scalar, tl.float32).view(np.float32)


def narrow(values: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    return TensorHandle(convert_float(np.asarray(values, np.float32), tl.float32, dtype), dtype)


def held_as_bits(*handles: TensorHandle) -> bool:
    return any(handle.dtype.scalar in HELD_AS_BITS for handle in handles)


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32, rounded once.

    The product is exact in float64.  Their sum is rounded to odd there (Knuth's two-sum gives what it lost), so that
    the rounding to float32 behind it sees which side of a tie it was on.
    """
    with np.errstate(all="ignore"):
        a, b = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = np.asarray(a + b)
        back = total - a
        lost = (a - (total - back)) + (b - back)
        even = (total.view(np.int64) & 1) == 0
        odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        return np.where(even & np.isfinite(lost) & (lost != 0), odd, total).astype(np.float32)


class Repaired:
    """The builder methods to replace; each falls back to the stock one for the types numpy knows."""

    stock_binary = InterpreterBuilder.binary_op
    stock_unary = InterpreterBuilder.unary_op
    stock_fma = InterpreterBuilder.create_fma
    stock_clamp = InterpreterBuilder.create_clampf
    stock_dot = InterpreterBuilder.create_dot
    stock_cast = InterpreterBuilder.cast_impl

    def binary_op(self, lhs, rhs, op):
        if not (held_as_bits(lhs) and held_as_bits(rhs)):
            return Repaired.stock_binary(self, lhs, rhs, op)
        result = op(widen(lhs), widen(rhs))
        return TensorHandle(result, tl.int1) if result.dtype == bool else narrow(result, lhs.dtype.scalar)

    def unary_op(self, arg, op):
        if not held_as_bits(arg):
            return Repaired.stock_unary(self, arg, op)
        return narrow(op(widen(arg)), arg.dtype.scalar)

    def create_fma(self, x, y, z):
        kind = x.dtype.scalar
        if held_as_bits(x):
            return narrow(fused(widen(x), widen(y), widen(z)), kind)
        if kind != tl.float32:
            return Repaired.stock_fma(self, x, y, z)
        return TensorHandle(fused(x.data, y.data, z.data), kind)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg, low, high, propagate_nans):
        if not held_as_bits(arg):
            return Repaired.stock_clamp(self, arg, low, high, propagate_nans)
        return narrow(np.clip(widen(arg), widen(low), widen(high)), arg.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if held_as_bits(a, b):
            product = np.matmul(widen(a), widen(b)).astype(d.data.dtype)
        elif a.data.dtype == np.int8:
            # exact: every partial sum stays far below 2^53, and the float64 BLAS is 50x faster than numpy's int loop
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        else:
            return Repaired.stock_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        return TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        target = dst_type.scalar
        if target in HELD_AS_BITS:
            if src.dtype.scalar in TORCH_DTYPE:
                return TensorHandle(convert_float(src.data, src.dtype.scalar, target), target)
            return narrow(src.data.astype(np.float32), target)
        if held_as_bits(src):
            return TensorHandle(widen(src).astype(interpreter._get_np_dtype(dst_type)), target)
        return Repaired.stock_cast(self, src, dst_type)

    def get_bf16(self, value):
        return narrow(np.array([value]), tl.bfloat16)

    def create_inline_asm(self, text, constraints, values, types, is_pure, pack):
        dtypes = tuple(np.dtype(interpreter._get_np_dtype(kind)) for kind in types)
        results = ptx.run(ptx.Call(text, constraints, dtypes, pack), [value.data for value in values])
        return AsmResults(tuple(map(TensorHandle, results, (kind.scalar for kind in types))))


class AsmResults(NamedTuple):
    handles: tuple[TensorHandle, ...]

    def get_result(self, index: int) -> TensorHandle:
        return self.handles[index]


REPLACED = (
    "binary_op",
    "unary_op",
    "create_fma",
    "create_minnumf",
    "create_maxnumf",
    "create_clampf",
    "create_dot",
    "cast_impl",
    "get_bf16",
    "create_inline_asm",
)


def through_float32(stock):
    """A reduction that widens its operand first and narrows its values (not its indices) afterwards."""

    def reduce(self, operand, *args, **kwargs):
        x = operand[0] if isinstance(operand, tuple) else operand
        if x.dtype not in HELD_AS_BITS:
            return stock(self, operand, *args, **kwargs)
        wide = tl.core.tensor(
            TensorHandle(widen(x.handle), tl.float32), tl.block_type(tl.float32, list(x.shape))
        )
        result = stock(self, wide, *args, **kwargs)
        if isinstance(result, tuple):
            return self.to_tensor(narrow(result[0].handle.data, x.dtype).data, x.dtype), result[1]
        return self.to_tensor(narrow(result.handle.data, x.dtype).data, x.dtype)

    return reduce


@cache
def known_shape(sizes: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """What a block type and a tensor of these sizes hold of them."""
    numel = validate_block_shape(sizes)
    return tl.tuple(sizes), numel, (tl.tuple([tl.constexpr(s) for s in sizes]), tl.constexpr(numel))


def init_block_type(self, element_ty, shape):
    """As stock, where making the shape's type anew for every value is a third of all time."""
    sizes = tuple(s.value if isinstance(s, tl.constexpr) else s for s in shape)
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape, self.numel, self.of_a_tensor = known_shape(sizes)
    self.name = f"<{self.shape}, {element_ty}>"


SCALAR = (tl.tuple([]), tl.constexpr(1))


def init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_a_tensor if type.is_block() else SCALAR


# reductions by a function of ours that numpy has: the stock fallback goes through the elements one by one
NUMPY_REDUCTIONS = {"larger_or_nan": np.max, "smaller_or_nan": np.min}


def by_numpy(stock):
    def apply_impl(self, operands):
        reduction = NUMPY_REDUCTIONS.get(getattr(self.combine_fn, "__name__", ""))
        if reduction is None:
            return stock(self, operands)
        return self.min_max(operands[0], val_reduce_op=reduction)

    return apply_impl


def patched_once(stock):
    """For a kernel, both modules under which its functions may know the language; it is as it was when the kernel ends.

    Stock, every call of a function in a kernel patches anew, which is a third of all time, and is never undone: what
    is compiled afterwards meets the interpreter's language.
    """
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    return lambda kernel: stock(both)


def call_function(self, *args, **kwargs):
    """InterpretedFunction.__call__ within a kernel, which has patched the language."""
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@cache
def numpy_dtype_of_scalar(kind: tl.dtype) -> np.dtype:
    return STOCK_NUMPY_DTYPE(kind)


def numpy_dtype(kind: tl.dtype) -> np.dtype:
    """Stock, it writes the table down at every call."""
    scalar = kind.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else numpy_dtype_of_scalar(scalar)


def repair() -> None:
    """Patches triton.runtime.interpreter in place; a second call changes nothing."""
    if interpreter._convert_float is convert_float:
        return
    interpreter._convert_float = convert_float
    for name in REPLACED:
        setattr(InterpreterBuilder, name, Repaired.__dict__[name])
    ReduceOps.sum = through_float32(ReduceOps.sum)
    ReduceOps.min_max = through_float32(ReduceOps.min_max)
    ReduceOps.apply_impl = by_numpy(ReduceOps.apply_impl)
    tl.block_type.__init__, tl.tensor.__init__ = init_block_type, init_tensor
    interpreter._get_np_dtype = numpy_dtype
    interpreter._patch_lang = patched_once(interpreter._patch_lang)
    interpreter.InterpretedFunction.__call__ = call_function
    stock_patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        stock_patch(tensor, scope)
        # numpy >= 2.4 refuses int() of a one-element array, which is what every scalar is here
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_lang_tensor
