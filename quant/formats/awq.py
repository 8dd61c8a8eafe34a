"""AWQ layers of the `gemm` layout (AutoAWQ): 4-bit weights in groups, zero points, activations left alone.

`qweight` int32 [K, N / 8] and `qzeros` int32 [Q, N / 8]: bits 4 i of word c hold output 8 c + INTERLEAVE[i]; `scales`
[Q, N].  W = (code - zero) * scale, codes and zeros 0..15.  The layouts gemv, marlin and exllama are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.formats.gptq import check_fields, is_gptq, read_group_size
from quant.pack import num_words, unpack
from quant.scheme import QuantWeight, Scheme

NAME = "awq"
SUFFIXES: tuple[str, ...] = ("qweight", "qzeros", "scales")
MAX_SKIPPED = 10_000  # names that are looked at
INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)
# place of output i among the nibbles
PLACE = tuple(INTERLEAVE.index(i) for i in range(8))


@dataclass(frozen=True, slots=True)
class AwqConfig:
    """`skipped`: parts of names of modules that stay plain."""

    group_size: int | None
    skipped: tuple[str, ...] = ()


def detect(infos: Mapping[str, Any], raw: Mapping[str, Any] | None) -> bool:
    """By the direction of the words, and by the config where there are none."""
    found = is_gptq(infos)
    return not found if found is not None else raw is not None and raw.get("quant_method") == NAME


def read_config(raw: Mapping[str, Any] | None) -> AwqConfig | None:
    """ValueError naming the key for other bits and other layouts."""
    if raw is None:
        return None
    version = raw.get("version", "gemm")
    for key, value, choice in (
        ("quant_method", raw.get("quant_method", NAME), NAME),
        ("bits", raw.get("bits", raw.get("w_bit", 4)), 4),
        ("version", version.lower() if isinstance(version, str) else version, "gemm"),
    ):
        if value != choice or type(value) is not type(choice):
            raise ValueError(
                f"quantization_config: {key} must be {choice!r} for AWQ's tensors, got {value!r:.80}"
            )
    skipped = raw.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(s, str) for s in skipped):
        raise ValueError(
            f"quantization_config: modules_to_not_convert must be a list of module names, got {skipped!r:.80}"
        )
    size = read_group_size(raw.get("group_size", raw.get("q_group_size", 128)))
    return AwqConfig(size, tuple(skipped[:MAX_SKIPPED]))


def targets(module: str, config: AwqConfig | None) -> bool:
    """Whether the config says that `module` is quantized."""
    return config is not None and module != "lm_head" and not any(s in module for s in config.skipped)


def load(
    module: str, fields: Mapping[str, Tensor], out_features: int, in_features: int, config: AwqConfig | None
) -> QuantWeight:
    """The layer from its tensors by suffix."""
    N, K = out_features, in_features
    scale_NQ = check_fields(fields, (K, num_words(N, 4)), N, K)
    Q = scale_NQ.shape[1]
    if config and (1 if config.group_size is None else K / config.group_size) != Q:
        raise ValueError(
            f"scales hold {Q} groups, but the config says group_size {config.group_size} of {K} inputs"
        )
    codes_NK, zero_NQ = (_outputs(fields[s], N) for s in ("qweight", "qzeros"))
    symmetric = not bool(zero_NQ.any())
    scheme = Scheme(4, None if Q == 1 else K // Q, symmetric, activations=None)
    return QuantWeight(scheme, codes_NK, scale_NQ, None if symmetric else zero_NQ).check()


def _outputs(words: Tensor, N: int) -> Tensor:
    """Codes -8..7 [N, rows] of words that run along the outputs."""
    nibbles = unpack(words, 4, N).view(len(words), -1, 8)
    return nibbles[..., torch.tensor(PLACE)].reshape(len(words), N).t().contiguous()
