"""Real workers on a tiny random float32 Llama: the server says what the LLM class says.  A third model has no weights."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from minserve import LLM, SamplingParams
from minserve.pool import SlabPool
from tests.e2e.running import VOCAB, Server, running, wait_for, write_config, write_model
from tests.tiny import write_llama, write_tokenizer

PROMPTS = ["hello", "the rain", "a", "one two three four five six"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    write_llama(folder / "tiny", seed=3, vocab_size=VOCAB)
    write_tokenizer(folder / "tiny", VOCAB)
    write_model(folder / "empty")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    models = [
        {"name": "left", "path": "tiny", "group": "any", "tier": 1, "policy_options": {"shed": "hopeless"}},
        {
            "name": "right",
            "path": "tiny",
            "quantization": "w8a8-int8",
            "kv_dtype": "int8",
            "deterministic": True,
            "group": "any",
            "tier": 2,
        },
        {"name": "broken", "path": "empty", "group": "any", "tier": 0},
    ]
    with running(write_config(folder, models), module="minserve.serve") as server:
        yield server


def complete(server: Server, **body: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 20, **body}
    answer = httpx.post(f"{server.url}/v1/completions", json=fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_server_says_what_the_library_says(server: Server, folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    for name, keys in (
        ("left", {}),
        ("right", {"quantization": "w8a8-int8", "kv_dtype": "int8", "deterministic": True}),
    ):
        with LLM(folder / "tiny", device="cpu", pool_bytes=64 << 20, reserve_tokens=256, **keys) as llm:
            want = [o.outputs[0].text for o in llm.generate(PROMPTS, params)]
            got = complete(server, model=name, prompt=PROMPTS, ignore_eos=True)
            assert [c["text"] for c in got["choices"]] == want
            sampled = SamplingParams(max_tokens=12, seed=11, n=2, stop=["e"])
            want = [[o.text for o in r.outputs] for r in llm.generate(PROMPTS, sampled)]
            got = complete(
                server, model=name, prompt=PROMPTS, temperature=1, seed=11, n=2, stop="e", max_tokens=12
            )
            assert [c["text"] for c in got["choices"]] == [t for pair in want for t in pair]


def test_a_group_answers_as_the_precision_that_it_names(server: Server) -> None:
    for prompt in PROMPTS:
        got = complete(server, model="any", prompt=prompt)
        assert got["model"] == "left", "the best one cannot be loaded"
        assert got["choices"] == complete(server, model="left", prompt=prompt)["choices"]
        # nobody is that fast: the lesser miss answers
        got = complete(server, model="any", prompt=prompt, slo={"tpot_ms": 0.1})
        assert got["choices"] == complete(server, model=got["model"], prompt=prompt)["choices"]


def test_a_request_that_cannot_be_in_time_is_shed_where_the_policy_says_so(server: Server) -> None:
    # more than a step can have: whoever waits for the second is late by then
    prompts = [[7 + i] * 200 for i in range(24)]
    body = {"model": "left", "prompt": prompts, "max_tokens": 4, "ignore_eos": True, "slo": {"ttft_ms": 1}}
    for stream in (False, True):
        answer = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": stream}, timeout=60)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shed"
        assert int(answer.headers["retry-after"]) >= 1
    assert complete(server, **{**body, "model": "right"})["usage"]["completion_tokens"] == 96
    text = httpx.get(f"{server.url}/metrics").text
    assert 'minserve:requests_shed_total{model_name="left"} 48\n' in text
    server.assert_idle(spare_slabs=1000)  # prompts stay cached


def test_echoed_logprobs_are_the_models(server: Server, folder: Path) -> None:
    with LLM(folder / "tiny", device="cpu", pool_bytes=64 << 20, reserve_tokens=256) as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode(PROMPTS[-1])
        logits = llm.logits(ids).double().numpy()
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = [logs[i, t] for i, t in enumerate(ids[1:])]
    got = complete(server, model="left", prompt=ids, echo=True, logprobs=3, max_tokens=0)["choices"][0][
        "logprobs"
    ]
    assert got["token_logprobs"][0] is None
    np.testing.assert_allclose(got["token_logprobs"][1:], want, atol=1e-4)


def test_what_cannot_run_is_refused(server: Server) -> None:
    body = {"model": "left", "prompt": [5] * 255, "max_tokens": 50, "temperature": 0}
    assert complete(server, **body)["usage"]["completion_tokens"] == 1  # clamped to the window
    answer = httpx.post(f"{server.url}/v1/completions", json={**body, "prompt": [5] * 256})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    failed = httpx.post(f"{server.url}/v1/completions", json={**body, "model": "broken"})
    assert (failed.status_code, failed.json()["error"]["code"]) == (503, "model_failed")
    assert "model broken failed:" in server.output


def streamed_usage(server: Server, route: str = "completions", **body: Any) -> Any:
    fields = {
        "temperature": 0,
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    answer = httpx.post(f"{server.url}/v1/{route}", json=fields, timeout=60)
    *_, last, done = [line for line in answer.text.splitlines() if line]
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))["usage"]


def cached(usage: Any) -> int:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    found = usage["prompt_tokens_details"]["cached_tokens"]
    assert isinstance(found, int)
    return found


def metric(server: Server, name: str, model: str = "left") -> float:
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f'minserve:{name}{{model_name="{model}"}}'):
            return float(line.split()[-1])
    raise AssertionError(f"no metric {name} of {model}")


def settled(server: Server) -> tuple[float, ...]:
    """Queries and hits of the model left, once its worker has told of all that it did before."""
    found: list[tuple[float, ...]] = []

    def same_twice() -> bool:
        if found:
            time.sleep(1.2)  # a worker is asked once a second
        names = ("prefix_cache_queries_total", "prefix_cache_hits_total")
        found.append(tuple(metric(server, name) for name in names))
        return found[-2:-1] == found[-1:]

    wait_for(same_twice, 30, server.describe)
    return found[-1]


def test_usage_says_what_was_cached(server: Server) -> None:
    """float32: 16 tokens a block, so 64 of these 70 are found."""
    prompt = [(11 * i) % 390 for i in range(70)]
    queries, hits = settled(server)
    first = complete(server, model="left", prompt=prompt)
    again = complete(server, model="left", prompt=prompt)
    assert (cached(first["usage"]), cached(again["usage"])) == (0, 64)
    assert again["choices"] == first["choices"]
    assert cached(streamed_usage(server, model="left", prompt=prompt)) == 64
    both = complete(server, model="left", prompt=[prompt, prompt[:40]], n=2, temperature=1)
    assert cached(both["usage"]) == 64 + 32, "a prompt counts once, however many answers it has"
    assert cached(complete(server, model="left", prompt=prompt, cache_salt="mine")["usage"]) == 0
    salted = complete(server, model="left", prompt=prompt, cache_salt="mine")
    assert cached(salted["usage"]) == 64
    assert salted["choices"] == first["choices"]
    assert cached(complete(server, model="left", prompt=prompt, cache_salt="other")["usage"]) == 0
    # echoed log probabilities are computed, and no query
    echoed = complete(server, model="left", prompt=prompt, echo=True, logprobs=1, max_tokens=1)
    assert cached(echoed["usage"]) == 0

    asked = 2 * 70 + 70 + 2 * (70 + 40) + 3 * 70
    found = 64 + 64 + 2 * (64 + 32) + 64
    assert settled(server) == (queries + asked, hits + found)
    assert metric(server, "prefix_cache_blocks") >= 3 * 4


def test_chat_says_what_was_cached(server: Server) -> None:
    body = {"model": "left", "temperature": 0, "max_tokens": 5, "cache_salt": "chat"}
    body["messages"] = [{"role": "user", "content": "tell me a story of the sea and of the wind that sank"}]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    again = streamed_usage(server, "chat/completions", **body)
    assert cached(answer["usage"]) == 0
    assert cached(again) == (again["prompt_tokens"] - 1) // 16 * 16 > 0


@pytest.mark.parametrize("salt", ["", "x" * 1025, 5])
def test_a_salt_that_is_none_is_refused(server: Server, salt: Any) -> None:
    body = {"model": "left", "prompt": "a", "cache_salt": salt}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


def attach(server: Server) -> SlabPool:
    """The server's own pool, through its descriptors."""
    fds = {}
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        name = os.readlink(link)
        if "minserve-slab" in name:
            fds["table" if "table" in name else "pool"] = os.open(link, os.O_RDWR)
    pool = SlabPool.attach(fds["table"], fds["pool"])
    for fd in fds.values():
        os.close(fd)
    return pool
