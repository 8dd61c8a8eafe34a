"""Bodies to values and errors, and values to bytes: the parts of the server that need no server."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minserve import answers
from minserve.host import ROOT
from minserve.protocol import (
    REFUSED,
    ApiError,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read_body,
    read_messages,
)
from minserve.sampling import SamplingParams
from minserve.text import Tokenizer
from minserve.wire import TokenLogprobs
from tests.tiny import write_tokenizer

KINDS = [CompletionBody, ChatBody, TokenizeBody, DetokenizeBody]
FIELDS = sorted({*(f for k in KINDS for f in k.__struct_fields__), *REFUSED, "unknown"})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**65)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=3)
)


def read(kind: Any, **fields: Any) -> Any:
    return read_body(json.dumps(fields).encode(), kind)


def refusal(kind: Any, data: bytes) -> ApiError | None:
    """Reads as far as a route does before it looks at the model."""
    try:
        body = read_body(data, kind)
        if isinstance(body, CompletionBody | ChatBody):
            assert isinstance(body.checked_params(), SamplingParams)
        if isinstance(body, CompletionBody):
            assert body.prompts()
        if isinstance(body, ChatBody):
            assert all(isinstance(m["content"], str) for m in read_messages(body.messages))
    except ApiError as error:
        return error
    return None


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6), st.sampled_from(KINDS))
def test_any_object_is_read_or_refused(fields: dict[str, Any], kind: Any) -> None:
    error = refusal(kind, json.dumps(fields).encode())
    assert error is None or (error.status == 400 and len(orjson.dumps(error.body())) < 2048)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    error = refusal(CompletionBody, data)
    assert error is not None
    assert error.status == 400


def test_null_is_absent() -> None:
    names = [f for f in CompletionBody.__struct_fields__ if f != "prompt"]
    assert read(CompletionBody, prompt="x", **dict.fromkeys(names)) == read(CompletionBody, prompt="x")


def test_the_shared_fields_are_samplings_own() -> None:
    body = read(
        CompletionBody, prompt="x", n=2, temperature=0.5, top_k=3, stop=["a"], stop_token_ids=[4], seed=9,
        logit_bias={"7": -3}, logprobs=2, echo=True, min_tokens=1, ignore_eos=True,
    )  # fmt: skip
    assert body.checked_params() == SamplingParams(
        n=2, temperature=0.5, top_k=3, stop=("a",), stop_token_ids=(4,), seed=9, logit_bias={7: -3.0},
        logprobs=2, prompt_logprobs=2, min_tokens=1, ignore_eos=True, max_tokens=16,
    )  # fmt: skip


def test_both_names_of_the_limit() -> None:
    messages = [{"role": "user", "content": "x"}]
    for fields in (
        {"max_tokens": 5},
        {"max_completion_tokens": 5},
        {"max_tokens": 5, "max_completion_tokens": 5},
    ):
        assert read(ChatBody, messages=messages, **fields).checked_params().max_tokens == 5
    assert read(ChatBody, messages=messages).checked_params().max_tokens is None
    assert read(CompletionBody, prompt="x").checked_params().max_tokens == 16


def test_parts_are_joined_and_names_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages([{"role": "user", "content": parts, "name": "n"}]) == [
        {"role": "user", "content": "a\nb", "name": "n"}
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stop_token_ids": [1, "x"]}, "stop_token_ids[1]"),
        ({"tools": [1]}, "tools"),
    ],
)
def test_errors_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(CompletionBody, prompt="x", **fields).checked_params()
    assert caught.value.param == param


def test_a_long_message_is_cut() -> None:
    assert len(ApiError(400, "x" * 10_000).body()["error"]["message"]) < 700


def test_every_field_of_a_body_is_used() -> None:
    """A field that is read and then forgotten would be accepted and do nothing."""
    readers = ("protocol", "frontend", "responses", "server")
    source = "".join((ROOT / f"minserve/{name}.py").read_text() for name in readers)
    for kind in (Body, *KINDS):
        for name in kind.__struct_fields__:
            assert f".{name}" in source or f'"{name}"' in source, name


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tok"), 300))


def test_a_token_is_among_its_own_alternatives(tokenizer: Tokenizer) -> None:
    # two ids that are half a character each are spelled alike: the sampled one's value wins
    halves = [i for i in range(256) if tokenizer.token_text(i) == "\ufffd"][:2]
    lp = TokenLogprobs(-3.0, 2, ((halves[0], -0.5), (halves[1], -3.0)))
    found = answers.completion_logprobs(tokenizer, [halves[1]], [lp])
    assert found["top_logprobs"] == [{"\ufffd": -3.0}]
    named = answers.completion_logprobs(tokenizer, [halves[1]], [lp], as_ids=True)
    assert named["top_logprobs"] == [{f"token_id:{halves[0]}": -0.5, f"token_id:{halves[1]}": -3.0}]


def test_an_event_is_the_json_it_looks_like() -> None:
    writer = answers.EventWriter('id"', 5, "m/1", chat=True)
    data = writer.delta(1, 'a"\n', None, ("stop", "x"), True, answers.usage(2, 3, 1))
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2
    assert json.loads(data[6:]) == {
        "id": 'id"', "object": "chat.completion.chunk", "created": 5, "model": "m/1",
        "choices": [{"index": 1, "delta": {"role": "assistant", "content": 'a"\n'}, "logprobs": None,
                     "finish_reason": "stop", "stop_reason": "x"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }  # fmt: skip
