"""The front end's turns without a server: readiness, and no answer so long that the others stand still."""

import asyncio
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from starlette.requests import Request

from minserve.frontend import Frontend
from minserve.protocol import CompletionBody
from minserve.responses import Response
from minserve.server import Pages

PROMPTS = 50


def served(name: str, *, stalled: bool) -> Any:
    first_load = asyncio.Event()
    first_load.set()
    host = SimpleNamespace(name=name, state="ready", stalled=stalled, first_load=first_load, loaded=None)
    return SimpleNamespace(entry=SimpleNamespace(name=name, model=name), host=host)


@pytest.mark.parametrize(("query", "status"), [("", 200), ("model=well", 200), ("model=stuck", 503)])
def test_a_stalled_model_is_not_ready(query: str, status: int) -> None:
    models = {"well": served("well", stalled=False), "stuck": served("stuck", stalled=True)}
    front: Any = SimpleNamespace(
        models=models, draining=False, target=lambda name: SimpleNamespace(members=(models[name],))
    )
    request = Request({"type": "http", "path": "/ready", "query_string": query.encode(), "headers": []})
    answer = asyncio.run(Pages(front, 1000).ready(request))
    assert answer.status_code == status
    assert "stuck" not in orjson.loads(answer.body)["models"]


async def turns_during(work: Any) -> int:
    """How often others had their turn until `work` was done."""
    task, turns = asyncio.ensure_future(work), 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    await task
    return turns


def test_others_have_their_turn_between_the_choices_of_a_long_answer() -> None:
    sequences = [
        SimpleNamespace(
            index=i, text=f"text {i}", finish=("length", None), token_ids=[], logprobs=[],
            prompt_logprobs=None, prompt=[], num_tokens=1, closed=False,
        )
        for i in range(PROMPTS)
    ]  # fmt: skip
    job: Any = SimpleNamespace(
        body=CompletionBody(prompt="x"), served=served("well", stalled=False), tokenizer=None, done=True,
        error=None, sequences=sequences, prompt_tokens=1, completion_tokens=PROMPTS, cached_tokens=0,
        close=lambda: None,
    )  # fmt: skip
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def story() -> int:
        return await turns_during(Response(job).run(asyncio.Event().wait, send))

    assert asyncio.run(story()) >= PROMPTS
    assert [c["text"] for c in orjson.loads(sent[1]["body"])["choices"]] == [s.text for s in sequences]


def test_others_have_their_turn_between_the_prompts_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    front: Any = object.__new__(Frontend)

    async def encode(*_: Any) -> list[int]:
        return [1]

    for name, value in (
        ("target", lambda name: None),
        ("able", lambda *_: [None]),
        ("encode", encode),
        ("_admit", lambda *_: None),
    ):
        monkeypatch.setattr(front, name, value, raising=False)

    async def story() -> int:
        return await turns_during(front.completion(CompletionBody(prompt=["x"] * PROMPTS)))

    assert asyncio.run(story()) >= PROMPTS
