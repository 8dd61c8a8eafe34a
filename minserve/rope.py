"""Rotary tables: cos and sin of every position of one Llama, in float32, for every `rope_type` transformers has.

The frequencies are fixed at load.  Where transformers lets them follow the longest length seen so far (`dynamic`,
`longrope`), ours are those of `max_model_len`: a token's key must not depend on which requests ran before it.
The attention factor of yarn and longrope is folded into both tables.  Layout: HF's, halves repeated (rotate_half).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minserve.model_config import LlamaConfig, RopeConfig

ROWS_AT_ONCE = 1 << 16


class Frequencies(NamedTuple):
    inv_freq: Tensor  # [K / 2], float32
    attention_factor: float


class RopeTables(NamedTuple):
    cos_MK: Tensor
    sin_MK: Tensor


def check_positions(config: LlamaConfig, max_model_len: int, num_rows: int, room: int) -> None:
    """ValueError where the tables of `max_model_len` positions, and the tokens of `num_rows` sequences of so many, take
    more than `room` bytes."""
    position = 4 * (2 * config.head_dim + num_rows)
    if max_model_len * position > room:
        raise ValueError(
            f"max_model_len must be at most {room // position} here, got {max_model_len}: a position takes {position} bytes of "
            f"rotary tables and token history, which may be {room} bytes; set max_model_len, or lower max_num_seqs"
        )


def rope_tables(config: LlamaConfig, max_model_len: int, device: torch.device | str = "cpu") -> RopeTables:
    """Tables of positions [0, max_model_len); computed on the CPU, so that every device rotates alike."""
    inv_freq, attention_factor = frequencies(config, max_model_len)
    tables = RopeTables(*(torch.empty(max_model_len, config.head_dim, device=device) for _ in range(2)))
    # in pieces: the tables of a long window are large, and what is computed on the way would be twice that
    for at in range(0, max_model_len, ROWS_AT_ONCE):
        rows = slice(at, min(at + ROWS_AT_ONCE, max_model_len))
        angles = torch.arange(rows.start, rows.stop, dtype=torch.float32)[:, None] * inv_freq
        for table_MK, values in zip(tables, (angles.cos(), angles.sin()), strict=True):
            table_MK[rows] = (values * attention_factor).repeat(1, 2)
    return tables


def frequencies(config: LlamaConfig, max_model_len: int) -> Frequencies:
    """Inverse frequencies and attention factor for sequences of up to `max_model_len` tokens."""
    return _KINDS[config.rope.rope_type](config, max_model_len)


def _powers(theta: float, dim: int) -> Tensor:
    return theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _default(config: LlamaConfig, max_model_len: int) -> Frequencies:
    return Frequencies(1.0 / _powers(config.rope.theta, config.head_dim), 1.0)


def _linear(config: LlamaConfig, max_model_len: int) -> Frequencies:
    return Frequencies(_default(config, max_model_len).inv_freq / _factor(config), 1.0)


def _dynamic(config: LlamaConfig, max_model_len: int) -> Frequencies:
    # NTK: the base grows with the length beyond the trained one, and not at all below it
    dim, factor, trained = config.head_dim, _factor(config), config.max_position_embeddings
    stretch = factor * max(max_model_len, trained) / trained - (factor - 1)
    return Frequencies(1.0 / _powers(config.rope.theta * stretch ** (dim / (dim - 2)), dim), 1.0)


def _llama3(config: LlamaConfig, max_model_len: int) -> Frequencies:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    rope, factor, trained = config.rope, _factor(config), _trained(config)
    inv_freq = _default(config, max_model_len).inv_freq
    wavelength = 2 * math.pi / inv_freq
    blend = (trained / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    mixed = (1 - blend) * inv_freq / factor + blend * inv_freq
    long = wavelength > trained / rope.low_freq_factor
    short = wavelength < trained / rope.high_freq_factor
    return Frequencies(torch.where(short, inv_freq, torch.where(long, inv_freq / factor, mixed)), 1.0)


def _yarn(config: LlamaConfig, max_model_len: int) -> Frequencies:
    """Dimensions that turn often keep their frequency, slow ones are interpolated, with a ramp between."""
    rope, dim, trained = config.rope, config.head_dim, _trained(config)
    factor = rope.factor or config.max_position_embeddings / trained

    def dimension_of(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = 0.001 if low == high else high - low
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    powers = _powers(rope.theta, dim)
    inv_freq = 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep
    return Frequencies(inv_freq, _yarn_attention(rope, factor))


def _yarn_attention(rope: RopeConfig, factor: float) -> float:
    def grown(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)


def _longrope(config: LlamaConfig, max_model_len: int) -> Frequencies:
    """One divisor a dimension; which of the two lists is decided once, by max_model_len."""
    rope, trained = config.rope, _trained(config)
    divisors = torch.tensor(
        rope.long_factor if max_model_len > trained else rope.short_factor, dtype=torch.float32
    )
    factor = rope.factor or config.max_position_embeddings / trained
    attention = rope.attention_factor
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    return Frequencies(1.0 / (divisors * _powers(rope.theta, config.head_dim)), attention)


def _proportional(config: LlamaConfig, max_model_len: int) -> Frequencies:
    # the leading part of the head turns, the rest stands still: frequency zero
    turning = int(config.rope.partial_rotary_factor * config.head_dim // 2)
    inv_freq = _default(config, max_model_len).inv_freq
    inv_freq[turning:] = 0
    return Frequencies(inv_freq / (config.rope.factor or 1.0), 1.0)


def _factor(config: LlamaConfig) -> float:
    assert config.rope.factor is not None, f"{config.rope.rope_type} without a factor passed validation"
    return config.rope.factor


def _trained(config: LlamaConfig) -> int:
    assert config.rope.original_max_position is not None, (
        f"{config.rope.rope_type} without its original length"
    )
    return config.rope.original_max_position


_KINDS: dict[str, Callable[[LlamaConfig, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
