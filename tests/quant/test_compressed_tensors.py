"""compressed-tensors layers written by hand from the byte layouts, not by our saver, must give exactly their codes."""

import copy
import random
import struct
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from quant.formats import compressed_tensors
from quant.formats.catalog import Reader, recognise
from quant.formats.compressed_tensors import config_object, save
from quant.formats.ct_config import CtConfig, read_config
from quant.rtn import quantize
from quant.scheme import QuantWeight, Scheme

N, K = 24, 64
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def load(module: str, fields: dict[str, Tensor], rows: int, columns: int, ct: CtConfig | None) -> QuantWeight:
    return Reader(compressed_tensors, ct).load(module, fields, rows, columns)


def config(
    bits: int = 8, strategy: str | None = "channel", group_size: int | None = None, **weights: Any
) -> dict:
    args = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
    }
    group = {"targets": ["Linear"], "weights": args | weights, "input_activations": dict(TOKEN)}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def random_codes(bits: int, rows: int = N, columns: int = K, seed: int = 0) -> list[list[int]]:
    r = random.Random(seed)
    return [[r.randrange(-(2 ** (bits - 1)), 2 ** (bits - 1)) for _ in range(columns)] for _ in range(rows)]


def nibble_words(rows: list[list[int]], order: range = range(8), offset: int = 8) -> Tensor:
    """int32 words from bytes written one by one: the first code of a row is the low nibble of its first byte."""
    out = []
    for row in rows:
        row = row + [-offset] * (-len(row) % 8)
        data = bytearray()
        for i in range(0, len(row), 8):
            nibbles = [row[i + j] + offset & 15 for j in order]
            data += bytes(nibbles[j] | nibbles[j + 1] << 4 for j in range(0, 8, 2))
        out.append(struct.unpack(f"<{len(data) // 4}i", bytes(data)))
    return torch.tensor(out, dtype=torch.int32)


def scales(groups: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.rand(N, groups, generator=torch.Generator().manual_seed(7)) + 0.5).to(dtype)


def packed(codes: list[list[int]], groups: int, **extra: Tensor) -> dict[str, Tensor]:
    shape = torch.tensor([N, K])
    return {
        "weight_packed": nibble_words(codes),
        "weight_scale": scales(groups),
        "weight_shape": shape,
        **extra,
    }


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


@pytest.mark.parametrize("container", ["packed", "int8"])
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4), Scheme(4, 16), Scheme(4, 16, False)], ids=str)
def test_save_and_load_agree(scheme: Scheme, container: str) -> None:
    weight = quantize(torch.randn(N, K), scheme, torch.bfloat16)
    fields = save(weight, container, torch.bfloat16)
    raw = config_object({scheme: ["Linear"]}, container, ["lm_head"])
    back = load("m", fields, N, K, read_config(raw))
    assert back.scheme == scheme
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert ("weight_packed" in fields) == (container == "packed")
    with pytest.raises(ValueError, match="container must be one of packed, int8"):
        save(weight, "nibbles", torch.bfloat16)
    with pytest.raises(ValueError, match="do not fit"):
        save(quantize(torch.randn(N, K), scheme), container, torch.bfloat16)


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
PACKED = packed(random_codes(4), 4)
BAD_TENSORS: dict[str, tuple[dict[str, Tensor], dict | None, str]] = {
    "fp8 weight": ({"weight": torch.zeros(N, K).to(torch.float8_e4m3fn), "weight_scale": torch.ones(N, 1)}, None, "float8_e4m3fn"),
    "float weight with a scale": (WEIGHT8 | {"weight": torch.zeros(N, K)}, None, "found tensors weight float32"),
    "no scale": ({"weight": WEIGHT8["weight"]}, None, "found tensors weight int8"),
    "no words": ({"weight_scale": torch.ones(N, 1)}, None, "found tensors weight_scale"),
    "both containers": (PACKED | {"weight": WEIGHT8["weight"]}, None, "found tensors"),
    "static input scale": (WEIGHT8 | {"input_scale": torch.ones(1)}, None, "input_scale"),
    "static input zero": (WEIGHT8 | {"input_zero_point": torch.ones(1, dtype=torch.int8)}, None, "input_zero_point"),
    "act order": (PACKED | {"weight_g_idx": torch.zeros(K, dtype=torch.int32)}, None, "weight_g_idx"),
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


def edited(path: str, value: Any) -> dict:
    """A good config with the key at a dotted path set (or removed, for `...`)."""
    raw = copy.deepcopy(config(4, "group", 16))
    *parents, last = path.replace("G", "config_groups.group_0").split(".")
    at = raw
    for key in parents:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return raw


ONLINE_TRANSFORM = {"config_groups": {"R3": {"type": "hadamard", "apply": [{"location": "q_attn"}]}}}
REFUSED: list[tuple[str, Any, str]] = [
    ("quant_method", "gptq", "quant_method must be 'compressed-tensors', got 'gptq'"),
    ("quant_method", "fp8", "quant_method"),
    ("config_groups", ..., "config_groups must be an object"),
    ("config_groups", [], "config_groups must be an object"),
    ("config_groups", {"FP8": ["Linear"]}, "preset FP8 must be one of W8A8, INT8, W4A8"),
    ("config_groups", {"W4A16": ["Linear"]}, "preset W4A16"),
    ("config_groups", {"g": 3}, "config_groups.g must be an object"),
    ("ignore", "lm_head", "ignore must be a list"),
    ("ignore", ["re:("], "bad pattern"),
    ("ignore", [3], "ignore must be a list"),
    ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparse weights are not supported"),
    ("sparsity_config", "yes", "sparsity_config"),
    ("transform_config", ONLINE_TRANSFORM, "q_attn"),
    ("transform_config", {"R": 1}, "transform_config"),
    ("transform_config", {"config_groups": {"R": {"apply": 3}}}, "transform_config.R"),
    ("kv_cache_scheme", {"num_bits": 8, "type": "float"}, "kv_cache_scheme"),
    ("G.targets", "Linear", "targets must be a list"),
    ("G.targets", ["re:[a-"], "bad pattern"),
    ("G.weights", "int4", "weights"),
    ("G.weights.num_bits", 3, "int3"),
    ("G.weights.num_bits", "4", "int4"),
    ("G.weights.type", "float", "float4"),
    ("G.weights.strategy", "block", "block"),
    ("G.weights.strategy", "tensor_group", "tensor_group"),
    ("G.weights.symmetric", "no", "symmetric"),
    ("G.weights.group_size", 0, "group, 0"),
    ("G.weights.group_size", "16", "16"),
    ("G.weights.dynamic", True, "dynamic=True"),
    ("G.input_activations", ..., "unquantized activations"),
    ("G.input_activations", None, "unquantized activations"),
    ("G.input_activations", 8, "input_activations"),
    ("G.input_activations.dynamic", False, "int8, token, symmetric"),
    ("G.input_activations.dynamic", "local", "dynamic=local"),
    ("G.input_activations.num_bits", 4, "int4"),
    ("G.input_activations.type", "float", "float8"),
    ("G.input_activations.symmetric", False, "with zero points"),
    ("G.input_activations.strategy", "tensor", "tensor"),
    ("G.input_activations.strategy", "group", "group"),
    ("G.output_activations", dict(TOKEN), "output_activations"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{p}={v!r:.30}" for p, v, _ in REFUSED])
def test_unsupported_configs_say_what_was_found(path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match="quantization_config") as error:
        read_config(edited(path, value))
    assert message in str(error.value)


ACCEPTED: list[tuple[str, Any]] = [
    ("quant_method", ...),
    ("quantization_status", "frozen"),
    ("some_key_of_next_year", {"a": 1}),
    ("G.weights.actorder", "weight"),
    ("G.weights.observer", "mse"),
    ("G.weights.strategy", ...),
    ("G.weights.strategy", None),
    ("G.input_activations.strategy", ...),
    ("sparsity_config", {}),
    ("sparsity_config", {"format": "dense", "global_sparsity": 0.1}),
    ("transform_config", {"config_groups": {"R1": {"apply": [{"location": "weight_input"}]}}}),
    ("kv_cache_scheme", None),
    ("ignore", ...),
]


@pytest.mark.parametrize(("path", "value"), ACCEPTED, ids=[f"{p}={v!r:.30}" for p, v in ACCEPTED])
def test_harmless_keys_change_nothing(path: str, value: Any) -> None:
    ct = read_config(edited(path, value))
    assert ct is not None
    group = ct.match("model.layers.0.mlp.up_proj")
    assert group is not None
    assert group.scheme == Scheme(4, 16)


def test_matching_prefers_exact_then_regex_then_class_and_ignore_wins() -> None:
    w8, w4 = config(8)["config_groups"]["group_0"], config(4, "group", 16)["config_groups"]["group_0"]
    ct = read_config(
        {
            "config_groups": {
                "all": w8 | {"targets": ["Linear"]},
                "mlp": w4 | {"targets": ["re:.*mlp.*"]},
                "one": w8 | {"targets": ["model.layers.1.mlp.down_proj"]},
                "kv": {"targets": [], "weights": None},
            },
            "ignore": ["lm_head", "re:model.layers.0.self_attn.*"],
        }
    )
    assert ct is not None
    names = {"lm_head": None, "model.layers.0.self_attn.q_proj": None, "model.layers.1.self_attn.q_proj": "all",
             "model.layers.0.mlp.down_proj": "mlp", "model.layers.1.mlp.down_proj": "one"}  # fmt: skip
    assert {n: getattr(ct.match(n), "name", None) for n in names} == names
    # anchored at the start only
    assert (
        read_config({"config_groups": {"g": w8 | {"targets": ["re:mlp"]}}}).match(
            "model.layers.0.mlp.up_proj"
        )
        is None
    )


@pytest.mark.parametrize("key", ["num_bits", "type", "strategy", "symmetric", "group_size", "dynamic"])
@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 0, 8, 4.0, True, [[1]], {"a": []}, 10**30])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_value_is_read_or_refused(bits: int, key: str, value: Any) -> None:
    for args in ("weights", "input_activations"):
        raw = config(bits, "channel")
        raw["config_groups"]["group_0"][args][key] = value
        outcome = "read"
        try:
            scheme = read_config(raw).groups[0].scheme
        except ValueError as error:
            outcome = str(error)
        if outcome == "read":
            assert scheme in (Scheme(4), Scheme(8), Scheme(4, 8)), scheme
            assert type(scheme.bits) is int
        else:
            assert outcome.startswith("quantization_config: config_groups.group_0: found")


def test_preset_names_and_no_config() -> None:
    assert read_config(None) is None
    ct = read_config({"config_groups": {"W4A8": ["Linear"]}})
    assert ct is not None
    assert ct.groups[0].scheme == Scheme(4, 128)
