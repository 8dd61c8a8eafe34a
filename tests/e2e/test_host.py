"""A worker's lives, watched from inside the agent with little patience."""

import asyncio
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from minserve.agent import open_pool, pool_bytes, reclaimer
from minserve.config import Config
from minserve.host import Host, Patience
from minserve.resolve import resolve_model
from minserve.sampling import SamplingParams
from minserve.wire import Start, Submit, TokenEvent
from tests.e2e.oracle import BOOT, HANG, SLOW
from tests.e2e.running import write_model

HASTY = Patience(ping_s=0.05, stalled_s=0.4, kill_s=1.5, stop_s=0.5, back_off_s=0.01)


class Ears:
    """A sink that remembers what it was told."""

    def __init__(self) -> None:
        self.tokens = 0
        self.end: str | None = None

    def token(self, event: TokenEvent) -> None:
        self.tokens += len(event.token_ids)
        self.end = event.finish_reason or self.end

    def refused(self, error: str) -> None:
        self.end = error

    def lost(self, error: str) -> None:
        self.end = error


def live(
    folder: Path, name: str, story: Callable[[Host], Awaitable[None]], patience: Patience = HASTY
) -> Host:
    """Runs `story` beside a host's life, then stops it; the pool must be whole and empty afterwards."""
    config = Config.single(write_model(folder), name=name, gpu={"device": "cpu", "pool_bytes": 64 << 20})
    resolved = resolve_model(config.models[0], "cpu")
    pool = open_pool(config.gpus[0], "cpu", [resolved], pool_bytes(config.gpus[0], "cpu", [resolved]))
    start = Start(dataclasses.asdict(config.models[0]), "cpu", 0, pool.table.fd, pool.fds)

    async def run() -> Host:
        host = Host(name, start, BOOT, reclaimer(pool.table, 0), patience)
        life = asyncio.create_task(host.run())
        async with asyncio.timeout(40):
            await host.first_load.wait()
            await story(host)
            await host.stop(life)
        return host

    host = asyncio.run(run())
    pool.table.check()
    assert pool.table.counts().leased == 0
    pool.close()
    assert host.num_requests == 0
    return host


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def ask(host: Host, rid: int, first: int = 1) -> Ears:
    ears = Ears()
    host.submit(Submit(rid, (first, 2), SamplingParams(max_tokens=20)), ears)
    return ears


def test_a_stopped_worker_is_stalled_until_it_goes_on(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        assert host.pid is not None
        os.kill(host.pid, signal.SIGSTOP)
        ears = ask(host, 1)
        await until(lambda: host.stalled)
        os.kill(host.pid, signal.SIGCONT)
        await until(lambda: ears.end == "length" and not host.stalled)
        assert host.restarts == 0

    live(tmp_path, "a", story, dataclasses.replace(HASTY, kill_s=60))


@pytest.mark.parametrize("stop", [True, False])
def test_a_worker_that_stays_silent_is_killed_and_comes_back(tmp_path: Path, stop: bool) -> None:
    async def story(host: Host) -> None:
        pid = host.pid
        assert pid is not None
        if stop:
            os.kill(pid, signal.SIGSTOP)
        ears = ask(host, 1, HANG)
        await until(lambda: ears.end is not None)
        assert "SIGKILL" in str(ears.end)
        await until(lambda: host.state == "ready" and host.pid != pid)
        assert host.restarts == 1
        again = ask(host, 2)
        await until(lambda: again.end == "length")

    live(tmp_path, "a", story)


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_leak_nothing(tmp_path: Path, kills: int) -> None:
    async def story(host: Host) -> None:
        for i in range(kills):
            await until(lambda: host.state == "ready")
            ears = [ask(host, 10 * i + k, SLOW) for k in range(3)]
            await until(lambda ears=ears: any(e.tokens for e in ears))
            assert host.pid is not None
            os.kill(host.pid, signal.SIGKILL)
            await until(lambda ears=ears: all(e.end for e in ears))

    assert live(tmp_path, "a", story).restarts >= kills - 1


def test_a_worker_that_cannot_live_is_given_up(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        assert host.state == "failed"
        assert "died 5 times and answered nothing" in host.reason

    live(tmp_path, "dies", story)


def test_a_machine_without_room_for_a_process_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def spawn(self: Host, theirs: Any, real: Any = Host._spawn) -> Any:
        tries.append(self.restarts)
        if len(tries) < 3:
            raise BlockingIOError("Resource temporarily unavailable")
        return real(self, theirs)

    async def story(host: Host) -> None:
        assert host.state == "ready"

    monkeypatch.setattr(Host, "_spawn", spawn)
    live(tmp_path, "unlucky", story)
    assert tries == [0, 1, 2]


def test_a_model_that_cannot_be_loaded_is_not_tried_again(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        assert (host.state, host.reason, host.restarts) == (
            "failed",
            "tensor model.norm.weight is missing",
            0,
        )

    live(tmp_path, "refuses", story)


def test_stopping_between_two_lives(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        assert host.pid is not None
        host._deaths.append(asyncio.get_running_loop().time())
        os.kill(host.pid, signal.SIGKILL)
        await until(lambda: host.state == "loading")

    live(tmp_path, "a", story, dataclasses.replace(HASTY, back_off_s=30))


def test_aborted_requests_hear_nothing_more(tmp_path: Path) -> None:
    async def story(host: Host) -> None:
        ears = ask(host, 1, SLOW)
        await until(lambda: ears.tokens > 0)
        host.abort(1)
        host.abort(1)
        host.abort(99)
        heard = ears.tokens
        other = ask(host, 2)
        await until(lambda: other.end == "length")
        assert (ears.tokens, ears.end) == (heard, None)

    live(tmp_path, "a", story)
