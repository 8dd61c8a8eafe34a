"""One process of the contention that bench/slabs_paths.py measures: leases and returns on a slab table of others.

    python -m bench.slabs_contend TABLE_FD OWNER BEGIN SECONDS RATE CORE...

From the moment BEGIN of the monotonic clock, RATE of each a second, 0: without a pause.  Prints microseconds as JSON.
No torch: it would be loaded four times.
"""

import json
import os
import sys
import time
from collections.abc import Sequence

from minserve.slab_table import SlabTable

LAYERS = 32  # slabs of a set


def contend(table_fd: int, owner: int, begin: float, seconds: float, rate: float) -> dict[str, list[float]]:
    table = SlabTable.attach(table_fd)
    found: dict[str, list[float]] = {"lease": [], "return": []}
    time.sleep(max(0.0, begin - time.monotonic()))
    while time.monotonic() < begin + seconds:
        start = time.perf_counter_ns()
        lease = table.lease(owner, LAYERS)
        found["lease"].append((time.perf_counter_ns() - start) / 1e3)
        assert lease is not None, "the pool refused"
        if rate:
            time.sleep(0.5 / rate)
        start = time.perf_counter_ns()
        table.free(owner, lease)
        found["return"].append((time.perf_counter_ns() - start) / 1e3)
        if rate:
            time.sleep(0.5 / rate)
    return found


def main(argv: Sequence[str]) -> None:
    fd, owner, begin, seconds, rate, *cores = argv
    os.sched_setaffinity(0, {int(c) for c in cores})
    print(json.dumps(contend(int(fd), int(owner), float(begin), float(seconds), float(rate))))


if __name__ == "__main__":
    main(sys.argv[1:])
