"""config.json: both spellings, every default, and a table of malformed ones with one clear ValueError each."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig as HfConfig

from minserve.model_config import LlamaConfig, RopeConfig, parse_json_object, read_json_object

GOOD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "bos_token_id": 298,
    "eos_token_id": [299, 297],
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_a_good_config_is_read_in_full() -> None:
    c = LlamaConfig.from_dict(GOOD)
    assert (c.vocab_size, c.hidden_size, c.intermediate_size, c.num_layers) == (300, 64, 96, 2)
    assert (c.num_heads, c.num_kv_heads, c.head_dim, c.q_size, c.kv_size) == (4, 2, 16, 64, 32)
    assert (c.max_position_embeddings, c.rms_norm_eps, c.dtype) == (256, 1e-5, "bfloat16")
    assert (c.tie_word_embeddings, c.attention_bias, c.mlp_bias) == (False, False, False)
    assert (c.bos_id, c.eos_ids, c.quantization) == (298, (299, 297), None)
    assert c.rope == RopeConfig(rope_type="default", theta=5e5)


def test_both_spellings_mean_the_same() -> None:
    new = GOOD | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}
    old = {k: v for k, v in GOOD.items() if k not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}, "torch_dtype": "bfloat16"}
    assert LlamaConfig.from_dict(new) == LlamaConfig.from_dict(old)
    for spelling in ("torch.bfloat16", "bf16", "bfloat16"):
        assert LlamaConfig.from_dict(old | {"torch_dtype": spelling}).dtype == "bfloat16"
    assert LlamaConfig.from_dict(old | {"rope_scaling": None}).rope == RopeConfig(theta=5e5)


def test_defaults_are_those_of_transformers() -> None:
    small = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    hf = HfConfig(**{k: GOOD[k] for k in small})
    c = LlamaConfig.from_dict({k: GOOD[k] for k in small} | {"model_type": "llama"})
    assert c.num_kv_heads == hf.num_key_value_heads
    assert c.head_dim == hf.head_dim
    assert c.max_position_embeddings == hf.max_position_embeddings
    assert c.rms_norm_eps == hf.rms_norm_eps
    assert c.rope.theta == hf.rope_parameters["rope_theta"]
    assert (c.tie_word_embeddings, c.attention_bias, c.mlp_bias) == (
        hf.tie_word_embeddings, hf.attention_bias, hf.mlp_bias
    )  # fmt: skip
    assert c.dtype == "float32"


def test_head_dim_need_not_divide_the_width() -> None:
    assert LlamaConfig.from_dict(GOOD | {"head_dim": 24}).q_size == 96
    assert LlamaConfig.from_dict(GOOD | {"hidden_size": 66, "head_dim": 16}).hidden_size == 66


def test_eos_ids_come_from_generation_config_first() -> None:
    assert LlamaConfig.from_dict(GOOD, {"eos_token_id": 5}).eos_ids == (5,)
    assert LlamaConfig.from_dict(GOOD, {"eos_token_id": [5, 6, 5]}).eos_ids == (5, 6)
    assert LlamaConfig.from_dict(GOOD, {"temperature": 0.6}).eos_ids == (299, 297)
    assert LlamaConfig.from_dict(GOOD | {"eos_token_id": None}).eos_ids == ()
    assert LlamaConfig.from_dict(GOOD | {"eos_token_id": -1, "bos_token_id": None}).bos_id is None


def test_quantization_config_under_both_keys() -> None:
    for key in ("quantization_config", "compression_config"):
        assert LlamaConfig.from_dict(GOOD | {key: {"config_groups": {}}}).quantization == {
            "config_groups": {}
        }
    assert LlamaConfig.from_dict(GOOD | {"quantization_config": None}).quantization is None


def test_original_length_beside_the_rope_object_has_priority() -> None:
    rope = {"rope_parameters": {"rope_type": "llama3", **LLAMA3}}
    assert LlamaConfig.from_dict(GOOD | rope).rope.original_max_position == 64
    assert (
        LlamaConfig.from_dict(
            GOOD | rope | {"original_max_position_embeddings": 128}
        ).rope.original_max_position
        == 128
    )
    del rope["rope_parameters"]["original_max_position_embeddings"]
    assert LlamaConfig.from_dict(GOOD | rope).rope.original_max_position == 256


def test_from_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert LlamaConfig.from_folder(tmp_path) == LlamaConfig.from_dict(GOOD)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert LlamaConfig.from_folder(str(tmp_path)).eos_ids == (7,)


# (key, bad value, what the message must hold); every message must also name the file and the key
BAD_VALUES: list[tuple[str, Any, str]] = [
    *((key, value, "an integer in [1, ") for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings",
    ) for value in (0, -1, 1.5, "64", True, [64], 2**40)),
    *((key, None, "an integer") for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    )),
    ("num_key_value_heads", 3, "a divisor of num_attention_heads=4"),
    ("num_key_value_heads", 8, "in [1, 4]"),
    ("hidden_size", 66, "a multiple of num_attention_heads=4"),
    ("head_dim", 15, "an even number"),
    *(("rms_norm_eps", value, "a number in (0, 1]") for value in (0, -1e-6, "1e-5", True, 2, [])),
    *((key, value, "true or false") for key in ("tie_word_embeddings", "attention_bias", "mlp_bias")
      for value in (0, 1, "false", [])),
    *(("dtype", value, "float32, bfloat16, float16") for value in ("float8_e4m3fn", "int8", 16, ["bfloat16"], "")),
    *(("architectures", value, "LlamaForCausalLM") for value in (
        ["MistralForCausalLM"], ["LlamaForSequenceClassification"], [], "LlamaForCausalLM", [None], {},
        ["LlamaForCausalLM", "Other"],
    )),
    *(("model_type", value, "'llama'") for value in ("mistral", "qwen2", 3)),
    *(("hidden_act", value, "'silu'") for value in ("gelu", "relu", 1)),
    *((key, value, "a token id") for key in ("bos_token_id", "eos_token_id")
      for value in (300, -2, "2", 1.0, True, {}, [1, 300], [[1]], [None])),
    *((key, value, "an object") for key in ("quantization_config", "compression_config", "rope_parameters", "rope_scaling")
      for value in ("int8", 8, [1])),
]  # fmt: skip

BAD_ROPES: list[tuple[dict[str, Any], str, str]] = [
    *(({"rope_type": kind}, "rope_type", "default, linear, dynamic, llama3, yarn, longrope") for kind in (
        "su", "mrope", "ntk", 3, [], {}, True)),
    *(({"rope_type": kind}, "factor", f"given for rope_type '{kind}'") for kind in ("linear", "dynamic", "llama3")),
    *(({"rope_type": "linear", "factor": f}, "factor", "a number") for f in (0, -2.0, "4", True, [4], 1e20)),
    *(({"rope_type": "default", "rope_theta": t}, "rope_theta", "a number in (1, ") for t in (0, 1, -1, "1e4", [], 1e300)),
    *(({"rope_type": "yarn", "factor": 2.0, key: value}, key, "number") for key in
      ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor") for value in (-1, "x", [], True)),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate", "true or false"),
    *(({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": n},
       "original_max_position_embeddings", "an integer") for n in (0, 1, -5, 2.5, "64", 2**40)),
    *(({"rope_type": "llama3"} | LLAMA3 | {key: value}, key, "number") for key in
      ("low_freq_factor", "high_freq_factor", "factor") for value in (0, -1, "1", [])),
    ({"rope_type": "llama3"} | LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor", "more than low_freq_factor=1"),
    *(({"rope_type": "longrope", "short_factor": short, "long_factor": [1.0] * 8}, "short_factor", text) for short, text in (
        (None, "a list of 8 numbers"), ([1.0] * 7, "a list of 8"), ([1.0] * 9, "a list of 8"), ("x", "a list of 8"),
        ([1.0] * 7 + ["x"], "a number"), ([1.0] * 7 + [0], "a number"), ([1.0] * 7 + [None], "a number"))),
    ({"rope_type": "longrope", "short_factor": [1.0] * 8}, "long_factor", "a list of 8 numbers"),
    *(({"rope_type": "default", "partial_rotary_factor": p}, "partial_rotary_factor", text) for p, text in (
        (0.5, "1.0 for rope_type 'default'"), (0, "a number"), (2, "a number"), ("1", "a number"))),
]  # fmt: skip


def bad_configs() -> list[tuple[dict[str, Any], str, str]]:
    cases = [(GOOD | {key: value}, key, text) for key, value, text in BAD_VALUES]
    for rope, key, text in BAD_ROPES:
        cases.append((GOOD | {"rope_parameters": rope}, key, text))
        old = {k: v for k, v in GOOD.items() if k != "rope_parameters"}
        cases.append((old | {"rope_scaling": rope}, key, text))
    return cases


BAD_TEXT: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[]", "must hold a JSON object, got list"),
    (b"null", "must hold a JSON object"),
    (b'"llama"', "must hold a JSON object"),
    (b"\xff\xfe{\x00}\x00", "not valid JSON"),
    (b'{"a": NaN}', "NaN is not JSON"),
    (b'{"a": [Infinity]}', "Infinity is not JSON"),
    (b'{"a": -Infinity}', "-Infinity is not JSON"),
    (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
    (b'{"a": {"b": 1, "b": 1}}', "duplicate key 'b'"),
    (b'{"a": 1,}', "not valid JSON"),
    (b"{'a': 1}", "not valid JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"a": ' + b"[" * 100_000, "not valid JSON"),
    (b'{"a": ' + b"[" * 600 + b"]" * 600 + b"}", "nests deeper"),
    (b'{"a": ' + b'{"b":' * 33 + b"1" + b"}" * 33 + b"}", "nests deeper"),
    (b"\x80\x04\x95", "not valid JSON"),
    (b"# comment\n{}", "not valid JSON"),
]


@pytest.mark.parametrize(("raw", "key", "text"), bad_configs())
def test_a_bad_value_is_named_with_its_choices(raw: dict[str, Any], key: str, text: str) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        LlamaConfig.from_dict(copy.deepcopy(raw), where="/models/x/config.json")
    message = str(error.value)
    assert message.startswith("/models/x/config.json: "), message
    assert key in message, message
    assert text in message, message
    assert len(message) < 600, message


@pytest.mark.parametrize(("data", "text"), BAD_TEXT)
def test_bad_json_is_named_with_its_file(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"config\.json") as error:
        LlamaConfig.from_folder(tmp_path)
    assert text in str(error.value)
    assert str(path) in str(error.value)


def test_missing_and_strange_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        LlamaConfig.from_folder(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        LlamaConfig.from_folder(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match="not a regular file"):
        LlamaConfig.from_folder(tmp_path)
    big = tmp_path / "big.json"
    big.write_bytes(b" " * 100)
    with pytest.raises(ValueError, match="100 bytes, more than the 10"):
        read_json_object(big, max_bytes=10)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "config.json").write_text(json.dumps(GOOD))
    (tmp_path / "good" / "generation_config.json").write_text('{"eos_token_id": "2"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id"):
        LlamaConfig.from_folder(tmp_path / "good")


def test_count_of_malformed_configs() -> None:
    count = len(bad_configs()) + len(BAD_TEXT)
    print(f"malformed config.json: {count} cases")
    assert count >= 200


def test_strict_json_reads_what_is_json() -> None:
    assert parse_json_object(b'{"a": [1, {"b": null}], "c": "\xc3\xa9"}', "x") == {
        "a": [1, {"b": None}],
        "c": "é",
    }
