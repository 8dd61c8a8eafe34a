"""Step-time models in files: a table in FineServe's form, and what `python -m bench.profile_steps` fits to one.

The JSON file holds, by model, the coefficients of a StepCost with the error it was judged at, and how much models that
share the device slow each other down, by phase.
"""

import csv
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sched.arrivals import MOST_TOKENS
from sched.latency import COEFFICIENTS, StepCost
from sched.slowdown import PHASES, Slowdown
from sched.step_time import Fitted, Point, decode_point, fit, prefill_point

COLUMNS = (
    "model",
    "qformat",
    "tp",
    "mps_percentage",
    "batch_size",
    "input_len",
    "output_len",
    "seq_len",
    "prefill_time",
    "decode_time",
    "ttft",
    "tpot",
    "e2e",
)
LEAST_S, MOST_S = 1e-9, 3600.0  # of a step
NEEDED = (*COLUMNS[:7], "prefill_time", "tpot")


class Measured(NamedTuple):
    """A row of the table: a batch whose prompts took `prefill_s`, and whose answers `tpot_s` a token.  `key` is
    (model, format, tensor parallelism, per cent of the SMs)."""

    key: tuple[str, str, str, str]
    batch: int
    input_tokens: int
    output_tokens: int
    prefill_s: float
    tpot_s: float


def write_costs(path: str | Path, rows: Iterable[Measured]) -> None:
    """The table; TTFT is that of the last prompt of the batch, all of which are computed first."""
    with Path(path).open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(COLUMNS)
        for row in rows:
            decode_s = row.tpot_s * (row.output_tokens - 1)
            times = (row.prefill_s, decode_s, row.prefill_s, row.tpot_s, row.prefill_s + decode_s)
            length = row.input_tokens + row.output_tokens
            sizes = (row.batch, row.input_tokens, row.output_tokens, length)
            writer.writerow((*row.key, *sizes, *(f"{s:.9g}" for s in times)))


def read_costs(path: str) -> dict[str, Fitted]:
    """Step-time models of the table, by `model/format/tp/per cent`.  ValueError names the file, the row, counted from 1
    behind the head, and what is wrong with it."""
    points: dict[str, list[Point]] = defaultdict(list)
    try:
        with Path(path).open(newline="") as lines:
            reader = csv.DictReader(lines)
            missing = set(NEEDED) - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"--costs {path!r} lacks the columns {', '.join(sorted(missing))}")
            for i, row in enumerate(reader, 1):
                try:
                    read = _measured(row)
                except ValueError as error:
                    raise ValueError(f"--costs {path!r}: row {i}: {error}") from None
                of = points["/".join(read.key)]
                of.append(prefill_point(read.batch, read.input_tokens, read.prefill_s))
                of.append(decode_point(read.batch, read.input_tokens, read.output_tokens, read.tpot_s))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--costs {path!r} cannot be read: {error}") from error
    if not points:
        raise ValueError(f"--costs {path!r} must have a row behind its head, got none")
    return {key: fit(of) for key, of in points.items()}


def _measured(row: Mapping[str, str | None]) -> Measured:
    def count(name: str, most: int) -> int:
        value = row[name] or ""
        if not (value.strip().isdecimal() and len(value) < 20 and 1 <= int(value) <= most):
            raise ValueError(f"{name} must be an integer in [1, {most}], got {row[name]!r:.60}")
        return int(value)

    def seconds(name: str) -> float:
        try:
            found = float(row[name] or "")
        except ValueError:
            found = 0.0
        if not LEAST_S <= found <= MOST_S:
            raise ValueError(f"{name} must be seconds in [{LEAST_S:g}, {MOST_S:g}], got {row[name]!r:.60}")
        return found

    if not row["model"] or row["qformat"] is None:
        raise ValueError(f"model must be a name and qformat a text, got {row['model']!r:.60}")
    tp, per_cent = count("tp", 1024), count("mps_percentage", 100)
    sizes = count("batch_size", 1 << 16), count("input_len", MOST_TOKENS), count("output_len", MOST_TOKENS)
    key = (row["model"], row["qformat"], str(tp), str(per_cent))
    return Measured(key, *sizes, seconds("prefill_time"), seconds("tpot"))


@dataclass(frozen=True, slots=True)
class Profile:
    """`models`: by name, a cost and the mean error of steps that its fit has not seen.  `about`: of where and when."""

    models: Mapping[str, Fitted]
    slowdown: Slowdown
    about: Mapping[str, Any]

    def cost_of(self, name: str) -> Fitted:
        """The model's, or the only one.  ValueError where there are others only."""
        if name in self.models:
            return self.models[name]
        if len(self.models) == 1:
            return next(iter(self.models.values()))
        raise ValueError(f"the profile has no model {name!r}; it has {', '.join(sorted(self.models))}")

    def write(self, path: str | Path) -> None:
        models = {
            name: {"cost": dataclasses.asdict(fitted.cost), "error": fitted.error}
            for name, fitted in self.models.items()
        }
        slow = {f"{own} beside {other}": s for (own, other), s in sorted(self.slowdown.items())}
        Path(path).write_text(json.dumps({**self.about, "models": models, "slowdown": slow}, indent=1) + "\n")


def read_profile(path: str | Path) -> Profile:
    """ValueError says what is wrong with the file."""
    try:
        found = json.loads(Path(path).read_text())
        models = {str(name): _fitted(of) for name, of in found.pop("models").items()}
        slow = found.pop("slowdown", {})
        known = {f"{own} beside {other}": (own, other) for own in PHASES for other in PHASES}
        slowdown = {known[key]: float(value) for key, value in slow.items()}
        if not models or not all(0 <= s < float("inf") for s in slowdown.values()):
            raise ValueError("at least one model, and slow-downs >= 0")
    except OSError as error:
        raise ValueError(f"the profile {str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        says = "a JSON file of python -m bench.profile_steps"
        raise ValueError(f"the profile {str(path)!r} must be {says}: {error}") from None
    return Profile(models, slowdown, found)


def _fitted(of: Mapping[str, Any]) -> Fitted:
    cost = dict(of["cost"])
    rows = tuple((float(r), float(s)) for r, s in cost.pop("rows", ()))
    found = StepCost(**{name: float(s) for name, s in cost.items()}, rows=rows)
    for name, seconds in [(n, getattr(found, n)) for n in COEFFICIENTS] + [("rows", s) for _, s in rows]:
        if seconds > MOST_S:
            raise ValueError(f"{name} must be at most {MOST_S:g} s, got {seconds:g}")
    return Fitted(found, float(of["error"]))
