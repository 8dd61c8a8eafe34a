"""What a client is told: JSON bodies and server-sent events, as bytes.

The parts of an event that do not change over a stream are encoded once.  Log probabilities have the shapes that
evaluation tools add up: the value of a token and of its entry among the alternatives is the same number.
"""

from collections.abc import Sequence
from typing import Any

import orjson

from minserve.text import Tokenizer
from minserve.wire import TokenLogprobs

DONE = b"data: [DONE]\n\n"
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
Tally = dict[str, int | dict[str, int]]


def event(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Tally:
    """A stop token counts as a completion token; tokens computed after the end do not."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def spell(tokenizer: Tokenizer, token_id: int, as_id: bool) -> str:
    return f"token_id:{token_id}" if as_id else tokenizer.token_text(token_id)


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    offset: int = 0,
    as_ids: bool = False,
) -> dict[str, Any]:
    """The four parallel lists of /v1/completions; `offset` is where the first token's text begins."""
    offsets, tops, at = [], [], offset
    for token_id, lp in zip(token_ids, logprobs, strict=True):
        offsets.append(at)
        at += len(tokenizer.token_text(token_id))
        tops.append(None if lp is None else top_entries(tokenizer, token_id, lp, as_ids))
    return {
        "tokens": [spell(tokenizer, t, as_ids) for t in token_ids],
        "token_logprobs": [None if lp is None else lp.logprob for lp in logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def top_entries(tokenizer: Tokenizer, token_id: int, lp: TokenLogprobs, as_ids: bool) -> dict[str, float]:
    """Likeliest first; the token itself is always there, and wins where another id has the same spelling."""
    entries: dict[str, float] = {}
    for other, value in lp.top:
        entries.setdefault(spell(tokenizer, other, as_ids), value)
    entries[spell(tokenizer, token_id, as_ids)] = lp.logprob
    return entries


def chat_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    top: int,
    as_ids: bool = False,
) -> dict[str, Any]:
    """choices[].logprobs of chat: one entry a token with its bytes and `top` alternatives."""

    def entry(token_id: int, value: float) -> dict[str, Any]:
        raw = list(tokenizer.token_bytes(token_id))
        return {"token": spell(tokenizer, token_id, as_ids), "logprob": value, "bytes": raw}

    content = [
        entry(t, lp.logprob) | {"top_logprobs": [entry(other, value) for other, value in lp.top[:top]]}
        for t, lp in zip(token_ids, logprobs, strict=True)
    ]
    return {"content": content}


class EventWriter:
    """The events of one stream, all with the same id, time and model."""

    def __init__(self, response_id: str, created: int, model: str, chat: bool) -> None:
        self.chat = chat
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = orjson.dumps({"id": response_id, "object": kind, "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['

    def delta(
        self, index: int, text: str, logprobs: Any, finish: tuple[str, Any] | None, first: bool,
        tally: Tally | None = None,
    ) -> bytes:  # fmt: skip
        """New text of one choice.  A chat choice's first event also carries the role."""
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant", "content": text} if first else {"content": text}
            choice: dict[str, Any] = {"index": index, "delta": delta}
        else:
            choice = {"index": index, "text": text}
        choice["logprobs"] = logprobs
        choice["finish_reason"] = None if finish is None else finish[0]
        if finish is not None:
            choice["stop_reason"] = finish[1]
        return self._head + orjson.dumps(choice) + self._tail(tally)

    def usage(self, tally: Tally) -> bytes:
        return self._head + self._tail(tally)

    @staticmethod
    def _tail(tally: Tally | None) -> bytes:
        return b"]}\n\n" if tally is None else b'],"usage":' + orjson.dumps(tally) + b"}\n\n"


def whole(
    response_id: str,
    created: int,
    model: str,
    chat: bool,
    choices: list[orjson.Fragment],
    tally: Tally,
) -> bytes:
    """The body of an answer that is not streamed."""
    kind = "chat.completion" if chat else "text_completion"
    head = {"id": response_id, "object": kind, "created": created, "model": model}
    return orjson.dumps(head | {"choices": choices, "usage": tally})


def choice(index: int, text: str, chat: bool, logprobs: Any, finish: tuple[str, Any]) -> orjson.Fragment:
    """One answer, encoded: the body is then put together at once, however long its parts."""
    said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    end = {"logprobs": logprobs, "finish_reason": finish[0], "stop_reason": finish[1]}
    return orjson.Fragment(orjson.dumps({"index": index, **said, **end}))


def model_object(
    name: str, root: str, created: int, max_model_len: int | None, status: dict[str, Any]
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "minserve",
        "root": root,
        "max_model_len": max_model_len,
        "status": status,
    }
