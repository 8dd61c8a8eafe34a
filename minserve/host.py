"""One model's worker process as the agent sees it: spawned, watched, restarted, its slab sets reclaimed.

States: loading -> ready -> draining -> asleep -> loading (waking) -> ready, or -> unloaded; back to loading when the
process died, unloaded when it died in its sleep or on the way there, failed when it cannot be had.  Every request handed
over ends exactly once: by its last token, refused, aborted, or lost with the process.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from minserve.link import LineLog, Link
from minserve.wire import (
    Abort,
    Asleep,
    Awake,
    Loaded,
    LoadFailed,
    Ping,
    Pong,
    Refused,
    Sleep,
    Start,
    Stats,
    Stop,
    Submit,
    TokenEvent,
    Tokens,
    Told,
    Wake,
    encode,
)

log = logging.getLogger("minserve")

ROOT = Path(__file__).resolve().parent.parent
# ours from any working directory, and nothing else of it: the path is only there for the first import
BOOT = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import minserve; sys.path.pop(0); "
    "from minserve.worker import main; main()"
)
MAX_DEATHS, DEATHS_WITHIN_S = 5, 600.0


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds.  A silent worker is shown as stalled in /health, as one step of a big model on a slow CPU may well be;
    one that stays silent, or has requests and makes no step, is killed."""

    ping_s: float = 1.0
    stalled_s: float = 10.0
    kill_s: float = 300.0
    stop_s: float = 5.0
    back_off_s: float = 0.5


class WorkerLost(RuntimeError):
    """The process ended before it had done what it was asked for."""


class WakeRefused(RuntimeError):
    """The worker could not wake, and is asleep as before."""


class Sink(Protocol):
    """Who waits for the tokens of one sequence."""

    def token(self, event: TokenEvent) -> None: ...
    def refused(self, error: str) -> None: ...
    def lost(self, error: str) -> None: ...


class Host:
    """Keeps one model's worker alive until `stop`.  All methods belong to the event loop's thread."""

    def __init__(
        self,
        name: str,
        start: Start,
        boot: str,
        reclaim: Callable[[], Awaitable[int]],
        patience: Patience | None = None,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """`environ`: of the worker's process, over our own."""
        self.name, self._start, self._boot, self._reclaim = name, start, boot, reclaim
        self._patience = patience or Patience()
        self._environ = dict(environ or {})
        self.state = "loading"
        self.reason = ""
        self.loaded: Loaded | None = None
        self.stats = Stats()
        self.restarts = 0
        self.first_load = asyncio.Event()  # set once the first life is ready or has failed
        self._sinks: dict[int, Sink] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._deaths: deque[float] = deque()
        self._answered = self._was_loaded = False
        self._asked: asyncio.Future[str] | None = None  # to sleep or to wake
        self._pinged_s = self._pong_s = self._moved_s = 0.0
        self._stopping = asyncio.Event()

    @classmethod
    def failed(cls, name: str, reason: str) -> "Host":
        """One that cannot even be started."""

        async def nothing() -> int:
            return 0

        host = cls(name, Start({}, "", 0, -1, ()), "", nothing)
        host._fail(reason)
        return host

    @property
    def num_requests(self) -> int:
        return len(self._sinks)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def stalled(self) -> bool:
        return self.state == "ready" and self._silent_s() > self._patience.stalled_s

    def _silent_s(self) -> float:
        """Since when a ping waits for its answer."""
        return time.monotonic() - self._pinged_s if self._pong_s < self._pinged_s else 0.0

    def submit(self, request: Submit, sink: Sink) -> None:
        """From here on `sink` is told how the request ends.  Only in state ready."""
        assert self.state == "ready", f"{self.name} is {self.state}"
        if not self._sinks:
            self._moved_s = time.monotonic()
        self._sinks[request.rid] = sink
        self._send(request)

    def abort(self, rid: int) -> None:
        """Forgets the request; nothing is told to its sink any more.  Known or not."""
        if self._sinks.pop(rid, None) is not None:
            self._send(Abort(rid))

    def drop(self, reason: str) -> None:
        """Ends all requests now."""
        sinks, self._sinks = self._sinks, {}
        for rid, sink in sinks.items():
            self._send(Abort(rid))
            sink.lost(reason)

    def park(self, reason: str = "") -> None:
        """There is no process, and there is to be none until `run` is called again."""
        self.state, self.reason, self.stats = "unloaded", reason, Stats()
        self.first_load.set()

    def begin(self) -> None:
        """Before it runs again, after it was parked or has failed."""
        self.state, self.reason = "loading", ""
        self._deaths.clear()
        self._stopping.clear()
        self._was_loaded = False

    async def run(self) -> None:
        """Lives of the worker, one after the other, until stopped, failed, or dead while nobody needs it."""
        while not self._stopping.is_set():
            await self._live()
            if self._stopping.is_set() or self.state in ("failed", "unloaded"):
                break
            pause_s = self._after_death()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_s)
        self.first_load.set()

    def _after_death(self) -> float:
        """Seconds to wait before the next life; too many lives that answered nothing end in state failed."""
        now = time.monotonic()
        if self._answered:
            self._deaths.clear()
        self._deaths.append(now)
        while now - self._deaths[0] > DEATHS_WITHIN_S:
            self._deaths.popleft()
        if len(self._deaths) >= MAX_DEATHS:
            self._fail(f"the worker died {len(self._deaths)} times and answered nothing in between")
            self._stopping.set()
            return 0.0
        self.restarts += 1
        # the first one comes back at once
        return min(30.0, self._patience.back_off_s * float(2 ** (len(self._deaths) - 1) - 1))

    def _fail(self, reason: str) -> None:
        self.state, self.reason = "failed", reason
        log.error("[%s] failed: %s", self.name, reason)
        self.first_load.set()

    async def _live(self) -> None:
        """One process from spawn to waitpid; afterwards it owns nothing and nobody waits for it."""
        self.state, self.reason, self.loaded, self.stats = "loading", "", None, Stats()
        self._pinged_s = self._pong_s = 0.0
        self._answered = False
        ours, theirs = socket.socketpair()
        try:
            self._process = process = self._spawn(theirs)
        except OSError as error:
            ours.close()
            self.reason = f"no process could be started: {error}"
            log.error("[%s] %s", self.name, self.reason)
            return
        finally:
            theirs.close()
        loop = asyncio.get_running_loop()
        exited = asyncio.Event()
        pidfd = os.pidfd_open(process.pid)
        loop.add_reader(pidfd, exited.set)
        _, self._link = await loop.create_unix_connection(lambda: Link(self._take, ours.dup()), sock=ours)
        self._send(self._start)
        assert process.stderr is not None
        await loop.connect_read_pipe(lambda: LineLog(self.name), process.stderr)
        watch = asyncio.create_task(self._watch())
        await exited.wait()
        watch.cancel()
        loop.remove_reader(pidfd)
        os.close(pidfd)
        await self._bury(process)

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                self._boot,
                "worker",
                self.name,
                str(theirs.fileno()),
                str(os.getpid()),
            ],
            pass_fds=[theirs.fileno(), self._start.table_fd, *(fd for fd in self._start.pool_fds if fd >= 0)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # threads of several models spinning on the same cores made a step 10 times slower (docs/log.md)
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **self._environ},
            start_new_session=True,  # Ctrl-C is the agent's to handle
        )

    async def _bury(self, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()  # it has exited: this only collects it
        assert self._link is not None
        self._process = None
        try:
            # tokens that it sent before it died are still in the socket
            await asyncio.wait_for(self._link.closed.wait(), 2.0)
        except TimeoutError:
            self._link.hang_up()
        why = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if self.state in ("draining", "asleep"):
            self.park(f"its worker ended ({why}) while it was {self.state}")
        elif self.state == "ready":
            self.state = "loading"
        lost = len(self._sinks)
        self.drop(f"The worker of model {self.name} ended ({why}).")
        slabs = await self._reclaim()
        if self._asked is not None and not self._asked.done():
            self._asked.set_exception(WorkerLost(f"the worker of {self.name} ended ({why})"))
        if not self._stopping.is_set():
            log.warning("[%s] worker %d ended: %s; %d requests lost, %d slabs reclaimed",
                        self.name, process.pid, why, lost, slabs)  # fmt: skip

    async def _watch(self) -> None:
        """Pings, and kills a worker that has stopped working: it is then restarted."""
        seq = 0
        while True:
            await asyncio.sleep(self._patience.ping_s)
            if self.state not in ("ready", "draining", "asleep"):
                continue
            now = time.monotonic()
            if self._pong_s >= self._pinged_s:
                seq, self._pinged_s = seq + 1, now
                self._send(Ping(seq))
            idle_s = max(self._silent_s(), now - self._moved_s if self._sinks else 0.0)
            if idle_s > self._patience.kill_s:
                log.error("[%s] no progress for %.0f s: killing worker %s", self.name, idle_s, self.pid)
                self.kill()

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _take(self, message: Told) -> None:
        if isinstance(message, Tokens):
            self._moved_s, self._answered = time.monotonic(), True
            for event in message.events:
                ended = event.finish_reason is not None
                sink = self._sinks.pop(event.rid, None) if ended else self._sinks.get(event.rid)
                if sink is not None:
                    sink.token(event)
        elif isinstance(message, Pong):
            self._pong_s = time.monotonic()
            if message.stats.steps != self.stats.steps:
                self._moved_s = self._pong_s
            self.stats = message.stats
        elif isinstance(message, Refused):
            sink = self._sinks.pop(message.rid, None)
            if sink is not None:
                sink.refused(message.error)
        else:
            self._moved(message)

    def _moved(self, message: Loaded | LoadFailed | Asleep | Awake) -> None:
        if isinstance(message, Loaded):
            self.loaded, self.state = message, "draining" if self._stopping.is_set() else "ready"
            self._was_loaded = True
            for line in message.report:
                log.info("[%s] %s", self.name, line)
            self.first_load.set()
        elif isinstance(message, LoadFailed):
            self._load_failed(message.error)
        elif isinstance(message, Asleep):
            self.state = "asleep"
            self._answer(message.report)
        else:
            self.state, self.reason = "asleep" if message.error else "ready", ""
            self._answer(WakeRefused(message.error) if message.error else message.report)

    def _answer(self, found: str | WakeRefused) -> None:
        assert self._asked is not None, f"{self.name} answers what nobody asked"
        log.info("[%s] %s", self.name, found)
        if self._asked.done():
            return  # whoever asked is gone
        if isinstance(found, str):
            self._asked.set_result(found)
        else:
            self._asked.set_exception(found)

    def sleep(self, level: int) -> "asyncio.Future[str]":
        """Asks a worker without requests, in state draining; WorkerLost where it dies over it."""
        assert (self.state, self.num_requests) == ("draining", 0), f"{self.name} is {self.state}"
        return self._ask_for(Sleep(level))

    def wake(self) -> "asyncio.Future[str]":
        """WakeRefused: it is asleep as before.  WorkerLost: it is loading anew, as after any death."""
        assert self.state == "asleep", f"{self.name} is {self.state}"
        self.state, self.reason = "loading", "waking up"
        return self._ask_for(Wake())

    def _ask_for(self, message: Sleep | Wake) -> "asyncio.Future[str]":
        self._asked = asyncio.get_running_loop().create_future()
        self._asked.add_done_callback(lambda f: f.cancelled() or f.exception())  # whoever asked may be gone
        self._send(message)
        return self._asked

    def _load_failed(self, error: str) -> None:
        if not self._was_loaded:
            self._fail(error)
        else:
            # it could be loaded before: something passing, perhaps memory
            self.reason = error
            log.error("[%s] did not load again: %s", self.name, error)

    def _send(self, message: Submit | Abort | Ping | Sleep | Wake | Stop | Start) -> None:
        # a dead worker's socket swallows it: the requests are lost at its burial
        transport = None if self._link is None else self._link.transport
        if transport is not None and not transport.is_closing():
            transport.write(encode(message))

    async def stop(self, life: "asyncio.Task[None]") -> None:
        """Asks the worker to end, then makes it; returns when it has been buried."""
        self._stopping.set()
        # who loads or wakes does not listen
        ask_s = 0.0 if self.state == "loading" else self._patience.stop_s
        if self.state == "ready":
            self.state = "draining"
        ways = ((self._ask, ask_s), (self._terminate, 1.0), (self.kill, 30.0))
        for make, wait_s in ways:
            if not life.done():
                make()
                await asyncio.wait([life], timeout=wait_s)
        assert life.done(), f"worker {self.pid} survived SIGKILL"

    def _ask(self) -> None:
        self._send(Stop())

    def _terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()
