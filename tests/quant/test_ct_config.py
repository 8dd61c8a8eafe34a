"""What a compressed-tensors config means, and what is refused in it."""

import copy
import time
from typing import Any

import pytest

from quant.formats.ct_config import PRESETS, read_config
from quant.formats.name_patterns import NamePattern
from quant.scheme import FP8_ROWS, Activations, Scheme
from tests.quant.ct_layers import TOKEN, config


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


FP8_GROUPS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
FP8_BLOCKS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
ONLINE_TRANSFORM = {"config_groups": {"R3": {"type": "hadamard", "apply": [{"location": "q_attn"}]}}}
REFUSED: list[tuple[str, Any, str]] = [
    ("quant_method", "gptq", "quant_method must be 'compressed-tensors', got 'gptq'"),
    ("quant_method", "fp8", "quant_method"),
    ("config_groups", ..., "config_groups must be an object"),
    ("config_groups", [], "config_groups must be an object"),
    ("config_groups", {"NVFP4": ["Linear"]}, "preset NVFP4 must be one of W8A8, INT8, W4A8"),
    ("config_groups", {"MXFP4": ["Linear"]}, "preset MXFP4"),
    ("config_groups", {"W8A16": ["Linear"]}, "preset W8A16"),
    ("config_groups", {"g": 3}, "config_groups.g must be an object"),
    ("ignore", "lm_head", "ignore must be a list"),
    ("ignore", ["re:("], "bad pattern"),
    ("ignore", ["re:(?i)lm_head"], "bad pattern"),
    ("ignore", ["re:(?:a{1000}){1000}"], "takes too long"),
    ("ignore", [f"re:a{i}" for i in range(513)], "at most 200000 names, 512 of them patterns"),
    ("G.targets", [f"a{i}" for i in range(200_001)], "at most 200000 names"),
    ("format", "nvfp4-pack-quantized", "format must be one of int-quantized"),
    ("format", "marlin-24", "format must be one of"),
    ("G.format", "mxfp4-pack-quantized", "group_0.format must be one of"),
    ("G.format", 4, "group_0.format must be one of"),
    ("ignore", [3], "ignore must be a list"),
    ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparse weights are not supported"),
    ("sparsity_config", "yes", "sparsity_config"),
    ("transform_config", ONLINE_TRANSFORM, "q_attn"),
    ("transform_config", {"R": 1}, "transform_config"),
    ("transform_config", {"config_groups": {"R": {"apply": 3}}}, "transform_config.R"),
    ("G.targets", "Linear", "targets must be a list"),
    ("G.targets", ["re:[a-"], "bad pattern"),
    ("G.weights", "int4", "weights"),
    ("G.weights.num_bits", 3, "int3"),
    ("G.weights.num_bits", "4", "num_bits must be an integer from 1 to 64, got '4'"),
    ("G.weights.type", "float", "float4"),
    ("G.weights.strategy", "block", "block"),
    ("G.weights.strategy", "tensor_group", "tensor_group"),
    ("G.weights.symmetric", "no", "symmetric"),
    ("G.weights.group_size", 0, "group_size must be"),
    ("G.weights.group_size", "16", "group_size must be"),
    ("G.weights.dynamic", True, "dynamic=True"),
    ("G.weights", None, "input_activations must be null where the weights are plain"),
    ("G.input_activations", 8, "input_activations"),
    ("G.input_activations.dynamic", False, "int8, token, symmetric"),
    ("G.input_activations.dynamic", "local", "dynamic=local"),
    ("G.input_activations.num_bits", 4, "int4"),
    ("G.input_activations.strategy", "tensor", "tensor, symmetric, dynamic=True"),
    ("G.input_activations.strategy", "group", "group_size must be positive"),
    ("G.input_activations", TOKEN | {"strategy": "group", "group_size": 128}, "group, 128"),
    ("G.input_activations", TOKEN | {"type": "float", "symmetric": False}, "float8, token, with zero points"),
    ("G.input_activations", FP8_GROUPS, "float8, group, 128"),
    ("G.weights.block_structure", "128by128", "block_structure must be [rows, columns]"),
    ("G.weights.block_structure", [128], "block_structure"),
    ("G.weights", {"num_bits": 8, "group_size": 128}, "int8, group, 128"),
    (
        "G.weights",
        {"num_bits": 8, "symmetric": False, "strategy": "channel"},
        "int8, channel, with zero points",
    ),
    ("G.weights", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, "float4"),
    ("G.weights", FP8_BLOCKS, "float8, block, 128x128, symmetric) weights, (int8, token"),
    ("G.weights", FP8_BLOCKS | {"block_structure": [64, 128]}, "64x128"),
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
                "also one": w4 | {"targets": ["re:model.*down_proj", "Linear"]},
                "attention": w4 | {"targets": ["re:.*k_proj"]},
            },
            "ignore": ["lm_head", "re:model.layers.0.self_attn.*"],
        }
    )
    assert ct is not None
    names = {
        "lm_head": None,
        "model.layers.0.self_attn.q_proj": None,
        "model.layers.1.self_attn.q_proj": "also one",
        "model.layers.1.self_attn.k_proj": "attention",
        "model.layers.0.mlp.down_proj": "mlp",
        "model.layers.1.mlp.down_proj": "one",
    }
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
            assert scheme is not None
            assert (type(scheme.bits), type(scheme.symmetric)) == (int, bool)
            assert scheme.group_size in (None, 8)
            assert scheme.activations is not None
        else:
            assert outcome.startswith("quantization_config: config_groups.group_0")


@pytest.mark.parametrize("pattern", ["(?:.|.)*!", ".?" * 40 + "." * 40, ".*" * 8 + "!", "(a+)+$"])
def test_patterns_that_send_re_back_and_forth_are_matched_at_once(pattern: str) -> None:
    start = time.process_time()
    ct = read_config(config() | {"ignore": [f"re:{pattern}"]})
    assert ct is not None
    assert ct.match("model.layers.0.self_attn.q_proj") is not None
    assert time.process_time() - start < 2


def test_no_name_is_matched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    ct = read_config(config() | {"ignore": ["re:.*k_proj"]})
    assert ct is not None
    assert ct.match("m.k_proj") is None
    assert ct.match("m.q_proj") is not None
    monkeypatch.setattr(NamePattern, "matches", lambda self, name: pytest.fail(f"{name} again"))
    assert ct.match("m.k_proj") is None
    assert ct.match("m.q_proj") is not None


def test_preset_names_and_no_config() -> None:
    assert read_config(None) is None
    for name, scheme in PRESETS.items():
        assert only_scheme({"config_groups": {name.lower(): ["Linear"]}}) == scheme
    assert only_scheme({"config_groups": {"W4A8": ["Linear"]}}) == Scheme(4, 128)


def only_scheme(raw: dict) -> Scheme | None:
    ct = read_config(raw)
    assert ct is not None
    (group,) = ct.groups
    return group.scheme


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
MEANINGS: list[tuple[dict, dict | None, Scheme]] = [
    (INT8, TOKEN, Scheme(8)),
    (INT8 | {"strategy": "tensor"}, TOKEN, Scheme(8)),
    (INT8, TOKEN | {"symmetric": False}, Scheme(8, activations=Activations(symmetric=False))),
    (INT8, STATIC, Scheme(8, activations=Activations(dynamic=False))),
    (INT8, STATIC | {"symmetric": False}, Scheme(8, activations=Activations(dynamic=False, symmetric=False))),
    (INT8, None, Scheme(8, activations=None)),
    (FP8, STATIC | {"type": "float"}, Scheme(8, activations=Activations("fp8", dynamic=False), values="fp8")),
    (FP8 | {"strategy": "CHANNEL"}, TOKEN | {"type": "FLOAT"}, Scheme(8, activations=FP8_ROWS, values="fp8")),
    (FP8_BLOCKS, FP8_GROUPS, PRESETS["FP8_BLOCK"]),
    (FP8_BLOCKS | {"block_structure": "128x128"}, FP8_GROUPS, PRESETS["FP8_BLOCK"]),
    (INT4, TOKEN, Scheme(4, 64)),
    (INT4 | {"symmetric": False}, TOKEN, Scheme(4, 64, symmetric=False)),
    (INT4, TOKEN | {"type": "float"}, Scheme(4, 64, activations=FP8_ROWS)),
    (INT4, STATIC, Scheme(4, 64, activations=Activations(dynamic=False))),
    (INT4, None, Scheme(4, 64, activations=None)),
    (INT4 | {"actorder": "group"}, TOKEN, Scheme(4, 64)),
    (INT4 | {"strategy": None, "group_size": -1}, TOKEN, Scheme(4)),
]


@pytest.mark.parametrize(("weights", "rows", "scheme"), MEANINGS, ids=[str(s) for _, _, s in MEANINGS])
def test_arguments_make_schemes(weights: dict, rows: dict | None, scheme: Scheme) -> None:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": rows}
    assert only_scheme({"config_groups": {"whatever": group}}) == scheme
    # as old writers nest it, and with the format said by group
    nested = {"sparsity_config": {}, "quantization_config": {"config_groups": {"g": group | {"format": "x"}}}}
    assert only_scheme(nested) == scheme


def test_groups_that_speak_of_the_cache_alone_leave_the_layers_theirs() -> None:
    static = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    groups = config()["config_groups"] | {
        "kv": {"targets": ["re:.*k_proj", "re:.*v_proj"], "weights": None, "output_activations": static},
        "attention": {"targets": ["LlamaAttention"], "weights": None, "input_activations": static},
        "bare": {"weights": None},
    }
    ct = read_config({"config_groups": groups})
    assert ct is not None
    found = ct.match("model.layers.0.self_attn.k_proj")
    assert found is not None
    assert found.scheme == Scheme(8)
    # nothing but a cache
    only_kv = read_config({"kv_cache_scheme": static})
    assert only_kv is not None
    assert only_kv.match("model.layers.0.self_attn.k_proj") is None
