"""The front end and its HTTP routes over hosts that do as they are told: no worker, no clock to wait for."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson

from minserve.config import parse_config
from minserve.frontend import Frontend
from minserve.metrics import rendered
from minserve.request_metrics import request_metrics
from minserve.server import Access, build_app
from minserve.text import Tokenizer
from minserve.wire import Loaded, Submit, TokenEvent

VOCAB = 400
TIERS = ("fp16", "w8", "w4")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Host:
    """Takes requests and gives the tokens that a test wants."""

    def __init__(self, name: str, window: int = 256) -> None:
        self.name, self.state, self.stalled, self.restarts, self.reason = name, "ready", False, 0, ""
        self.loaded: Loaded | None = Loaded(window, VOCAB)
        self.first_load = asyncio.Event()
        self.first_load.set()
        self.asked: dict[int, tuple[Submit, Any]] = {}
        self.stats = SimpleNamespace(running=0, waiting=0)

    @property
    def num_requests(self) -> int:
        return len(self.asked)

    def submit(self, request: Submit, sink: Any) -> None:
        self.asked[request.rid] = request, sink

    def abort(self, rid: int) -> None:
        self.asked.pop(rid, None)

    def say(self, tokens: tuple[int, ...] = (97,), finish: str | None = "length", **more: Any) -> None:
        """The same to all that wait."""
        for rid, (_, sink) in list(self.asked.items()):
            if finish is not None:
                del self.asked[rid]
            sink.token(TokenEvent(rid, tokens, finish_reason=finish, **more))


@dataclasses.dataclass
class Site:
    """An application over hosts, and a client of it."""

    front: Frontend
    app: Any
    hosts: dict[str, Host]

    async def ask(self, path: str, method: str = "POST", query: str = "", **body: Any) -> "Answer":
        """Sends a request and waits for its end, or for an answer that is cut."""
        data, got = orjson.dumps(body), Answer()
        there = asyncio.Event()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers,
            "query_string": query.encode(), "http_version": "1.1", "scheme": "http", "server": ("x", 1),
            "client": ("y", 2), "root_path": "",
        }  # fmt: skip

        async def receive() -> Any:
            if there.is_set():
                await asyncio.Event().wait()
            there.set()
            return {"type": "http.request", "body": data}

        async def send(message: Any) -> None:
            got.take(message)

        await self.app(scope, receive, send)
        return got

    def begin(self, path: str = COMPLETIONS, **body: Any) -> "asyncio.Task[Answer]":
        return asyncio.ensure_future(self.ask(path, **body))

    async def completed(self, **body: Any) -> "Answer":
        """Whoever gets it answers at once."""
        task = self.begin(**{"prompt": [1, 2, 3], **body})
        await settled()
        for host in self.hosts.values():
            host.say()
        return await task

    @property
    def metrics(self) -> dict[str, float]:
        lines = rendered(
            [], {}, {}, request_metrics(self.front.models.values(), self.front.groups, time.monotonic())
        )
        rows = (line.rpartition(" ") for line in lines.splitlines() if not line.startswith("#"))
        return {name.removeprefix("minserve:"): float(value) for name, _, value in rows}


class Answer:
    def __init__(self) -> None:
        self.status, self.data, self.whole = 0, b"", False
        self.headers: dict[str, str] = {}

    def take(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            self.data += message.get("body", b"")
            self.whole = not message.get("more_body", False)

    @property
    def json(self) -> Any:
        return orjson.loads(self.data)

    @property
    def by(self) -> str | None:
        return self.headers.get("x-minserve-model")

    @property
    def events(self) -> list[Any]:
        found = [line.removeprefix("data: ") for line in self.data.decode().split("\n\n") if line]
        return [None if data == "[DONE]" else orjson.loads(data) for data in found]


async def settled() -> None:
    """Everything that can go on without a host has."""
    for _ in range(20):
        await asyncio.sleep(0)


def site(folder: Path, models: list[dict[str, Any]], **more: Any) -> Site:
    gpus = [{"device": "cpu"}, {"device": "cpu"}]
    config = parse_config(
        {"nodes": [{"name": "n", "gpus": gpus}], "models": [{"path": ".", **m} for m in models], **more},
        folder,
    ).replicated()
    hosts = {m.name: Host(m.name, m.max_model_len or 256) for m in config.models}
    rids: Iterator[int] = iter(range(1, 1 << 20))
    agent: Any = SimpleNamespace(hosts=hosts, pools=[], next_rid=lambda: next(rids), residencies={})
    tokenizer = Tokenizer.load(folder)
    front = Frontend(config, agent, dict.fromkeys(hosts, tokenizer))
    return Site(front, build_app(front, access=Access(local=True), max_body_bytes=1 << 20), hosts)


def three(folder: Path, group: dict[str, Any] | None = None, **more: Any) -> Site:
    """One model in three precisions behind `any`."""
    slos = ({"ttft_ms": 400, "tpot_ms": 100}, {"ttft_ms": 9000}, {"ttft_ms": 9000})
    models = [
        {"name": name, "group": "any", "tier": i, "slo": slos[i], **more} for i, name in enumerate(TIERS)
    ]
    return site(folder, models, **({"groups": [{"name": "any", **group}]} if group else {}))


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 20))
