"""Native `fp8` checkpoints (`quant_method: "fp8"`): e4m3 weights with a scale a tensor, channel or block.

`weight_scale_inv`, of block scales, is a multiplier in spite of its name.  Activations are static where the config says
so (one scale a layer), else dynamic: a scale a token, or, with blocks, a token and 128 columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quant.formats.scales import block_scales, input_constants, row_scales
from quant.scheme import BLOCK, FP8, Activations, QuantWeight, Scheme

NAME = "fp8"
SUFFIXES: tuple[str, ...] = ("weight", "weight_scale", "weight_scale_inv", "input_scale")
ACTIVATIONS = ("static", "dynamic")
MAX_SKIPPED = 10_000  # names that are looked at
SKIPPED = ("ignored_layers", "modules_to_not_convert")


@dataclass(frozen=True, slots=True)
class Fp8Config:
    """`static` and `block` None: the tensors decide.  `said`: there is a config; `skipped`: parts of names it leaves plain."""

    static: bool | None = None
    block: bool | None = None
    said: bool = False
    skipped: tuple[str, ...] = ()


def detect(infos: Mapping[str, Any], raw: Mapping[str, Any] | None) -> bool:
    """Where it says so itself, or in the tensor that no other format has."""
    method = raw.get("quant_method") if raw is not None else None
    return method == NAME or (method is None and any(name.endswith(".weight_scale_inv") for name in infos))


def read_config(raw: Mapping[str, Any] | None) -> Fp8Config:
    """ValueError naming key, value and choices.  Which layers are plain is in their tensors, not in the lists."""
    if raw is None or raw.get("quant_method") is None:
        return Fp8Config()
    scheme, block = raw.get("activation_scheme"), raw.get("weight_block_size")
    if scheme is not None and scheme not in ACTIVATIONS:
        raise _wrong("activation_scheme", scheme, f"one of {', '.join(ACTIVATIONS)}")
    if block is not None and (not isinstance(block, list) or block != [BLOCK, BLOCK]):
        raise _wrong("weight_block_size", block, f"null or [{BLOCK}, {BLOCK}]")
    if block is not None and scheme == "static":
        raise _wrong("activation_scheme", scheme, "dynamic with weight_block_size")
    if raw.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
        raise _wrong("fmt", raw["fmt"], "e4m3")
    if raw.get("scale_fmt") not in (None, "float", "float32", "ue8m0"):
        raise _wrong("scale_fmt", raw["scale_fmt"], "float or ue8m0")
    for key in SKIPPED:
        names = raw.get(key)
        if names is not None and (not isinstance(names, list) or not all(isinstance(n, str) for n in names)):
            raise _wrong(key, names, "a list of module names")
    skipped = [n for key in SKIPPED for n in raw.get(key) or ()]
    static = None if scheme is None else scheme == "static"
    return Fp8Config(static, block is not None, True, tuple(skipped[:MAX_SKIPPED]))


def targets(module: str, config: Fp8Config) -> bool:
    """Whether the config says that `module` is quantized."""
    return config.said and module != "lm_head" and not any(s in module for s in config.skipped)


def _wrong(key: str, value: Any, choices: str) -> ValueError:
    return ValueError(f"quantization_config: {key} must be {choices}, got {value!r:.120}")


def load(
    module: str, fields: Mapping[str, Tensor], out_features: int, in_features: int, config: Fp8Config
) -> QuantWeight:
    """The layer `module` from its tensors by suffix; each of them is used, or named in the error."""
    shape = (out_features, in_features)
    found = ", ".join(f"{s} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for s, t in fields.items())
    scales = [s for s in ("weight_scale", "weight_scale_inv") if s in fields]
    if (
        "weight" not in fields
        or fields["weight"].dtype != FP8
        or len(scales) != 1
        or set(fields) - set(SUFFIXES)
    ):
        raise ValueError(
            f"found tensors {found}; supported: weight float8_e4m3fn with weight_scale or, in blocks, "
            "weight_scale_inv, and input_scale where activations are static"
        )
    if list(fields["weight"].shape) != list(shape):
        raise ValueError(f"weight must be {list(shape)}, got {list(fields['weight'].shape)}")
    by_block = scales == ["weight_scale_inv"]
    if config.block is not None and by_block != config.block:
        raise ValueError(
            f"found {scales[0]}, but the config has {'a' if config.block else 'no'} weight_block_size"
        )
    static = config.static if config.static is not None else "input_scale" in fields
    if by_block and static:
        raise ValueError("found input_scale beside weight_scale_inv: block scales need dynamic activations")
    rows = Activations("fp8", dynamic=not static, block=by_block)
    scale_NQ = (block_scales if by_block else row_scales)(scales[0], fields[scales[0]], shape)
    constants = input_constants(fields, rows)
    scheme = Scheme(8, activations=rows, values="fp8", block=by_block)
    return QuantWeight(scheme, fields["weight"], scale_NQ, **constants).check()
