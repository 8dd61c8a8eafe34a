"""The HTTP surface: routes, keys, request ids, body limits, and errors in OpenAI's shape.

`build_app` makes a plain ASGI application.  Every route needs a key where keys are set, save the two of PUBLIC; those under
ADMIN need an admin key, or nobody may use them.  What is not known here is refused.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response as Plain
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import minserve
from minserve import answers, metrics
from minserve.admin_routes import AdminPages
from minserve.frontend import Frontend
from minserve.jobs import Job
from minserve.protocol import (
    ApiError,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read_body,
)
from minserve.request_metrics import request_metrics
from minserve.responses import Disconnected, Response, error_headers, reply, send_error
from minserve.served import Served, Target

log = logging.getLogger("minserve")

PUBLIC = frozenset({"/health", "/ready"})
ADMIN = "/admin"
# what /v1/models calls the states that others have names for
SHOWN = {"ready": "loaded", "asleep": "sleeping"}
BODY_TIMEOUT_S = 60.0
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
STATUS_CODES = {404: "not_found", 405: "method_not_allowed"}


def header(scope: Scope, name: bytes) -> str:
    """The first header of that name, "" where there is none."""
    found: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return found.decode("latin-1")


async def receive_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """The whole body of a JSON request, not a byte over the cap.

    What comes after a refusal is read and dropped: closing the connection would take the answer away with it.
    """
    kind = header(scope, b"content-type").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "content-type must be application/json", "unsupported_media_type")
    declared = header(scope, b"content-length")
    over = ApiError(413, f"The body is over the {max_bytes} bytes allowed.", "body_too_large")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise over
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise over
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s.", "body_timeout"
        ) from None


class Generate:
    """POST /v1/completions and /v1/chat/completions."""

    def __init__(
        self,
        kind: type[CompletionBody] | type[ChatBody],
        begin: Callable[[Any], Awaitable[Job]],
        max_body_bytes: int,
    ) -> None:
        self._kind, self._begin, self._max_body_bytes = kind, begin, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            data = await receive_body(scope, receive, self._max_body_bytes)
            job = await self._begin(read_body(data, self._kind))
            await Response(job).run(receive, send)
        except ApiError as error:
            await send_error(send, error)
        except Disconnected:
            pass
        except TimeoutError:
            log.warning("a client did not read its stream: request aborted")


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use what.  `local`: without any keys the admin routes are open, since only this machine reaches them."""

    keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    local: bool = False


class Gate:
    """Around the whole application: the request id of every answer, and the key check."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._local = app, access.local
        self._keys, self._admin = (
            [hashlib.sha256(k.encode()).digest() for k in keys] for keys in (access.keys, access.admin_keys)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = header(scope, b"x-request-id")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        extra = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], extra]
            await send(message)

        path = scope["path"]
        error = (
            self._admin_error(scope) if path == ADMIN or path.startswith(f"{ADMIN}/") else self._error(scope)
        )
        if error is None:
            await self._app(scope, receive, send_with_id)
        else:
            await send_error(send_with_id, error)

    def _error(self, scope: Scope) -> ApiError | None:
        if not self._keys or scope["path"] in PUBLIC or _has_key(scope, self._keys):
            return None
        return ApiError(401, "A valid API key is needed.", "invalid_api_key")

    def _admin_error(self, scope: Scope) -> ApiError | None:
        if self._admin:
            if _has_key(scope, self._admin):
                return None
            if _has_key(scope, self._keys):
                return ApiError(403, "This route needs an admin key; an API key is none.", "admin_key_needed")
            return ApiError(401, "A valid admin key is needed.", "invalid_api_key")
        if not self._local or self._keys:
            says = "The admin routes are off: MINSERVE_ADMIN_KEY or server.admin_keys_file turns them on."
            return ApiError(403, says, "admin_off")
        if header(scope, b"origin"):
            # any page that this machine's browser shows could send it
            return ApiError(
                403, "The admin routes are not for browsers where there is no admin key.", "admin_off"
            )
        return None


def _has_key(scope: Scope, digests: list[bytes]) -> bool:
    scheme, _, key = header(scope, b"authorization").partition(" ")
    digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
    # all of them, always: how long it takes tells nothing
    matches = [hmac.compare_digest(digest, known) for known in digests]
    return scheme.lower() == "bearer" and any(matches)


class Pages:
    """The routes that answer at once."""

    def __init__(self, front: Frontend, max_body_bytes: int) -> None:
        self._front, self._max_body_bytes = front, max_body_bytes
        self._created = int(time.time())

    async def _body(self, request: Request, kind: type[Any]) -> Any:
        data = await receive_body(request.scope, request.receive, self._max_body_bytes)
        return read_body(data, kind)

    def _model(self, target: Target) -> dict[str, Any]:
        """Of several members the best state and the longest window."""
        served = next((s for s in target.members if s.host.state == "ready"), target.members[0])
        windows = [s.host.loaded.max_model_len for s in target.members if s.host.loaded is not None]
        status = {
            "value": SHOWN.get(served.host.state, served.host.state),
            "failed": all(s.host.state == "failed" for s in target.members),
        }
        window = max(windows, default=served.entry.max_model_len)
        found = answers.model_object(target.name, target.name, self._created, window, status)
        return found | ({"members": [s.entry.name for s in target.members]} if target.several else {})

    async def models(self, request: Request) -> Plain:
        return reply({"object": "list", "data": [self._model(t) for t in self._front.names]})

    async def model(self, request: Request) -> Plain:
        return reply(self._model(self._front.target(request.path_params["name"])))

    async def tokenize(self, request: Request) -> Plain:
        body: TokenizeBody = await self._body(request, TokenizeBody)
        served = self._front.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "tokenize takes either prompt or messages", "missing_parameter", "prompt")
        if body.prompt is None:
            body.add_special_tokens = bool(body.add_special_tokens)
            ids = await self._front.encode_chat(served, body)
        else:
            ids = await self._front.encode(served, body.prompt, body.add_special_tokens is not False)
        tokenizer, loaded = self._front.tokenizer(served), served.host.loaded
        found: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": loaded and loaded.max_model_len,
            "tokens": ids,
        }
        if body.return_token_strs:
            found["token_strs"] = [tokenizer.token_text(t) for t in ids]
        return reply(found)

    async def detokenize(self, request: Request) -> Plain:
        body: DetokenizeBody = await self._body(request, DetokenizeBody)
        served = self._front.find(body.model)
        tokenizer = self._front.tokenizer(served)
        if any(not 0 <= t < tokenizer.vocab_size for t in body.tokens):
            limit = f"token ids must be in [0, {tokenizer.vocab_size})"
            raise ApiError(400, limit, param="tokens")
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, False)
        return reply({"prompt": text})

    async def health(self, request: Request) -> Plain:
        """The process lives, and no model is lost for good."""
        states = {name: self._state(s) for name, s in self._front.models.items()}
        pools = {
            name: counts and counts.leased for name, counts in (await self._front.agent.counts()).items()
        }
        bad = any(s.host.state == "failed" or s.host.stalled for s in self._front.models.values())
        found = {"status": "degraded" if bad else "ok", "models": states, "leased_slabs": pools}
        return reply(found, 503 if bad else 200)

    @staticmethod
    def _state(served: Served) -> dict[str, Any]:
        host = served.host
        return {
            "state": "stalled" if host.stalled else host.state,
            "requests": host.num_requests,
            "running": host.stats.running,
            "waiting": host.stats.waiting,
            "queued_tokens": served.waiting_tokens,
            "restarts": host.restarts,
        }

    async def ready(self, request: Request) -> Plain:
        """Can take work: all models have had their first load, and one of them (or the one asked for) is ready."""
        names = parse_qs(request.url.query).get("model")
        every = ((s,) for s in self._front.models.values())
        chosen = [self._front.target(n).members for n in names] if names else list(every)
        settled = all(s.host.first_load.is_set() for members in chosen for s in members)
        well = [[s for s in members if s.host.state == "ready" and not s.host.stalled] for members in chosen]
        up = [members[0].entry.name for members in well if members]
        good = settled and not self._front.draining and (all(well) if names else bool(up))
        status = "draining" if self._front.draining else "ready" if good else "not ready"
        return reply({"status": status, "models": up}, 200 if good else 503)

    async def metrics(self, request: Request) -> Plain:
        hosts = [served.host for served in self._front.models.values()]
        agent = self._front.agent
        requests = request_metrics(self._front.models.values(), self._front.groups, time.monotonic())
        plans = {p.name: p.plan for p in agent.pools}
        text = metrics.rendered(hosts, plans, await agent.counts(), requests)
        return Plain(text, media_type=metrics.CONTENT_TYPE)

    async def embeddings(self, request: Request) -> Plain:
        raise ApiError(501, "This server generates text; it serves no embeddings.", "not_supported")

    async def version(self, request: Request) -> Plain:
        return reply({"version": minserve.__version__})


async def http_error(request: Request, error: Exception) -> Plain:
    """404 and 405 of the router, in our shape."""
    assert isinstance(error, HTTPException), f"{error!r} is not the router's"
    known = ApiError(error.status_code, error.detail, STATUS_CODES.get(error.status_code, "http_error"))
    answer = reply(known.body(), known.status)
    answer.headers.update(error.headers or {})
    return answer


async def api_error(request: Request, error: Exception) -> Plain:
    assert isinstance(error, ApiError), f"{error!r} is no ApiError"
    answer = reply(error.body(), error.status)
    answer.raw_headers += error_headers(error)
    return answer


async def our_fault(request: Request, error: Exception) -> Plain:
    """A bug: the client learns no more than that, the log has the traceback."""
    return reply(ApiError(500, "The server made a mistake; its log says more.", "internal_error").body(), 500)


async def vanished(request: Request, error: Exception) -> Plain:
    return Plain(status_code=499)  # nobody reads it


def build_app(front: Frontend, *, access: Access, max_body_bytes: int) -> ASGIApp:
    pages, admin = Pages(front, max_body_bytes), AdminPages(front)
    completions = Generate(CompletionBody, front.completion, max_body_bytes)
    chat = Generate(ChatBody, front.chat, max_body_bytes)
    routes = [
        Route("/v1/models", pages.models),
        Route("/v1/models/{name:path}", pages.model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/tokenize", pages.tokenize, methods=["POST"]),
        Route("/detokenize", pages.detokenize, methods=["POST"]),
        Route("/v1/embeddings", pages.embeddings, methods=["POST"]),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/version", pages.version),
        Route("/metrics", pages.metrics),
        Route(f"{ADMIN}/models", admin.models),
        Route(f"{ADMIN}/models/{{name:path}}/{{verb}}", admin.act, methods=["POST"]),
        Route(f"{ADMIN}/models/{{name:path}}", admin.model),
    ]
    handlers: Any = {
        HTTPException: http_error,
        ApiError: api_error,
        Disconnected: vanished,
        Exception: our_fault,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Gate(app, access)
