"""The quantization_config of compressed-tensors: which modules have which scheme.

Decided by the arguments, not by the preset's or the format's name.  Unknown keys are passed over, since the schema
drifts from release to release; what would change the arithmetic (sparsity, online transforms, static or missing
activation scales, KV scales) is refused, naming what was found and what is supported.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from quant.scheme import Scheme

SUPPORTED = (
    "supported: int8 weights (per channel or tensor, symmetric) or int4 weights (groups or channel, symmetric or with "
    "zero points), with dynamic symmetric int8 activations, one scale a token"
)
# transforms already multiplied into the weights; any other location is an operation at run time
FOLDED = {"weight_input", "weight_output"}
PRESETS = {"W8A8": Scheme(8), "INT8": Scheme(8), "W4A8": Scheme(4, 128)}


@dataclass(frozen=True, slots=True)
class Group:
    """One config group: which modules, and their scheme (None: nothing about weights)."""

    name: str
    targets: tuple[str, ...]
    scheme: Scheme | None


@dataclass(frozen=True, slots=True)
class CtConfig:
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    def match(self, module: str) -> Group | None:
        """The most specific group for a linear module: its exact name, a regex, its class."""
        if any(_specificity(pattern, module) for pattern in self.ignore):
            return None
        best = max(self.groups, key=lambda g: _best(g, module), default=None)
        return best if best is not None and _best(best, module) else None


def _best(group: Group, module: str) -> int:
    return max((_specificity(t, module) for t in group.targets), default=0)


def _specificity(target: str, module: str) -> int:
    """3 exact, 2 regex (anchored at its start only), 1 class, 0 no match."""
    if target.startswith("re:"):
        return 2 if re.match(target[3:], module) else 0
    return 3 if target == module else int(target == "Linear")


def read_config(raw: Mapping[str, Any] | None) -> CtConfig | None:
    """Validates a quantization_config (or compression_config) object; None stays None."""
    if raw is None:
        return None
    method = raw.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        _refuse("quant_method", method, "'compressed-tensors'")
    _check_sparsity(raw.get("sparsity_config"))
    _check_transforms(raw.get("transform_config"))
    if raw.get("kv_cache_scheme"):
        _refuse("kv_cache_scheme", raw["kv_cache_scheme"], "null (the KV format is chosen by kv_dtype)")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict):
        _refuse("config_groups", groups, "an object")
    ignore = _strings("ignore", raw.get("ignore"))
    return CtConfig(tuple(_group(name, value) for name, value in groups.items()), ignore)


def _refuse(key: str, value: Any, choices: str) -> NoReturn:
    raise ValueError(f"quantization_config: {key} must be {choices}, got {value!r:.200}")


def _strings(key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        _refuse(key, value, "a list of module names, 're:' patterns or class names")
    for v in value:
        try:
            re.compile(v[3:] if v.startswith("re:") else "")
        except re.error as error:
            raise ValueError(
                f"quantization_config: {key} holds the bad pattern {v!r:.120}: {error}"
            ) from error
    return tuple(value)


def _check_sparsity(value: Any) -> None:
    if value and (not isinstance(value, dict) or value.get("format") != "dense"):
        _refuse("sparsity_config", value, "empty or dense: sparse weights are not supported")


def _check_transforms(value: Any) -> None:
    if not value:
        return
    groups = value.get("config_groups") if isinstance(value, dict) else None
    if not isinstance(groups, dict):
        _refuse("transform_config", value, "empty or an object with config_groups")
    for name, group in groups.items():
        applied = group.get("apply") if isinstance(group, dict) else None
        if not isinstance(applied, list) or not all(isinstance(a, dict) for a in applied):
            _refuse(f"transform_config.{name}", group, "an object with a list 'apply'")
        for where in (a.get("location") for a in applied):
            if where not in FOLDED:
                choices = f"one of {', '.join(sorted(FOLDED))} (folded into the weights); online transforms are not supported"
                _refuse(f"transform_config.{name} location", where, choices)


def _group(name: str, value: Any) -> Group:
    if isinstance(value, list):
        # a preset by its name, with the targets alone
        if name.upper() not in PRESETS:
            _refuse(f"config_groups preset {name}", value, f"one of {', '.join(PRESETS)}")
        return Group(name, _strings(f"{name}.targets", value), PRESETS[name.upper()])
    if not isinstance(value, dict):
        _refuse(f"config_groups.{name}", value, "an object or a list of targets")
    targets = _strings(f"{name}.targets", value.get("targets"))
    weights, activations = value.get("weights"), value.get("input_activations")
    if value.get("output_activations"):
        _refuse(f"{name}.output_activations", value["output_activations"], "null")
    if weights is None or not targets:
        return Group(name, targets, None)
    if not isinstance(weights, dict) or not isinstance(activations, dict | None):
        _refuse(f"config_groups.{name}", value, "an object with objects 'weights' and 'input_activations'")
    return Group(name, targets, _scheme(name, weights, activations))


def _scheme(name: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> Scheme:
    """By the arguments, never by the preset's name."""
    bits, size, strategy = weights.get("num_bits", 8), weights.get("group_size"), _strategy(weights)
    symmetric = weights.get("symmetric", True)
    found = f"found {_describe(weights)} weights, {_describe(activations)} activations"
    good = weights.get("type", "int") == "int" and isinstance(symmetric, bool) and not weights.get("dynamic")
    good &= type(bits) is int
    if bits == 8:
        good &= strategy in ("tensor", "channel") and symmetric is True
    else:
        good &= bits == 4 and strategy in ("tensor", "channel", "group")
    if strategy == "group":
        good &= type(size) is int and size > 0
    if not good or not _activations_ok(activations):
        raise ValueError(f"quantization_config: config_groups.{name}: {found}; {SUPPORTED}")
    return Scheme(bits, size if strategy == "group" else None, symmetric)


def _strategy(args: dict[str, Any]) -> Any:
    size = args.get("group_size")
    if args.get("strategy") is not None or not isinstance(size, int | None):
        return args.get("strategy")
    if size is None:
        return "token" if args.get("dynamic") is True else "tensor"
    return "channel" if size == -1 else "group"


def _activations_ok(args: dict[str, Any] | None) -> bool:
    if args is None:
        return False
    kind = (
        args.get("num_bits", 8),
        args.get("type", "int"),
        args.get("symmetric", True),
        args.get("dynamic"),
    )
    return kind == (8, "int", True, True) and _strategy(args) == "token"


def _describe(args: dict[str, Any] | None) -> str:
    if args is None:
        return "unquantized"
    size = args.get("group_size")
    parts = [f"{args.get('type', 'int')}{args.get('num_bits', 8)}", f"{_strategy(args)}"]
    if size is not None and size != -1:
        parts.append(f"{size}")
    parts.append("symmetric" if args.get("symmetric", True) else "with zero points")
    if args.get("dynamic"):
        parts.append(f"dynamic={args['dynamic']}")
    return f"({', '.join(parts):.200})"
