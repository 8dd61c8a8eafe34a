"""A job's way out: one JSON body, or a stream of events, and what happens when the reader or the engine goes away.

Nothing is sent before there is a token or an error, so an error that comes first has its own status.  A failure later
is an error event and a connection that ends without the end of its chunked body: clients read anything else as
success.
"""

import asyncio
import logging
import time
import uuid
from typing import Any

import orjson
from starlette.responses import Response as Plain
from starlette.types import Receive, Send

from minserve import answers
from minserve.jobs import Job, Sequence
from minserve.protocol import ApiError, ChatBody, CompletionBody

log = logging.getLogger("minserve")

WRITE_TIMEOUT_S = 60.0
JSON_TYPE = (b"content-type", b"application/json")


class Disconnected(Exception):
    """The client is gone: there is nobody to tell anything."""


def reply(value: Any, status: int = 200) -> Plain:
    return Plain(orjson.dumps(value), status, media_type="application/json")


async def send_body(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


def error_headers(error: ApiError) -> list[tuple[bytes, bytes]]:
    headers: list[tuple[bytes, bytes]] = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.status == 408:
        headers.append((b"connection", b"close"))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


async def send_error(send: Send, error: ApiError) -> None:
    await send_body(send, error.status, orjson.dumps(error.body()), [JSON_TYPE, *error_headers(error)])


class Response:
    """Answers one job; it belongs to the connection's task."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.chat = isinstance(job.body, ChatBody)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        # of a group or of several replicas, the one that answers
        self.model = job.served.entry.model
        self.by = (b"x-minserve-model", job.served.entry.name.encode())
        self._offsets: dict[int, int] = {}

    async def run(self, receive: Receive, send: Send) -> None:
        """ApiError where nothing was sent yet; Disconnected or TimeoutError where the client does not read."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            if self.job.body.stream:
                await self._stream(send)
            else:
                await self._whole(send)
        finally:
            watcher.cancel()
            self.job.close()

    async def _watch(self, receive: Receive) -> None:
        # the body has been read, so all that can come is the end of the connection
        while (await receive())["type"] != "http.disconnect":
            pass
        self.job.disconnect()

    async def _news(self) -> None:
        await self.job.news()
        if self.job.gone:
            raise Disconnected

    async def _whole(self, send: Send) -> None:
        job = self.job
        while not job.done and job.error is None:
            await self._news()
        if job.error is not None:
            raise job.error
        choices = []
        for s in job.sequences:
            finish = s.finish or ("stop", None)
            choices.append(answers.choice(s.index, self._shown(s), self.chat, self._logprobs(s), finish))
            await asyncio.sleep(0)  # log probabilities may be many: other streams go on in between
        body = answers.whole(self.id, self.created, self.model, self.chat, choices, self._usage())
        await send_body(send, 200, body, [JSON_TYPE, self.by])

    async def _stream(self, send: Send) -> None:
        job, begun = self.job, set[int]()
        writer = answers.EventWriter(self.id, self.created, self.model, self.chat)
        started = False
        while True:
            await self._news()
            if job.error is not None:
                break
            data = b"".join(self._delta(writer, s, begun) for s in job.sequences if self._has_news(s))
            if not data:
                continue
            if not started:
                started = True
                headers = [*answers.SSE_HEADERS, self.by]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            if job.done:
                await self._write(send, data + self._last(writer), more=False)
                return
            await self._write(send, data, more=True)
        if not started:
            raise job.error
        log.warning("[%s] stream %s cut: %s", self.model, self.id, job.error)
        # an event for clients that read events, then a cut for those that do not: see the module's first lines
        await self._write(send, answers.event(job.error.body()), more=True)

    @staticmethod
    def _has_news(s: Sequence) -> bool:
        return bool(s.text or s.logprobs or s.finish) and not s.closed

    def _delta(self, writer: answers.EventWriter, s: Sequence, begun: set[int]) -> bytes:
        first = s.index not in begun
        begun.add(s.index)
        text, logprobs = self._shown(s), self._logprobs(s)
        s.text, s.token_ids, s.logprobs, s.prompt_logprobs = "", [], [], None
        s.closed = s.finish is not None
        options = self.job.body.stream_options
        tally = self._usage() if options is not None and options.continuous_usage_stats else None
        return writer.delta(s.index, text, logprobs, s.finish, first, tally)

    def _last(self, writer: answers.EventWriter) -> bytes:
        options = self.job.body.stream_options
        tally = writer.usage(self._usage()) if options is not None and options.include_usage else b""
        return tally + answers.DONE

    async def _write(self, send: Send, data: bytes, more: bool) -> None:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await send({"type": "http.response.body", "body": data, "more_body": more})

    def _usage(self) -> answers.Tally:
        job = self.job
        return answers.usage(job.prompt_tokens, job.completion_tokens, job.cached_tokens)

    def _echoes(self, s: Sequence) -> bool:
        return (
            isinstance(self.job.body, CompletionBody) and self.job.body.echo and s.index not in self._offsets
        )

    def _shown(self, s: Sequence) -> str:
        """New text, after the prompt's where the first of it is echoed."""
        if not self._echoes(s):
            return s.text
        return self.job.prompt_texts[s.index // self.job.body.n] + s.text

    def _logprobs(self, s: Sequence) -> dict[str, Any] | None:
        body, tokenizer = self.job.body, self.job.tokenizer
        top = body.top_count()
        ids, values = list(s.token_ids), list(s.logprobs)
        if self._echoes(s):
            ids, values = s.prompt + ids, [*(s.prompt_logprobs or ()), *values]
        start = self._offsets.setdefault(s.index, 0)
        if top is None:
            return None
        as_ids = body.return_tokens_as_token_ids
        if self.chat:
            known = [v for v in values if v is not None]
            return answers.chat_logprobs(tokenizer, ids, known, top, as_ids)
        found = answers.completion_logprobs(tokenizer, ids, values, start, as_ids)
        self._offsets[s.index] = start + sum(len(tokenizer.token_text(t)) for t in ids)
        return found
