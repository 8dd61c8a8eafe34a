"""Bodies that a server must refuse, by category, each with the one status that it has to get.

`cases(vocab, window)` gives (category, path, body bytes, content type, status); 200 marks the neighbours that are
fine, so that a server which refuses everything fails too.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = (
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
)
JSON = "application/json"
HUGE = 10**30
NOT_NUMBERS: list[Any] = ["1", "", [], {}, True]


class Case(NamedTuple):
    category: str
    path: str
    body: bytes
    content_type: str | None
    status: int


# name -> (fine values, refused values); on top of each come values of wrong types
GRID: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 16], [0, -1, 17, 2**31, 2**63, -(2**63), HUGE, 1.5]),
    "max_tokens": ([1, 2**31], [0, -1, -(2**63), 2**31 + 1, 2**64 - 1, HUGE, 1.5]),
    "min_tokens": ([0, 1], [-1, 3, 2**63, HUGE]),
    "temperature": ([0, 0.0, 2, 1e-9], [-0.01, 2.01, -1, 2**63, HUGE, -(2**63), 1e308]),
    "top_p": ([1, 1e-6], [0, -0.1, 1.0001, 2**63]),
    "top_k": ([-1, 0, 1, 2**31], [-2, 2**31 + 1, -(2**63), 2**63, 0.5]),
    "min_p": ([0, 1], [-0.01, 1.01, 2**63]),
    "presence_penalty": ([-2, 2], [-2.01, 2.01, 2**63]),
    "frequency_penalty": ([-2, 2], [-2.01, 2.01, 2**63]),
    "repetition_penalty": ([0.01, 1e6], [0, -1, 1.1e6, 2**63]),
    "seed": ([-(2**63), 2**63 - 1, 0], [2**63, -(2**63) - 1, HUGE, 0.5]),
    "logprobs": ([0, 20], [-1, 21, 2**63, 0.5]),
    "best_of": ([1], [0, 2, -1, 2**63]),
    "priority": ([0, -5, 2**31 - 1], [2**31, 2**63, HUGE]),
}
FLAGS = (
    "stream",
    "echo",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "add_special_tokens",
)
UNSUPPORTED: dict[str, Any] = {
    "tools": [{"type": "function"}],
    "functions": [{"name": "f"}],
    "tool_choice": "required",
    "suffix": "end",
    "guided_json": {"type": "object"},
    "guided_regex": "(a+)+b",
    "structured_outputs": {"regex": "a"},
    "response_format": {"type": "json_object"},
    "chat_template": "{{ 'a' * 10 ** 10 }}",
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "prompt_logprobs": 1,
    "prompt_embeds": "AAAA",
    "use_beam_search": True,
    "audio": {"voice": "x"},
    "modalities": ["audio"],
    "logits_processors": ["os.system"],
    "truncate_prompt_tokens": 5,
}


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "a", "prompt": "x", "max_tokens": 2, **fields}


def talk(**fields: Any) -> dict[str, Any]:
    return {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **fields}


def case(category: str, status: int, body: Any, path: str = COMPLETIONS, kind: str | None = JSON) -> Case:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Case(category, path, raw, kind, status)


def cases(vocab: int, window: int) -> Iterator[Case]:
    yield from numbers()
    yield from flags_and_unsupported()
    yield from prompts(vocab, window)
    yield from messages()
    yield from lists(vocab)
    yield from raw_bytes()
    yield from other_routes(vocab)


def numbers() -> Iterator[Case]:
    for name, (fine, refused) in GRID.items():
        for value in fine:
            extra = {"max_tokens": 2**31} if name == "min_tokens" else {}
            yield case(f"grid {name}", 200, ask(**{**extra, name: value}))
        for value in (*refused, *NOT_NUMBERS):
            yield case(f"grid {name}", 400, ask(**{name: value}))
        yield case(f"grid {name}", 200, ask(**{name: None}))


def flags_and_unsupported() -> Iterator[Case]:
    for name in FLAGS:
        for value in ("true", 1, [], {}):
            yield case("flags", 400, ask(**{name: value}))
    for name, value in UNSUPPORTED.items():
        yield case("unsupported", 400, ask(**{name: value}))
        yield case("unsupported", 400, talk(**{name: value}), CHAT)
        yield case("unsupported", 200, ask(**{name: None}))
    yield case("unsupported", 200, ask(tools=[], tool_choice="none", response_format={"type": "text"}))
    yield case("unsupported", 200, ask(some_new_field={"a": [1]}, user="u", metadata={}))
    yield case("stream options", 400, ask(stream_options={"include_usage": True}))
    for value in ("x", [], {"include_usage": "yes"}, 1):
        yield case("stream options", 400, ask(stream=True, stream_options=value))


def prompts(vocab: int, window: int) -> Iterator[Case]:
    for value in (None, 1, 1.5, True, {}, [], [[]], [[], [1]], ["a", [1]], [["a"]], [[1], "a"], [1, "a"], [1.0],
                  [True], [[1], [True]], [None], [{}], [[[1]]], [-1], [vocab], [2**31], [2**63], [-(2**63)], [HUGE],
                  ["x"] * 257, [[1]] * 257, "", ["x", ""]):  # fmt: skip
        yield case("prompt", 400, ask(prompt=value))
    yield case("prompt", 200, ask(prompt=["x"] * 3))
    yield case("prompt", 200, ask(prompt=[[1], [vocab - 1]]))
    yield case("prompt too long", 200, ask(prompt=[1] * (window - 1)))
    for length in (window, window + 1, 100_000):
        yield case("prompt too long", 400, ask(prompt=[1] * length))
    yield case("prompt too long", 400, ask(prompt="x" * 1_000_000))
    yield case("prompt too long", 400, ask(prompt="word " * window))
    yield case("prompt too long", 400, talk(messages=[{"role": "user", "content": "x " * 5000}]), CHAT)
    # a small body must not ask for an answer of a hundred megabytes
    echo = {"echo": True, "max_tokens": 1, "prompt": [[1] * (window - 2)] * 256}
    rows = (1 << 20) // (256 * (window - 2))
    yield case("echo too long", 400 if rows <= 20 else 200, ask(**echo, logprobs=min(20, rows)))
    for value in ("gpt", "", "a ", "A", "../a", "x" * 5000, "a\0", "a\u202e"):
        yield case("unknown model", 404, ask(model=value))
    for value in (1, [], {}, True):
        yield case("unknown model", 400, ask(model=value))
    yield case("unknown model", 400, {"prompt": "x"})


def messages() -> Iterator[Case]:
    def said(content: Any) -> list[Any]:
        return [{"role": "user", "content": content}]

    image = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]
    for value in (None, [], {}, "hi", 1, [1], [None], [[]], ["x"], [{}], [{"content": "x"}], [{"role": 1, "content": "x"}],
                  [{"role": "", "content": "x"}], [{"role": "r" * 65, "content": "x"}], said(None), said(1), said({}),
                  said([]), said(["x"]), said([{}]), said([{"type": "text"}]), said([{"type": "text", "text": 1}]),
                  said(image), said([{"type": 5}]), [{"role": "user", "content": "x", "name": 5}],
                  [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], said("x") * 1025):  # fmt: skip
        yield case("messages", 400, talk(messages=value), CHAT)
    for fields in ({"max_tokens": 0}, {"max_completion_tokens": 0}, {"max_completion_tokens": 3}, {"top_logprobs": 1},
                   {"logprobs": 1}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -1},
                   {"continue_final_message": True}, {"chat_template_kwargs": {"messages": []}},
                   {"chat_template_kwargs": []}, {"add_generation_prompt": "no"}):  # fmt: skip
        yield case("chat fields", 400, talk(**fields), CHAT)
    for fields in ({"max_completion_tokens": 2}, {"chat_template_kwargs": {"tokenize": True}},
                   {"continue_final_message": True, "add_generation_prompt": False}):  # fmt: skip
        yield case("chat fields", 200, talk(**fields), CHAT)


def lists(vocab: int) -> Iterator[Case]:
    for value in (1, {}, [1], [None], [""], "", ["x"] * 17, ["x" * 1025], ["x" * 600, "y" * 600], [["x"]]):
        yield case("stop", 400, ask(stop=value))
    yield case("stop", 200, ask(stop=["x"] * 16))
    for ids in ("1", 1, [-1], ["1"], [vocab], [2**63], [1.5], [True], [None]):
        yield case("stop_token_ids", 400, ask(stop_token_ids=ids))
    for bias in ([], "x", {"a": 1}, {"-1": 1}, {"1.5": 1}, {"": 1}, {str(vocab): 1}, {"1": "x"}, {"1": 101},
                 {"1": -101}, {"1": None}, {"9" * 5000: 1}, {"\u0661": 1}, {str(i): 1 for i in range(301)}):  # fmt: skip
        yield case("logit_bias", 400, ask(logit_bias=bias))
    yield case("logit_bias", 200, ask(logit_bias={"1": 100, "2": -100}))


def raw_bytes() -> Iterator[Case]:
    deep = b'{"model":"a","prompt":"x","z":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    objects = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    for body in (b"", b"{", b"}", b"[]", b"null", b"1", b'"x"', b"{]", b"{'a': 1}", b'{"model": "a",}', b"\xff\xfe{}",
                 b'{"model":"a","prompt":"\xff"}', b'{"model":"a","prompt":"\\ud800"}', b'{"a":NaN}', b'{"a":Infinity}',
                 b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":01}', b'{"a":' + b"9" * 5000 + b"}", b"\0", b'{"a":"\0"}',
                 b"{}{}", b"<xml/>", b"model=a&prompt=x", deep, objects, b"[" * 1_000_000, b"\xef\xbb\xbf{}",
                 '{"model":"a"}'.encode("utf-16"), b'{"model":"a","prompt":"x"'):  # fmt: skip
        yield case("not JSON", 400, body)
    good = json.dumps(ask()).encode()
    for kind in (None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json",
                 "application/jsonx"):  # fmt: skip
        yield case("content type", 415, good, kind=kind)
    yield case("content type", 200, good, kind="application/json; charset=utf-8")
    yield case("content type", 200, good, kind="APPLICATION/JSON")
    for size in (2 * 2**20 + 1, 8 * 2**20):
        yield case("too large", 413, b" " * size)
    yield case("too large", 400, b" " * (2 * 2**20))


def other_routes(vocab: int) -> Iterator[Case]:
    for body in ({}, {"prompt": 1}, {"prompt": ["x"]}, {"prompt": "x", "messages": []}, {"messages": "x"},
                 {"prompt": "x", "add_special_tokens": "no"}):  # fmt: skip
        yield case("tokenize", 400, {"model": "a", **body}, TOKENIZE)
    for body in ({}, {"tokens": "x"}, {"tokens": ["x"]}, {"tokens": [-1]}, {"tokens": [vocab]}, {"tokens": [2**63]},
                 {"tokens": [1.5]}, {"tokens": [True]}, {"tokens": 5}):  # fmt: skip
        yield case("detokenize", 400, {"model": "a", **body}, DETOKENIZE)
    for path in (
        "/v1/nothing",
        "/v1/responses",
        "/v1/completions/",
        "/v1//completions",
        "/V1/completions",
        "/admin",
    ):
        yield case("unknown route", 404, ask(), path)
    yield case("not served", 501, ask(), "/v1/embeddings")
    for path in ("/health", "/v1/models", "/version"):
        yield case("wrong method", 405, ask(), path)
