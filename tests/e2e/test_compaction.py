"""Compaction between real workers: one decodes in sets that are mostly empty, another is short of memory.  Float32."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minserve import LLM, SamplingParams
from minserve.engine import EngineRequest
from minserve.wire import Submit
from tests.e2e.fleet import Fleet, Heard, until
from tests.e2e.running import VOCAB
from tests.tiny import write_llama, write_tokenizer

KEYS: dict[str, Any] = {
    "dtype": "fp32",
    "max_model_len": 256,
    "max_num_seqs": 64,
    "reserve_tokens": 64,
    # all that the sets hold is of requests: nothing can be given but by moving
    "enable_prefix_caching": False,
}
LAYERS = {"sparse": 3, "short": 2}
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
BRIEF = dataclasses.replace(LONG, max_tokens=4)
Asked = list[tuple[list[int], SamplingParams]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for seed, (name, layers) in enumerate(LAYERS.items()):
        path = write_llama(
            tmp_path_factory.mktemp(name), seed=seed, vocab_size=VOCAB, num_hidden_layers=layers
        )
        made[name] = write_tokenizer(path, VOCAB)
    return made


@pytest.fixture
def fleet(folders: dict[str, Path]) -> Iterator[Fleet]:
    models = [{"name": name, "path": str(path), **KEYS} for name, path in folders.items()]
    fleet = Fleet(models, 5 << 20)
    yield fleet
    fleet.close()


def prompts(n: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, VOCAB - 2) for _ in range(length)] for _ in range(n)]


def alone(folder: Path, asked: Asked) -> list[list[int]]:
    heard = [Heard() for _ in asked]
    with LLM(folder, device="cpu", pool_bytes=32 << 20, **KEYS) as llm:
        for rid, (prompt, params) in enumerate(asked):
            llm.engine.add(EngineRequest(rid=rid, prompt=tuple(prompt), params=params))
        while llm.engine.has_work:
            for event in llm.engine.step():
                heard[event.rid].token(event)
    return [h.tokens for h in heard]


def ask(fleet: Fleet, name: str, asked: Asked) -> list[Heard]:
    heard = [Heard() for _ in asked]
    for sink, (prompt, params) in zip(heard, asked, strict=True):
        fleet.host(name).submit(Submit(fleet.agent.next_rid(), tuple(prompt), params), sink)
    return heard


async def story(fleet: Fleet, sparse: Asked, short: Asked) -> tuple[list[Heard], list[Heard]]:
    first = ask(fleet, "sparse", sparse)
    brief = sum(params is BRIEF for _, params in sparse)
    await until(lambda: sum(h.end is not None for h in first) >= brief)
    second = ask(fleet, "short", short)
    await until(lambda: all(h.end for h in first + second))
    return first, second


def test_free_blocks_in_one_models_sets_become_another_models_memory(
    fleet: Fleet, folders: dict[str, Path]
) -> None:
    """Both say what they say alone."""
    table = fleet.pool.table
    shape = table.plan.models["sparse"]
    # a long one in four: of the blocks that the brief ones leave, hardly a set is empty
    many = (table.plan.num_slabs // shape.layers * shape.slots) // (96 // shape.block_tokens + 2)
    many = min(many, 60)
    said: dict[str, int] = {}
    # where the machine stops for a moment, the long ones end before anybody is short of memory, and nothing is to be moved
    for attempt in range(3):
        sparse: Asked = [
            (p, LONG if i % 4 == 0 else BRIEF) for i, p in enumerate(prompts(many, 96, 1 + 2 * attempt))
        ]
        short: Asked = [(p, BRIEF) for p in prompts(24, 240, 2 + 2 * attempt)]
        first, second = fleet.call(story(fleet, sparse, short))
        assert {h.end for h in first + second} == {"length"}
        assert [h.tokens for h in first] == alone(folders["sparse"], sparse)
        assert [h.tokens for h in second] == alone(folders["short"], short)
        said = table.status(table.owner_of("sparse"))
        print(f"{said['vacated']} sets emptied, {said['moved_bytes']} bytes moved; {table.counts()}")
        if said["vacated"]:
            break
    assert said["vacated"] > 0, "nothing was moved"
    assert said["moved_bytes"] > 0
