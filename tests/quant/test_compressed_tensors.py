"""compressed-tensors layers written by hand from the byte layouts, not by our saver, must give exactly their codes."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from quant.formats import compressed_tensors
from quant.formats.catalog import recognise
from quant.formats.compressed_tensors import config_object, save
from quant.formats.ct_config import read_config
from quant.rtn import quantize
from quant.scheme import FP8, FP8_ROWS, Activations, QuantWeight, Scheme
from tests.quant.ct_layers import K, N, config, load, nibble_words, packed, random_codes, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_w8a8_channel(dtype: torch.dtype) -> None:
    codes = random_codes(8)
    fields = {"weight": torch.tensor(codes, dtype=torch.int8), "weight_scale": scales(1, dtype)}
    q = load("m", fields, N, K, read_config(config()))
    assert q.scheme == Scheme(8)
    assert q.codes_NK.tolist() == codes
    assert torch.equal(q.scale_NQ, scales(1, dtype).float())


def test_w8a8_scale_per_tensor_is_repeated() -> None:
    fields = {"weight": torch.tensor(random_codes(8), dtype=torch.int8)}
    for scale in (torch.tensor([0.25]), torch.tensor(0.25)):
        q = load("m", fields | {"weight_scale": scale}, N, K, read_config(config(strategy="tensor")))
        assert q.scale_NQ.tolist() == [[0.25]] * N


@pytest.mark.parametrize("container", ["packed", "int8"])
@pytest.mark.parametrize("groups", [1, 4])
def test_w4a8_both_containers(container: str, groups: int) -> None:
    codes = random_codes(4)
    fields = packed(codes, groups)
    if container == "int8":
        fields = {"weight": torch.tensor(codes, dtype=torch.int8), "weight_scale": scales(groups)}
    raw = config(4, "group", K // groups) if groups > 1 else config(4, "channel", -1)
    for given in (read_config(raw), None if groups > 1 or container == "packed" else read_config(raw)):
        q = load("m", fields, N, K, given)
        assert q.scheme == Scheme(4, K // groups if groups > 1 else None)
        assert q.codes_NK.tolist() == codes
        assert torch.equal(q.scale_NQ, scales(groups).float())
        by_hand = torch.tensor(codes).float() * scales(groups).float().repeat_interleave(K // groups, 1)
        assert torch.equal(q.dequantize(), by_hand)


@pytest.mark.parametrize("container", ["packed", "int8"])
def test_w4a8_zero_points(container: str) -> None:
    codes, zeros = random_codes(4), random_codes(4, N, 4, seed=3)
    columns = [list(c) for c in zip(*zeros, strict=True)]
    # packed along the outputs: a column is a bit stream of its own
    fields = packed(codes, 4, weight_zero_point=nibble_words(columns).t().contiguous())
    if container == "int8":
        fields = {
            "weight": torch.tensor(codes, dtype=torch.int8),
            "weight_scale": scales(4),
            "weight_zero_point": torch.tensor(zeros, dtype=torch.int8),
        }
    q = load("m", fields, N, K, read_config(config(4, "group", 16, symmetric=False)))
    assert q.scheme == Scheme(4, 16, symmetric=False)
    assert q.codes_NK.tolist() == codes
    assert q.zero_NQ is not None
    assert q.zero_NQ.tolist() == zeros
    spread = torch.tensor(zeros).repeat_interleave(16, 1)
    assert torch.equal(
        q.dequantize(), (torch.tensor(codes) - spread) * scales(4).float().repeat_interleave(16, 1)
    )


def test_rows_that_do_not_fill_their_words() -> None:
    codes, zeros = random_codes(4, 5, 20), random_codes(4, 5, 2, seed=4)
    columns = [list(c) for c in zip(*zeros, strict=True)]
    fields = {
        "weight_packed": nibble_words(codes),
        "weight_scale": torch.ones(5, 2),
        "weight_shape": torch.tensor([5, 20]),
        "weight_zero_point": nibble_words(columns).t().contiguous(),
    }
    assert fields["weight_packed"].shape == (5, 3)
    q = load("m", fields, 5, 20, read_config(config(4, "group", 10, symmetric=False)))
    assert q.codes_NK.tolist() == codes
    assert q.zero_NQ is not None
    assert q.zero_NQ.tolist() == zeros


def test_zero_points_that_are_all_zero_mean_symmetric() -> None:
    codes = random_codes(8)
    fields = {
        "weight": torch.tensor(codes, dtype=torch.int8),
        "weight_scale": scales(1),
        "weight_zero_point": torch.zeros(N, 1, dtype=torch.int8),
    }
    assert load("m", fields, N, K, read_config(config())).zero_NQ is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": range(7, -1, -1)},  # nibbles of a word reversed
        {"order": [1, 0, 3, 2, 5, 4, 7, 6]},  # nibbles of a byte swapped
        {"offset": 0},  # two's complement
    ],
)
def test_a_wrong_nibble_layout_gives_other_codes(wrong: dict) -> None:
    codes = random_codes(4)
    fields = packed(codes, 4) | {"weight_packed": nibble_words(codes, **wrong)}
    got = load("m", fields, N, K, read_config(config(4, "group", 16))).codes_NK
    same = (got == torch.tensor(codes)).float().mean().item()
    assert same < 0.2, f"{same:.2f} of the codes agree: the layout test could not tell"


def test_static_activations_bring_their_constants() -> None:
    fields = {"weight": torch.tensor(random_codes(8), dtype=torch.int8), "weight_scale": scales(1)}
    fields |= {"input_scale": torch.tensor([0.5]), "input_zero_point": torch.tensor([-7], dtype=torch.int8)}
    for raw in (config(rows=STATIC | {"symmetric": False}), None):
        q = load("m", fields, N, K, read_config(raw))
        assert q.scheme == Scheme(8, activations=Activations(dynamic=False, symmetric=False))
        assert (q.input_scale, q.input_zero) == (0.5, -7)
    # symmetric writers may store a zero of 0
    fields |= {"input_scale": torch.tensor(0.25), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    for raw in (config(rows=STATIC), None):
        q = load("m", fields, N, K, read_config(raw))
        assert q.scheme == Scheme(8, activations=Activations(dynamic=False))
        assert (q.input_scale, q.input_zero) == (0.25, None)


def test_fp8_weights() -> None:
    codes = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)).to(FP8)
    for scale in (torch.rand(200, 1), torch.rand(200), torch.tensor([0.5]), torch.tensor(0.5)):
        q = load("m", {"weight": codes, "weight_scale": scale}, 200, 300, None)
        assert q.scheme == Scheme(8, activations=FP8_ROWS, values="fp8")
        assert torch.equal(q.dequantize(), codes.float() * scale.reshape(-1, 1))
    blocks = torch.rand(2, 3, dtype=torch.bfloat16)
    rows = {"type": "float", "strategy": "group", "group_size": 128}
    raw = config(8, "block", type="float", block_structure=[128, 128], rows=rows)
    for given in (raw, None):
        q = load("m", {"weight": codes, "weight_scale": blocks}, 200, 300, read_config(given))
        assert q.scheme == Scheme(8, activations=Activations("fp8", block=True), values="fp8", block=True)
        spread = torch.tensor([[blocks[i // 128, j // 128] for j in range(300)] for i in range(200)])
        assert torch.equal(q.dequantize(), codes.float() * spread)


def test_activation_order_brings_columns_of_a_group_together() -> None:
    codes, group_K = random_codes(4), torch.arange(K) % 4
    group_K = group_K[torch.randperm(K, generator=torch.Generator().manual_seed(5))].int()
    fields = packed(codes, 4, weight_g_idx=group_K)
    q = load("m", fields, N, K, read_config(config(4, "group", 16, actorder="group")))
    assert q.order_K is not None
    by_hand = torch.tensor(codes).float() * scales(4).float()[:, group_K.long()]
    assert torch.equal(q.dequantize(), by_hand)
    x = torch.randn(3, K, dtype=torch.float64)
    in_groups = q.codes_NK.double().view(N, 4, 16) * q.scale_NQ[..., None]
    torch.testing.assert_close(x[:, q.order_K] @ in_groups.view(N, K).T, x @ by_hand.double().T)
    for group_K in (torch.full((K,), -1, dtype=torch.int32), torch.arange(K) // 16):
        assert load("m", fields | {"weight_g_idx": group_K}, N, K, None).order_K is None


def test_frozen_float_weights_are_rounded_with_their_scales() -> None:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    fields = {"weight": w.bfloat16(), "weight_scale": scales(4)}
    q = load("m", fields, N, K, read_config(config(4, "group", 16)))
    spread = scales(4).float().repeat_interleave(16, 1)
    by_hand = (w.bfloat16().float() / spread).round().clamp(-8, 7)
    assert torch.equal(q.codes_NK.float(), by_hand)
    zero = {"weight_zero_point": torch.full((N, 4), 3, dtype=torch.int8)}
    q = load("m", fields | zero, N, K, read_config(config(4, "group", 16, symmetric=False)))
    assert torch.equal(q.codes_NK.float(), (w.bfloat16().float() / spread).add(3).round().clamp(-8, 7))
    raw = config(8, "channel", type="float", rows={"type": "float"})
    q = load("m", {"weight": w, "weight_scale": scales(1)}, N, K, read_config(raw))
    assert torch.equal(q.codes_NK.float(), (w / scales(1).float()).to(FP8).float())


SAVED = [
    Scheme(8),
    Scheme(4),
    Scheme(4, 16),
    Scheme(4, 16, False),
    Scheme(4, 16, False, activations=None),
    Scheme(4, 16, activations=FP8_ROWS),
    Scheme(8, activations=FP8_ROWS, values="fp8"),
    Scheme(8, activations=Activations(symmetric=False)),
    Scheme(8, activations=Activations(dynamic=False)),
    Scheme(8, activations=Activations(dynamic=False, symmetric=False)),
    Scheme(8, activations=Activations("fp8", dynamic=False), values="fp8"),
]


def made(scheme: Scheme, dtype: torch.dtype = torch.bfloat16) -> QuantWeight:
    weight = quantize(torch.randn(N, K), scheme, dtype)
    rows = scheme.activations
    if rows is None or rows.dynamic:
        return weight
    return replace(weight, input_scale=0.125, input_zero=None if rows.symmetric else -5)


@pytest.mark.parametrize("container", ["packed", "int8"])
@pytest.mark.parametrize("scheme", SAVED, ids=str)
def test_save_and_load_agree(scheme: Scheme, container: str) -> None:
    weight = made(scheme)
    fields = save(weight, container, torch.bfloat16)
    raw = config_object({scheme: ["Linear"]}, container, ["lm_head"])
    back = load("m", fields, N, K, read_config(raw))
    assert back.scheme == scheme
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert (back.input_scale, back.input_zero) == (weight.input_scale, weight.input_zero)
    assert ("weight_packed" in fields) == (container == "packed" and scheme.values == "int")
    with pytest.raises(ValueError, match="scales do not fit"):
        save(made(scheme, torch.float32), container, torch.bfloat16)


def test_save_refuses_what_the_format_does_not_hold() -> None:
    weight = made(Scheme(4, 16))
    with pytest.raises(ValueError, match="container must be one of packed, int8"):
        save(weight, "nibbles", torch.bfloat16)
    order_K = torch.randperm(K)
    with pytest.raises(ValueError, match="no order of columns"):
        save(replace(weight, order_K=order_K), "packed", torch.bfloat16)
    # without groups an order is none
    channel = replace(made(Scheme(4)), order_K=order_K)
    back = load("m", save(channel, "packed", torch.bfloat16), N, K, None)
    assert torch.equal(back.dequantize(), channel.dequantize())
    static = replace(made(SAVED[-1]), input_scale=0.1)
    with pytest.raises(ValueError, match="the input scale do"):
        save(static, "packed", torch.bfloat16)


def test_block_scales_are_saved_as_they_came() -> None:
    scheme = Scheme(8, activations=Activations("fp8", block=True), values="fp8", block=True)
    weight = QuantWeight(scheme, torch.randn(130, 128).to(FP8), torch.rand(2, 1)).check()
    raw = config_object({scheme: ["Linear"]}, "packed", [])
    back = load("m", save(weight, "packed", torch.float32), 130, 128, read_config(raw))
    assert back.scheme == scheme
    assert torch.equal(back.dequantize(), weight.dequantize())


class Header(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...] = (N, K)


def test_detection_is_by_tensors() -> None:
    reader = recognise({}, None)
    assert reader.format is compressed_tensors
    f, i = Header(torch.bfloat16), Header(torch.int8)
    assert not reader.fields("m", {})
    assert not reader.fields("m", {"m.weight": f, "other.weight": i})
    for fields in (
        {"weight": i},
        {"weight": Header(torch.float8_e4m3fn)},
        {"weight": f, "weight_scale": f},
        {"weight_packed": Header(torch.int32)},
    ):
        assert set(reader.fields("m", {f"m.{s}": info for s, info in fields.items()})) == set(fields)


WEIGHT8 = {"weight": torch.zeros(N, K, dtype=torch.int8), "weight_scale": torch.ones(N, 1)}
FP8_WEIGHT = {"weight": torch.zeros(N, K).to(FP8), "weight_scale": torch.ones(N, 1)}
PACKED = packed(random_codes(4), 4)
STATIC = {"strategy": "tensor", "dynamic": False}
STATIC_FIELDS = {"input_scale": torch.ones(1), "input_zero_point": torch.tensor([3], dtype=torch.int8)}
BAD_TENSORS: dict[str, tuple[dict[str, Tensor], dict | None, str]] = {
    "fp8 weight of an int8 config": (FP8_WEIGHT, config(8), "tensors hold fp8 weights, but the config says"),
    "int8 weight of an fp8 config": (WEIGHT8, config(8, type="float", rows={"type": "float"}), "tensors hold int weights"),
    "another fp8": (FP8_WEIGHT | {"weight": torch.zeros(N, K).to(torch.float8_e5m2)}, None, "float8_e5m2"),
    "NaN fp8 weight": (FP8_WEIGHT | {"weight": torch.full((N, K), 127, dtype=torch.int8).view(FP8)}, None, "finite"),
    "fp8 scale": (FP8_WEIGHT | {"weight_scale": torch.ones(N, 1).to(FP8)}, None, "float tensor"),
    "fp8 groups": (FP8_WEIGHT | {"weight_scale": torch.ones(N, 4)}, None, "weight_scale must be"),
    "order of fp8": (FP8_WEIGHT | {"weight_g_idx": torch.zeros(K, dtype=torch.int32)}, None, "weight_g_idx"),
    "float weight with a scale": (WEIGHT8 | {"weight": torch.zeros(N, K)}, None, "the config says nothing"),
    "NaN weight with a scale": (WEIGHT8 | {"weight": torch.full((N, K), float("nan"))}, config(8), "finite"),
    "FP4": (PACKED | {"weight_global_scale": torch.ones(1)}, None, "weight_global_scale float32"),
    "no scale": ({"weight": WEIGHT8["weight"]}, None, "found tensors weight int8"),
    "no words": ({"weight_scale": torch.ones(N, 1)}, None, "found tensors weight_scale"),
    "both containers": (PACKED | {"weight": WEIGHT8["weight"]}, None, "found tensors"),
    "static input scale": (WEIGHT8 | {"input_scale": torch.ones(1)}, config(), "input_scale is present, but activations dynamic int8"),
    "input scale of float rows": (PACKED | {"input_scale": torch.ones(1)}, config(4, "group", 16, rows=None), "that stay floats"),
    "static input zero": (WEIGHT8 | {"input_zero_point": torch.ones(1, dtype=torch.int8)}, config(), "input_zero_point is 1"),
    "no input scale": (WEIGHT8, config(rows=STATIC), "input_scale is missing, which activations static int8"),
    "no input zero": (WEIGHT8 | {"input_scale": torch.ones(1)}, config(rows=STATIC | {"symmetric": False}), "input_zero_point is missing"),
    "input zero of symmetric rows": (WEIGHT8 | STATIC_FIELDS, config(rows=STATIC), "input_zero_point is 3, but"),
    "an input scale a channel": (WEIGHT8 | {"input_scale": torch.ones(N)}, config(rows=STATIC), "one value for the tensor"),
    "input scale 0": (WEIGHT8 | {"input_scale": torch.zeros(1)}, config(rows=STATIC), "above 0"),
    "NaN input scale": (WEIGHT8 | {"input_scale": torch.full((1,), float("nan"))}, config(rows=STATIC), "finite"),
    "fractional input zero": (WEIGHT8 | STATIC_FIELDS | {"input_zero_point": torch.full((1,), 0.5)}, None, "integer"),
    "columns in one group": (PACKED | {"weight_g_idx": torch.zeros(K, dtype=torch.int32)}, None, "each of 4 groups 16 times"),
    "groups of other columns": (PACKED | {"weight_g_idx": torch.zeros(K + 1, dtype=torch.int32)}, None, "weight_g_idx must be"),
    "groups of floats": (PACKED | {"weight_g_idx": torch.zeros(K)}, None, "weight_g_idx must be int32"),
    "ignored": (WEIGHT8, config() | {"ignore": ["re:.*up_proj"]}, "quantized, but the config ignores it"),
    "in no group": (WEIGHT8, config(targets=["re:.*down_proj"]), "the config has no group with weights for it"),
    "packed without shape": ({k: PACKED[k] for k in ("weight_packed", "weight_scale")}, None, "found tensors"),
    "words of another type": (PACKED | {"weight_packed": torch.zeros(N, 8, dtype=torch.int64)}, None, "int64"),
    "another shape stated": (PACKED | {"weight_shape": torch.tensor([N, K + 1])}, None, "weight_shape"),
    "too few words": (PACKED | {"weight_packed": torch.zeros(N, 7, dtype=torch.int32)}, None, "weight_packed must be"),
    "transposed": (WEIGHT8 | {"weight": torch.zeros(K, N, dtype=torch.int8)}, None, "weight must be"),
    "scale of another row count": (WEIGHT8 | {"weight_scale": torch.ones(N + 1, 1)}, None, "weight_scale must be"),
    "scale of no columns": (WEIGHT8 | {"weight_scale": torch.ones(N, 0)}, None, "weight_scale must be"),
    "groups that do not divide": (WEIGHT8 | {"weight_scale": torch.ones(N, 3)}, None, "weight_scale must be"),
    "integer scale": (WEIGHT8 | {"weight_scale": torch.ones(N, 1, dtype=torch.int32)}, None, "float tensor"),
    "NaN scale": (WEIGHT8 | {"weight_scale": torch.full((N, 1), float("nan"))}, None, "finite"),
    "negative scale": (WEIGHT8 | {"weight_scale": -torch.ones(N, 1)}, None, "not negative"),
    "int4 codes out of range": (WEIGHT8 | {"weight": torch.full((N, K), 9, dtype=torch.int8)}, config(4, "channel"), r"in \[-8, 7\]"),
    "bits unlike the config": (PACKED, config(8), "config says"),
    "groups unlike the config": (PACKED, config(4, "group", 32), "config says"),
    "groups of int8 codes": (WEIGHT8 | {"weight": torch.full((N, K), 9, dtype=torch.int8), "weight_scale": torch.ones(N, 4)}, config(8), "8-bit|config"),
    "zero points lacking": (PACKED, config(4, "group", 16, symmetric=False), "weight_zero_point is missing"),
    "zero points of a symmetric layer": (PACKED | {"weight_zero_point": torch.ones(3, 4, dtype=torch.int32)}, config(4, "group", 16), "not zero"),
    "zero points unpacked in the packed form": (PACKED | {"weight_zero_point": torch.ones(N, 4, dtype=torch.int8)}, None, "weight_zero_point must be"),
    "zero points packed along the inputs": (PACKED | {"weight_zero_point": torch.ones(N, 1, dtype=torch.int32)}, None, "weight_zero_point must be"),
    "int8 zero points": (WEIGHT8 | {"weight_zero_point": torch.ones(N, 1, dtype=torch.int8)}, None, "8-bit weights must be symmetric"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(case: str) -> None:
    fields, raw, message = BAD_TENSORS[case]
    with pytest.raises(ValueError, match=message) as error:
        load("model.layers.0.mlp.up_proj", fields, N, K, read_config(raw))
    assert str(error.value).startswith("model.layers.0.mlp.up_proj: ")
