"""The HTTP surface over oracle workers: every byte of an answer is known, streamed or not."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from minserve import metrics
from minserve.request_metrics import OUTCOMES
from minserve.text import Tokenizer
from tests.e2e.oracle import BREAK, LATE_COMPILES, SLOW, SPEAK, oracle_tokens
from tests.e2e.running import (
    REQUEST_S,
    VOCAB,
    Server,
    events,
    running,
    wait_for,
    write_config,
    write_model,
)

TEXTS = ["🙂 and 日本語 мир", "👨‍👩‍👧 family", "naïve — “quoted”"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_model(tmp_path_factory.mktemp("tok")))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    write_model(folder / "m")
    models = [
        {"name": "a", "path": "m", "aliases": ["alpha"]},
        {"name": "b/c", "path": "m", "max_queued_requests": 8},
    ]
    with running(write_config(folder, models)) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> Any:
    answer = http.post(path, json={"model": "a", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> list[Any]:
    answer = http.post(path, json={"model": "a", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = events(answer.text)
    assert found[-1] is None
    assert [e["id"] for e in found[:-1]] == [found[0]["id"]] * (len(found) - 1)
    return found[:-1]


def joined(chunks: list[Any], index: int = 0, chat: bool = False) -> tuple[str, str]:
    """Text and finish reason of one choice; exactly one chunk ends it, and it is the last."""
    mine = [c for e in chunks for c in e["choices"] if c["index"] == index]
    assert [bool(c["finish_reason"]) for c in mine] == [False] * (len(mine) - 1) + [True]
    text = "".join(c["delta"]["content"] if chat else c["text"] for c in mine)
    return text, mine[-1]["finish_reason"]


def test_an_answer_is_what_the_oracle_says(http: httpx.Client, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("hello")
    got = post(http, prompt="hello", max_tokens=9, seed=5)
    want = tokenizer.decode(oracle_tokens(tuple(prompt), 5, 0, 9, VOCAB))
    assert got["choices"][0]["text"] == want
    assert got["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 9,
        "total_tokens": len(prompt) + 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert post(http, prompt=prompt, max_tokens=9, seed=5)["choices"] == got["choices"]
    assert post(http, prompt=prompt, max_tokens=9, seed=6)["choices"] != got["choices"]


@pytest.mark.parametrize("stop", [None, "e", ["qq", "th", "a"]])
def test_streams_say_what_whole_answers_say(http: httpx.Client, stop: Any) -> None:
    for seed in range(8):
        body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 40, "seed": seed, "stop": stop}
        whole = post(http, **body)
        chunks = streamed(http, **body, stream_options={"include_usage": True})
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        for choice in whole["choices"]:
            assert joined(chunks, choice["index"]) == (choice["text"], choice["finish_reason"])
        assert [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]


def test_chat_streams_say_what_whole_answers_say(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 12, "n": 2, "seed": 3}
    whole = post(http, "/v1/chat/completions", **body)
    chunks = streamed(http, "/v1/chat/completions", **body)
    for choice in whole["choices"]:
        assert joined(chunks, choice["index"], chat=True) == (choice["message"]["content"], "length")
        first = next(c for e in chunks for c in e["choices"] if c["index"] == choice["index"])
        assert first["delta"]["role"] == "assistant"
        assert first["delta"]["content"], "the role leaves together with the first text"
    parts = [{"type": "text", "text": "hi"}]
    again = post(http, "/v1/chat/completions", **{**body, "messages": [{"role": "user", "content": parts}]})
    assert again["choices"] == whole["choices"]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_arrive_whole(http: httpx.Client, tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    body = {"prompt": [SPEAK, *ids], "max_tokens": len(ids)}
    assert post(http, **body)["choices"][0]["text"] == text
    chunks = streamed(http, **body)
    assert joined(chunks) == (text, "length")
    assert not any("\ufffd" in c["text"] for e in chunks for c in e["choices"])
    # cut inside a character: what is not whole is not shown
    for cut in range(1, len(ids)):
        shown = post(http, prompt=[SPEAK, *ids], max_tokens=cut)["choices"][0]["text"]
        assert text.startswith(shown)


def test_stop_strings_across_tokens(http: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the END🙂 of it")
    body: dict[str, Any] = {"prompt": [SPEAK, *ids], "max_tokens": len(ids), "stop": ["END🙂 o", "zz"]}
    whole = post(http, **body)
    assert whole["choices"][0]["text"] == "the "
    assert (whole["choices"][0]["finish_reason"], whole["choices"][0]["stop_reason"]) == ("stop", "END🙂 o")
    # what the engine computed beyond the stop is not counted
    upto = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]).endswith("END🙂 o"))
    assert whole["usage"]["completion_tokens"] == upto
    chunks = streamed(http, **body)
    assert joined(chunks) == ("the ", "stop")
    assert post(http, **body, include_stop_str_in_output=True)["choices"][0]["text"] == "the END🙂 o"
    # a start that comes to nothing is shown in the end
    assert joined(streamed(http, **{**body, "stop": "of itt"})) == ("the END🙂 of it", "length")
    assert joined(streamed(http, **body, min_tokens=len(ids))) == ("the END🙂 of it", "length")


def test_stop_token_ids_end_the_text_before_them(http: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one. two")
    dot = tokenizer.encode(".")[0]
    got = post(http, prompt=[SPEAK, *ids], max_tokens=len(ids), stop_token_ids=[dot])
    assert got["choices"][0]["text"] == "one"
    assert (got["choices"][0]["finish_reason"], got["choices"][0]["stop_reason"]) == ("stop", dot)
    assert got["usage"]["completion_tokens"] == ids.index(dot) + 1


def test_echo_and_logprobs_line_up(http: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("echo me")
    got = post(http, prompt=ids, max_tokens=2, echo=True, logprobs=1)["choices"][0]
    lp = got["logprobs"]
    assert len({len(lp[k]) for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}) == 1
    assert len(lp["tokens"]) == len(ids) + 2
    assert lp["token_logprobs"][0] is lp["top_logprobs"][0] is None
    # evaluation tools compare these two for equality
    for token, value, top in zip(
        lp["tokens"][1:], lp["token_logprobs"][1:], lp["top_logprobs"][1:], strict=True
    ):
        assert top[token] == value
    assert got["text"].startswith("echo me")
    assert lp["text_offset"] == list(itertools.accumulate([0, *map(len, lp["tokens"][:-1])]))
    alone = post(http, prompt="echo me", max_tokens=0, echo=True, logprobs=1)
    assert alone["choices"][0]["logprobs"]["tokens"] == lp["tokens"][: len(ids)]
    assert alone["usage"]["completion_tokens"] == 0
    chunks = streamed(http, prompt=ids, max_tokens=2, echo=True, logprobs=1)
    assert joined(chunks)[0] == got["text"]
    assert [t for e in chunks for c in e["choices"] for t in c["logprobs"]["tokens"]] == lp["tokens"]
    named = post(http, prompt=ids, max_tokens=1, logprobs=0, return_tokens_as_token_ids=True)["choices"][0][
        "logprobs"
    ]
    assert named["tokens"][0].startswith("token_id:")


def test_chat_logprobs(http: httpx.Client) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    content = post(http, "/v1/chat/completions", **body)["choices"][0]["logprobs"]["content"]
    assert [len(c["top_logprobs"]) for c in content] == [2, 2, 2]
    assert all(c["top_logprobs"][0] == {k: c[k] for k in ("token", "logprob", "bytes")} for c in content)
    assert content[0]["bytes"] == [*bytes(content[0]["bytes"])]


def test_usage_on_every_chunk(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(http, prompt="x", max_tokens=5, stream_options=options)
    counts = [e["usage"]["completion_tokens"] for e in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_the_openai_client_is_at_home(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["a", "b/c"]
    assert client.models.retrieve("b/c").id == "b/c"
    whole = client.completions.create(model="alpha", prompt="hi", max_tokens=6, seed=1)
    parts = client.completions.create(model="a", prompt="hi", max_tokens=6, seed=1, stream=True)
    assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
    messages: Any = [{"role": "user", "content": "hi"}]
    said = client.chat.completions.create(model="a", messages=messages, max_completion_tokens=6)
    stream = client.chat.completions.create(
        model="a", messages=messages, max_completion_tokens=6, stream=True
    )
    assert "".join(p.choices[0].delta.content or "" for p in stream) == said.choices[0].message.content
    assert said._request_id
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length is"):
        client.completions.create(model="a", prompt=[1] * 300)


def test_a_failure_in_mid_stream_is_an_event_and_a_cut(server: Server, client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "a", "prompt": [BREAK, 1], "max_tokens": 200, "stream": True}

    def let_it_break() -> None:
        """Another request; before there is anything to read a failure is a status."""
        asked = {"model": "a", "prompt": [BREAK]}
        whole = httpx.post(f"{server.url}/v1/completions", json=asked, timeout=REQUEST_S)
        assert whole.status_code == 500

    got: list[bytes] = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=REQUEST_S) as r:
        parts = r.iter_raw()
        got.append(next(parts))
        let_it_break()
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            got.extend(parts)
    last = events(b"".join(got).decode())[-1]
    assert last["error"]["code"] == "engine_error"
    stream = iter(client.completions.create(**body))
    assert next(stream).choices
    let_it_break()
    with pytest.raises(openai.APIError):
        list(stream)
    server.assert_idle()


def test_tokenize_and_back(http: httpx.Client, tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        found = post(http, "/tokenize", prompt=text, return_token_strs=True)
        assert found["tokens"] == tokenizer.encode(text)
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert post(http, "/detokenize", tokens=found["tokens"]) == {"prompt": text}
    chat = post(http, "/tokenize", messages=[{"role": "user", "content": "hi"}])
    assert post(http, "/detokenize", tokens=chat["tokens"]) == {"prompt": "user: hi\nassistant: "}


def test_health_ready_version_and_ids(http: httpx.Client) -> None:
    assert http.get("/health").json()["status"] == "ok"
    assert http.get("/ready").status_code == http.get("/ready?model=a").status_code == 200
    assert http.get("/ready?model=zzz").status_code == 404
    assert http.get("/version").json()["version"]
    assert http.head("/health").status_code == 200
    assert http.get("/health", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    for bad in ("a b", "x" * 200, "é".encode(), "a/b"):
        assert http.get("/nope", headers={"x-request-id": bad}).headers["x-request-id"].startswith("req-")
    assert "access-control-allow-origin" not in http.get("/health", headers={"origin": "http://evil"}).headers


def test_a_full_queue_says_come_again(http: httpx.Client, server: Server) -> None:
    body = {"model": "b/c", "prompt": [SLOW, 1], "n": 8, "max_tokens": 100}
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=20) as r:
        parts = r.iter_raw()  # kept: a generator that is dropped hangs up
        next(parts)
        refused = http.post("/v1/completions", json={**body, "n": 1})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert (
            http.post("/v1/completions", json={**body, "model": "a", "prompt": "x", "n": 1}).status_code
            == 200
        )
    assert http.post("/v1/completions", json={**body, "n": 9}).status_code == 400  # never fits
    server.assert_idle()


def test_metrics_are_what_the_workers_report(http: httpx.Client) -> None:
    post(http, prompt="hello", max_tokens=9)

    def text() -> str:
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        return answer.text

    # workers are asked once a second
    wait_for(lambda: f'late_compiles_total{{model_name="b/c"}} {LATE_COMPILES}' in text(), 10, text)
    wait_for(lambda: 'steps_total{model_name="a"} 0\n' not in text(), 10, text)
    series = [line for line in text().splitlines() if not line.startswith("#")]
    label = r'(model_name|pool)="[^"]+"'
    assert all(
        re.fullmatch(rf"minserve:[a-z_]+\{{{label}(,{label})?\}} \d+(\.\d+)?", line) for line in series
    )
    assert len({line.rsplit(" ", 1)[0] for line in series}) == len(series)
    # of a model, of the pool, of a model in the pool
    kinds = Counter(tuple(re.findall(r"(\w+)=", line)) for line in series)
    of_a_model = 2 * (len(metrics.MODEL_METRICS) + 2 + len(OUTCOMES) + 3)
    assert kinds == {("model_name",): of_a_model, ("pool",): 6, ("pool", "model_name"): 2 * 21}
    assert "# TYPE minserve:late_compiles_total counter" in text()
    assert http.head("/metrics").status_code == 200


GETS = [
    "/v1/models",
    "/v1/models/a",
    "/version",
    "/docs",
    "/openapi.json",
    "/",
    "/metrics",
    "//health",
    "/health/",
    "/health%2f",
    "/ready/x",
]
POSTS = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"]
WRONG_KEYS = (b"", b"Bearer", b"Bearer key-three", b"Basic key-one", b"Bearer key-one\xe9", b"Bearer key-on")


def test_keys_guard_every_route_that_is_not_public(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "keys").write_text("# two\nkey-one\nkey-two\n")
    config = write_config(tmp_path, [{"name": "a", "path": "m"}], api_keys_file="keys")
    with running(config) as server, httpx.Client(base_url=server.url, timeout=REQUEST_S) as http:
        for method, path in [*(("GET", p) for p in GETS), *(("POST", p) for p in POSTS)]:
            for key in WRONG_KEYS:
                answer = http.request(method, path, headers={"authorization": key})
                assert answer.status_code == 401, (path, key)
        assert http.get("/health").status_code == http.get("/ready").status_code == 200
        for key in (b"Bearer key-one", b"bearer key-two"):
            assert http.get("/v1/models", headers={"authorization": key}).status_code == 200
        assert "key-one" not in server.output


def test_errors_have_openais_shape(http: httpx.Client) -> None:
    for answer in (
        http.get("/nope"),
        http.get("/v1/completions"),
        http.post("/v1/completions", content=b"{"),
    ):
        error = json.loads(answer.text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
