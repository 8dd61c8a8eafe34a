"""The quantization_config of compressed-tensors: which modules have which scheme.

Decided by the arguments, not by the preset's or the format's name.  Unknown keys are passed over, since the schema
drifts from release to release; what would change the arithmetic (sparsity, online transforms, types and grains that no
kernel has) is refused, naming what was found and what is supported.  KV schemes are read by `kv_cache`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from quant.formats.ct_args import Args, describe, read_args
from quant.formats.name_patterns import Budget, NamePattern
from quant.kinds import BLOCK, FP8_ROWS, Activations, Scheme

SUPPORTED = (
    "supported weights: int8 or fp8 by channel or tensor, fp8 by block [128, 128], int4 in groups or by channel, "
    "symmetric or with zero points; supported activations: none, int8 or fp8, dynamic by token or static by tensor "
    "(fp8 blocks: dynamic in groups of 128); int8 ones symmetric or with zero points"
)
# transforms already multiplied into the weights; any other location is an operation at run time
FOLDED = {"weight_input", "weight_output"}
# what formats of other arithmetic or layout have in their names
REFUSED_FORMATS = ("nvfp4", "mxfp4", "mxfp6", "mxfp8", "marlin", "sparse")
MAX_NAMES, MAX_PATTERNS = 200_000, 512  # of a config, and of its 're:' ones
FP8_STATIC = Activations("fp8", dynamic=False)
FP8_BLOCKS = Activations("fp8", block=True)
PRESETS = {
    "W8A8": Scheme(8),
    "INT8": Scheme(8),
    "W4A8": Scheme(4, 128),
    "W4AFP8": Scheme(4, 128, activations=FP8_ROWS),
    "W4A16": Scheme(4, 128, activations=None),
    "W4A16_ASYM": Scheme(4, 128, symmetric=False, activations=None),
    "FP8": Scheme(8, activations=FP8_STATIC, values="fp8"),
    "FP8_DYNAMIC": Scheme(8, activations=FP8_ROWS, values="fp8"),
    "FP8_BLOCK": Scheme(8, activations=FP8_BLOCKS, values="fp8", block=True),
}


@dataclass(frozen=True, slots=True)
class Group:
    """One config group: which modules, and their scheme (None: nothing about weights)."""

    name: str
    targets: tuple[str, ...]
    scheme: Scheme | None


@dataclass(slots=True)
class CtConfig:
    """ValueError where a pattern is none, or is too much work to match; nothing in it is matched twice."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    _plain: dict[str, Group] = field(init=False, repr=False, compare=False)
    _patterns: dict[str, tuple[NamePattern, Group]] = field(init=False, repr=False, compare=False)
    _ignored: frozenset[str] = field(init=False, repr=False, compare=False)
    _ignoring: list[NamePattern] = field(init=False, repr=False, compare=False)
    _found: dict[str, Group | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        targets = [(f"{g.name:.80}.targets", t, g) for g in self.groups for t in g.targets]
        ignored = dict.fromkeys(self.ignore)
        names = [(key, t) for key, t, _ in targets] + [("ignore", t) for t in ignored]
        patterns = {t: key for key, t in names if t.startswith("re:")}
        if len(names) > MAX_NAMES or len(patterns) > MAX_PATTERNS:
            found = f"{len(names)} of which {len(patterns)} are 're:' patterns"
            _refuse(
                "ignore and targets", found, f"at most {MAX_NAMES} names, {MAX_PATTERNS} of them patterns"
            )
        budget = Budget()
        made = {t: _pattern(key, t, budget) for t, key in patterns.items()}
        with_weights = {t: g for _, t, g in targets if g.scheme is not None}
        self._plain = {t: g for t, g in with_weights.items() if t not in made}
        # among patterns the first in the alphabet decides
        self._patterns = {t: (made[t], g) for t, g in sorted(with_weights.items()) if t in made}
        self._ignored = frozenset(t for t in ignored if t not in made)
        self._ignoring = [made[t] for t in ignored if t in made]
        self._found = {}

    def match(self, module: str) -> Group | None:
        """The group with weights of a linear module: by its exact name, else a regex, else its class.

        Among regexes the first in the alphabet, of one target the last group that has it: so the package reads them.
        """
        if module not in self._found:
            self._found[module] = None if self.ignores(module) else self._group(module)
        return self._found[module]

    def _group(self, module: str) -> Group | None:
        if module in self._plain:
            return self._plain[module]
        found = (g for target, (p, g) in self._patterns.items() if _matches(p, target, module))
        return next(found, self._plain.get("Linear"))

    def ignores(self, module: str) -> bool:
        if module in self._ignored or "Linear" in self._ignored:
            return True
        return any(_matches(p, "ignore", module) for p in self._ignoring)


def _pattern(key: str, target: str, budget: Budget) -> NamePattern:
    try:
        return NamePattern(target.removeprefix("re:"), budget)
    except ValueError as error:
        raise ValueError(
            f"quantization_config: {key} holds the bad pattern {target!r:.120}: {error}"
        ) from error


def _matches(pattern: NamePattern, where: str, module: str) -> bool:
    try:
        return pattern.matches(module)
    except ValueError as error:
        raise ValueError(f"quantization_config: {where!r:.120}: {error}") from error


def read_config(raw: Mapping[str, Any] | None) -> CtConfig | None:
    """Validates a quantization_config (or compression_config) object; None stays None."""
    raw = unwrapped(raw)
    if raw is None:
        return None
    method = raw.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        _refuse("quant_method", method, "'compressed-tensors'")
    _check_sparsity(raw.get("sparsity_config"))
    _check_transforms(raw.get("transform_config"))
    _check_format("format", raw.get("format"))
    groups = raw.get("config_groups")
    if groups is None and raw.get("kv_cache_scheme"):
        groups = {}
    if not isinstance(groups, dict):
        _refuse("config_groups", groups, "an object")
    ignore = _strings("ignore", raw.get("ignore"))
    return CtConfig(tuple(_group(name, value) for name, value in groups.items()), ignore)


def unwrapped(raw: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Old writers put the object one deeper, beside the sparsity."""
    inner = raw.get("quantization_config") if raw is not None else None
    if raw is None or not isinstance(inner, dict):
        return raw
    return {k: v for k, v in raw.items() if k != "quantization_config"} | inner


def _refuse(key: str, value: Any, choices: str) -> NoReturn:
    raise ValueError(f"quantization_config: {key} must be {choices}, got {value!r:.200}")


def _strings(key: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        _refuse(key, value, "a list of module names, 're:' patterns or class names")
    return tuple(value)


def _check_format(key: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str) or any(word in value.lower() for word in REFUSED_FORMATS):
        _refuse(key, value, "one of int-quantized, float-quantized, pack-quantized, naive-quantized")


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
            if not isinstance(where, str) or where not in FOLDED:
                choices = f"one of {', '.join(sorted(FOLDED))} (folded into the weights); online transforms are not supported"
                _refuse(f"transform_config.{name} location", where, choices)


def _group(name: str, value: Any) -> Group:
    if isinstance(value, list):
        # a preset by its name, with the targets alone
        scheme = PRESETS.get(name.upper())
        if scheme is None:
            _refuse(f"config_groups preset {name:.80}", value, f"one of {', '.join(PRESETS)}")
        return Group(name, _strings(f"{name}.targets", value), scheme)
    if not isinstance(value, dict):
        _refuse(f"config_groups.{name:.80}", value, "an object or a list of targets")
    targets = _strings(f"{name:.80}.targets", value.get("targets"))
    _check_format(f"config_groups.{name:.80}.format", value.get("format"))
    weights, inputs, outputs = (
        read_args(f"config_groups.{name:.80}.{key}", value.get(key))
        for key in ("weights", "input_activations", "output_activations")
    )
    if outputs and not all(is_kv_projection(t) for t in targets):
        _refuse(
            f"{name:.80}.output_activations", value["output_activations"], "null, save for k_proj and v_proj"
        )
    if weights is None and inputs and not all(is_attention(t) for t in targets):
        _refuse(
            f"{name:.80}.input_activations", value["input_activations"], "null where the weights are plain"
        )
    if weights is None or not targets:
        return Group(name, targets, None)
    return Group(name, targets, _scheme(name, weights, inputs))


def is_kv_projection(target: str) -> bool:
    """Whether a target names projections whose outputs are cached: there outputs are the KV scheme of old writers."""
    return bool(re.search(r"[qkv]_proj\W*$", target))


def is_attention(target: str) -> bool:
    """Whether a target names whole attention layers, whose inputs are the KV scheme of new writers."""
    return bool(re.search(r"(Attention|attn)\W*$", target))


def _scheme(name: str, weights: Args, inputs: Args | None) -> Scheme:
    """By the arguments, never by the preset's name."""
    try:
        return _weights(weights, _activations(inputs))
    except ValueError as error:
        found = f"found {describe(weights)} weights, {describe(inputs)} activations"
        raise ValueError(f"quantization_config: config_groups.{name:.80}: {found}; {SUPPORTED}") from error


def _weights(args: Args, rows: Activations | None) -> Scheme:
    """ValueError where nothing has them; so does Scheme, of the pairs that the canonical form lacks."""
    by_block = rows is not None and rows.block
    match (args.kind, args.strategy, args.dynamic):
        case ("float", "block", False) if args.block == [BLOCK, BLOCK] and args.symmetric:
            return Scheme(args.bits, activations=rows, values="fp8", block=True)
        case ("float", "tensor" | "channel", False) if args.symmetric and not by_block:
            return Scheme(args.bits, activations=rows, values="fp8")
        case ("int", "tensor" | "channel" | "group", False) if not by_block:
            return Scheme(args.bits, args.size if args.strategy == "group" else None, args.symmetric, rows)
    raise ValueError(f"unsupported weights {args}")


def _activations(args: Args | None) -> Activations | None:
    if args is None:
        return None
    dtype = {("int", 8): "int8", ("float", 8): "fp8"}.get((args.kind, args.bits), "")
    match (args.strategy, args.dynamic):
        case ("token", True) | ("tensor", False):
            return Activations(dtype, args.dynamic is True, args.symmetric)
        case ("group", True) if args.size == BLOCK and args.symmetric and dtype == "fp8":
            return FP8_BLOCKS
    raise ValueError(f"unsupported activations {args}")
