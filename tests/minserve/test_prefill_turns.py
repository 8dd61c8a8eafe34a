"""Real processes that take turns with the prefill token: no two chunks at once, whoever is stopped or killed."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minserve.slab_table import SlabTable
from tests.minserve.small_table import PLAN

ROOT = Path(__file__).resolve().parents[2]


class Crew:
    """Takers of the same table, and what they did."""

    def __init__(self, tmp_path: Path) -> None:
        self.table, self.path = SlabTable.create(PLAN), tmp_path / "log"
        self.log = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_RDWR)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *, step_ms: float = 3, chunk_ms: float = 8, prompts: int = -1) -> int:
        arguments = [self.table.fd, self.log, name, step_ms, chunk_ms, prompts]
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "tests.minserve.turn_takers", *map(str, arguments)],
            cwd=ROOT,
            pass_fds=(self.table.fd, self.log),
        )
        return self.processes[name].pid

    def chunks(self) -> list[tuple[str, int, int]]:
        rows = [line.split() for line in self.path.read_text().splitlines()]
        return sorted(
            ((n, int(b), int(e)) for n, b, e in (r for r in rows if r[1] != "decode")), key=lambda c: c[1]
        )

    def count(self, name: str) -> int:
        return sum(c[0] == name for c in self.chunks())

    def decodes(self, name: str) -> int:
        return self.path.read_text().count(f"{name} decode")

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end, self.path.read_text()[-2000:]
            time.sleep(0.02)

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        os.close(self.log)
        self.table.close()


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(tmp_path)
    yield crew
    crew.close()


def overlaps(chunks: list[tuple[str, int, int]]) -> list[tuple[str, str]]:
    return [(a[0], b[0]) for a, b in itertools.pairwise(chunks) if b[1] < a[2] and a[0] != b[0]]


def test_processes_take_turns_through_kill_and_stop(crew: Crew) -> None:
    """Three processes at once: no two chunks overlap, each gets its part; then the holder is stopped, then killed."""
    pids = {name: crew.start(name) for name in PLAN.models}
    crew.until(lambda: min(crew.count(name) for name in pids) >= 20)
    before = crew.chunks()
    assert overlaps(before) == []
    together = before[max(next(i for i, c in enumerate(before) if c[0] == name) for name in pids) :]
    shares = [sum(c[0] == name for c in together) / len(together) for name in pids]
    assert min(shares) > 0.15, shares
    assert all(crew.decodes(name) > 0 for name in pids), "who waits decodes meanwhile"
    # stopped: the others go on within the lease, and so do their decodes
    os.kill(pids["deep"], signal.SIGSTOP)
    counts = {name: crew.count(name) for name in pids}
    decodes = crew.decodes("wide")
    crew.until(lambda: min(crew.count(name) - counts[name] for name in ("wide", "poor")) >= 10)
    assert crew.decodes("wide") > decodes
    os.kill(pids["deep"], signal.SIGCONT)
    counts["deep"] = crew.count("deep")
    crew.until(lambda: crew.count("deep") - counts["deep"] >= 5)
    # killed and buried: free at once
    os.kill(pids["wide"], signal.SIGKILL)
    crew.processes["wide"].wait()
    crew.table.reclaim(crew.table.owner_of("wide"))
    counts = {name: crew.count(name) for name in pids}
    crew.until(lambda: min(crew.count(name) - counts[name] for name in ("deep", "poor")) >= 5)


def test_killed_again_and_again_the_token_is_never_lost(crew: Crew) -> None:
    """Workers killed at random moments, holding or not: the one that stays computes prompts after each."""
    rng = random.Random(3)
    crew.start("deep")
    for _ in range(6):
        crew.start("wide", step_ms=0.2, chunk_ms=1)
        crew.until(lambda: crew.count("wide") > 0)
        time.sleep(rng.random() * 0.05)
        crew.processes["wide"].kill()
        crew.processes["wide"].wait()
        crew.table.reclaim(crew.table.owner_of("wide"))
        count = crew.count("deep")
        crew.until(lambda count=count: crew.count("deep") >= count + 2)
        os.ftruncate(crew.log, 0)
