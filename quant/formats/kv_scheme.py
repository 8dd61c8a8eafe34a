"""What a checkpoint says of its KV cache: which format, and which tensors then hold its scales.

Written as `kv_cache_scheme`, as the inputs of the attention layers or, by old writers, as the outputs of k_proj and
v_proj.  No torch: pools are planned before weights are read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quant.formats.ct_args import Args, describe, read_args
from quant.formats.ct_config import is_attention, is_kv_projection, unwrapped

# below a layer's attention, "model.layers.0.self_attn": the newest name first
KEY = ("k_scale", "k_proj.k_scale", "k_proj.output_scale", "kv_scale")
VALUE = ("v_scale", "v_proj.v_scale", "v_proj.output_scale", "kv_scale")
# QServe's, of keys and of values, for int8
PAIR = "kv_scale_quant_orig"
ZEROS = ("k_zero_point", "v_zero_point", "k_proj.output_zero_point", "v_proj.output_zero_point")
DROPPED = (
    "q_scale", "q_zero_point", "prob_scale", "prob_output_scale", "q_proj.output_scale", "q_proj.output_zero_point",
)  # fmt: skip
WHY_DROPPED = "queries are quantized by their own values at run time, probabilities are not quantized"
SUFFIXES: tuple[str, ...] = tuple(dict.fromkeys((*KEY, *VALUE, PAIR, *ZEROS, *DROPPED)))
STATIC_FORMATS = {("float", 8): "fp8", ("int", 8): "int8"}
DYNAMIC_FORMATS = STATIC_FORMATS | {("int", 4): "int4"}
SUPPORTED = (
    "supported: fp8 or int8, symmetric, static by tensor or attn_head with scales in the checkpoint; or dynamic fp8, "
    "int8 or int4 (int4 with zero points too), which get a scale a token and head"
)


@dataclass(frozen=True, slots=True)
class KvScheme:
    """`fmt` is one of the KV formats of the kernels; `static` ones need the scales of every layer."""

    fmt: str
    static: bool


def declared(raw: Mapping[str, Any] | None, names: Iterable[str] = ()) -> KvScheme | None:
    """The scheme that a quantization_config, or else the checkpoint's tensor `names`, declares; None where neither does.

    ValueError where it is one that no KV format has.
    """
    raw = unwrapped(raw) or {}
    names = tuple(names)
    found = [_scheme(where, args) for where, args in _all_args(raw) if args is not None]
    if len(set(found)) > 1:
        raise ValueError(f"quantization_config: KV schemes must be one for all layers, got {found}")
    if found:
        return found[0]
    if any(name.endswith(f".{PAIR}") for name in names):
        return KvScheme("int8", static=True)
    # the native fp8 format has no key for it, or one of many spellings
    has_scales = any(name.endswith(tuple(f".self_attn.{s}" for s in KEY)) for name in names)
    return KvScheme("fp8", static=True) if has_scales and raw.get("quant_method") == "fp8" else None


def _all_args(raw: Mapping[str, Any]) -> list[tuple[str, Args | None]]:
    if raw.get("quant_method", "compressed-tensors") != "compressed-tensors":
        return []
    found = [("kv_cache_scheme", read_args("kv_cache_scheme", raw.get("kv_cache_scheme")))]
    groups = raw.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
            continue
        keyed = {"output_activations": is_kv_projection, "input_activations": is_attention}
        for key, belongs in keyed.items():
            if group.get("weights") is None or key == "output_activations":
                where = f"config_groups.{name:.80}.{key}"
                # queries alone say nothing of keys
                if all(belongs(t) for t in targets) and not all("q_proj" in t for t in targets):
                    found.append((where, read_args(where, group.get(key))))
    return found


def _scheme(where: str, args: Args) -> KvScheme:
    if args.dynamic:
        fmt = DYNAMIC_FORMATS.get((args.kind, args.bits))
        if fmt == "int4" and not args.symmetric:
            return KvScheme("int4z", static=False)
        good = args.dynamic is True and args.symmetric
    else:
        fmt = STATIC_FORMATS.get((args.kind, args.bits))
        good = args.strategy in ("tensor", "attn_head") and args.symmetric
    if fmt is None or not good:
        raise ValueError(f"quantization_config: {where} is {describe(args)}; {SUPPORTED}")
    return KvScheme(fmt, not args.dynamic)


def scheme_args(fmt: str) -> dict[str, Any]:
    """`kv_cache_scheme` of a checkpoint with constant scales of one layer each, for `ct_save.config_object`."""
    kinds = {name: kind for kind, name in STATIC_FORMATS.items()}
    if fmt not in kinds:
        raise ValueError(f"a static KV format must be one of {', '.join(kinds)}, got {fmt!r}")
    kind, bits = kinds[fmt]
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "tensor", "dynamic": False}
