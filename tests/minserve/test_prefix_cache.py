"""The prefix cache through LLM: the same tokens with it and without, whatever happens to the blocks in between."""

import dataclasses
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minserve import LLM, SamplingParams
from minserve.cache_identity import cache_identity
from minserve.config import Config
from minserve.engine import EngineRequest
from minserve.outputs import RequestOutput
from minserve.resolve import resolve_model
from tests.tiny import write_llama, write_tokenizer

P = 16  # tokens of a block in float32
SHARED = [(7 * i) % 290 for i in range(5 * P + 3)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("prefix"), seed=5))


def load(folder: Path, **keys: Any) -> LLM:
    device = keys.pop("device", "cpu")
    return LLM(folder, device=device, **({"dtype": "fp32", "pool_bytes": 8 << 20, "overlap": True} | keys))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[LLM]:
    with load(folder, enable_prefix_caching=False) as llm:
        yield llm


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    """A cache that is empty; nothing but cached blocks may be left in it."""
    with load(folder) as llm:
        yield llm
        while llm.engine.has_work:
            llm.engine.step()
        llm.engine.batcher.check()
        assert llm.engine.batcher.blocks.num_live == 0
        llm._local.sets.check()
        llm._local.pool.table.check()


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [o.token_ids for r in outputs for o in r.outputs]


def prompts(n: int) -> list[list[int]]:
    rng = random.Random(n)
    return [SHARED[: rng.randint(1, len(SHARED))] + [rng.randrange(290) for _ in range(9)] for _ in range(n)]


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(seed=3, max_tokens=10, ignore_eos=True, top_k=40, n=2),
        SamplingParams(seed=4, max_tokens=10, temperature=0.7, repetition_penalty=1.3, frequency_penalty=0.2),
    ],
    ids=["greedy", "seeded", "penalties"],
)
def test_equal_tokens_with_and_without(llm: LLM, plain: LLM, params: SamplingParams) -> None:
    asked = prompts(12)
    want = tokens(plain.generate(asked, params))
    for _ in range(2):
        got = llm.generate(asked, params)
        assert tokens(got) == want
    assert all((r.num_cached_tokens or 0) >= len(p) // P * P - P for r, p in zip(got, asked, strict=True))
    assert llm.engine.counters.prefix_hits > 12 * 3 * P
    assert plain.engine.counters.prefix_queries == plain.engine.batcher.blocks.num_cached == 0


@pytest.mark.parametrize(
    "keys", [{}, {"kv_dtype": "int8"}, {"kv_dtype": "int4", "quantization": "w8a8-int8"}]
)
def test_equal_tokens_in_deterministic_mode(folder: Path, keys: dict[str, str]) -> None:
    """bf16, and blocks of codes: what is found was stored by the same rounding."""
    asked = [SHARED + p for p in prompts(6)]
    with load(folder, dtype="bf16", deterministic=True, enable_prefix_caching=False, **keys) as plain:
        want = tokens(plain.generate(asked, GREEDY))
    with load(folder, dtype="bf16", deterministic=True, **keys) as llm:
        for _ in range(2):
            assert tokens(llm.generate(asked, GREEDY)) == want
        assert llm.engine.counters.prefix_hits > 0


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"dtype": "bf16", "deterministic": True, "kv_dtype": "int8"}])
def test_equal_tokens_on_a_gpu(folder: Path, keys: dict[str, Any]) -> None:
    asked = [SHARED + p for p in prompts(6)]
    with load(folder, enable_prefix_caching=False, device="cuda:0", **keys) as plain:
        want = tokens(plain.generate(asked, GREEDY))
    with load(folder, device="cuda:0", **keys) as llm:
        for _ in range(2):
            assert tokens(llm.generate(asked, GREEDY)) == want
        assert llm.engine.counters.prefix_hits > 0


def test_elsewhere_the_next_token_has_nearly_the_same_chances(folder: Path) -> None:
    """bf16 and int8 keys and values, not deterministic: sums may be taken in another order, and nothing else differs."""
    asked = [SHARED + p for p in prompts(6)]
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=20, ignore_eos=True)
    keys = {"dtype": "bf16", "kv_dtype": "int8"}
    with load(folder, enable_prefix_caching=False, **keys) as plain:
        want = [r.outputs[0].logprobs[0] for r in plain.generate(asked, params)]
    with load(folder, **keys) as llm:
        llm.generate(asked, params)
        again = llm.generate(asked, params)
        assert all(r.num_cached_tokens for r in again)
    for r, expected in zip(again, want, strict=True):
        got = r.outputs[0].logprobs[0]
        both = got.keys() & expected.keys()
        assert len(both) >= 18
        p = torch.tensor([expected[t].logprob for t in both]).double()
        q = torch.tensor([got[t].logprob for t in both]).double()
        kl = (p.softmax(0) * (p.log_softmax(0) - q.log_softmax(0))).sum().item()
        assert kl < 1e-3, f"{kl=}"


def test_hits_are_counted_exactly(llm: LLM) -> None:
    first = llm.generate([SHARED], GREEDY)[0]
    assert first.num_cached_tokens == 0
    again = llm.generate([SHARED, SHARED[: 2 * P], SHARED[: 2 * P + 1], SHARED[P:]], GREEDY)
    assert [r.num_cached_tokens for r in again] == [5 * P, P, 2 * P, 0]
    c = llm.engine.counters
    assert c.prefix_queries == 2 * len(SHARED) + 2 * P + 2 * P + 1 + len(SHARED) - P
    assert c.prefix_hits == 8 * P


def test_the_next_turn_of_a_conversation_finds_the_answer_before(llm: LLM, plain: LLM) -> None:
    turn = llm.generate([SHARED], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))[0]
    history = SHARED + turn.outputs[0].token_ids + [1, 2, 3]
    got = llm.generate([history], GREEDY)[0]
    assert got.num_cached_tokens == (len(SHARED) + 39) // P * P
    assert tokens([got]) == tokens(plain.generate([history], GREEDY))


def test_salts_share_nothing_and_change_nothing(llm: LLM, plain: LLM) -> None:
    asked: list[Any] = [{"prompt_token_ids": SHARED, "cache_salt": s} for s in ("one", "two")]
    want = tokens(plain.generate([SHARED], GREEDY))[0]
    assert [llm.generate(a, GREEDY)[0].num_cached_tokens for a in [*asked, SHARED]] == [0, 0, 0]
    again = llm.generate([*asked, SHARED, {"prompt_token_ids": SHARED}], GREEDY)
    assert [r.num_cached_tokens for r in again] == [5 * P] * 4
    assert tokens(again) == [want] * 4
    with pytest.raises(ValueError, match="cache_salt must be a text that is not empty, got ''"):
        llm.generate({"prompt_token_ids": SHARED, "cache_salt": ""}, GREEDY)


def test_tenants_share_nothing(llm: LLM) -> None:
    found = []
    for rid, tenant in enumerate(("a", "b", "a")):
        request = EngineRequest(rid=rid, prompt=tuple(SHARED), params=GREEDY, tenant=tenant)
        llm.engine.add(request)
        events = [e for _ in range(30) for e in llm.engine.step()]
        found.append(events[0].cached_tokens)
    assert found == [0, 0, 5 * P]


def test_log_probabilities_of_the_prompt_are_computed(llm: LLM, plain: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=2)
    want = plain.generate([SHARED], params)[0]
    llm.generate([SHARED], GREEDY)
    got = llm.generate([SHARED], params)[0]
    assert got.num_cached_tokens == 0
    assert llm.engine.counters.prefix_queries == len(SHARED), "and it is no query either"
    assert got.prompt_logprobs is not None
    assert want.prompt_logprobs is not None
    for mine, theirs in zip(got.prompt_logprobs[1:], want.prompt_logprobs[1:], strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.keys() == theirs.keys()
        assert all(abs(mine[t].logprob - theirs[t].logprob) < 1e-4 for t in mine)


def test_preempted_and_evicted_under_pressure_the_tokens_are_the_same(folder: Path, plain: LLM) -> None:
    """A pool for a third of the requests: blocks are evicted, requests preempted and computed again."""
    rng = random.Random(2)
    asked = [p + [rng.randrange(290) for _ in range(30)] for p in prompts(60)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=rng.randint(60, 120), ignore_eos=True) for _ in asked
    ]
    want = tokens(plain.generate(asked, params))
    pool = {"pool_bytes": 1640 << 10, "reserve_tokens": 16}
    with load(folder, **pool) as llm:
        before = llm.engine.batcher.num_preemptions
        got = llm.generate(asked, params)
        assert tokens(got) == want
        assert llm.engine.batcher.num_preemptions > before
        assert llm.engine.batcher.blocks.num_evicted > 0
        assert llm.engine.counters.prefix_hits > 0
        assert tokens(llm.generate(asked, params)) == want


def test_a_failed_step_is_not_found_later(llm: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its readers fail with it: one that began while it ran, and computed with what was never written."""
    want = tokens(plain.generate([SHARED], GREEDY))
    fails = [True]
    forward = llm.engine.runner._forward

    def broken(*args: Any, **keys: Any) -> Any:
        done = forward(*args, **keys)
        if fails.pop() if fails else False:
            llm._local.pool.bytes.fill_(0xFF)  # what it has written cannot be trusted
            raise RuntimeError("planted")
        return done

    monkeypatch.setattr(llm.engine.runner, "_forward", broken)
    events = []
    for rid in (0, 1):
        llm.engine.add(EngineRequest(rid=rid, prompt=tuple(SHARED), params=GREEDY))
        events += llm.engine.step()
    while llm.engine.has_work:
        events += llm.engine.step()
    assert [(e.rid, e.finish_reason) for e in events] == [(0, "error"), (1, "error")]
    assert llm.engine.counters.prefix_hits == 5 * P, "the second had found the blocks of the first"
    assert llm.engine.batcher.blocks.num_cached == 0
    got = llm.generate([SHARED], GREEDY)
    assert (got[0].num_cached_tokens, tokens(got)) == (0, want)


def test_aborts_leave_blocks_that_can_be_trusted(llm: LLM, plain: LLM) -> None:
    want = tokens(plain.generate([SHARED], GREEDY))
    llm.engine.add(EngineRequest(rid=900, prompt=tuple(SHARED), params=GREEDY))
    llm.engine.step()
    llm.engine.abort(900)
    got = llm.generate([SHARED], GREEDY)
    assert (got[0].num_cached_tokens, tokens(got)) == (5 * P, want)


def test_sets_without_requests_can_be_given_up(llm: LLM) -> None:
    llm.generate(prompts(20), GREEDY)
    blocks, sets = llm.engine.batcher.blocks, llm._local.sets
    assert blocks.num_live == 0
    assert blocks.num_spare_sets == blocks.num_sets == sets.num_leased >= 1
    assert blocks.give_up(99) > 0
    assert (blocks.num_cached, sets.num_leased) == (0, 0)
    assert llm.generate([SHARED], GREEDY)[0].num_cached_tokens == 0


def test_the_cache_knows_what_its_blocks_depend_on(folder: Path, tmp_path: Path) -> None:
    """No two of these may ever find each other's blocks."""

    def identity(path: Path = folder, **keys: Any) -> str:
        return cache_identity(resolve_model(Config.single(path, **{"dtype": "fp32"} | keys).models[0], "cpu"))

    other = write_llama(tmp_path / "a" / folder.name, seed=6)
    found = [
        identity(),
        identity(kv_dtype="int8"),
        identity(kv_dtype="int4"),
        identity(dtype="bf16"),
        identity(quantization="w8a8-int8"),
        identity(max_model_len=128),
        identity(other),
    ]
    weights = next(other.glob("*.safetensors"))
    stat = weights.stat()
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    found.append(identity(other))
    assert len(set(found)) == len(found)
    assert identity() == identity()
    resolved = resolve_model(Config.single(folder, dtype="fp32").models[0], "cpu")
    rope = dataclasses.replace(resolved.config.rope, theta=resolved.config.rope.theta * 2)
    config = dataclasses.replace(resolved.config, rope=rope)
    assert cache_identity(dataclasses.replace(resolved, config=config)) not in found


def test_the_device_forgets_slabs_of_sets_that_were_given_back(llm: LLM) -> None:
    """Before memory goes: rows of the device's table name leased slabs or slab 0, and what is cached is still right."""
    want = tokens(llm.generate(prompts(12), GREEDY))
    blocks, runner, sets = llm.engine.batcher.blocks, llm.engine.runner, llm._local.sets
    blocks.give_up(max(1, blocks.num_sets - 1))
    sets.poll()
    free = [s for s in range(len(sets.slab_table_SL)) if s not in sets._leases]
    assert runner._slab_table_SL[free].any(), "they are named until they are forgotten"
    runner.forget_slabs()
    assert not runner._slab_table_SL[free].any()
    assert torch.equal(runner._slab_table_SL, sets.slab_table_SL)
    assert tokens(llm.generate(prompts(12), GREEDY)) == want
