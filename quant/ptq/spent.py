"""What a run has cost in seconds and memory, over all its legs: one that was killed and went on has several.

Memory is the most that the process has held above what it held at the start, pages of mapped files included.  The kernel
keeps that mark (VmHWM), and it can be set back; what ran in the process before, or in its parent, is then not in it.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # see proc(5)


def status_bytes(key: str) -> int | None:
    """VmRSS or VmHWM of this process; None where the system does not say."""
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


class Spent:
    """Starts with the run.  `seconds` by what they went to; `told` is what the next leg is to be given as `before`."""

    def __init__(self, memory: bool = False) -> None:
        """`memory`: the mark of the whole process is set back, and read later."""
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.legs, self.wall_before, self.peak_before = 1, 0.0, 0
        self.base: int | None = None
        if memory:
            with suppress(OSError):
                CLEAR.write_text(RESET_PEAK)
                self.base = status_bytes("VmRSS")

    def add_before(self, before: Mapping[str, Any]) -> None:
        """What the legs until now had spent."""
        for what, seconds in before["seconds"].items():
            self.seconds[what] = self.seconds.get(what, 0.0) + seconds
        self.legs += before["legs"]
        self.wall_before += before["wall"]
        self.peak_before = max(self.peak_before, before["peak"] or 0)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    @property
    def wall(self) -> float:
        """Seconds of all legs, up to their last finished layer where they were killed."""
        return self.wall_before + time.perf_counter() - self.started

    @property
    def peak_extra_bytes(self) -> int | None:
        """The most of any leg; None where the system does not say."""
        most = status_bytes("VmHWM")
        return None if most is None or self.base is None else max(most - self.base, self.peak_before)

    def told(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "legs": self.legs,
            "wall": self.wall,
            "peak": self.peak_extra_bytes,
        }
