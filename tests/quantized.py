"""Tells a matmul that quantizes its activations from one that only claims to.

Two inputs that differ by at least 4 units in the last place of their type, yet lie in the same quantum everywhere, have
the same int8 codes: a truly quantized operator gives them equal outputs, one that works on the floats does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MIN_ULPS = 4


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """Representable values between a and b, for values of one sign."""
    bits = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return (a.view(bits).long() - b.view(bits).long()).abs()


def twins_within_a_quantum(
    rows: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Two inputs [rows, columns]; each row has one common largest value 1, all else differs, within its quantum.

    Values lie in the middle of a quantum of 1/127, at most 12 quanta from 0: there 4 ulp of bf16 are a quarter of one.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(5, 13, (rows, columns), generator=generator)
    codes *= torch.randint(0, 2, codes.shape, generator=generator) * 2 - 1
    a = (codes / 127).to(dtype)
    # 4 ulp of float32 would drown in any rounding: at least an eighth of a quantum
    b = torch.where(codes % 2 == 0, a.float() * (1 + 2**-5), a.float() * (1 - 2**-5)).to(dtype)
    a[:, 0] = b[:, 0] = 1.0
    assert ulps_apart(a[:, 1:], b[:, 1:]).min() >= MIN_ULPS
    for x in (a, b):
        assert ((x[:, 1:].double() * 127 - codes[:, 1:]).abs() < 0.45).all(), "a twin left its quantum"
    return a, b


def same_for_twins(operator: Callable[[Tensor], Tensor], columns: int, dtype: torch.dtype) -> bool:
    """Whether `operator` (x_TK -> y_TN) quantizes its activations."""
    a, b = twins_within_a_quantum(3, columns, dtype)
    return torch.equal(operator(a), operator(b))
