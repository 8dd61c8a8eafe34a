"""QServe's tensors, written here byte by byte from the layout, are read as the weights they stand for.

Every control writes one thing otherwise (nibbles, the order of s2, an offset, a sign) and must not be read the same.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.gemm_w4a8 import gemm_w4a8, prepare_w4a8, prepare_w4a8_progressive
from quant.formats import qserve
from quant.formats.catalog import recognise
from quant.rtn import quantize
from quant.scheme import QuantWeight, Scheme

N, K, Q = 64, 256, 2


def nibbles(codes_NK: Tensor, swapped: bool = False) -> Tensor:
    """qweight of codes 0..15: in a tile's 512 bytes, the byte and the half of it that output o, input i has."""
    n, k = codes_NK.shape
    out, inp = torch.arange(n)[:, None], torch.arange(k)
    o, i = out % 32, inp % 32
    tile = (out // 32) * (k // 32) + inp // 32
    byte = (o % 8) * 64 + (i // 4 % 4) * 16 + (i // 16) * 8 + (o // 8 % 2) * 4 + i % 4
    high = ((o >= 16) != swapped).expand(n, k)
    data = torch.zeros(n * k // 2, dtype=torch.long)
    data.put_(tile * 512 + byte, codes_NK << (4 * high), accumulate=True)
    return data.to(torch.uint8).view(torch.int8).view(n, k // 2)


def permuted(x_NQ: Tensor, order: str = "kernel") -> Tensor:
    """[Q, N] with the outputs of each 32 where the kernels, or deepcompressor's packer, want them."""
    out = torch.zeros(x_NQ.shape[1], x_NQ.shape[0], dtype=torch.int8)
    for n in range(len(x_NQ)):
        block, o = n // 32 * 32, n % 32
        place = (o % 8) * 4 + o // 8 if order == "kernel" else o // 16 * 16 + (o % 8) * 2 + o // 8 % 2
        out[:, block + place] = x_NQ[n]
    return out


class Groups(NamedTuple):
    codes_NK: Tensor  # 0..15
    step_NQ: Tensor
    zero_NQ: Tensor  # added to code * step
    scale_N: Tensor

    def integers(self) -> Tensor:
        spread = (t.long().repeat_interleave(128, 1) for t in (self.step_NQ, self.zero_NQ))
        step, zero = spread
        return self.codes_NK.long() * step + zero


def groups(seed: int = 0, n: int = N, k: int = K, alike: bool = False, top: int = 119) -> Groups:
    """As QoQ makes them: int8 of a channel within `top`, groups of very different ranges or, as rotated, `alike`."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g).view(n, -1, 128)
    w = w if alike else w * torch.rand(n, k // 128, 1, generator=g)
    scale = (w.abs().amax((1, 2)) / top).half().float()
    wide = (w / scale[:, None, None]).round().clamp(-top, top)
    step = ((wide.amax(2) - wide.amin(2)) / 15).round().clamp(min=1)
    zero = (-wide.amin(2) / step).round().clamp(0, 15)
    codes = (wide / step[..., None] + zero[..., None]).round().clamp(0, 15)
    return Groups(codes.view(n, k).long(), step.long(), (-zero * step).long(), scale)


def written(w: Groups, order: str = "kernel", **wrong: Any) -> dict[str, Tensor]:
    # beyond -128 the sum wraps, as in the kernel that adds bytes
    zeros = ((w.zero_NQ + 128) % 256 - 128).to(torch.int8)
    return {
        "qweight": nibbles(w.codes_NK, **wrong),
        "s1_scales": w.scale_N.half(),
        "s2_scales": permuted(w.step_NQ.to(torch.int8), order),
        "s2_zeros": permuted(zeros, order),
    }


def read(fields: dict[str, Tensor], raw: dict[str, Any] | None = None, k: int = K) -> QuantWeight:
    return qserve.load("m", fields, N, k, qserve.read_config(raw))


def accumulators(weight: QuantWeight, x_TK: Tensor) -> Tensor:
    """What the matmul of the engine adds up, before any scale."""
    ones = torch.ones(len(weight.codes_NK))
    if weight.scheme.progressive:
        w = prepare_w4a8_progressive(weight.codes_NK, ones, weight.step_NQ, offset_NQ=weight.offset_NQ)
    else:
        w = prepare_w4a8(weight.codes_NK, ones[:, None], weight.zero_NQ)
    return gemm_w4a8(x_TK, torch.ones(len(x_TK)), w, torch.float32).long()


def rows(t: int = 5, k: int = K) -> Tensor:
    return torch.randint(-127, 128, (t, k), generator=torch.Generator().manual_seed(1), dtype=torch.int8)


@pytest.mark.parametrize("order", ["kernel", "packer"])
def test_groups_are_read_in_whichever_order_they_were_permuted(order: str) -> None:
    w = groups()
    assert int(w.step_NQ.max()) > 8
    got = read(written(w, order), {"quant_method": "qoq", "wbits": 4, "group_size": 128})
    assert got.scheme == Scheme(4, 128, progressive=True)
    assert torch.equal(got.dequantize(), w.integers().float() * w.scale_N[:, None])
    assert torch.equal(accumulators(got, rows()), rows().long() @ w.integers().T)


@pytest.mark.parametrize("order", ["kernel", "packer"])
@pytest.mark.parametrize("seed", range(4))
def test_rotated_weights_tell_the_order_by_where_their_groups_lie(seed: int, order: str) -> None:
    """Either order makes int8 of them, so the range alone would read one of the two files as another model."""
    w = groups(seed, alike=True, k=512, top=104)
    fields = written(w, order)
    for natural in qserve.ORDERS.values():
        step, zero = natural(fields["s2_scales"]).int(), natural(fields["s2_zeros"]).int()
        values = w.codes_NK * step.repeat_interleave(128, 1) + zero.repeat_interleave(128, 1)
        assert -128 <= int(values.min()) <= int(values.max()) <= 127
    assert torch.equal(read(fields, k=512).integers().long(), w.integers())


@pytest.mark.parametrize(("zero", "low"), [(-180, 6), (40, 0), (-128, 0)])
def test_zeros_are_added_modulo_256(zero: int, low: int) -> None:
    """-180 is written as 76, and 40 is what it is: the codes of the group tell."""
    w = groups()
    codes = low + torch.arange(K).expand(N, K) % 10
    w = w._replace(codes_NK=codes, step_NQ=torch.full((N, Q), 9), zero_NQ=torch.full((N, Q), zero))
    assert torch.equal(read(written(w)).integers().long(), w.integers())


def test_the_kernels_order_is_no_other() -> None:
    """That both readings of one file differ, and which of them is which."""
    w = groups()
    fields = written(w)
    assert torch.equal(qserve.ORDERS["the kernels'"](fields["s2_scales"]), w.step_NQ)
    assert not torch.equal(qserve.ORDERS["deepcompressor's"](fields["s2_scales"]), w.step_NQ)


def test_an_order_that_nobody_writes_is_refused_with_the_counts() -> None:
    w = groups()
    fields = written(w) | {
        "s2_scales": written(w)["s2_scales"].flip(1),
        "s2_zeros": written(w)["s2_zeros"].flip(1),
    }
    with pytest.raises(
        ValueError, match=r"no known order .* of 128 groups leave int8 in the kernels' \d+, in deep"
    ):
        read(fields)


class Layer(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


def file_of(layers: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    tensors = {f"{name}.{s}": t for name, fields in layers.items() for s, t in fields.items()}
    return {n: Layer(t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors


def lopsided(seed: int) -> Groups:
    """One sign, in two steps of scale: no group's mean tells whose it is, nor does any leave int8."""
    g = torch.Generator().manual_seed(seed)
    step = torch.randint(1, 3, (32, 1), generator=g).expand(32, 2)
    codes = torch.randint(0, 16, (32, 128), generator=g).repeat(1, 2)
    return Groups(codes, step, torch.zeros(32, 2, dtype=torch.long), torch.ones(32))


@pytest.mark.parametrize("order", ["kernel", "packer"])
def test_the_order_is_decided_once_for_all_layers(order: str) -> None:
    small = lopsided(0)
    with pytest.raises(
        ValueError, match=r"1\.00 times better centred .* 2 times would tell, .* s2_order: kernel or deep"
    ):
        qserve.load("small", written(small, order), 32, K, None)
    layers = {"small": written(small, order)}
    layers |= {f"large{i}": written(groups(i, n=64, alike=True, k=512, top=104), order) for i in range(2)}
    infos, tensors = file_of(layers)
    # what is no such layer is left to the one that reads it
    infos["odd.s2_scales"] = Layer(torch.int8, (2, 64))
    reader = recognise(infos, None).settled(infos, tensors.__getitem__)
    got = reader.load("small", layers["small"], 32, K)
    assert torch.equal(got.integers().long(), small.integers())


@pytest.mark.parametrize("order", ["kernel", "packer"])
def test_a_file_that_does_not_tell_its_order_is_refused_unless_the_config_says_it(order: str) -> None:
    w = lopsided(1)
    infos, tensors = file_of({"a": written(w, order)})
    with pytest.raises(ValueError, match="s2_order: kernel or deepcompressor"):
        recognise(infos, None).settled(infos, tensors.__getitem__)
    raw = {"quant_method": "qoq", "wbits": 4, "group_size": 128}
    named = raw | {"s2_order": {"kernel": "kernel", "packer": "deepcompressor"}[order]}
    reader = recognise(infos, named).settled(infos, tensors.__getitem__)
    assert torch.equal(reader.load("a", written(w, order), 32, K).integers().long(), w.integers())
    with pytest.raises(ValueError, match="s2_order must be one of kernel, deepcompressor, got 'best'"):
        recognise(infos, raw | {"s2_order": "best"})


@pytest.mark.parametrize("order", ["kernel", "packer"])
@pytest.mark.parametrize("lie", ["rows", "columns"])
def test_rows_and_columns_that_lie_off_zero_hide_no_order(lie: str, order: str) -> None:
    g = torch.Generator().manual_seed(5)
    n, k = 64, 1024
    w = torch.randn(n, k, generator=g) + torch.randn((n, 1) if lie == "rows" else (1, k), generator=g)
    scale = (w.abs().amax(1) / 119).half().float()
    wide = (w / scale[:, None]).round().clamp(-119, 119).view(n, -1, 128)
    step = ((wide.amax(2) - wide.amin(2)) / 15).round().clamp(min=1)
    zero = (-wide.amin(2) / step).round().clamp(0, 15)
    codes = (wide / step[..., None] + zero[..., None]).round().clamp(0, 15)
    made = Groups(codes.view(n, k).long(), step.long(), (-zero * step).long(), scale)
    assert torch.equal(qserve.load("m", written(made, order), n, k, None).integers().long(), made.integers())


def test_a_layer_in_another_order_than_the_file_is_refused() -> None:
    layers = {f"m{i}": written(groups(i), "kernel") for i in range(3)} | {"odd": written(groups(3), "packer")}
    infos, tensors = file_of(layers)
    reader = recognise(infos, None).settled(infos, tensors.__getitem__)
    with pytest.raises(
        ValueError, match=r"odd: s2_scales and s2_zeros in the kernels' order, that of the file"
    ):
        reader.load("odd", layers["odd"], N, K)


def controls() -> Iterator[tuple[str, dict[str, Tensor]]]:
    w = groups()
    good = written(w)
    yield "nibbles exchanged", written(w, swapped=True)
    yield "bytes reversed", good | {"qweight": good["qweight"].flip(1)}
    yield "two's complement", written(w._replace(codes_NK=(w.codes_NK + 8) % 16))
    yield "zero one too low", written(w._replace(zero_NQ=w.zero_NQ - w.step_NQ))
    yield "zeros not negated", good | {"s2_zeros": permuted((-w.zero_NQ).clamp(max=127).to(torch.int8))}
    yield "groups exchanged", good | {k: good[k].flip(0) for k in ("s2_scales", "s2_zeros")}
    yield "outputs of s2 in plain order", good | {"s2_scales": w.step_NQ.T.to(torch.int8).contiguous()}
    yield "scales reversed", good | {"s1_scales": good["s1_scales"].flip(0)}


@pytest.mark.parametrize("control", [name for name, _ in controls()])
def test_a_wrong_layout_is_not_read_as_the_right_weights(control: str) -> None:
    w = groups()
    want = w.integers().float() * w.scale_N[:, None]
    got = read_or_none(dict(controls())[control])
    # a refusal is as good as another weight
    off = 1.0 if got is None else ((got.dequantize() - want).norm() / want.norm()).item()
    assert off > 0.1, f"{control} changes the weights by {off:.3f} only: the layout test could not tell"


def read_or_none(fields: dict[str, Tensor]) -> QuantWeight | None:
    try:
        return read(fields)
    except ValueError:
        return None


def channel(zero_N: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=g)
    scale = (torch.rand(N, generator=g) * 0.01 + 0.001).half()
    szero = (zero_N * scale.float()).half()
    return codes, scale, szero, {"qweight": nibbles(codes), "s1_scales": scale, "s1_szeros": szero}


def test_channels_with_whole_zeros() -> None:
    zero = torch.randint(0, 16, (N,), generator=torch.Generator().manual_seed(3))
    codes, scale, _, fields = channel(zero.float())
    got = read(fields, {"quant_method": "qoq", "wbits": 4, "group_size": -1})
    assert got.scheme == Scheme(4, symmetric=False)
    integers = codes - zero[:, None]
    assert torch.equal(got.dequantize(), integers.float() * scale.float()[:, None])
    assert torch.equal(accumulators(got, rows()), rows().long() @ integers.T)
    symmetric = read(channel(torch.full((N,), 8.0))[3])
    assert symmetric.scheme == Scheme(4)


def test_channels_with_zeros_between_the_codes() -> None:
    """Zeros subtracted after the scale: on a finer grid, at most a sixteenth of a step off, mostly a hundredth."""
    zero = torch.rand(N, generator=torch.Generator().manual_seed(4)) * 8 + 3.5
    codes, scale, szero, fields = channel(zero)
    got = read(fields)
    assert got.scheme == Scheme(4, 128, progressive=True)
    truth = codes.double() * scale.double()[:, None] - szero.double()[:, None]
    off = (got.dequantize().double() - truth).abs() / scale.double()[:, None]
    print(f"largest error {off.max():.4f} steps, mean {off.mean():.4f}")
    assert off.max() <= qserve.MAX_ZERO_ERROR
    assert off.mean() < 0.015
    whole = (codes - zero.round()[:, None]) * scale.double()[:, None]
    assert ((whole - truth).abs() / scale.double()[:, None]).mean() > 0.1, "rounding would do as well"
    assert torch.equal(accumulators(got, rows()), rows().long() @ got.integers().long().T)


def test_zeros_that_no_int8_form_reaches_are_refused_with_the_error() -> None:
    zero = torch.full((N,), 7.0)
    zero[9] = -20.5
    with pytest.raises(
        ValueError, match=r"zero point -20\.\d+ of output 9 has no int8 form nearer than \S+ steps"
    ):
        read(channel(zero)[3])


def test_int8_channels() -> None:
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    scale = (torch.rand(N) + 0.5).half()
    got = read(
        {"weight": codes, "dequant_scale": scale}, {"quant_method": "qoq", "wbits": 8, "group_size": -1}
    )
    assert got.scheme == Scheme(8)
    assert torch.equal(got.dequantize(), codes.float() * scale.float()[:, None])


def test_what_we_write_is_what_the_layout_says_and_reads_back() -> None:
    w = groups()
    fields = written(w)
    got = qserve.save(read(fields))
    assert set(got) == set(fields)
    assert all(torch.equal(got[name], fields[name]) for name in fields)
    zeros = channel(torch.randint(0, 16, (N,)).float())[3]
    assert all(torch.equal(value, zeros[name]) for name, value in qserve.save(read(zeros)).items())
    for scheme in (Scheme(4, symmetric=False), Scheme(4), Scheme(8)):
        weight = quantize(torch.randn(N, K), scheme, torch.float16)
        back = read(qserve.save(weight), qserve.config_object(scheme))
        assert back.scheme == scheme
        assert torch.equal(back.dequantize(), weight.dequantize())


def test_writing_what_qserve_does_not_hold_is_refused() -> None:
    w = torch.randn(N, K)
    for scheme in (Scheme(4, 128), Scheme(4, activations=None)):
        with pytest.raises(ValueError, match="QServe holds"):
            qserve.save(quantize(w, scheme, torch.float16))
    with pytest.raises(ValueError, match="do not fit float16"):
        qserve.save(quantize(w, Scheme(4)))
    with pytest.raises(ValueError, match="multiples of 32, got 48 x 256"):
        qserve.save(quantize(w[:48], Scheme(4), torch.float16))


class Header(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...] = (N, K)


def test_detection_needs_no_config() -> None:
    for own in ("s1_scales", "dequant_scale"):
        reader = recognise({f"m.{own}": Header(torch.float16)}, None)
        assert reader.format is qserve
        assert reader.fields("m", {f"m.{own}": Header(torch.float16), "m.qweight": Header(torch.int8)})


GOOD = written(groups())
CHANNEL = channel(torch.full((N,), 7.0))[3]
BAD: dict[str, tuple[dict[str, Tensor], dict[str, Any] | None, str]] = {
    "a config for channels": (GOOD, {"wbits": 4, "group_size": -1}, "hold 4-bit groups of 128, but the config says 4-bit channels$"),
    "a config for groups": (CHANNEL, {"wbits": 4, "group_size": 128}, "hold 4-bit channels, but the config says 4-bit groups"),
    "another method": (GOOD, {"quant_method": "awq"}, "quant_method must be 'qoq'"),
    "three bits": (GOOD, {"wbits": 3}, "wbits must be 4 or 8, got 3"),
    "another group": (GOOD, {"group_size": 64}, "group_size must be -1 or 128"),
    "no zeros": ({k: GOOD[k] for k in ("qweight", "s1_scales", "s2_scales")}, None, "found tensors qweight"),
    "both levels' zeros": (GOOD | {"s1_szeros": CHANNEL["s1_szeros"]}, None, "found tensors"),
    "qweight of words": (GOOD | {"qweight": GOOD["qweight"].int()}, None, "qweight must be int8"),
    "qweight of a byte a code": (GOOD | {"qweight": torch.zeros(N, K, dtype=torch.int8)}, None, "qweight must be"),
    "steps transposed": (GOOD | {"s2_scales": GOOD["s2_scales"].T}, None, "s2_scales must be"),
    "steps too large": (GOOD | {"s2_scales": GOOD["s2_scales"] + 9}, None, r"s2_scales must be 0\.\.17"),
    "NaN": (GOOD | {"s1_scales": torch.full((N,), float("nan")).half()}, None, "s1_scales must be finite"),
    "negative": (CHANNEL | {"s1_scales": -CHANNEL["s1_scales"]}, None, "s1_scales must be above 0"),
    "too few": (GOOD | {"s1_scales": GOOD["s1_scales"][1:]}, None, "s1_scales must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused(case: str) -> None:
    fields, raw, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read(fields, raw)


def test_shapes_that_tiles_do_not_cover_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        qserve.load("m", GOOD, N + 8, K, None)
    with pytest.raises(ValueError, match="groups of 128 do not divide 192"):
        qserve.load("m", GOOD | {"qweight": nibbles(torch.zeros(N, 192, dtype=torch.long))}, N, 192, None)
