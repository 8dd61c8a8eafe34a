"""What a policy gives up leaves the engine once, as an event that says so; the others go on."""

import time
from pathlib import Path

import pytest

from minserve import LLM, SamplingParams
from minserve.engine import EngineRequest
from tests.tiny import write_llama, write_tokenizer

PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shed")
    write_llama(folder, seed=1)
    write_tokenizer(folder)
    return folder


def request(rid: int, late_s: float, ttft_s: float = 5.0) -> EngineRequest:
    prompt = tuple(range(1, 40))
    return EngineRequest(
        rid=rid, prompt=prompt, params=PARAMS, arrival_s=time.monotonic() - late_s, ttft_s=ttft_s
    )


def test_the_hopeless_are_shed_and_the_others_served(folder: Path) -> None:
    keys = {"policy": "slack", "policy_options": {"shed": "hopeless"}}
    with LLM(folder, device="cpu", pool_bytes=16 << 20, reserve_tokens=256, **keys) as llm:  # type: ignore[arg-type]
        engine = llm.engine
        for rid, late_s in ((1, 60.0), (2, 0.0), (3, 60.0)):
            engine.add(request(rid, late_s))
        said = {}
        while engine.has_work:
            for event in engine.step():
                if event.finish_reason is not None:
                    assert event.rid not in said
                    said[event.rid] = event
        assert {rid: e.finish_reason for rid, e in said.items()} == {1: "shed", 2: "length", 3: "shed"}
        assert said[1].token_ids == ()
        assert "in time" in (said[1].error or "")
        assert (engine.counters.shed, engine.counters.failed, engine.counters.finished) == (2, 0, 1)
        assert not engine.has_requests
        assert not engine.abort(1), "it is gone"
        engine.batcher.check()


def test_nobody_is_shed_unless_the_policy_says_so(folder: Path) -> None:
    with LLM(folder, device="cpu", pool_bytes=16 << 20, reserve_tokens=256) as llm:
        llm.engine.add(request(1, 60.0))
        ends = []
        while llm.engine.has_work:
            ends += [e.finish_reason for e in llm.engine.step() if e.finish_reason]
        assert ends == ["length"]


def test_a_policy_that_does_not_exist_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"policy.*slack, fcfs.*'?edf"):
        LLM(folder, device="cpu", pool_bytes=16 << 20, policy="edf")
