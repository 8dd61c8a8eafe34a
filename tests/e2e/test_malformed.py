"""Every malformed body gets its one status, quickly, briefly, and without hurting anybody."""

import asyncio
import collections
import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.malformed import COMPLETIONS, Case, cases
from tests.e2e.running import VOCAB, Server, running, write_config, write_model

WINDOW = 256
MAX_ERROR_BYTES = 4096


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("malformed")
    write_model(folder / "m")
    with running(write_config(folder, [{"name": "a", "path": "m"}, {"name": "b", "path": "m"}])) as server:
        yield server


def golden(server: Server) -> str:
    body = {"model": "a", "prompt": "golden", "max_tokens": 20, "seed": 7}
    return str(httpx.post(server.url + COMPLETIONS, json=body).json()["choices"])


async def send_all(url: str, table: list[Case]) -> list[httpx.Response]:
    limit = asyncio.Semaphore(8)

    async def send(client: httpx.AsyncClient, c: Case) -> httpx.Response:
        headers = {} if c.content_type is None else {"content-type": c.content_type}
        async with limit:
            return await client.post(url + c.path, content=c.body, headers=headers)

    async with httpx.AsyncClient(timeout=30) as client:
        return await asyncio.gather(*(send(client, c) for c in table))


def test_every_body_gets_its_status(server: Server) -> None:
    table = list(cases(VOCAB, WINDOW))
    before, pids = golden(server), server.workers()
    answers = asyncio.run(send_all(server.url, table))
    wrong = [
        f"{c.category}: {c.path} {c.body[:90]!r} ({c.content_type}): {r.status_code}, not {c.status}: {r.text[:150]}"
        for c, r in zip(table, answers, strict=True)
        if r.status_code != c.status
    ]
    assert not wrong, "\n".join(wrong)
    refused = [(c, r) for c, r in zip(table, answers, strict=True) if c.status != 200]
    assert len(refused) >= 300, len(refused)
    for c, r in refused:
        error = json.loads(r.content)["error"]
        assert isinstance(error["message"], str) and error["code"], (c, error)  # noqa: PT018
        assert len(r.content) <= MAX_ERROR_BYTES, (c.category, len(r.content))
        # nothing of the server's inside, nothing of a long input
        assert "/work" not in r.text and ".py" not in r.text and "Traceback" not in r.text, r.text  # noqa: PT018
        assert "x" * 201 not in r.text, c.category
    assert server.workers() == pids, "a worker died"
    assert golden(server) == before
    assert "Traceback" not in server.output, server.output
    server.assert_idle()
    counts = collections.Counter((c.category, c.status) for c in table)
    sys.stdout.write(
        "".join(f"{n:4} {category} -> {status}\n" for (category, status), n in sorted(counts.items()))
    )


def raw(server: Server, data: bytes, patience_s: float = 5.0) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=patience_s) as peer:
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: peer.recv(65536), b""))
        except OSError:  # hung up on; too late an end shows in the time it took
            return b""


def test_broken_http_gets_an_error_or_a_close(server: Server) -> None:
    rng = random.Random(4)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    attacks = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\0" * 1000,
        head + b"content-length: -5\r\n\r\n{}",
        head + b"content-length: abc\r\n\r\n{}",
        head + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}",
        head + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}",
        head + b"content-length: 99999999999999999999\r\n\r\n{}",
        head + b"x: " + b"a" * 1_000_000,
        head + b"".join(b"h%d: v\r\n" % i for i in range(20_000)) + b"\r\n",
        *(rng.randbytes(rng.randrange(1, 300)) for _ in range(50)),
    ]
    for attack in attacks:
        began = time.monotonic()
        answer = raw(server, attack)
        status = answer[9:12]
        assert not answer or status.startswith(b"4"), (attack[:60], answer[:200])
        assert time.monotonic() - began < 4, attack[:60]
    assert golden(server)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_headers_over_the_cap_are_refused_while_they_arrive(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as peer:
        peer.sendall(b"GET /health HTTP/1.1\r\nx: ")
        got = b""
        try:
            for _ in range(200):
                peer.sendall(b"a" * 1024)
                time.sleep(0.001)
        except (BrokenPipeError, ConnectionResetError):
            pass
        else:
            got = peer.recv(1000)
        assert not got or b"431" in got.split(b"\r\n")[0]
    assert golden(server)
