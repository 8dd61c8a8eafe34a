"""Recipes: what is done to a model before and while its weights are rounded, as a list of named steps with options.

    rotate; smooth_attention(alpha=0.5); clip(points=80); gptq(actorder=true); refine

Folds change the plain model without changing its function; `grid`, `clip`, `gptq` and `refine` then say how weights
are rounded (to nearest where none is named).  RECIPES are the named ones: single methods, FireQ and QoQ as they were
published, and for each scheme the best that we found.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a step does, and its options' defaults, whose types are the options'; AUTO: a number, or that word."""

    help: str
    options: Mapping[str, Any]


ALL_PAIRS, NORM_PAIRS = ("qkv", "o", "gate_up", "down"), ("qkv", "gate_up")
GLOBAL = {
    "rotate": Kind(
        "turns the residual stream and the values of every head by Hadamard matrices (QuaRot)",
        {"residual": True, "heads": True, "signs": True},
    ),
}
FOLDS = {
    "smooth": Kind(
        "moves range from activations into weights: max|x|^alpha / max|W|^beta (SmoothQuant)",
        {"alpha": 0.5, "beta": AUTO, "pairs": NORM_PAIRS},
    ),
    "awq": Kind(
        "the scale of a family that quantizes best, searched (AWQ); rows: activations are rounded too",
        {"kind": "duo", "grid": 20, "pairs": ALL_PAIRS, "rows": False},
    ),
    "smooth_attention": Kind(
        "tames keys for a 4-bit cache: max|k|^alpha, auto searches alpha for each head (QoQ)", {"alpha": 0.5}
    ),
    "equalize": Kind(
        "columns to one mean magnitude (FireQ); a constant for each pair, auto: their geometric mean, 0: not this pair",
        {"qkv": 0.0, "o": 0.0, "gate_up": AUTO, "down": AUTO, "kind": "mean"},
    ),
    "scale_values": Kind(
        "values times a factor that the output projection takes back (FireQ)", {"factor": 0.9}
    ),
    "scale_keys": Kind(
        "keys to alpha before RoPE, folded, and the top_k largest channels to beta after it, at run time (FireQ)",
        {"alpha": 8.0, "beta": 8.0, "top_k": 8},
    ),
    "reorder": Kind("inputs of like size become neighbours (QoQ)", {"pairs": ("o", "down")}),
}
ROUNDING = {
    "grid": Kind(
        "how scales are made: divisor of symmetric int4 (auto 7.5); e4m3: FireQ's scales; multiples: offsets of "
        "progressive weights are multiples of the step",
        {"divisor": AUTO, "e4m3": False, "multiples": False},
    ),
    "match": Kind(
        "weights make up for what rounding before them did to their inputs (GPTAQ)",
        {"damp": 0.01, "strength": 1.0},
    ),
    "clip": Kind(
        "searches how far each group reaches; measure: error of the weight, or of the outputs (diagonal, output)",
        {"measure": "diagonal", "points": 40, "least": 0.5, "sides": False},
    ),
    "gptq": Kind(
        "rounds column by column, each allowing for the errors before it",
        {"damp": 0.01, "actorder": False},
    ),
    "refine": Kind(
        "sweeps over codes and scales, each to its best with the rest fixed",
        {"sweeps": 2, "scales": True, "damp": 0.01},
    ),
}
STEPS = GLOBAL | FOLDS | ROUNDING
BLIND_FOLDS = ("equalize", "scale_values")  # they look at weights alone


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    options: Mapping[str, Any]  # complete: defaults filled in

    def __str__(self) -> str:
        changed = [f"{k}={_spelled(v)}" for k, v in self.options.items() if v != STEPS[self.name].options[k]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


@dataclass(frozen=True, slots=True)
class Recipe:
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.steps)) or "rtn"

    def find(self, name: str) -> Mapping[str, Any] | None:
        """The options of a step, None where the recipe has none of that name."""
        return next((s.options for s in self.steps if s.name == name), None)

    @property
    def folds(self) -> tuple[Step, ...]:
        return tuple(s for s in self.steps if s.name in FOLDS)

    @property
    def wants_hessian(self) -> bool:
        """Whether rounding looks at the inputs."""
        clip = self.find("clip")
        seeing = clip is not None and clip["measure"] != "weight"
        return seeing or any(self.find(name) is not None for name in ("match", "gptq", "refine"))

    @property
    def wants_data(self) -> bool:
        """Whether any step looks at calibration rows."""
        return self.wants_hessian or any(s.name not in BLIND_FOLDS for s in self.folds)

    def prefixes(self) -> list["Recipe"]:
        """Plain rounding, then the recipe up to each of its steps."""
        return [Recipe(self.steps[:n]) for n in range(len(self.steps) + 1)]


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return (
        "+".join(value)
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


STEP = re.compile(r"\s*([a-z_]+)\s*(?:\(([^()]*)\))?\s*")


def parse(text: str) -> Recipe:
    """ValueError that names what is unknown, of the wrong type, twice there or out of order, and the choices."""
    steps: list[Step] = []
    for part in filter(str.strip, text.split(";")):
        match = STEP.fullmatch(part)
        if match is None:
            raise ValueError(f"a step must read name or name(option=value, ...), got {part.strip()!r}")
        name, inside = match.group(1), match.group(2) or ""
        if name == "rtn":
            if inside.strip():
                raise ValueError(f"rtn has no options, got {inside.strip()!r}: see grid")
            continue
        if name not in STEPS:
            raise ValueError(f"step must be one of rtn, {', '.join(STEPS)}, got {name!r}")
        steps.append(Step(name, _options(name, inside)))
    _check_order([s.name for s in steps])
    return Recipe(tuple(steps))


def _options(name: str, inside: str) -> dict[str, Any]:
    defaults = dict(STEPS[name].options)
    given: dict[str, Any] = {}
    for item in filter(str.strip, inside.split(",")):
        key, equals, value = (x.strip() for x in item.partition("="))
        if not equals or key not in defaults:
            raise ValueError(
                f"option of {name} must be one of {', '.join(defaults)} as name=value, got {item.strip()!r}"
            )
        if key in given:
            raise ValueError(f"option {key} of {name} is given twice")
        given[key] = _value(f"{name}({key})", value, defaults[key])
    return defaults | given


def _value(what: str, text: str, default: Any) -> Any:
    """`text` as a value of the default's type."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(f"{what} must be true or false, got {text!r}")
        return text == "true"
    if isinstance(default, tuple):
        return tuple(filter(None, text.split("+")))
    if isinstance(default, str) and default != AUTO:
        return text
    # scale_keys and smooth_attention know a number and the word auto
    if text == AUTO and (
        default == AUTO or what == "smooth_attention(alpha)" or what.startswith("equalize(")
    ):
        return AUTO
    try:
        return int(text) if isinstance(default, int) else float(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ValueError(f"{what} must be {kind}{' or auto' * (default == AUTO)}, got {text!r}") from None


def _check_order(names: list[str]) -> None:
    once = [*GLOBAL, *ROUNDING]
    twice = [n for n in once if names.count(n) > 1]
    if twice:
        raise ValueError(f"step {twice[0]} may stand once in a recipe, got {names.count(twice[0])} times")
    place = dict.fromkeys(GLOBAL, 0) | dict.fromkeys(FOLDS, 1) | {n: 2 + i for i, n in enumerate(ROUNDING)}
    for before, after in itertools.pairwise(names):
        if place[before] > place[after]:
            order = f"{', '.join(GLOBAL)}, then folds ({', '.join(FOLDS)}), then {', '.join(ROUNDING)}"
            raise ValueError(f"step {after} must stand before {before}: the order is {order}")


FIREQ = "equalize; scale_values; scale_keys; grid(e4m3=true)"
QOQ = (
    "rotate(signs=false); smooth_attention(alpha=0.5); smooth(pairs=down, alpha=0.1, beta=0.9); reorder(pairs=down); "
    "clip(measure=output, points=80, least=0.2); gptq"
)
# one for all schemes: on the demo models every step of it gains or costs nothing; see docs/quantization.md
BEST_STEPS = "rotate; match; clip; gptq(actorder=true)"
BEST = dict.fromkeys(
    ("w8a8-int8", "w8a8-fp8", "w4a8-int8", "w4a8-int8-channel", "w4a8-fp8", "w4a8-fp8-channel"), BEST_STEPS
)
# and after the rotation where keys will have 4 bits
BEST_KEYS = "smooth_attention(alpha=0.5)"
RECIPES = {
    "rtn": "rtn",
    "clip": "clip",
    "smoothquant": "smooth(alpha=0.5)",
    "awq": "awq; clip",
    "gptq": "gptq(actorder=true)",
    "fireq": FIREQ,
    "qoq": QOQ,
}


def recipe(method: str | None, steps: str | None, scheme: str, kv: str | None = None) -> Recipe:
    """The one that `method` names for a scheme (a key of BEST) and KV format, or that `steps` spells."""
    if (method is None) == (steps is None):
        raise ValueError("give either a method or steps")
    if steps is not None:
        return parse(steps)
    if method == "best":
        return parse(
            BEST[scheme].replace(";", f"; {BEST_KEYS};", 1) if kv in ("int4", "int4z") else BEST[scheme]
        )
    if method not in RECIPES:
        raise ValueError(f"method must be one of best, {', '.join(RECIPES)}, got {method!r}")
    return parse(RECIPES[method])
