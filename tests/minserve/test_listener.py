"""The listening socket alone, under an application that says ok."""

import asyncio
from typing import Any

import pytest

from minserve import listener

REQUEST = b"GET / HTTP/1.1\r\nhost: a\r\n"


async def talk(*parts: bytes, answer_s: float = 0.0) -> list[bytes]:
    """Sends the parts on one connection, each once the one before has been answered; "" is a silent server."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(answer_s)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    socket = listener.bind("127.0.0.1", 0)
    server = listener.HttpServer(app)
    serving = asyncio.create_task(server.serve(sockets=[socket]))
    reader, writer = await asyncio.open_connection(*socket.getsockname())
    answers = []
    for part in parts:
        writer.write(part)
        try:
            answers.append(await asyncio.wait_for(reader.read(4096), 3))
        except TimeoutError:
            answers.append(b"")
    writer.close()
    server.should_exit = True
    await serving
    return answers


def test_every_request_of_a_connection_must_finish_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEADERS_WITHIN_S", 0.3)
    first, second = asyncio.run(talk(REQUEST + b"\r\n", REQUEST))
    assert first.startswith(b"HTTP/1.1 200")
    assert second.startswith(b"HTTP/1.1 408")


def test_an_answer_under_way_is_not_cut_by_the_next_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEADERS_WITHIN_S", 0.1)
    (first,) = asyncio.run(talk(REQUEST + b"\r\n" + REQUEST, answer_s=0.5))
    assert first.startswith(b"HTTP/1.1 200")
