"""What was loaded and how it will be computed: a line for each group of layers, and for each layer in the debug log."""

import logging
from dataclasses import dataclass, field

from minserve.prepare import Ready

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ReportRow:
    """The linear layers of one scheme: how many, through which kernel, in how many bytes."""

    scheme: str
    kernel: str
    layers: int = 0
    weights: int = 0
    nbytes: int = 0
    note: str = ""
    arithmetic: str = ""

    def __str__(self) -> str:
        bits = 8 * self.nbytes / max(1, self.weights)
        text = f"{self.scheme}: {self.layers} layers, kernel {self.kernel}, {bits:.2f} bits per weight"
        text += f", {self.nbytes / 1e6:.1f} MB, {self.arithmetic}"
        return text + (f" ({self.note})" if self.note else "")


@dataclass(slots=True)
class LoadReport:
    """For start-up to print and tests to read.  Fused projections are one layer; `notes` are about no layer.

    `peak_bytes`: the most host memory that this process had by the end of the load, its libraries and mapped files too.
    """

    rows: dict[tuple[str, ...], ReportRow] = field(default_factory=dict)
    other_bytes: int = 0
    derived: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.other_bytes + sum(row.nbytes for row in self.rows.values())

    def book(self, name: str, scheme: str, ready: Ready) -> None:
        """Counts one prepared layer, and says it in the debug log."""
        key = (scheme, ready.kernel, ready.arithmetic, ready.note)
        row = self.rows.setdefault(
            key, ReportRow(scheme, ready.kernel, note=ready.note, arithmetic=ready.arithmetic)
        )
        row.layers += 1
        row.weights += (weights := ready.part.in_features * ready.part.out_features)
        row.nbytes += (size := ready.part.nbytes)
        log.debug(
            "%s: %s, kernel %s, %s, %.2f bits per weight, %d bytes%s",
            name, scheme, ready.kernel, ready.arithmetic, 8 * size / max(1, weights), size, f" ({ready.note})" * bool(ready.note),
        )  # fmt: skip

    def remark(self, note: str) -> None:
        """Says something once, however many layers it is true of."""
        if note not in self.notes:
            self.notes.append(note)

    def lines(self) -> list[str]:
        other = f"embeddings and norms: {self.other_bytes / 1e6:.1f} MB"
        peak = f"host memory: at most {self.peak_bytes / 1e6:.1f} MB of this process by the end of the load"
        return [*map(str, self.rows.values()), other, peak, *self.notes]
