"""A replay's way to an OpenAI server: connections that stay open, a request written in one go, events as they come.

A socket's own callback takes the time of what arrives, before anything is parsed.  Spare connections are opened ahead, so
that a request does not wait for one.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

from minserve.replay_heard import Heard
from sched.workload import Request

SPARES = 8
CONNECT_S = 10.0
MOST_SHOWN = 200
Clock = Callable[[], float]


class Events:
    """The body of one answer: server-sent events, or the one JSON object of a refusal."""

    def __init__(self, heard: Heard) -> None:
        self.heard, self.status = heard, 0
        self._data = bytearray()
        self._finished = False

    def feed(self, data: bytes, at_s: float) -> None:
        self._data += data
        if self.status == 200:
            *whole, rest = bytes(self._data).split(b"\n\n")
            self._data = bytearray(rest)
            for event in whole:
                if event.startswith(b"data: ") and event != b"data: [DONE]":
                    self._event(orjson.loads(event[6:]), at_s)

    def _event(self, event: dict[str, Any], at_s: float) -> None:
        heard = self.heard
        if event.get("error"):
            heard.end(at_s, named(200, event))
            return
        choices, usage = event.get("choices") or (), event.get("usage")
        if usage:
            details = usage.get("prompt_tokens_details") or {}
            heard.cached = details.get("cached_tokens") or 0
            heard.news(usage["completion_tokens"] - heard.tokens, at_s)
        elif any(c.get("text") for c in choices):
            heard.news(1, at_s)  # a server that does not count on the way: the last event corrects it
        self._finished = self._finished or any(c.get("finish_reason") for c in choices)

    def end(self, at_s: float) -> None:
        """The answer is whole."""
        if self.status != 200:
            try:
                found = orjson.loads(self._data)
            except orjson.JSONDecodeError:
                found = {}
            self.heard.end(at_s, named(self.status, found))
        else:
            self.heard.end(at_s, None if self._finished else "the stream has no finish reason")


def named(status: int, body: Any) -> str:
    """An error in few words; `shed` first where the server says that it was its decision."""
    error = body.get("error") if isinstance(body, dict) else None
    said = error if isinstance(error, dict) else {}
    code = str(said.get("code") or said.get("type") or "error")[:MOST_SHOWN]
    return f"shed: {code}" if "shed" in code else f"{status} {code}"


class Connection(asyncio.Protocol):
    """One socket, one request at a time."""

    def __init__(self, clock: Clock, done: Callable[["Connection", bool], None]) -> None:
        self._clock, self._done = clock, done
        self._events: Events | None = None
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._at_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), f"{transport!r} is no stream"
        self._transport = transport

    def send(self, data: bytes, events: Events) -> None:
        assert self._transport is not None, "the connection is not open"
        assert self._events is None, "the connection is not free"
        self._events, self._parser = events, httptools.HttpResponseParser(self)
        self._transport.write(data)
        events.heard.sent_s = self._clock()

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._at_s = self._clock()
        try:
            if self._parser is not None:
                self._parser.feed_data(data)
        except (httptools.HttpParserError, ValueError, KeyError, TypeError, AttributeError) as error:
            # the parser wraps what its callbacks raise
            self._fail(f"the answer cannot be read: {type(error.__context__ or error).__name__}")

    def connection_lost(self, error: Exception | None) -> None:
        self._at_s = self._clock()
        self._fail("connection lost")
        self._transport = None
        self._done(self, False)

    def _fail(self, why: str) -> None:
        events, self._events, self._parser = self._events, None, None
        if events is not None:
            events.heard.end(self._at_s, why)
            self.close()

    # the parser's callbacks
    def on_headers_complete(self) -> None:
        if self._events is not None:
            self._events.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self._events is not None:
            self._events.feed(data, self._at_s)

    def on_message_complete(self) -> None:
        events, keep = self._events, self._parser.should_keep_alive()
        self._events = None
        if events is not None:
            events.end(self._at_s)
        if not keep:
            self.close()
        self._done(self, keep)


class HttpTarget:
    """`url` as http://host:port; ValueError where it is another kind of address, OSError where nobody answers.

    `salt`: prompts find in the server's cache only what was sent with the same.
    """

    def __init__(self, url: str, key: str | None, clock: Clock, salt: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"--url must be http://HOST:PORT or https://..., got {url!r}")
        self._host, self._secure = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._secure else 80)
        self._path = f"{parts.path.rstrip('/').removesuffix('/v1')}/v1/completions"
        self._head = (
            f"POST {self._path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
            + (f"authorization: Bearer {key}\r\n" if key else "")
        ).encode()
        self._clock, self._salt = clock, salt
        self._usage = {"include_usage": True, "continuous_usage_stats": True}
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        await asyncio.gather(*(self._connect() for _ in range(SPARES)))

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        tls = ssl.create_default_context() if self._secure else None
        async with asyncio.timeout(CONNECT_S):
            _, connection = await loop.create_connection(
                lambda: Connection(self._clock, self._released), self._host, self._port, ssl=tls
            )
        self._all.add(connection)
        self._idle.append(connection)

    def _released(self, connection: Connection, keep: bool) -> None:
        if keep and connection.open:
            self._idle.append(connection)
        else:
            self._all.discard(connection)
            if connection in self._idle:
                self._idle.remove(connection)

    def prepared(self, request: Request, ids: list[int]) -> bytes:
        body: dict[str, Any] = {
            "model": request.model, "prompt": ids, "max_tokens": request.output_tokens, "ignore_eos": True,
            "temperature": 1.0, "seed": request.rid, "stream": True, "stream_options": self._usage,
            # a special token has a text then, and so an event
            "skip_special_tokens": False,
        }  # fmt: skip
        if request.priority:
            body["priority"] = request.priority
        own = {"ttft_ms": request.ttft_slo_s, "tpot_ms": request.tpot_slo_s}
        if slo := {name: 1e3 * value for name, value in own.items() if value is not None}:
            body["slo"] = slo
        if self._salt:
            body["cache_salt"] = self._salt
        data = orjson.dumps(body)
        return b"%scontent-length: %d\r\n\r\n%s" % (self._head, len(data), data)

    def send(self, data: bytes, heard: Heard) -> None:
        """At once where a connection is free; else it waits for one, and that shows in its lateness."""
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                connection.send(data, Events(heard))
                break
        else:
            self._spawn(self._send_late(data, heard))
        if len(self._idle) < SPARES // 2:
            self._spawn(self._spare())

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _spare(self) -> None:
        try:
            await self._connect()
        except OSError:  # the request that needs it will say so
            return

    async def _send_late(self, data: bytes, heard: Heard) -> None:
        try:
            await self._connect()
            self._idle.pop().send(data, Events(heard))
        except (OSError, TimeoutError) as error:
            heard.end(self._clock(), f"no connection: {type(error).__name__}")

    def cancel(self, heard: Heard) -> None:
        """Nothing: `close` cuts every connection, and the server aborts what it was at."""

    async def close(self) -> None:
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in [*self._all]:
            connection.close()
        await asyncio.sleep(0)
