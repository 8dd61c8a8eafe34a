"""FireQ's buffers, written here nibble by nibble, are read as the weights they stand for; controls are not."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.gemm_w4a8 import gemm_w4a8, prepare_w4a8
from kernels.quant_rows import quant_rows
from quant.formats import compressed_tensors, fireq
from quant.formats.catalog import recognise
from quant.rtn import quantize
from quant.scheme import FP8, FP8_ROWS, QuantWeight, Scheme

N, K, Q = 16, 256, 2
SCHEME = Scheme(4, 128, activations=FP8_ROWS)


def words(codes_NK: Tensor, offset: int = 0, order: Any = range(8)) -> Tensor:
    """int32 words, code 8 c + i of a row in nibble i of word c, two's complement unless there is an offset."""
    out = torch.zeros(len(codes_NK), codes_NK.shape[1] // 8, dtype=torch.int64)
    for i, nibble in enumerate(order):
        out |= ((codes_NK[:, i::8].long() + offset) & 15) << (4 * nibble)
    return out.to(torch.int32)


def weights(seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Codes, e4m3 scales and the power of two they were multiplied with."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (N, K), generator=g, dtype=torch.int8)
    return codes, (torch.rand(N, Q, generator=g) * 2 + 0.01).to(FP8), 16.0


def written(codes: Tensor, scale: Tensor, factor: float, **wrong: Any) -> dict[str, Tensor]:
    return {
        "weight": words(codes, **wrong),
        "weight_scale": scale,
        "per_tensor_scale_inv": torch.tensor([1 / factor], dtype=torch.bfloat16),
    }


def read(fields: dict[str, Tensor]) -> QuantWeight:
    return fireq.load("m", fields, N, K, fireq.read_config(None))


def oracle(codes: Tensor, scale: Tensor, factor: float) -> Tensor:
    return codes.float() * scale.float().repeat_interleave(128, 1) / factor


def test_codes_scales_and_the_power_of_two() -> None:
    codes, scale, factor = weights()
    fields = written(codes, scale, factor)
    got = read(fields)
    assert got.scheme == SCHEME
    assert torch.equal(got.dequantize(), oracle(codes, scale, factor))
    assert fireq.bias_factor(fields) == 1 / factor
    assert fireq.bias_factor({}) == 1.0


def test_the_matmul_adds_exact_products_of_8_bit_rows() -> None:
    """Whole e4m3 rows: the sum of each group is a whole number, and the result is that times its scale."""
    codes, scale, factor = weights()
    got = read(written(codes, scale, factor))
    x_TK = torch.randint(-15, 16, (5, K), generator=torch.Generator().manual_seed(2)).float()
    w = prepare_w4a8(got.codes_NK, torch.ones(N, Q), kind="fp8")
    y = gemm_w4a8(x_TK.to(FP8), torch.ones(5), w, torch.float32)
    assert torch.equal(y.long(), x_TK.long() @ codes.long().T)
    run = prepare_w4a8(got.codes_NK, got.scale_NQ, kind="fp8")
    # rows that differ by a sixteenth of a step of e4m3 only: their largest value makes the scale 1
    x_TK[:, 0] = 448
    twins = (x_TK, torch.where(x_TK == 448, x_TK, x_TK * (1 + 2**-7)))
    one, other = (gemm_w4a8(*quant_rows(x, FP8), run, torch.float32) for x in twins)
    assert torch.equal(one, other)
    assert not torch.equal(twins[0] @ got.dequantize().T, twins[1] @ got.dequantize().T)


def test_scales_without_a_power_of_two() -> None:
    codes, scale, _ = weights()
    for stored in (scale, scale.float().bfloat16()):
        got = read({"weight": words(codes), "weight_scale": stored})
        assert torch.equal(got.dequantize(), oracle(codes, stored, 1.0))


def controls() -> Iterator[tuple[str, dict[str, Tensor]]]:
    codes, scale, factor = weights()
    good = written(codes, scale, factor)
    yield "offset binary", written(codes, scale, factor, offset=8)
    yield "nibbles of a byte exchanged", written(codes, scale, factor, order=[1, 0, 3, 2, 5, 4, 7, 6])
    yield "nibbles of a word reversed", written(codes, scale, factor, order=range(7, -1, -1))
    yield "groups exchanged", good | {"weight_scale": scale.float().flip(1).to(FP8)}
    yield "outputs of the scales reversed", good | {"weight_scale": scale.float().flip(0).to(FP8)}
    yield "no power of two", {k: v for k, v in good.items() if k != "per_tensor_scale_inv"}


@pytest.mark.parametrize("control", [name for name, _ in controls()])
def test_a_wrong_layout_is_not_read_as_the_right_weights(control: str) -> None:
    want = oracle(*weights())
    off = ((read(dict(controls())[control]).dequantize() - want).norm() / want.norm()).item()
    assert off > 0.1, f"{control} changes the weights by {off:.3f} only: the layout test could not tell"


def test_what_we_write_is_what_the_layout_says_and_reads_back() -> None:
    codes, scale, factor = weights()
    fields = written(codes, scale, factor)
    got = fireq.save(read(fields), factor)
    assert got["weight_scale"].dtype == FP8
    assert all(torch.equal(value.float(), fields[name].float()) for name, value in got.items())
    free = fireq.save(read(fields))
    assert torch.equal(read(free).dequantize(), oracle(codes, scale, factor))
    # the products of FireQ's own arithmetic must stay in e4m3
    assert 224 < 8 * float(free["weight_scale"].float().max()) <= 448


def test_writing_what_fireq_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="FireQ holds symmetric 4-bit groups of 128"):
        fireq.save(quantize(torch.randn(N, K), Scheme(4, 128)))
    with pytest.raises(ValueError, match="not e4m3 numbers times a power of two"):
        fireq.save(quantize(torch.randn(N, K), SCHEME))
    ones = QuantWeight(SCHEME, weights()[0], torch.ones(N, Q))
    with pytest.raises(ValueError, match="factor must be a power of two, got 3"):
        fireq.save(ones, 3.0)


class Header(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...] = (N, K)


def test_detection_needs_no_config() -> None:
    for infos in (
        {"m.weight": Header(torch.int32), "m.weight_scale": Header(FP8)},
        {"m.per_tensor_scale_inv": Header(torch.bfloat16, (1,))},
    ):
        reader = recognise(infos, None)
        assert reader.format is fireq
        assert reader.bias_factor({"per_tensor_scale_inv": torch.tensor([0.25])}) == 0.25
    assert recognise({"m.weight": Header(torch.bfloat16)}, None).bias_factor({}) == 1.0


def test_one_odd_weight_does_not_make_a_checkpoint_fireqs() -> None:
    int8 = {
        f"{m}.{f}": Header(d)
        for m in "abc"
        for f, d in (("weight", torch.int8), ("weight_scale", torch.float32))
    }
    stray = int8 | {"a.weight": Header(torch.int32)}
    assert recognise(stray, None).format is compressed_tensors
    assert recognise({"model.norm.weight": Header(torch.int32)}, None).format is compressed_tensors
    # every layer of words, but of a config that says what they are
    words = {n: Header(torch.int32) if n.endswith(".weight") else h for n, h in int8.items()}
    assert recognise(words, None).format is fireq
    raw = {"quant_method": "compressed-tensors", "config_groups": {}}
    reader = recognise(words, raw)
    assert reader.format is compressed_tensors
    with pytest.raises(ValueError, match=r"b: found tensors weight int32 \[8, 8\], weight_scale"):
        reader.load(
            "b", {"weight": torch.zeros(8, 8, dtype=torch.int32), "weight_scale": torch.ones(8, 1)}, 8, 8
        )


GOOD = written(*weights())
BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "no scale": ({"weight": GOOD["weight"]}, "weight_scale missing; found weight"),
    "bytes": (GOOD | {"weight": GOOD["weight"].view(torch.int8)}, "weight must be int32"),
    "too few words": (GOOD | {"weight": GOOD["weight"][:, 1:]}, "weight must be int32"),
    "float scales beside a power of two": (GOOD | {"weight_scale": torch.ones(N, Q)}, "weight_scale must be float8"),
    "scales transposed": (GOOD | {"weight_scale": GOOD["weight_scale"].T}, "weight_scale must be"),
    "NaN": (GOOD | {"weight_scale": torch.full((N, Q), float("nan")).to(FP8)}, "finite"),
    "no number": (GOOD | {"per_tensor_scale_inv": torch.zeros(1)}, "finite and above 0, got 0"),
    "two numbers": (GOOD | {"per_tensor_scale_inv": torch.ones(2)}, "must be one float"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_tensors_are_refused(case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        read(fields)
    with pytest.raises(ValueError, match="groups of 128 do not divide 192"):
        fireq.load("m", GOOD, N, 192, None)
    with pytest.raises(ValueError, match="quant_method must be 'fireq' or absent"):
        fireq.read_config({"quant_method": "gptq"})


H, G, D, TOP = 6, 2, 16, 3


def post_rope(prefix: str = "", bad_query: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Factors S of some channels of each KV head (an index twice, as RoPE's partners give), and 1 / S of its queries."""
    g = torch.Generator().manual_seed(5)
    factor_GK = torch.ones(G, D)
    keys: list[int] = []
    for head in range(G):
        chosen = torch.randperm(D, generator=g)[:TOP]
        factor_GK[head, chosen] = (torch.rand(TOP, generator=g) * 3 + 0.2).bfloat16().float()
        keys += [head * D + int(i) for i in (*chosen, chosen[0])]
    queries = [head * D + i % D for head in range(H) for i in keys if i // D == head // (H // G)]
    of_query = torch.stack([1 / factor_GK[q // D // (H // G), q % D] for q in queries])
    return factor_GK, {
        f"{prefix}post_k_smooth.smooth": factor_GK.flatten()[keys].bfloat16(),
        f"{prefix}post_k_smooth.top_k_indices": torch.tensor(keys, dtype=torch.int32),
        f"{prefix}post_q_smooth.smooth": (of_query * (2 if bad_query else 1)).bfloat16(),
        f"{prefix}post_q_smooth.top_k_indices": torch.tensor(queries, dtype=torch.int32),
    }


@pytest.mark.parametrize("prefix", ["", "qkv_supply."])
def test_factors_after_rope(prefix: str) -> None:
    factor_GK, fields = post_rope(prefix)
    assert set(fields) <= set(fireq.POST_ROPE)
    channel_GK = fireq.load_post_rope(fields, H, G, D)
    assert channel_GK is not None
    assert torch.equal(channel_GK, 1 / factor_GK)
    keys_only = {name: value for name, value in fields.items() if "post_k" in name}
    assert torch.equal(fireq.load_post_rope(keys_only, H, G, D), channel_GK)
    assert fireq.load_post_rope({}, H, G, D) is None


def test_factors_after_rope_read_back() -> None:
    channel_GK = torch.ones(G, D)
    channel_GK[0, [1, 9]] = torch.tensor([0.5, 4.0])
    channel_GK[1, [0, 8, 3]] = torch.tensor([2.0, 0.25, 8.0])
    fields = fireq.save_post_rope(channel_GK, H)
    assert set(fields) <= set(fireq.POST_ROPE)
    assert torch.equal(fireq.load_post_rope(fields, H, G, D), channel_GK)


def test_bad_factors_after_rope_are_refused() -> None:
    _, good = post_rope()
    name, index = "post_k_smooth.smooth", "post_k_smooth.top_k_indices"
    for fields, message in (
        (post_rope(bad_query=True)[1], "must be the inverse of post_k_smooth"),
        ({k: v for k, v in good.items() if "post_q" in k}, "post_k_smooth is missing"),
        ({name: good[name]}, "needs smooth and top_k_indices"),
        (good | {name: good[name][1:]}, "as many factors as indices"),
        (good | {index: good[index] + G * D}, r"must be in \[0, 32\)"),
        (good | {name: -good[name]}, "finite and above 0"),
        (good | {name: torch.arange(1, 1 + len(good[name])).float()}, "two factors for one channel"),
        (good | post_rope("qkv_supply.")[1], "stored twice"),
    ):
        with pytest.raises(ValueError, match=message):
            fireq.load_post_rope(fields, H, G, D)


def test_products_are_rounded_as_fireq_rounds_them() -> None:
    """Whatever the matrix's power of two is, subnormal scales included; but not where 8 scales are no e4m3."""
    g = torch.Generator().manual_seed(4)
    codes_NK = torch.randint(-8, 8, (N, K), generator=g, dtype=torch.int8)
    stored_NQ = torch.tensor([2.0**-9, 7 * 2.0**-9, 0.9375, 1.375])[
        torch.randint(0, 4, (N, K // 128), generator=g)
    ]
    wide_NK = stored_NQ.repeat_interleave(128, 1)
    want = (codes_NK * wide_NK).to(FP8).float()
    assert not torch.equal(want, codes_NK * wide_NK)
    for factor in (1.0, 64.0):
        made = fireq.rounded_products(QuantWeight(SCHEME, codes_NK, stored_NQ / factor))
        assert made.scheme == Scheme(8, activations=FP8_ROWS, values="fp8")
        assert torch.equal(made.dequantize(), want / factor)
    with pytest.raises(ValueError, match="at most 56"):
        fireq.rounded_products(QuantWeight(SCHEME, codes_NK, torch.tensor([[448.0, 2.0**-9]]).repeat(N, 1)))
