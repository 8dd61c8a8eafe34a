"""Finds the process that was stopped (SIGSTOP) inside a shared table's lock: all others would stand still with it.

The kernel knows who holds a flock (/proc/locks), so nothing is written on the way in or out.  No torch.
"""

import os
import threading
from pathlib import Path

from minserve.shared_memory import SharedLock, reopen_memfd

# a holder needs microseconds: one that has not let go for so long is not at work
HELD_S = 0.2


class LockWatch:
    """Looks with a description of its own: no thread of this process is in its way."""

    def __init__(self, fd: int, held_s: float = HELD_S) -> None:
        """`fd`: of the table, which stays the caller's."""
        self._fd, _ = reopen_memfd(fd, "slab table")
        self._lock = SharedLock(self._fd, held_s)
        self._looking, self._closed = threading.Lock(), False

    def stopped_holder(self) -> int | None:
        """The pid of a stopped process that has held the lock for `held_s`, as long as this call then takes; else None."""
        with self._looking:
            if self._closed:
                return None
            try:
                with self._lock:
                    return None
            except TimeoutError:
                pid = holder_of(self._fd)
                return pid if pid is not None and is_stopped(pid) else None

    def close(self) -> None:
        """Waits for a look under way in another thread."""
        with self._looking:
            self._closed = True
            os.close(self._fd)


def holder_of(fd: int) -> int | None:
    """The process that holds the flock of this file."""
    found = os.fstat(fd)
    file = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        # "1: FLOCK  ADVISORY  WRITE 24551 00:01:2646739 0 EOF"; those that wait have an arrow before FLOCK
        words = line.split()
        if words[1] == "FLOCK" and words[5] == file:
            return int(words[4])
    return None


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False  # it has ended
    # the name before may hold anything, parentheses too
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
