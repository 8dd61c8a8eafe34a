"""The listening socket and what uvicorn lacks on it: a cap on headers, a deadline for them, errors in our shape.

Signals are not its business: `serve` decides when the server ends.
"""

import asyncio
import contextlib
import logging
import resource
import socket
from collections.abc import Iterator
from typing import Any

import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from minserve.protocol import ApiError

BACKLOG = 2048
MAX_HEADER_BYTES = 64 << 10
HEADERS_WITHIN_S = 15.0
KEEP_ALIVE_S = 75
LAST_WORDS_S = 5


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; OSError says why not.  Port 0 is any free one."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        # create_server repeats the address in its own words
        why = str(error.strerror or error).split(" (while", 1)[0]
        raise OSError(f"cannot listen on {host} port {port}: {why}") from None


def raise_open_files() -> int:
    """A connection is a descriptor, and the usual soft limit of 1024 is few.  Returns the limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1 << 20) if hard != resource.RLIM_INFINITY else 1 << 20
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


class HttpProtocol(HttpToolsProtocol):
    """One connection.  Data is counted only as long as a request's headers have not ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and self.parser is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.refuse(
                    ApiError(431, f"The headers are over {MAX_HEADER_BYTES} bytes.", "headers_too_large")
                )

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._start_timer()  # a later request on the connection has its own time
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self.refuse(ApiError(400, msg, "invalid_http"))

    def refuse(self, error: ApiError) -> None:
        """The last answer on this connection, before there is a request that could be answered."""
        body = orjson.dumps(error.body())
        head = f"HTTP/1.1 {error.status} Refused\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def _start_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEADERS_WITHIN_S, self._too_slow)

    def _too_slow(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_timer()  # the request before it is still being answered
        else:
            self.refuse(ApiError(408, "No request arrived in time.", "headers_timeout"))

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def not_a_cut(record: logging.LogRecord) -> bool:
    """A stream that fails is cut on purpose, by an application that ends before its response: no news for the log."""
    return not record.getMessage().startswith("ASGI callable returned without completing")


class HttpServer(uvicorn.Server):
    def __init__(self, app: ASGIApp) -> None:
        logging.getLogger("uvicorn.error").addFilter(not_a_cut)
        super().__init__(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=LAST_WORDS_S,
                backlog=BACKLOG,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
