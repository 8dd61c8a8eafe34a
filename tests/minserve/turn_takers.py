"""Processes that take turns with the prefill token of a slab table, without engine or tensors.

    python -m tests.minserve.turn_takers TABLE_FD LOG_FD NAME STEP_MS CHUNK_MS PROMPTS

A process is what a worker is: it asks before each plan, its steps are sleeps, and it says in its row that it lives.
Chunks are written to the log as lines `NAME begin end` (ns), decodes as `NAME decode ns`; each line is one write.
"""

import os
import sys
import time

from minserve.prefill_token import PrefillToken
from minserve.slab_table import SlabTable

FOREVER = -1


class Taker:
    """`prompts` chunks to compute, FOREVER; a step without a chunk takes `step_ms`, one with it `chunk_ms`."""

    def __init__(self, table_fd: int, name: str, prompts: int) -> None:
        self.table, self.left = SlabTable.attach(table_fd), prompts
        self.owner = self.table.owner_of(name)
        self.token = PrefillToken(self.table, self.owner, lambda: self.left != 0, lambda: float("inf"))

    def step(self, step_s: float, chunk_s: float) -> tuple[int, int] | None:
        cap = self.token.cap()
        tokens = 256 if self.left and cap != 0 else 0
        self.token.planned(tokens, True)
        begin = time.monotonic_ns()
        time.sleep(chunk_s if tokens else step_s)
        end = time.monotonic_ns()
        self.token.landed()
        seconds = (end - begin) / 1e3
        self.table.publish(self.owner, heartbeat_ns=time.monotonic_ns(), step_us=int(seconds))
        self.left -= bool(tokens) and self.left > 0
        return (begin, end) if tokens else None


def main() -> None:
    table_fd, log_fd = int(sys.argv[1]), int(sys.argv[2])
    name, step_s, chunk_s = sys.argv[3], float(sys.argv[4]) / 1e3, float(sys.argv[5]) / 1e3
    taker = Taker(table_fd, name, int(sys.argv[6]))
    while taker.left:
        chunk = taker.step(step_s, chunk_s)
        line = f"{name} {chunk[0]} {chunk[1]}" if chunk else f"{name} decode {time.monotonic_ns()}"
        os.write(log_fd, line.encode() + b"\n")
    taker.token.idle()


if __name__ == "__main__":
    main()
