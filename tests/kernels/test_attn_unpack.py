"""The dequantizers in inline PTX against plain arithmetic: every byte, at every place of a register."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attn_unpack import bytes_to_fp16, nibbles_to_fp16, nibbles_to_int8, scale_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = 1024


@triton.jit
def _bytes_kernel(out, x, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(out + o_n, bytes_to_fp16(tl.load(x + o_n)))


@triton.jit
def _nibbles_kernel(low, high, low8, high8, x, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_x = tl.load(x + o_n)
    b_low, b_high = nibbles_to_fp16(b_x)
    tl.store(low + o_n, b_low)
    tl.store(high + o_n, b_high)
    b_low, b_high = nibbles_to_int8(b_x)
    tl.store(low8 + o_n, b_low)
    tl.store(high8 + o_n, b_high)


@triton.jit
def _scales_kernel(key, value, x, N: tl.constexpr):
    o_n = tl.program_id(0) * N + tl.arange(0, N)
    b_k, b_v = scale_pair(tl.load(x + o_n))
    tl.store(key + o_n, b_k)
    tl.store(value + o_n, b_v)


@pytest.fixture(params=range(4))
def codes(request: pytest.FixtureRequest) -> Tensor:
    """All bytes, each beside others than before."""
    step = (1, 3, 77, 129)[request.param]
    return (torch.arange(COUNT) * step + torch.arange(COUNT) // 256).to(torch.uint8)


def test_every_byte(codes: Tensor):
    assert set(codes.tolist()) == set(range(256))
    out = torch.empty(COUNT, dtype=torch.float16, device=DEVICE)
    _bytes_kernel[(1,)](out, codes.view(torch.int8).to(DEVICE), N=COUNT, num_warps=1)
    assert torch.equal(out.cpu(), 1024.0 + codes.half())


def test_every_pair_of_nibbles(codes: Tensor):
    halves = [torch.empty(COUNT, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    bytes_ = [torch.empty(COUNT, dtype=torch.int8, device=DEVICE) for _ in range(2)]
    _nibbles_kernel[(1,)](*halves, *bytes_, codes.view(torch.int8).to(DEVICE), N=COUNT, num_warps=1)
    low, high = (codes & 15).int(), (codes >> 4).int()
    assert torch.equal(halves[0].cpu().int(), 1024 + low)
    assert torch.equal(halves[1].cpu().int(), 1024 + 16 * high)
    assert torch.equal(bytes_[0].cpu().int(), low)
    assert torch.equal(bytes_[1].cpu().int(), 16 * (high - 8))


def test_every_scale():
    """All fp16 but NaN, in both halves, beside each other's sign bits."""
    bits = torch.arange(65536, dtype=torch.int32)
    bits = bits[~bits.short().view(torch.float16).isnan()]
    bits = torch.cat((bits, bits[: -len(bits) % COUNT]))
    other = bits.flip(0)
    pairs = (bits & 0xFFFF) | (other << 16)
    key, value = (torch.empty(len(pairs), device=DEVICE) for _ in range(2))
    _scales_kernel[(len(pairs) // COUNT,)](key, value, pairs.to(DEVICE), N=COUNT, num_warps=1)
    assert torch.equal(key.cpu(), bits.short().view(torch.float16).float())
    assert torch.equal(value.cpu(), other.short().view(torch.float16).float())
