"""The steps that a recipe may have, and the options of each: its default, and what it may be.

`Option.read` makes a value of what a user typed, or a ValueError that names the option, the value and the choices.  The
ranges are those in which a step does what it says: outside them a model would come out ruined without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Option:
    """Of the type of its default, or of `kind` where that is AUTO or a number that may be written as a word.

    `low` and `high` bound numbers, both included.  `words`: what text must be; of a tuple, what its parts must be.
    `numbers`: the few that are allowed.  `off`: 0 is allowed too, below `low`.  `auto`: so is the word.
    """

    default: Any
    low: float = 0.0
    high: float = 1.0
    words: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()
    auto: bool = False
    off: bool = False

    def choices(self) -> str:
        """In words, for help and messages."""
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, tuple):
            return f"{', '.join(self.words)}, one or several joined by +"
        if self.words:
            return f"one of {', '.join(self.words)}"
        if self.numbers:
            allowed = ", ".join(f"{x:g}" for x in self.numbers)
        else:
            whole = "a whole number" if isinstance(self.default, int) else "a number"
            allowed = f"{whole} from {self.low:g} to {self.high:g}"
        return allowed + ", or 0 for none" * self.off + f", or {AUTO}" * self.auto

    def read(self, what: str, text: str) -> Any:
        """The value that `text` spells."""
        value = self._parsed(text)
        if value is None:
            raise ValueError(f"{what} must be {self.choices()}, got {text!r:.80}")
        return value

    def _parsed(self, text: str) -> Any:
        if self.auto and text == AUTO:
            return AUTO
        if isinstance(self.default, bool):
            return {"true": True, "false": False}.get(text)
        if isinstance(self.default, tuple):
            parts = tuple(x.strip() for x in text.split("+"))
            known = set(parts) <= set(self.words) and len(set(parts)) == len(parts)
            return parts if known else None
        if self.words:
            return text if text in self.words else None
        return self._number(text)

    def _number(self, text: str) -> Any:
        try:
            value = int(text) if isinstance(self.default, int) else float(text)
        except ValueError:
            return None
        if self.off and value == 0:
            return value
        # written so that NaN is outside
        within = value in self.numbers if self.numbers else self.low <= value <= self.high
        return value if within else None

    def spelled(self, value: Any) -> str:
        """As `read` takes it."""
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return "+".join(value)
        return f"{value:.17g}" if isinstance(value, float) and float(f"{value:g}") != value else _short(value)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True)
class Kind:
    """What a step does, and its options."""

    help: str
    options: Mapping[str, Option]

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: option.default for name, option in self.options.items()}


YES, NO = Option(True), Option(False)
ALL_PAIRS, NORM_PAIRS, REORDERED = ("qkv", "o", "gate_up", "down"), ("qkv", "gate_up"), ("o", "down")
DAMP = Option(0.01, 1e-6, 0.999)
EXPONENT = Option(0.5)
# the published constants are 0.0096 and 0.015; beyond these ends norms leave what 16 bits hold
COLUMN, NO_COLUMN = (Option(d, 1e-5, 10.0, auto=True, off=True) for d in (AUTO, 0.0))
KEYS = Option(8.0, 0.1, 1000.0)
GLOBAL = {
    "rotate": Kind(
        "turns the residual stream and the values of every head by Hadamard matrices (QuaRot)",
        {"residual": YES, "heads": YES, "signs": YES},
    ),
}
FOLDS = {
    "smooth": Kind(
        "moves range from activations into weights: max|x|^alpha / max|W|^beta (SmoothQuant); beta auto: 1 - alpha",
        {"alpha": EXPONENT, "beta": Option(AUTO, auto=True), "pairs": Option(NORM_PAIRS, words=ALL_PAIRS)},
    ),
    "awq": Kind(
        "the scale of a family that quantizes best, searched (AWQ); rows: activations are rounded too",
        {
            "kind": Option("duo", words=("plain", "duo", "smooth")),
            "grid": Option(20, 1, 1000),
            "pairs": Option(ALL_PAIRS, words=ALL_PAIRS),
            "rows": NO,
        },
    ),
    "smooth_attention": Kind(
        "tames keys for a 4-bit cache: max|k|^alpha, auto searches alpha for each head (QoQ)",
        {"alpha": Option(0.5, auto=True)},
    ),
    "equalize": Kind(
        "columns to one mean magnitude (FireQ); a constant for each pair, auto: their geometric mean, 0: not this pair",
        {
            "qkv": NO_COLUMN,
            "o": NO_COLUMN,
            "gate_up": COLUMN,
            "down": COLUMN,
            "kind": Option("mean", words=("mean", "max")),
        },
    ),
    "scale_values": Kind(
        "values times a factor that the output projection takes back (FireQ)",
        {"factor": Option(0.9, 0.01, 100.0)},
    ),
    "scale_keys": Kind(
        "keys to alpha before RoPE, folded, and the top_k largest channels to beta after it, at run time (FireQ)",
        {"alpha": KEYS, "beta": KEYS, "top_k": Option(8, 0, 1024)},
    ),
    "reorder": Kind(
        "inputs of like size become neighbours (QoQ)", {"pairs": Option(REORDERED, words=REORDERED)}
    ),
}
ROUNDING = {
    "grid": Kind(
        "how scales are made: divisor of symmetric int4 (auto 7.5); e4m3: FireQ's scales; multiples: offsets of "
        "progressive weights are multiples of the step",
        {"divisor": Option(AUTO, numbers=(7.0, 7.5, 8.0), auto=True), "e4m3": NO, "multiples": NO},
    ),
    "match": Kind(
        "weights make up for what rounding before them did to their inputs (GPTAQ)",
        {"damp": DAMP, "strength": Option(1.0)},
    ),
    "clip": Kind(
        "searches how far each group reaches; measure: error of the weight, or of the outputs (diagonal, output); sides: "
        "then each end by itself, which needs zero points",
        {
            "measure": Option("diagonal", words=("weight", "diagonal", "output")),
            "points": Option(40, 1, 1000),
            "least": Option(0.5, 0.01, 1.0),
            "sides": NO,
        },
    ),
    "gptq": Kind(
        "rounds column by column, each allowing for the errors before it", {"damp": DAMP, "actorder": NO}
    ),
    "refine": Kind(
        "sweeps over codes and scales, each to its best with the rest fixed",
        {"sweeps": Option(2, 1, 100), "scales": YES, "damp": DAMP},
    ),
}
STEPS = GLOBAL | FOLDS | ROUNDING
BLIND_FOLDS = ("equalize", "scale_values")  # they look at weights alone


def described() -> str:
    """Every step with its options, what each may be and what it is when not given."""
    lines = []
    for name, kind in STEPS.items():
        lines.append(f"  {name}: {kind.help}")
        lines += [f"      {key}={o.spelled(o.default)}: {o.choices()}" for key, o in kind.options.items()]
    return "\n".join(lines)
