"""Tokens of a block: planned for the pool, said in the model's entry, and without effect on what is computed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from minserve import LLM
from minserve.agent import Agent
from minserve.config import Config, GpuConfig, ModelEntry
from minserve.resolve import ResolvedModel, plan_pool, resolve_model, settle_blocks
from sched.slabs import MAX_TAIL
from tests.tiny import write_llama

IDS = [(7 * i * i + 3 * i) % 290 for i in range(70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("blocks"), seed=34, num_hidden_layers=3)


def resolved(folder: Path, **keys: Any) -> ResolvedModel:
    return resolve_model(Config.single(folder, **keys).models[0], "cpu")


@pytest.mark.parametrize(("kv_dtype", "sizes"), [("fp32", (16, 64)), ("int8", (16, 32)), ("int4", (32, 64))])
def test_blocks_of_any_size_store_the_same(folder: Path, kv_dtype: str, sizes: tuple[int, int]) -> None:
    found = []
    for tokens in sizes:
        keys = {"kv_dtype": kv_dtype, "kv_block_tokens": tokens, "max_model_len": 128, "max_num_seqs": 4}
        with LLM(folder, device="cpu", pool_bytes=32 << 20, **keys) as llm:
            found.append(llm.logits(IDS))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"kv_dtype": "int4", "kv_block_tokens": 16},
            "a power of two from 32 to 256 with kv_dtype int4, got 16",
        ),
        ({"kv_block_tokens": 48}, "a power of two from 16 to 256 with kv_dtype fp32, got 48"),
    ],
)
def test_blocks_that_no_kernel_takes_are_refused(folder: Path, keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=rf"models\[m\]\.kv_block_tokens must be auto or {says}"):
        resolved(folder, name="m", **keys)


# slabs of up to 16 KiB: blocks of 32 tokens (8.5 KiB) leave 29 % of 12 KiB, three of 16 tokens 20 % of 16
SMALL = GpuConfig(name="gpu0", device="cpu", slab_bytes=16 << 10, pool_bytes=12 << 20)
WIDE = {"num_key_value_heads": 4, "head_dim": 32}


def test_a_small_pool_gets_smaller_blocks_and_the_entry_says_so(tmp_path: Path) -> None:
    model = resolved(write_llama(tmp_path / "m", **WIDE), name="m", kv_dtype="int8", max_model_len=64)
    size = 12 << 20
    assert plan_pool([model], SMALL, size).models["m"].tail_waste > MAX_TAIL
    (settled,) = settle_blocks([model], SMALL, size)
    plan = plan_pool([settled], SMALL, size)
    assert settled.layout.block_tokens == plan.models["m"].block_tokens == settled.entry.kv_block_tokens == 16
    assert plan.models["m"].tail_waste < plan_pool([model], SMALL, size).models["m"].tail_waste
    # a worker resolves the entry that it is sent, and must come to the same blocks
    sent = ModelEntry.read(dataclasses.asdict(settled.entry))
    assert resolve_model(sent, "cpu").layout == settled.layout


def test_blocks_named_in_the_configuration_stay(tmp_path: Path) -> None:
    keys = {"kv_dtype": "int8", "max_model_len": 64, "kv_block_tokens": 32}
    model = resolved(write_llama(tmp_path / "m", **WIDE), name="m", **keys)
    (settled,) = settle_blocks([model], SMALL, 12 << 20)
    assert settled.layout.block_tokens == 32


def test_the_agent_sends_workers_what_it_planned(tmp_path: Path) -> None:
    path = str(write_llama(tmp_path / "m", **WIDE))
    entry = ModelEntry.read({"name": "m", "path": path, "kv_dtype": "int8", "max_model_len": 64})
    node = dataclasses.replace(Config.single(path).nodes[0], gpus=(SMALL,))
    agent = Agent(Config(nodes=(node,), models=(entry,)), {})
    try:
        plan = agent.pools[0].plan.models["m"]
        sent = agent.hosts["m"]._start.entry
        assert plan.block_tokens == sent["kv_block_tokens"] == 16
    finally:
        for pool in agent.pools:
            pool.close()
