"""The comparison: what was measured several times, and what the simulator says of the same requests.

An error is |simulated / measured - 1| of the median of the repeats; the spread is the repeats' largest less their
smallest, over that median.  A figure passes with an error of at most `limit` or SPREAD times its spread, an attainment
with a difference of at most `points`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

SPREAD = 1.5
FIGURES = ("p50_ttft_ms", "p90_ttft_ms", "p50_tpot_ms", "p90_tpot_ms")


@dataclass(frozen=True, slots=True)
class Gate:
    limit: float
    points: float
    repeats: int = 3
    cells: int = 12


GATES = {"cpu": Gate(0.15, 4.0), "cuda": Gate(0.10, 3.0)}


class Verdict(NamedTuple):
    """Of one figure in one cell.  Attainment in per cent, its error and spread in points."""

    figure: str
    measured: float
    simulated: float
    error: float
    spread: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def judge(measured: Sequence[Mapping[str, Any]], simulated: Mapping[str, Any], gate: Gate) -> list[Verdict]:
    """One cell: the summaries of its repeats and of the simulation.  ValueError where a figure is missing."""
    verdicts = []
    for figure in FIGURES:
        values, said = [m[figure] for m in measured], simulated[figure]
        if said is None or None in values:
            raise ValueError(f"{figure} must be a number in every run, got {values} and {said} simulated")
        middle = median(values)
        spread = (max(values) - min(values)) / middle
        allowed = max(gate.limit, SPREAD * spread)
        verdicts.append(Verdict(figure, middle, said, abs(said / middle - 1), spread, allowed))
    shares = [100 * m["slo_attainment"] for m in measured]
    middle, said = median(shares), 100 * simulated["slo_attainment"]
    spread = max(shares) - min(shares)
    verdicts.append(Verdict("slo_attainment", middle, said, abs(said - middle), spread, gate.points))
    return verdicts


def verdict(cells: Mapping[str, Sequence[Verdict]], gate: Gate, repeats: int) -> tuple[bool, str]:
    """In all, and why."""
    failed = [name for name, found in cells.items() if not all(v.passed for v in found)]
    if len(cells) < gate.cells or repeats < gate.repeats:
        return (
            False,
            f"no verdict: {len(cells)} cells x {repeats}, {gate.cells} x {gate.repeats} are asked for",
        )
    if failed:
        return False, f"FAIL: {len(cells) - len(failed)} of {len(cells)} cells pass, not {', '.join(failed)}"
    return True, f"PASS: all of {len(cells)} cells, {repeats} repeats each"
