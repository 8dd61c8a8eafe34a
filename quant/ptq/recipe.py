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

from quant.ptq.steps import AUTO as AUTO
from quant.ptq.steps import BLIND_FOLDS as BLIND_FOLDS
from quant.ptq.steps import FOLDS as FOLDS
from quant.ptq.steps import GLOBAL, ROUNDING
from quant.ptq.steps import STEPS as STEPS


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    options: Mapping[str, Any]  # complete: defaults filled in

    def __str__(self) -> str:
        known = STEPS[self.name].options
        changed = [f"{k}={known[k].spelled(v)}" for k, v in self.options.items() if v != known[k].default]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


@dataclass(frozen=True, slots=True)
class Recipe:
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.steps)) or RTN

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

    def without_data(self) -> "Recipe":
        """What is left of the rounding where inputs tell nothing: the steps that look at the weight alone."""
        kept = [s for s in self.steps if s.name not in ("match", "gptq", "refine")]
        return Recipe(tuple(kept))

    def prefixes(self) -> list["Recipe"]:
        """Plain rounding, then the recipe up to each of its steps."""
        return [Recipe(self.steps[:n]) for n in range(len(self.steps) + 1)]


RTN = "rtn"  # no step: what is done where no other says how to round
STEP = re.compile(r"\s*([a-z_]+)\s*(?:\(([^()]*)\))?\s*")


def parse(text: str) -> Recipe:
    """ValueError that names what is unknown, of the wrong type, twice there or out of order, and the choices."""
    steps: list[Step] = []
    parts = [part.strip() for part in text.split(";") if part.strip()]
    for part in parts:
        match = STEP.fullmatch(part)
        if match is None:
            raise ValueError(f"a step must read name or name(option=value, ...), got {part!r:.80}")
        name, inside = match.group(1), match.group(2) or ""
        if name == RTN:
            if inside.strip():
                raise ValueError(f"rtn has no options, got {inside.strip()!r:.80}: see grid")
        elif name not in STEPS:
            raise ValueError(f"step must be one of {RTN}, {', '.join(STEPS)}, got {name!r:.80}")
        else:
            steps.append(Step(name, _options(name, inside)))
    names = [s.name for s in steps]
    if not parts:
        raise ValueError(f"a recipe needs at least one step of {RTN}, {', '.join(STEPS)}, got {text!r:.80}")
    if RTN in parts and (other := [n for n in names if n in ("gptq", "refine")]):
        raise ValueError(f"{RTN} is rounding to nearest and cannot stand beside {other[0]}: leave one out")
    _check_order(names)
    return Recipe(tuple(steps))


def _options(name: str, inside: str) -> dict[str, Any]:
    known = STEPS[name].options
    given: dict[str, Any] = {}
    for item in filter(str.strip, inside.split(",")):
        key, equals, value = (x.strip() for x in item.partition("="))
        if not equals or key not in known:
            raise ValueError(
                f"option of {name} must be one of {', '.join(known)} as name=value, got {item.strip()!r:.80}"
            )
        if key in given:
            raise ValueError(f"option {key} of {name} is given twice")
        given[key] = known[key].read(f"{name}({key})", value)
    return STEPS[name].defaults | given


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
