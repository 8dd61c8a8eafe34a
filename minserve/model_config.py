"""LlamaConfig: what a Hugging Face folder's config.json says about a Llama, validated, as plain values.

Both spellings are read: `rope_parameters` or `rope_theta` + `rope_scaling`, `dtype` or `torch_dtype`,
`quantization_config` or `compression_config`.  A bad value raises ValueError naming the file, the key, the value and
the choices; other architectures are refused, never guessed at.  Knows nothing of tensors, so any process may read it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ARCHITECTURES = ("LlamaForCausalLM",)
DTYPES = {
    "float32": "float32", "float": "float32", "fp32": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "half": "float16", "fp16": "float16",
}  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
MAX_CONFIG_BYTES = 16 << 20
# 4,000 tensors, a Llama of 126 layers in 4 bits, take half a megabyte; the safetensors format itself ends at 100 MB
MAX_HEADER_BYTES, MAX_INDEX_BYTES = 16 << 20, 32 << 20
MAX_DEPTH = 32  # of nested JSON
MAX_DIGITS = 40
MAX_VALUES = 400_000  # in one file: a tensor of a header is 8, and 50,000 of them take Python two seconds
MAX_SIZE = 1 << 24  # of any dimension: larger is a typing error, and would not fit anywhere
DEFAULT_THETA = 10000.0


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in `path`; ValueError naming the file for anything else."""
    try:
        if not path.is_file():
            raise ValueError(f"{path} is missing or not a regular file")
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{path} holds {size} bytes, more than the {max_bytes} allowed")
        return parse_json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Strict JSON: no NaN, no duplicate keys, an object at the top."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                raise ValueError(f"duplicate key {key!r:.80}")
            seen[key] = value
        return seen

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def integer(text: str) -> int:
        # thousands of digits take time that grows with their square
        if len(text) > MAX_DIGITS:
            raise ValueError(f"an integer of {len(text)} digits")
        return int(text)

    # a value ends at a comma or is the last of its container
    if (count := sum(data.count(mark) for mark in (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError(f"{where} holds up to {count} values, more than the {MAX_VALUES} allowed")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_int=integer
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error!s:.200}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [child for v in level if isinstance(v, dict | list) for child in _children(v)]
    if level:
        # error messages print values, and printing recurses
        raise ValueError(f"{where} nests deeper than {MAX_DEPTH} levels")
    return value


def _children(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary settings, resolved; what a `rope_type` does not use keeps its default."""

    rope_type: str = "default"
    theta: float = DEFAULT_THETA
    factor: float | None = None
    original_max_position: int | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Shapes and constants of one Llama; `quantization` is the raw quantization_config, read by `quant.formats`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str  # float32 | bfloat16 | float16, as stored
    rope: RopeConfig
    bos_id: int | None
    eos_ids: tuple[int, ...]
    quantization: dict[str, Any] | None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_folder(cls, folder: str | Path) -> "LlamaConfig":
        """Reads config.json and, for the EOS ids, generation_config.json."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(
                f"model path must be a Hugging Face model folder, got {str(folder)!r}: no such folder"
            )
        path = folder / "config.json"
        generation = folder / "generation_config.json"
        return cls.from_dict(
            read_json_object(path), read_json_object(generation) if generation.exists() else {}, str(path)
        )

    @classmethod
    def from_dict(
        cls, raw: dict[str, Any], generation: dict[str, Any] | None = None, where: str = "config.json"
    ) -> "LlamaConfig":
        keys = _Keys(raw, where)
        keys.check_architecture()
        hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads", high=4096)
        kv_heads = keys.integer("num_key_value_heads", heads, high=heads)
        if heads % kv_heads:
            keys.fail("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
        if raw.get("head_dim") is None and hidden % heads:
            keys.fail("hidden_size", hidden, f"a multiple of num_attention_heads={heads}, or head_dim given")
        head_dim = keys.integer("head_dim", hidden // heads, high=4096)
        if head_dim % 2:
            keys.fail("head_dim", head_dim, "an even number")
        max_position = keys.integer("max_position_embeddings", 2048)
        vocab = keys.integer("vocab_size")
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=keys.integer("intermediate_size"),
            num_layers=keys.integer("num_hidden_layers", high=4096),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6, high=1.0),
            tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
            attention_bias=keys.boolean("attention_bias", False),
            mlp_bias=keys.boolean("mlp_bias", False),
            dtype=keys.dtype(),
            rope=_rope(keys, head_dim, max_position),
            bos_id=next(iter(keys.token_ids("bos_token_id", vocab)), None),
            eos_ids=_eos_ids(keys, generation or {}, vocab),
            quantization=keys.quantization(),
        )


class _Keys:
    """Typed access to a config dict; every failure names the file, the key, the value and what is allowed."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def fail(self, key: str, value: Any, choices: str) -> NoReturn:
        raise ValueError(f"{self.where}: {key} must be {choices}, got {value!r:.120}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.fail(key, value, f"an integer in [{low}, {high}]")
        return value

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        value = self.get(key, default)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        # the bounds also turn away infinities, and integers too large for a float
        if not good or not low < value <= high or not math.isfinite(value):
            self.fail(key, value, f"a number in ({low:g}, {high:g}]")
        return float(value)

    def maybe_number(self, key: str) -> float | None:
        return None if self.raw.get(key) is None else self.number(key)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.get(key)
        if not isinstance(value, list) or len(value) != count:
            self.fail(key, value, f"a list of {count} numbers (half of head_dim)")
        one = [_Keys({key: v}, self.where) for v in value]
        return tuple(k.number(key) for k in one)

    def token_ids(self, key: str, vocab: int) -> tuple[int, ...]:
        value = self.get(key, [])
        ids = value if isinstance(value, list) else [value]
        for i in ids:
            # -1 is how some old files say that there is none
            if isinstance(i, bool) or not isinstance(i, int) or not -1 <= i < vocab:
                self.fail(key, value, f"a token id or a list of token ids below vocab_size={vocab}")
        return tuple(dict.fromkeys(i for i in ids if i >= 0))

    def check_architecture(self) -> None:
        found = self.get("architectures")
        known = " or ".join(ARCHITECTURES)
        if found is None:
            if self.get("model_type") != "llama":
                self.fail("model_type", self.get("model_type"), "'llama' where architectures is not given")
        elif not isinstance(found, list) or not found or any(a not in ARCHITECTURES for a in found):
            self.fail("architectures", found, f"[{known}]")
        if self.get("model_type", "llama") != "llama":
            self.fail("model_type", self.get("model_type"), "'llama'")
        if self.get("hidden_act", "silu") not in ("silu", "swish"):
            self.fail("hidden_act", self.get("hidden_act"), "'silu'")

    def dtype(self) -> str:
        key = "dtype" if self.raw.get("dtype") is not None else "torch_dtype"
        value = self.get(key, "float32")
        name = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
        if name is None:
            self.fail(key, value, "one of float32, bfloat16, float16")
        return name

    def quantization(self) -> dict[str, Any] | None:
        key = "quantization_config" if self.raw.get("quantization_config") else "compression_config"
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            self.fail(key, value, "an object")
        return value or None


def _eos_ids(keys: _Keys, generation: dict[str, Any], vocab: int) -> tuple[int, ...]:
    # transformers generates by generation_config where it names an id, by config otherwise
    if generation.get("eos_token_id") is not None:
        return _Keys(generation, "generation_config.json").token_ids("eos_token_id", vocab)
    return keys.token_ids("eos_token_id", vocab)


def _rope(keys: _Keys, head_dim: int, max_position: int) -> RopeConfig:
    # rope_scaling, where both are present, is the one an old tool edited: transformers lets it win too
    key = "rope_scaling" if keys.raw.get("rope_scaling") else "rope_parameters"
    settings = keys.get(key, {})
    if not isinstance(settings, dict):
        keys.fail(key, settings, "an object")
    # outer keys of the old spelling count where the object does not name them
    outer = ("rope_theta", "partial_rotary_factor")
    merged = {k: keys.raw[k] for k in outer if keys.raw.get(k) is not None} | settings
    rope = _Keys(merged, f"{keys.where}: {key}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        rope.fail("rope_type", kind, f"one of {', '.join(ROPE_TYPES)}")
    original = _original_max_position(keys, rope, kind, max_position)
    partial = rope.number("partial_rotary_factor", 1.0, high=1.0)
    # transformers' Llama rotates whole heads: only `proportional` has a meaning for a part of one
    if partial != 1.0 and kind != "proportional":
        rope.fail("partial_rotary_factor", partial, f"1.0 for rope_type {kind!r}")
    if kind == "dynamic" and head_dim == 2:
        rope.fail("rope_type", kind, "another type where head_dim is 2")
    factor = rope.maybe_number("factor")
    if kind in ("linear", "dynamic", "llama3") and factor is None:
        rope.fail("factor", None, f"given for rope_type {kind!r}")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            rope.fail("high_freq_factor", high, f"more than low_freq_factor={low:g}")
    return RopeConfig(
        rope_type=kind,
        theta=rope.number("rope_theta", DEFAULT_THETA, low=1.0),
        factor=factor,
        original_max_position=original,
        attention_factor=rope.maybe_number("attention_factor"),
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.maybe_number("mscale"),
        mscale_all_dim=rope.maybe_number("mscale_all_dim"),
        truncate=rope.boolean("truncate", True),
        short_factor=rope.numbers("short_factor", head_dim // 2) if kind == "longrope" else (),
        long_factor=rope.numbers("long_factor", head_dim // 2) if kind == "longrope" else (),
        partial_rotary_factor=partial,
    )


def _original_max_position(keys: _Keys, rope: _Keys, kind: str, max_position: int) -> int | None:
    if kind not in ("llama3", "yarn", "longrope"):
        return None
    # beside the rope object it has priority, as Phi-3 and its descendants write it
    name = "original_max_position_embeddings"
    holder = keys if keys.raw.get(name) is not None else rope
    return holder.integer(name, max_position, low=2)
