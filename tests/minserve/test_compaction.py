"""Compaction in the engine: blocks move between steps, and no token is another."""

import random
from pathlib import Path
from typing import Any

import pytest

from minserve import LLM, SamplingParams
from minserve.engine import Engine, EngineRequest, TokenEvent
from tests.tiny import write_llama, write_tokenizer

MIX = {"model.layers.0": "fp32", "model.layers.1": "int4", "*": "int8"}
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True),
    SamplingParams(seed=5, max_tokens=30, ignore_eos=True, top_k=50, repetition_penalty=1.2),
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compaction")
    return write_tokenizer(write_llama(path, seed=6, num_hidden_layers=3, head_dim=32))


def load(folder: Path, **keys: Any) -> LLM:
    steps = {"max_num_batched_tokens": 96, "max_num_seqs": 24, "max_model_len": 256}
    return LLM(
        folder, device="cpu", **({"dtype": "fp32", "pool_bytes": 10 << 20, "overlap": True} | steps | keys)
    )


def requests(n: int) -> list[EngineRequest]:
    rng = random.Random(n)
    shared = [rng.randrange(290) for _ in range(70)]
    made = []
    for rid in range(n):
        prompt = (*shared[: rng.randint(1, 70)], *(rng.randrange(290) for _ in range(rng.randint(1, 30))))
        made.append(EngineRequest(rid=rid, prompt=prompt, params=PARAMS[rid % 3]))
    return made


def serve(engine: Engine, compact: bool) -> dict[int, list[int]]:
    """All tokens of 40 requests that come a few at a time; `compact`: all there is to move, before every step."""
    waiting, tokens = requests(40), {rid: [] for rid in range(40)}
    for turn in range(3000):
        if waiting and turn % 3 == 0:
            engine.add(waiting.pop(0))
        if compact:
            engine.batcher.compactor.ask(8, 10**6)
        events: list[TokenEvent] = engine.step()
        for event in events:
            assert event.error is None, event.error
            tokens[event.rid] += event.token_ids
        if turn % 20 == 0:
            engine.batcher.check()
        if not engine.has_work and not waiting:
            break
    assert not engine.has_requests
    return tokens


@pytest.mark.parametrize(
    "keys",
    [
        {},
        pytest.param({"overlap": False}, marks=pytest.mark.slow),
        pytest.param({"enable_prefix_caching": False}, marks=pytest.mark.slow),
        {"kv_dtype": "int8", "kv_dtype_overrides": MIX},
        {"dtype": "bf16", "kv_dtype": "int4", "deterministic": True},
    ],
    ids=["float32", "one-at-a-time", "no-cache", "mixed", "int4-deterministic"],
)
def test_no_token_is_another(folder: Path, keys: dict[str, Any]) -> None:
    with load(folder, **keys) as llm:
        want = serve(llm.engine, compact=False)
    with load(folder, **keys) as llm:
        assert serve(llm.engine, compact=True) == want
        counters, compactor = llm.engine.counters, llm.engine.batcher.compactor
        assert counters.moved_blocks > 20, "hardly anything was moved"
        assert 0 < counters.move_s < 60
        assert compactor.num_vacated > 5
        assert llm.engine.batcher.blocks.num_live == 0
        llm._local.sets.check()
        llm._local.pool.table.check()


def test_a_step_copies_no_longer_than_it_may(folder: Path) -> None:
    """From the copies so far; the first moves one set."""
    with load(folder) as llm:
        engine, asked = llm.engine, []
        engine.batcher.compactor.ask = lambda sets, blocks: asked.append((sets, blocks))  # type: ignore[method-assign]
        engine.compact(3)
        engine.counters.moved_blocks, engine.counters.move_s = 500, 0.25
        engine.compact(4)
    assert asked == [(3, 0), (4, 2)]
