"""A worker's life: it starts, opens an engine, and loops: messages in, one turn of the engine, tokens out.

It sleeps on its socket while the engine is idle, and looks at it once a step while it is not.  Whose engine it is does
not matter here; no torch.
"""

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from minserve.wire import (
    Abort,
    Asleep,
    Awake,
    Channel,
    Loaded,
    LoadFailed,
    Ping,
    Pong,
    Refused,
    Segment,
    SegmentDone,
    Sleep,
    Start,
    Stats,
    Stop,
    Submit,
    TokenEvent,
    Tokens,
    ToWorker,
    Wake,
    WireError,
)

WAIT_FOR_BLOCKS_S = 0.002
# new objects after which Python looks for cycles: its own 700 hold up one plan in thirty, by 0.3 to 4 ms
COLLECT_AFTER = 10_000
PR_SET_PDEATHSIG = 1
# of files, of memory, of a device: they are told, what else is raised is a crash
REFUSALS = (ValueError, OSError, RuntimeError, MemoryError)


class ServedEngine(Protocol):
    """`add` raises ValueError for a request that can never run; `step` gives events with the fields of TokenEvent.

    `idle` is called in place of a step while there is no work, and says after how many seconds to call it again if no
    message comes; None: not at all.  `sleep` is called without requests and says what it did; until `wake` there is no
    work.  A `wake` that raises one of REFUSALS leaves the engine asleep.  `segment`: of the pool's memory; without `fd`
    nothing touches it from then on.
    """

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Submit) -> None: ...
    def abort(self, rid: int) -> bool: ...
    def step(self) -> Sequence[Any]: ...
    def idle(self) -> float | None: ...
    def stats(self) -> Stats: ...
    def sleep(self, level: int) -> str: ...
    def wake(self) -> str: ...
    def segment(self, index: int, fd: int | None) -> None: ...
    def close(self) -> None: ...


Opener = Callable[[Start], tuple[ServedEngine, Loaded]]


class Loop:
    """Runs until it is told to stop (returns) or the agent is gone (EOFError or OSError)."""

    def __init__(self, channel: Channel, engine: ServedEngine) -> None:
        self._channel = channel
        self._engine = engine
        self._stopping = False

    def run(self) -> None:
        engine = self._engine
        wait_s: float | None = None
        while True:
            for message in self._channel.receive(wait_s):
                self._handle(message)
            if self._stopping:
                engine.close()
                return
            if not engine.has_work:
                wait_s = engine.idle()
                continue
            before = engine.stats().steps
            events = engine.step()
            if events:
                self._send(events)
            # no step ran: another model has the blocks, so waiting is all there is to do
            moved = events or engine.stats().steps != before
            wait_s = 0.0 if moved else WAIT_FOR_BLOCKS_S

    def _handle(self, message: ToWorker) -> None:
        if isinstance(message, Submit):
            try:
                self._engine.add(message)
            except ValueError as error:
                self._channel.send(Refused(message.rid, str(error)))
        elif isinstance(message, Abort):
            self._engine.abort(message.rid)
        elif isinstance(message, Ping):
            self._channel.send(Pong(message.seq, self._engine.stats(), time.monotonic()))
        elif isinstance(message, Sleep):
            self._channel.send(Asleep(self._engine.sleep(message.level)))
        elif isinstance(message, Wake):
            self._channel.send(self._woken())
        elif isinstance(message, Segment):
            self._channel.send(SegmentDone(message.index, self._moved_segment(message)))
        elif isinstance(message, Stop):
            self._stopping = True

    def _moved_segment(self, message: Segment) -> str:
        """What went wrong."""
        fd = self._channel.fds.popleft() if message.there else None
        try:
            self._engine.segment(message.index, fd)
        except REFUSALS as error:
            return explain(error)
        finally:
            if fd is not None:
                os.close(fd)
        return ""

    def _woken(self) -> Awake:
        try:
            return Awake(self._engine.wake())
        except REFUSALS as error:
            return Awake(error=explain(error))

    def _send(self, events: Sequence[Any]) -> None:
        try:
            self._channel.send(Tokens(list(events)))
        except WireError:
            # log probabilities of a long prompt may not fit in a frame together with the others'
            for event in events:
                self._send_alone(event)

    def _send_alone(self, event: Any) -> None:
        try:
            self._channel.send(Tokens([event]))
        except WireError as error:
            self._engine.abort(event.rid)
            self._channel.send(Tokens([TokenEvent(event.rid, (), finish_reason="error", error=str(error))]))


def explain(error: Exception) -> str:
    return f"{error!s:.2000}" or type(error).__name__


def die_with_parent(parent: int) -> None:
    """The kernel kills us when the agent ends, even in the middle of a long load."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"the agent {parent} is gone")


def serve(opener: Opener, argv: Sequence[str]) -> None:
    """The process's life; `argv` is what follows the interpreter's own arguments."""
    _, _, fd, parent = argv
    die_with_parent(int(parent))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    channel = Channel(socket.socket(fileno=int(fd)))
    try:
        start, *more = channel.receive(None)
        assert isinstance(start, Start), f"the first message must be Start, got {start}"
        if any(isinstance(message, Stop) for message in more):
            return  # the server was stopped while this process began
        try:
            engine, loaded = opener(start)
        except REFUSALS as error:
            channel.send(LoadFailed(explain(error)))
            sys.exit(1)
        channel.send(loaded)
        # what is there by now stays: to look through the 230,000 objects of torch and transformers takes over 0.1 s
        gc.collect()
        gc.freeze()
        gc.set_threshold(COLLECT_AFTER)
        Loop(channel, engine).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(0)  # the agent is gone, and with it everybody who could read an answer
