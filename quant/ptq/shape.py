"""Shape: what quantization needs of a Llama's config.json, and its rotary tables.

Both spellings are read: `rope_parameters`, or `rope_theta` and `rope_scaling`.  Refused, with a ValueError that names
the file, the key, the value and the choices: other architectures and other rope types.
Tables are float32 as the engine and transformers have them; `dynamic` is the default within the trained length.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
MAX_CONFIG_BYTES = 16 << 20
MAX_SIZE = 1 << 24


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary settings; what a `kind` does not use keeps its default."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    trained: int = 2048  # positions of the training that a scaling starts from

    def frequencies(self, head_dim: int) -> Tensor:
        """Radians a position of each pair: [K / 2] float32."""
        inv_freq = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.kind == "linear":
            return inv_freq / self.factor
        if self.kind != "llama3":
            return inv_freq
        # long wavelengths are divided by the factor, short ones kept, those between blended
        wavelength = 2 * math.pi / inv_freq
        blend = (self.trained / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        mixed = (1 - blend) * inv_freq / self.factor + blend * inv_freq
        long = wavelength > self.trained / self.low_freq_factor
        short = wavelength < self.trained / self.high_freq_factor
        return torch.where(short, inv_freq, torch.where(long, inv_freq / self.factor, mixed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes and constants of one Llama."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    vocab: int
    eps: float
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rotary: Rope = Rope()
    positions: int = 2048  # the longest sequence that the model was made for

    @property
    def heads_per_kv(self) -> int:
        return self.heads // self.kv_heads

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos_TK and sin_TK of integer positions, float32, halves repeated."""
        if self.rotary.kind == "dynamic" and positions_T.numel():
            last = int(positions_T.max())
            if last >= self.rotary.trained:
                raise ValueError(
                    f"positions must be below {self.rotary.trained} with rope_type 'dynamic', got {last}"
                )
        angles = positions_T[:, None].float() * self.rotary.frequencies(self.head_dim).to(positions_T.device)
        angles_TK = torch.cat((angles, angles), dim=-1)
        return angles_TK.cos(), angles_TK.sin()

    def weight_shape(self, linear: str) -> tuple[int, int]:
        """(outputs, inputs) of a linear layer by its name inside a decoder layer."""
        q, kv, D, F = (
            self.heads * self.head_dim,
            self.kv_heads * self.head_dim,
            self.hidden,
            self.intermediate,
        )
        shapes = {
            "q_proj": (q, D), "k_proj": (kv, D), "v_proj": (kv, D), "o_proj": (D, q),
            "gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F),
        }  # fmt: skip
        return shapes[linear.rpartition(".")[2]]

    def has_bias(self, linear: str) -> bool:
        return self.attention_bias if linear.startswith("self_attn.") else self.mlp_bias


class _Keys:
    """Typed access to a JSON object; every failure names the file, the key, the value and what is allowed."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self.raw, self.where = raw, where

    def fail(self, key: str, value: Any, choices: str) -> NoReturn:
        raise ValueError(f"{self.where}: {key} must be {choices}, got {value!r:.120}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
            self.fail(key, value, f"an integer in [1, {MAX_SIZE}]")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e12:
            self.fail(key, value, "a number in (0, 1e12]")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return value


def read_shape(folder: str | Path) -> Shape:
    """The shape of the Llama in `folder`, whatever its weights are stored in."""
    path = Path(folder) / "config.json"
    keys = _Keys(read_object(path), str(path))
    if keys.get("model_type", "llama") != "llama":
        keys.fail("model_type", keys.get("model_type"), "'llama'")
    if keys.get("architectures", ["LlamaForCausalLM"]) != ["LlamaForCausalLM"]:
        keys.fail("architectures", keys.get("architectures"), "['LlamaForCausalLM']")
    if keys.get("hidden_act", "silu") not in ("silu", "swish"):
        keys.fail("hidden_act", keys.get("hidden_act"), "'silu'")
    hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    kv_heads = keys.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        keys.fail("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads={heads}")
    if keys.get("head_dim") is None and hidden % heads:
        keys.fail("hidden_size", hidden, f"a multiple of num_attention_heads={heads}, or head_dim given")
    head_dim = keys.integer("head_dim", hidden // heads)
    if head_dim % 2:
        keys.fail("head_dim", head_dim, "an even number")
    return Shape(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=keys.integer("intermediate_size"),
        layers=keys.integer("num_hidden_layers"),
        vocab=keys.integer("vocab_size"),
        eps=keys.number("rms_norm_eps", 1e-6),
        tied=keys.boolean("tie_word_embeddings"),
        attention_bias=keys.boolean("attention_bias"),
        mlp_bias=keys.boolean("mlp_bias"),
        rotary=_rotary(keys),
        positions=keys.integer("max_position_embeddings", 2048),
    )


def _rotary(keys: _Keys) -> Rope:
    # where both are present the old spelling is the one that was edited: transformers lets it win too
    name = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    settings = keys.get(name, {})
    if not isinstance(settings, dict):
        keys.fail(name, settings, "an object")
    outer = {"rope_theta": keys.get("rope_theta")} if keys.get("rope_theta") is not None else {}
    rope = _Keys(outer | settings, f"{keys.where}: {name}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        rope.fail("rope_type", kind, f"one of {', '.join(ROPE_TYPES)}")
    if rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0)) != 1.0:
        rope.fail("partial_rotary_factor", rope.get("partial_rotary_factor"), "1.0")
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    if kind == "llama3" and high <= low:
        rope.fail("high_freq_factor", high, f"more than low_freq_factor={low:g}")
    trained = keys.integer("max_position_embeddings", 2048)
    if kind == "llama3":
        original = "original_max_position_embeddings"
        trained = (
            keys.integer(original) if keys.get(original) is not None else rope.integer(original, trained)
        )
    return Rope(
        kind=kind,
        theta=rope.number("rope_theta", 10000.0),
        # None is refused where the kind needs a factor
        factor=rope.number("factor", None if kind in ("linear", "llama3") else 1.0),
        low_freq_factor=low,
        high_freq_factor=high,
        trained=trained,
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 16 MiB; ValueError naming the file for anything else."""
    try:
        if not path.is_file():
            raise ValueError(f"{path} is missing or not a regular file")
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise ValueError(f"{path} holds {size} bytes, more than the {MAX_CONFIG_BYTES} allowed")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error!s:.200}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
