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

from sched.latency import StepCost
from sched.slowdown import PHASES, Slowdown
from sched.step_time import Fitted, decode_point, fit, prefill_point

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
    """Step-time models of the table, by `model/format/tp/per cent`.  ValueError says what is wrong with the file."""
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    try:
        with Path(path).open(newline="") as lines:
            reader = csv.DictReader(lines)
            missing = set(NEEDED) - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"--costs {path!r} lacks the columns {', '.join(sorted(missing))}")
            for row in reader:
                rows["/".join(row[name] for name in COLUMNS[:4])].append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--costs {path!r} cannot be read: {error}") from error
    found = {}
    for key, of in rows.items():
        points = []
        for row in of:
            try:
                batch, prompt, answer = (int(row[name]) for name in COLUMNS[4:7])
                points.append(prefill_point(batch, prompt, float(row["prefill_time"])))
                points.append(decode_point(batch, prompt, answer, float(row["tpot"])))
            except (TypeError, ValueError):
                raise ValueError(
                    f"--costs {path!r} has a row of {key} that holds no numbers: {row}"
                ) from None
        found[key] = fit(points)
    return found


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
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        says = "a JSON file of python -m bench.profile_steps"
        raise ValueError(f"the profile {str(path)!r} must be {says}: {error}") from None
    return Profile(models, slowdown, found)


def _fitted(of: Mapping[str, Any]) -> Fitted:
    cost = dict(of["cost"])
    rows = tuple((float(r), float(s)) for r, s in cost.pop("rows", ()))
    return Fitted(StepCost(**{name: float(s) for name, s in cost.items()}, rows=rows), float(of["error"]))
