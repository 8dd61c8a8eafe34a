"""The repaired interpreter against torch, bit for bit; all but the plain float16 and int8 cases fail on the stock one."""

from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = [
    pytest.mark.skipif("torch.cuda.is_available()", reason="on a GPU the kernels are compiled"),
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
]


@triton.jit
def _cast_kernel(out, x, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(out + o_n, tl.load(x + o_n).to(out.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(total, scaled, quotient, larger, less, x, y, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_x = tl.load(x + o_n)
    b_y = tl.load(y + o_n)
    tl.store(total + o_n, b_x + b_y)
    tl.store(scaled + o_n, b_x * 3.0)
    tl.store(quotient + o_n, b_x * b_y)
    tl.store(larger + o_n, tl.maximum(b_x, b_y))
    tl.store(less + o_n, (b_x < b_y).to(tl.int8))


@triton.jit
def _fma_kernel(out, x, y, z, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(out + o_n, tl.fma(tl.load(x + o_n), tl.load(y + o_n), tl.load(z + o_n)))


@triton.jit
def _reduce_kernel(total, largest, x, M: tl.constexpr, N: tl.constexpr):
    b_x = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(total + tl.arange(0, M), tl.sum(b_x, 1))
    tl.store(largest + tl.arange(0, M), tl.max(b_x, 1))


@triton.jit
def _dot_kernel(out, a, b, M: tl.constexpr, K: tl.constexpr):
    o_m = tl.arange(0, M)
    o_k = tl.arange(0, K)
    b_a = tl.load(a + o_m[:, None] * K + o_k[None, :])
    b_b = tl.load(b + o_m[:, None] * K + o_k[None, :])
    tl.store(out + o_m[:, None] * M + o_m[None, :], tl.dot(b_a, tl.trans(b_b)))


@triton.jit
def _descriptor_load_kernel(out, x, i_row, i_column, R: tl.constexpr, N: tl.constexpr):
    o_n = tl.arange(0, R)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + o_n, x.load([i_row, i_column]))


@triton.jit
def _descriptor_store_kernel(out, x, i_row, i_column, R: tl.constexpr, N: tl.constexpr):
    o_n = tl.arange(0, R)[:, None] * N + tl.arange(0, N)[None, :]
    out.store([i_row, i_column], tl.load(x + o_n))


@triton.jit
def _nested_loops_kernel(out, bounds, STEP: tl.constexpr):
    total = 0
    low = tl.load(bounds)
    high = tl.load(bounds + 1)
    for i in tl.range(low, high, STEP, num_stages=3, flatten=True, warp_specialize=False):
        for j in range(low, i):
            total += 100 * i + j
    left = high
    while left > low:
        left -= 1
        total += 100000
    tl.store(out, total)


@triton.jit
def _count_kernel(out, n, STEP: tl.constexpr):
    count = 0
    for i in tl.range(0, n, STEP):
        for _ in range(tl.load(out)):
            count += i
    tl.store(out, count)


@triton.jit
def _halves(x):
    return tl.cdiv(x, 2)


@triton.jit
def _calling_kernel(out, x, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(out + o_n, _halves(tl.load(x + o_n)))


def bits(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def every_float(dtype: torch.dtype) -> Tensor:
    """All finite 16-bit patterns of `dtype`; for fp32 random ones of every exponent, ties of bf16 among them."""
    if dtype != torch.float32:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        return torch.where(x.isfinite(), x, 0)
    x = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).int()
    x[::4] = x[::4] & ~0xFFFF | 0x8000
    x = x.view(torch.float32)
    x[1::4] = torch.randn(2**14, generator=torch.Generator().manual_seed(1))
    return torch.where(x.isfinite(), x, 0)


@pytest.mark.parametrize(
    "target", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_between_floats(source, target):
    x = every_float(source)
    out = torch.empty(x.shape, dtype=target)
    _cast_kernel[(1,)](out, x, N=len(x))
    expected = x
    if target.itemsize == 1:
        limit = torch.finfo(target).max
        expected = x.float().clamp(-limit, limit)
    expected = expected.to(target)
    assert torch.equal(bits(out), bits(expected))


def test_casts_of_integers():
    x = torch.arange(-128, 128, dtype=torch.int8)
    out, back = torch.empty(256, dtype=torch.bfloat16), torch.empty(256, dtype=torch.int8)
    _cast_kernel[(1,)](out, x, N=256)
    assert torch.equal(out, x.bfloat16())
    _cast_kernel[(1,)](back, out, N=256)
    assert torch.equal(back, x)


def test_arithmetic_in_bf16():
    x, y = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    total, scaled, product, larger = torch.empty(4, 4096, dtype=torch.bfloat16)
    less = torch.empty(4096, dtype=torch.int8)
    _arithmetic_kernel[(1,)](total, scaled, product, larger, less, x, y, N=4096)
    for got, expected in ((total, x + y), (scaled, x * 3.0), (product, x * y), (larger, torch.maximum(x, y))):
        assert torch.equal(bits(got), bits(expected))
    assert torch.equal(less.bool(), x < y)


def test_an_fma_rounds_once():
    """The product's own rounding error survives, and a tie that only a far smaller addend breaks goes its way."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    y = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    z = -(x * y)
    x[0], y[0], z[0] = 1 + 2**-12, 1 + 2**-12, 2**-80  # the product is a tie of float32
    x[1], y[1], z[1] = 1 + 2**-12, 1 + 2**-12, -(2**-80)
    x[2], y[2], z[2] = 3e38, 3e38, float("-inf")
    out = torch.empty(4096)
    _fma_kernel[(1,)](out, x, y, z, N=4096)

    def exact(i: int) -> float:
        total = Fraction(x[i].item()) * Fraction(y[i].item()) + Fraction(z[i].item())
        near = torch.tensor(float(total))  # of its neighbours, the nearest
        both = [torch.nextafter(near, torch.tensor(end)).item() for end in (-1e38, 1e38)]
        return min((near.item(), *both), key=lambda v: abs(Fraction(v) - total))

    assert out[3:].tolist() == [exact(i) for i in range(3, 4096)]
    assert out[:2].tolist() == [1 + 2**-11 + 2**-23, 1 + 2**-11]
    assert out[2] == float("-inf")
    assert (out[3:] != 0).any()


def test_reductions_in_bf16():
    # multiples of 1/8 below 4: every partial sum is exact, so the order of the additions cannot matter
    x = (torch.randint(-8, 9, (4, 16), generator=torch.Generator().manual_seed(0)) / 8).bfloat16()
    total, largest = torch.empty(2, 4, dtype=torch.bfloat16)
    _reduce_kernel[(1,)](total, largest, x, M=4, N=16)
    assert torch.equal(total, x.sum(1))
    assert torch.equal(largest, x.amax(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_dot(dtype):
    # small integers: exact in every type, whatever the order
    a, b = torch.randint(-8, 9, (2, 16, 32), generator=torch.Generator().manual_seed(0)).float()
    integer = not dtype.is_floating_point
    out = torch.empty(16, 16, dtype=torch.int32 if integer else torch.float32)
    _dot_kernel[(1,)](out, a.to(dtype), b.to(dtype), M=16, K=32)
    assert torch.equal(out.float(), a @ b.T)


def test_loops_with_run_time_bounds():
    out = torch.tensor([2], dtype=torch.int32)
    _count_kernel[(1,)](out, 10, STEP=3)
    assert out.item() == 2 * (0 + 3 + 6 + 9)


def test_loops_inside_loops_with_hints_and_a_while():
    out = torch.zeros(1, dtype=torch.int32)
    _nested_loops_kernel[(1,)](out, torch.tensor([1, 8], dtype=torch.int32), STEP=2)
    assert out.item() == sum(100 * i + j for i in range(1, 8, 2) for j in range(1, i)) + 7 * 100000


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("left", FP8)
@pytest.mark.parametrize("right", FP8)
def test_dot_of_two_fp8_types(left, right):
    a, b = torch.randint(-8, 9, (2, 16, 32), generator=torch.Generator().manual_seed(0)).float()
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](out, a.to(left), b.to(right), M=16, K=32)
    assert torch.equal(out, a.to(left).float() @ b.to(right).float().T)


@pytest.mark.parametrize("dtypes", [(torch.uint8, torch.int8), (torch.uint8, torch.uint8)], ids=str)
def test_dot_of_unsigned_bytes_is_refused_as_by_the_compiler(dtypes):
    a, b = (torch.ones(16, 32, dtype=dtype) for dtype in dtypes)
    with pytest.raises(Exception, match=r"same dtype|only int8"):
        _dot_kernel[(1,)](torch.empty(16, 16, dtype=torch.int32), a, b, M=16, K=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_tensor_descriptors_read_zeros_past_the_edge_and_write_nothing_there(dtype):
    x = torch.randint(1, 100, (5, 48), generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(4, 32, dtype=dtype)
    _descriptor_load_kernel[(1,)](out, TensorDescriptor.from_tensor(x, [4, 32]), 3, 32, R=4, N=32)
    expected = torch.zeros(4, 32)
    expected[:2, :16] = x.float()[3:, 32:]
    assert torch.equal(out.float(), expected)
    y = x.clone()
    _descriptor_store_kernel[(1,)](TensorDescriptor.from_tensor(y, [4, 32]), out, 1, 16, R=4, N=32)
    expected = x.float()
    expected[1:, 16:] = out.float()
    assert torch.equal(y.float(), expected)


def test_a_kernel_that_calls_functions_leaves_the_language_as_it_was():
    """Or what is compiled afterwards meets the interpreter's."""
    owners = (tl, tl.core, tl.core.tensor, tl.core.tensor_descriptor_base, tl.math)

    def language():
        return [{name: getattr(owner, name) for name in dir(owner) if name != "__dict__"} for owner in owners]

    before = language()
    x = torch.arange(64, dtype=torch.int32)
    out = torch.empty_like(x)
    _calling_kernel[(1,)](out, x, N=64)
    assert torch.equal(out, (x + 1) // 2)
    for owner, was, now in zip(owners, before, language(), strict=True):
        changed = [name for name in was.keys() | now.keys() if was.get(name) != now.get(name)]
        assert not changed, f"{owner}: {changed}"
