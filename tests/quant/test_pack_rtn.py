"""Packing against arithmetic on Python integers; rounding against the definition of the grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.pack import num_words, pack, unpack
from quant.rtn import quantize
from quant.scheme import ONLINE, QuantWeight, Scheme, fuse


def words_by_hand(row: list[int], bits: int) -> list[int]:
    """The bit stream of a row as one Python integer, cut in signed 32-bit words."""
    stream = sum((code + 2 ** (bits - 1)) << (i * bits) for i, code in enumerate(row))
    words = [stream >> (32 * w) & 0xFFFFFFFF for w in range(-(-len(row) * bits // 32))]
    return [w - 2**32 if w >= 2**31 else w for w in words]


def test_pack_of_known_nibbles() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, 0, 1, 6, 7]], dtype=torch.int8)
    assert pack(codes, 4).item() == 0xFE983210 - 2**32
    assert pack(torch.tensor([[0]], dtype=torch.int8), 4).item() == 8


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 41), st.integers(0, 1), st.randoms())
@settings(max_examples=100, deadline=None)
def test_pack_equals_the_bit_stream_and_unpack_inverts_it(bits, rows, count, dim, random) -> None:
    codes = [
        [random.randrange(-(2 ** (bits - 1)), 2 ** (bits - 1)) for _ in range(count)] for _ in range(rows)
    ]
    tensor = torch.tensor(codes, dtype=torch.int8)
    along = tensor if dim == 1 else tensor.t()
    words = pack(along, bits, dim)
    assert (words if dim == 1 else words.t()).tolist() == [words_by_hand(row, bits) for row in codes]
    assert words.is_contiguous()
    assert words.shape[dim] == num_words(count, bits)
    assert torch.equal(unpack(words, bits, count, dim), along)


@pytest.mark.parametrize(
    "scheme", [Scheme(8), Scheme(4, 32), Scheme(4), Scheme(4, 32, False), Scheme(4, None, False)]
)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_rtn_picks_the_nearest_code(scheme: Scheme, scale_dtype: torch.dtype) -> None:
    w_NK = torch.randn(24, 128, generator=torch.Generator().manual_seed(0)) + 0.2
    q = quantize(w_NK, scheme, scale_dtype).check()
    assert torch.equal(q.scale_NQ.to(scale_dtype).float(), q.scale_NQ)
    # no code of the grid is nearer than the one taken
    group = scheme.group_size or 128
    zero_NK = 0 if q.zero_NQ is None else q.zero_NQ.float().repeat_interleave(group, 1)
    grid = torch.arange(scheme.low, scheme.high + 1).float()
    scale_NK = q.scale_NQ.repeat_interleave(group, 1)
    all_NKC = (grid - (zero_NK[..., None] if scheme.bits == 4 and q.zero_NQ is not None else 0)) * scale_NK[
        ..., None
    ]
    best = (all_NKC - w_NK[..., None]).abs().amin(-1)
    assert torch.allclose((q.dequantize() - w_NK).abs(), best, atol=1e-6)


def test_rtn_error_falls_with_bits_groups_and_zero_points() -> None:
    w_NK = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) + 0.5
    schemes = [Scheme(4), Scheme(4, 64), Scheme(4, 64, False), Scheme(8)]
    errors = [(quantize(w_NK, s).dequantize() - w_NK).square().mean().item() for s in schemes]
    assert errors == sorted(errors, reverse=True), errors
    assert errors[0] > 50 * errors[-1], errors


def test_rtn_of_zeros_and_of_one_value() -> None:
    for scheme in (Scheme(8), Scheme(4, 16), Scheme(4, 16, False)):
        q = quantize(torch.zeros(3, 32), scheme, torch.float16).check()
        assert not q.dequantize().any()
        assert not (quantize(torch.full((3, 32), 2.0), scheme).dequantize() - 2.0).abs().gt(0.15).any()
    with pytest.raises(ValueError, match="finite"):
        quantize(torch.tensor([[1.0, float("nan")]]), Scheme(8))


def test_int8_maximum_meets_the_last_code() -> None:
    q = quantize(torch.tensor([[3.0, -1.5, 0.3]]), Scheme(8))
    assert q.codes_NK.tolist() == [[127, -64, 13]]


def test_scheme_fits_the_columns_and_says_no() -> None:
    assert Scheme(4, 128).fit(256).group_size == 128
    assert Scheme(4, 128).fit(192).group_size == 64
    assert Scheme(4, 128).fit(100).group_size is None
    for bad in ({"bits": 3}, {"bits": 8, "group_size": 64}, {"bits": 8, "symmetric": False}):
        with pytest.raises(ValueError, match=r"bits|8-bit"):
            Scheme(**bad)
    assert ONLINE["w4a8"] == ONLINE["w4a8-int8"]


def test_check_refuses_what_is_not_canonical() -> None:
    good = quantize(torch.randn(4, 32), Scheme(4, 16))
    codes, scale = good.codes_NK, good.scale_NQ
    bad = {
        "codes must be": QuantWeight(good.scheme, codes.int(), scale),
        "scales must be .4, 2.": QuantWeight(good.scheme, codes, scale[:, :1]),
        "finite": QuantWeight(good.scheme, codes, scale * float("inf")),
        "not negative": QuantWeight(good.scheme, codes, -scale),
        "codes must be in": QuantWeight(good.scheme, codes + 8, scale),
        "zero points must be absent": QuantWeight(
            good.scheme, codes, scale, torch.zeros(4, 2, dtype=torch.int8)
        ),
        "zero points must be given": QuantWeight(Scheme(4, 16, False), codes, scale),
        "zero points must be int8": QuantWeight(Scheme(4, 16, False), codes, scale, torch.zeros(4, 2)),
    }
    for message, weight in bad.items():
        with pytest.raises(ValueError, match=message):
            weight.check()


def test_fuse_stacks_equal_schemes_only() -> None:
    a, b = (quantize(torch.randn(n, 32), Scheme(4, 16)) for n in (4, 8))
    both = fuse([a, b])
    assert both is not None
    assert torch.equal(both.dequantize(), torch.cat([a.dequantize(), b.dequantize()]))
    assert fuse([a, quantize(torch.randn(4, 32), Scheme(4))]) is None
    assert fuse([a, quantize(torch.randn(4, 32), Scheme(4, 16, False))]) is None
