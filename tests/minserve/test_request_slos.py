"""SLOs, priorities and outcomes of single requests over HTTP: what reaches the worker, what is refused, what is counted."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from minserve.protocol import CompletionBody
from minserve.wire import TokenEvent
from tests.minserve.site import COMPLETIONS, TIERS, VOCAB, run, settled, three
from tests.tiny import write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("m"), VOCAB)


def test_an_slo_reaches_the_worker(folder: Path) -> None:
    async def story() -> None:
        s = three(folder)

        async def asked(**body: Any) -> tuple[float, float, int]:
            task = s.begin(**{"model": "w8", "prompt": [1], **body})
            await settled()
            (host,) = (h for h in s.hosts.values() if h.num_requests)
            ((request, _),) = host.asked.values()
            host.say()
            await task
            return request.ttft_s, request.tpot_s, request.priority

        assert await asked() == (9.0, 1.0, 0)
        assert await asked(slo={"ttft_ms": 250, "tpot_ms": 12.5}, priority=-3) == (0.25, 0.0125, -3)
        assert await asked(slo={"tpot_ms": 20}) == (9.0, 0.02, 0)
        assert (
            await asked(slo={"ttft_ms": None})
            == await asked(slo={})
            == await asked(slo=None)
            == (9.0, 1.0, 0)
        )
        # a group has that of its best precision, whoever answers
        s.hosts["fp16"].state = "asleep"
        assert await asked(model="any") == (0.4, 0.1, 0)

    run(story)


HOSTILE = [
    ({"slo": 5}, "slo"),
    ({"slo": "fast"}, "slo"),
    ({"slo": [1, 2]}, "slo"),
    ({"slo": {"ttft": 5}}, "ttft_ms and tpot_ms, got 'ttft'"),
    ({"slo": {"x" * 5000: 5}}, "ttft_ms and tpot_ms"),
    ({"slo": {"ttft_ms": "5"}}, "slo"),
    ({"slo": {"ttft_ms": True}}, "slo"),
    ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms must be milliseconds in [1, 3.6e+06], got 0"),
    ({"slo": {"ttft_ms": -1}}, "slo.ttft_ms"),
    ({"slo": {"ttft_ms": 1e300}}, "slo.ttft_ms"),
    ({"slo": {"tpot_ms": 0.05}}, "slo.tpot_ms must be milliseconds in [0.1, 3.6e+06], got 0.05"),
    ({"slo": {"tpot_ms": {"a": 1}}}, "slo"),
    ({"priority": 1 << 40}, "priority"),
    ({"priority": "high"}, "priority"),
    ({"priority": 1.5}, "priority"),
    ({"model": ["any"]}, "model"),
    ({"model": "any" * 500}, "does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "says"), HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
def test_hostile_bodies_are_one_clear_refusal(folder: Path, body: dict[str, Any], says: str) -> None:
    async def story() -> None:
        s = three(folder)
        answer = await s.ask(COMPLETIONS, **{"model": "any", "prompt": "x", **body})
        assert answer.status in (400, 404)
        said = answer.json["error"]["message"]
        assert says in said
        assert len(said) < 700
        assert not any(h.num_requests for h in s.hosts.values())

    run(story)


def test_outcomes_are_counted_by_model_and_group(folder: Path) -> None:
    async def story() -> None:
        s = three(folder)

        async def one(wait_s: float, gap_s: float = 0.0, **body: Any) -> None:
            task = s.begin(**{"model": "any", "prompt": [1], "max_tokens": 3, **body})
            await asyncio.sleep(wait_s)
            for i in range(3):
                await asyncio.sleep(gap_s if i else 0)
                for host in s.hosts.values():
                    host.say(finish="length" if i == 2 else None)
            await task

        await one(0.0)
        await one(0.03, slo={"ttft_ms": 20})
        await one(0.0, 0.03, slo={"tpot_ms": 15})
        await one(0.03, 0.03, slo={"ttft_ms": 20, "tpot_ms": 15}, model="w4")
        found = s.metrics
        by = [name for name in TIERS if found[f'slo_missed_ttft_total{{model_name="{name}"}}']]
        assert by[-1] == "w4"
        names = ("slo_requests", "slo_attained", "slo_missed_ttft", "slo_missed_tpot", "requests_shed")

        def sums(prefix: str) -> list[float]:
            return [sum(v for k, v in found.items() if k.startswith(f"{prefix}{n}_total{{")) for n in names]

        assert sums("") == [4, 1, 2, 2, 0]
        assert sums("group_") == [3, 1, 1, 1, 0]

    run(story)


def test_who_left_is_not_counted_and_nothing_stays_queued(folder: Path) -> None:
    async def story() -> None:
        s = three(folder)
        job = await s.front.completion(CompletionBody(model="fp16", prompt=[1] * 40, n=2))
        served = s.front.models["fp16"]
        assert (served.waiting_tokens, served.pace.queued_tokens, served.pace.waiting) == (80, 72, 2)
        job.close()
        assert (served.waiting_tokens, served.pace.queued_tokens, served.pace.waiting) == (0, 0, 0)
        assert served.outcomes.requests == 0
        job = await s.front.completion(CompletionBody(model="fp16", prompt=[1] * 40))
        s.hosts["fp16"].say(finish=None)
        assert (served.waiting_tokens, served.pace.queued_tokens, served.pace.decoding) == (0, 0, 1)
        job.close()
        assert (served.pace.waiting, served.pace.decoding, served.outcomes.requests) == (0, 0, 0)

    run(story)


# -- shed


def test_a_shed_request_is_a_503_that_says_so(folder: Path) -> None:
    async def story() -> None:
        s = three(folder, {"policy": "best"})
        task = s.begin(model="any", prompt=["x", "y"])
        await settled()
        ((_, first), _) = s.hosts["fp16"].asked.values()
        first.token(TokenEvent(next(iter(s.hosts["fp16"].asked)), (), finish_reason="shed", error="too late"))
        answer = await task
        assert answer.status == 503
        assert answer.json["error"] == {
            "message": "too late", "type": "overloaded_error", "param": None, "code": "shed",
        }  # fmt: skip
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert s.hosts["fp16"].num_requests == 0, "the other prompt of the request is aborted"
        assert s.metrics['requests_shed_total{model_name="fp16"}'] == 2
        assert s.metrics['group_requests_shed_total{group="any",model_name="fp16"}'] == 2
        assert s.metrics['slo_attained_total{model_name="fp16"}'] == 0

    run(story)


def test_a_stream_that_is_shed_ends_with_an_event_and_a_cut(folder: Path) -> None:
    async def story() -> None:
        s = three(folder)
        task = s.begin(model="fp16", prompt="x", stream=True, max_tokens=5)
        await settled()
        s.hosts["fp16"].say(finish=None)
        await settled()
        s.hosts["fp16"].say(tokens=(), finish="shed")
        answer = await task
        assert (answer.status, answer.whole) == (200, False)
        assert answer.events[-1]["error"]["code"] == "shed"
        assert answer.events[0]["choices"][0]["text"]

    run(story)


def test_a_worker_that_fails_is_a_failed_request(folder: Path) -> None:
    async def story() -> None:
        s = three(folder)
        task = s.begin(model="fp16", prompt="x")
        await settled()
        s.hosts["fp16"].say(tokens=(), finish="error", error="not finite")
        assert (await task).status == 500
        assert s.metrics['requests_failed_total{model_name="fp16"}'] == 1

    run(story)
