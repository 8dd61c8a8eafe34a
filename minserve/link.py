"""The agent's ends of what a worker inherits: its socket, as messages, and its stderr, as lines of our log."""

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from minserve.wire import Frames, FromWorker, WireError

log = logging.getLogger("minserve")

MAX_LINE = 4000


class Link(asyncio.Protocol):
    """The agent's end of a worker's socket."""

    def __init__(self, take: Callable[[FromWorker], None]) -> None:
        self._take = take
        self._frames: Frames[FromWorker] = Frames(FromWorker)
        self.transport: asyncio.WriteTransport | None = None
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.feed(data):
                self._take(message)
        except WireError as error:
            log.error("hung up on a worker: %s", error)
            self.hang_up()

    def hang_up(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()


class LineLog(asyncio.Protocol):
    """A worker's stderr, line by line into our log, with its model's name."""

    def __init__(self, name: str) -> None:
        self._name, self._left = name, b""

    def data_received(self, data: bytes) -> None:
        *lines, self._left = (self._left + data).split(b"\n")
        for line in lines:
            self._write(line)
        if len(self._left) > MAX_LINE:
            self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._left:
            self._write(self._left)
        self._left = b""

    def _write(self, line: bytes) -> None:
        # a progress bar redraws its line: only the last state is worth a line of the log
        text = line.rstrip(b"\r").rsplit(b"\r", 1)[-1][:MAX_LINE].decode("utf-8", "replace")
        shown = "".join(c if c.isprintable() else "\ufffd" for c in text.expandtabs(4))
        if shown.strip():
            log.info("[%s] %s", self._name, shown)
