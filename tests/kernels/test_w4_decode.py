"""Every decoder of int4 weights, on every byte with every legal scale and zero: exactly what plain arithmetic gives."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gemm_w4a8 import quantize_progressive
from kernels.w4_decode import decode
from kernels.w4_pack import (
    FP8,
    Int4,
    chunk_of,
    cut_group,
    encode_e4m3,
    fireq_products,
    pack,
    pack_steps,
    pack_zeros,
    pair_up,
    progressive_offset,
    unpair,
    widened,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# of a program: all the interpreter can take at once, few enough for a GPU's registers
ROWS = 16 if DEVICE == "cuda" else 256


@triton.jit
def _decode_kernel(even, odd, w, meta, DECODE: tl.constexpr, ROWS: tl.constexpr):
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o = o_n[:, None] * 256 + tl.arange(0, 256)[None, :]
    b_even, b_odd = decode(tl.load(w + o), meta + o_n, DECODE)
    tl.store(even + o, b_even)
    tl.store(odd + o, b_odd)


def decoded(bytes_N256: Tensor, how: str, meta_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The even and odd halves of rows of 256 bytes."""
    N = bytes_N256.shape[0]
    kind = FP8 if how == "e4m3" else torch.int8
    given = torch.zeros(-(-N // ROWS) * ROWS, 256, dtype=torch.uint8)
    meta = torch.zeros(given.shape[0], dtype=torch.int32)
    given[:N] = bytes_N256
    # the filling must be legal too: step 1, offset 0
    meta[:] = 0x00010001 if how == "progressive" else 0
    if meta_N is not None:
        meta[:N] = meta_N
    even, odd = (torch.empty(given.shape, dtype=kind, device=DEVICE) for _ in range(2))
    grid = (given.shape[0] // ROWS,)
    _decode_kernel[grid](even, odd, given.to(DEVICE), meta.to(DEVICE), DECODE=how, ROWS=ROWS)
    return even[:N].cpu(), odd[:N].cpu()


def halves(bytes_N256: Tensor) -> tuple[Tensor, Tensor]:
    return (bytes_N256 & 15).int(), (bytes_N256 >> 4).int()


ALL_BYTES = torch.arange(256, dtype=torch.uint8)[None, :]


def test_symmetric_codes_come_out_times_16():
    for got, nibble in zip(decoded(ALL_BYTES, "symmetric"), halves(ALL_BYTES), strict=True):
        assert torch.equal(got.int(), 16 * ((nibble ^ 8) - 8))


def test_e4m3_holds_every_code_exactly():
    codes = torch.arange(-8, 8, dtype=torch.int8)
    nibbles = encode_e4m3(codes)
    assert sorted(nibbles.tolist()) == list(range(16))
    pairs = (nibbles[:, None] << 4 | nibbles[None, :]).view(1, 256)
    even, odd = decoded(pairs, "e4m3")
    assert torch.equal(even.float() * 256, codes.float().repeat(16)[None, :])
    assert torch.equal(odd.float() * 256, codes.float().repeat_interleave(16)[None, :])


def test_every_zero_point_is_taken_off():
    zero_NQ = torch.cartesian_prod(torch.arange(16), torch.arange(16)).int()
    w = ALL_BYTES.expand(256, 256)
    even, odd = decoded(w, "zeros", pack_zeros(zero_NQ)[0])
    u_even, u_odd = halves(w)
    assert torch.equal(even.int(), u_even - zero_NQ[:, :1])
    assert torch.equal(odd.int(), u_odd - zero_NQ[:, 1:])


def legal_rows() -> tuple[Tensor, Tensor, Tensor]:
    """(step, offset) that leave any value within int8, and codes [rows, 256] of which every value is."""
    step, offset = torch.cartesian_prod(torch.arange(18), torch.arange(256)).int().unbind(1)
    u = torch.arange(16)
    legal = (u * step[:, None] - offset[:, None]).add(128).bitwise_and(~255) == 0
    step, offset, legal = step[legal.any(1)], offset[legal.any(1)], legal[legal.any(1)]
    # row by row all legal codes in turn, none left out, in an order that mixes neighbours
    ranks = (torch.arange(256) * 7 % 256)[None, :] % legal.sum(1, keepdim=True)
    order = legal.int().argsort(dim=1, descending=True, stable=True)
    return step, offset, order.gather(1, ranks)


def test_every_legal_step_and_offset_on_every_code():
    step, offset, codes = legal_rows()
    assert len(step) > 3000
    assert all(set(c.tolist()) for c in codes)
    # the odd half has other steps than the even one
    other = torch.arange(len(step)).roll(1234)
    w = (codes | codes[other] << 4).to(torch.uint8)
    meta = pack_steps(torch.stack([step, step[other]], 1), torch.stack([offset, offset[other]], 1))
    even, odd = decoded(w, "progressive", meta[0])
    assert torch.equal(even.int(), (codes * step[:, None] - offset[:, None]).int())
    assert torch.equal(odd.int(), (codes[other] * step[other, None] - offset[other, None]).int())


@pytest.mark.parametrize(
    ("group", "cut", "chunk"),
    [
        (128, 128, 128),
        (32, 32, 32),
        (1024, 128, 128),
        (96, 32, 32),
        (64, 64, 64),
        (2, 2, 32),
        (48, 48, 64),
        (130, 65, 128),
        (131, 1, 32),
    ],
)
def test_a_group_is_cut_and_filled_up(group, cut, chunk):
    assert cut_group(group) == cut
    assert chunk_of(cut) == chunk


@pytest.mark.parametrize(("group", "groups"), [(32, 5), (48, 4), (65, 3), (128, 2)])
def test_two_codes_share_a_byte_and_come_back(group, groups):
    codes = torch.randint(0, 16, (7, group * groups)).to(torch.uint8)
    packed = pair_up(codes, group)
    assert packed.shape == (7, -(-groups // 2) * chunk_of(group))
    assert torch.equal(unpair(packed, group, group * groups), codes)
    assert torch.equal(packed[:, :group] & 15, codes[:, :group])
    assert torch.equal(packed[:, :group] >> 4, codes[:, group : 2 * group])


@pytest.mark.parametrize("kind", ["group", "progressive", "channel", "fp8"])
def test_four_bits_a_weight_and_little_beside(kind):
    N, K = 256, 1024
    step = torch.ones(N, K // 128, dtype=torch.int8) if kind == "progressive" else None
    groups = 1 if kind in ("progressive", "channel") else K // 128
    w = Int4(torch.zeros(N, K, dtype=torch.int8), torch.ones(N, groups), None, step)
    packed = pack(kind, w)
    beside = {"group": 4 * N * 8, "fp8": 4 * N * 8, "progressive": 2 * N * 8 + 4 * N, "channel": 4 * N}[kind]
    assert packed.nbytes - packed.arrivals.nbytes == N * K // 2 + beside


def test_a_quantized_weight_is_legal_and_near():
    w_NK = torch.randn(33, 512, generator=torch.Generator().manual_seed(0))
    w_NK[3] *= 1000
    w_NK[5] = 0
    w_NK[7, :128] = torch.linspace(-119, 119, 128)
    w = quantize_progressive(w_NK, 128)
    progressive_offset(w)
    assert int(widened(w).abs().max()) > 100
    step = w.step_NQ.float().repeat_interleave(128, 1)
    error = (widened(w).float() * w.scale_NQ - w_NK).abs() / w.scale_NQ
    # half a code of the first rounding and half a step of the second; a step rounded down leaves the ends out of reach
    assert (error <= 0.5 + 1.5 * step).all()
    assert (error <= 0.5 + 0.5 * step + 1e-3).float().mean() > 0.99
    assert int(w.step_NQ.max()) <= 16


def test_fireq_products_are_rounded_once():
    """To the nearest e4m3 of code times scale, scales of few bits and subnormal ones among them."""
    scale = torch.tensor([[2.0**-9, 1.375], [0.9375, 56.0]]).to(FP8)
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 2)
    products = fireq_products(codes, scale).view(2, 2, 16).float()
    exact = codes.view(2, 2, 16).float() * scale.float()[:, :, None]
    assert torch.equal(products[0, 0], exact[0, 0])
    assert not torch.equal(products[0, 1], exact[0, 1]), "7 * 1.375 has more bits than e4m3"
    grid = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    nearest = (exact.abs()[..., None] - grid).abs().amin(-1)
    assert torch.equal((products - exact).abs(), nearest)
    with pytest.raises(ValueError, match="at most 56"):
        fireq_products(codes, (scale.float() * 2).to(FP8))


@pytest.mark.parametrize(
    ("step", "zero", "message"),
    [(18, 0, "steps must be"), (17, 7, "zero . step must be"), (17, -8, r"\(code - zero\) . step must be")],
)
def test_illegal_progressive_weights_are_refused(step, zero, message):
    w = Int4(
        torch.full((2, 32), 7, dtype=torch.int8),
        torch.ones(2, 1),
        torch.full((2, 1), zero, dtype=torch.int8),
        torch.full((2, 1), step, dtype=torch.int8),
    )
    if (step, zero) == (17, 7):
        w = Int4(w.codes_NK, w.scale_NQ, None, w.step_NQ, torch.full((2, 1), 200))
    with pytest.raises(ValueError, match=message):
        progressive_offset(w)
