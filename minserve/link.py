"""The agent's ends of what a worker inherits: its socket, as messages, and its stderr, as lines of our log."""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import cast

from minserve.wire import Frames, FromWorker, Segment, SegmentDone, Told, WireError, encode

log = logging.getLogger("minserve")

MAX_LINE = 4000


class Link(asyncio.Protocol):
    """The agent's end of a worker's socket.  `raw`: the same socket, for descriptors; closed with the connection."""

    def __init__(self, take: Callable[[Told], None], raw: socket.socket) -> None:
        self._take, self._raw = take, raw
        self._asked: deque[asyncio.Future[str]] = deque()
        self._frames: Frames[FromWorker] = Frames(FromWorker)
        self.transport: asyncio.WriteTransport | None = None
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._frames.feed(data):
                if isinstance(message, SegmentDone):
                    self._answer(message.error)
                else:
                    self._take(message)
        except WireError as error:
            log.error("hung up on a worker: %s", error)
            self.hang_up()

    async def tell_segment(self, message: Segment, fd: int | None) -> str:
        """ "" once the worker has done it, or has ended; else what went wrong.  One at a time."""
        own = None if fd is None else os.dup(fd)  # whoever asks may close it before it is sent
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        try:
            # a frame with a descriptor goes past the transport: nothing may be left in there
            while own is not None and self._buffered and not self.closed.is_set():
                await asyncio.sleep(0.001)
            if self.closed.is_set() or self.transport is None:
                return ""
            self._asked.append(answer)
            if own is None:
                self.transport.write(encode(message))
            else:
                socket.send_fds(self._raw, [encode(message)], [own])
        except OSError as error:
            self._asked.remove(answer)
            return str(error)
        finally:
            if own is not None:
                os.close(own)
        return await answer

    @property
    def _buffered(self) -> int:
        return 0 if self.transport is None else self.transport.get_write_buffer_size()

    def _answer(self, error: str) -> None:
        if not self._asked:
            raise WireError("a worker answers what nobody asked")
        answer = self._asked.popleft()
        if not answer.done():  # else whoever asked has given up
            answer.set_result(error)

    def hang_up(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        self._raw.close()
        while self._asked:
            self._answer("")  # the dead have let go


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
