"""LLM and engine on a tiny random model: stops, seeds, log probabilities, aborts, failures, nothing left behind."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minserve import LLM, SamplingParams
from minserve.config import Config
from minserve.engine import EngineRequest
from minserve.loading import load_model
from minserve.resolve import resolve_model
from minserve.runner import Runner, StepHandle
from tests.tiny import write_llama, write_tokenizer

PROMPT = [5, 9, 200, 33, 7]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("llm"), seed=21))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    # overlapped as on a GPU: the harder case for aborts, stops and failures
    with LLM(folder, device="cpu", dtype="fp32", pool_bytes=8 << 20, overlap=True) as llm:
        yield llm


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        check_empty(request.getfixturevalue("llm"))


def check_empty(llm: LLM) -> None:
    """No request, no step, no row, no block: after every test that shares the model."""
    while llm.engine.has_work:
        llm.engine.step()
    assert len(llm.engine.runner.rows) == 0
    assert llm.engine.batcher.num_running == llm.engine.batcher.num_waiting == 0
    llm.engine.batcher.check()
    assert llm.engine.batcher.blocks.num_live == 0
    llm._local.sets.check()
    llm._local.pool.table.check()


def greedy(llm: LLM, prompt: list[int], **kw: object) -> list[int]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | kw)
    return llm.generate(prompt, params)[0].outputs[0].token_ids


def test_output_has_vllms_fields(llm: LLM) -> None:
    out = llm.generate([PROMPT, "hello there"], GREEDY)
    assert [o.prompt for o in out] == [None, "hello there"]
    assert out[0].prompt_token_ids == PROMPT
    assert out[1].prompt_token_ids == llm.tokenizer.encode("hello there")
    for o in out:
        assert o.finished
        completion = o.outputs[0]
        assert len(completion.token_ids) == 12
        assert completion.finish_reason == "length"
        assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_greedy_tokens_are_the_argmax_of_logits(llm: LLM) -> None:
    tokens = greedy(llm, PROMPT)
    logits = llm.logits(PROMPT + tokens)
    assert logits.shape == (len(PROMPT) + 12, 300)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens


def test_eos_and_stop_token_ids_end_a_request(llm: LLM, folder: Path) -> None:
    free = greedy(llm, PROMPT)
    third = free[2]
    assert third not in free[:2], "pick another prompt: the test needs a fresh third token"
    out = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[third]))[
        0
    ].outputs[0]
    assert out.token_ids == free[:3]
    assert (out.finish_reason, out.stop_reason) == ("stop", third)
    llm.engine._eos_ids = frozenset({third})
    try:
        out = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=12))[0].outputs[0]
        assert (out.token_ids, out.finish_reason, out.stop_reason) == (free[:3], "stop", None)
        assert greedy(llm, PROMPT, ignore_eos=True) == free
        late = greedy(llm, PROMPT, ignore_eos=False, min_tokens=6)
        assert third not in late[:6]
        assert len(late) >= 6
    finally:
        llm.engine._eos_ids = frozenset(llm._local.resolved.config.eos_ids)


def test_stop_strings_cut_the_text(llm: LLM) -> None:
    text = llm.generate(PROMPT, GREEDY)[0].outputs[0].text
    assert len(text) >= 6, "pick another prompt: the test needs some text"
    stop = text[3:5]
    at = text.index(stop)
    out = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=stop))[
        0
    ].outputs[0]
    assert (out.text, out.finish_reason, out.stop_reason) == (text[:at], "stop", stop)
    kept = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, stop=[stop], include_stop_str_in_output=True
    )
    assert llm.generate(PROMPT, kept)[0].outputs[0].text == text[: at + len(stop)]


def test_min_tokens_holds_for_stop_strings_and_a_stop_token_may_show(llm: LLM) -> None:
    free = llm.generate(PROMPT, GREEDY)[0].outputs[0]
    stop = free.text[3:5]
    late = SamplingParams(temperature=0.0, max_tokens=12, min_tokens=12, ignore_eos=True, stop=stop)
    out = llm.generate(PROMPT, late)[0].outputs[0]
    assert (out.text, out.finish_reason) == (free.text, "length")
    for include in (False, True):
        third = SamplingParams(
            temperature=0.0,
            max_tokens=12,
            stop_token_ids=free.token_ids[2:3],
            include_stop_str_in_output=include,
        )
        shown = llm.tokenizer.decode(free.token_ids[: 2 + include], skip_special_tokens=True)
        assert llm.generate(PROMPT, third)[0].outputs[0].text == shown


def test_a_seed_gives_the_same_tokens_whatever_the_batch(llm: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, seed=42, max_tokens=20, top_p=0.9, ignore_eos=True)
    alone = llm.generate(PROMPT, seeded)[0].outputs[0].token_ids
    others = [SamplingParams(temperature=1.3, seed=i, max_tokens=20, ignore_eos=True) for i in range(5)]
    together = llm.generate([[1, 2], PROMPT, [3] * 40, [4], [9, 9], [8]], [others[0], seeded, *others[1:]])
    assert together[1].outputs[0].token_ids == alone
    different = llm.generate(PROMPT, SamplingParams(temperature=1.0, seed=43, max_tokens=20, ignore_eos=True))
    assert different[0].outputs[0].token_ids != alone
    n = llm.generate(
        PROMPT, SamplingParams(n=3, temperature=1.0, seed=42, max_tokens=20, top_p=0.9, ignore_eos=True)
    )
    assert n[0].outputs[0].token_ids == alone
    assert len({tuple(o.token_ids) for o in n[0].outputs}) == 3


def test_unseeded_requests_differ(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
    assert len({tuple(o.outputs[0].token_ids) for o in llm.generate([PROMPT] * 4, params)}) == 4


def test_logprobs_are_those_of_logits(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.8, seed=1, max_tokens=6, logprobs=3, prompt_logprobs=2, ignore_eos=True
    )
    result = llm.generate(PROMPT, params)[0]
    out = result.outputs[0]
    lp = llm.logits(PROMPT + out.token_ids).log_softmax(-1)
    assert out.logprobs is not None
    for i, (token, found) in enumerate(zip(out.token_ids, out.logprobs, strict=True)):
        row = lp[len(PROMPT) - 1 + i]
        assert found[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert found[token].rank == (row > row[token]).sum().item() + 1
        assert [t for t, x in found.items() if x.rank <= 3] == row.topk(3).indices.tolist()
        assert found[token].decoded_token == llm.tokenizer.token_text(token)
    assert out.cumulative_logprob == pytest.approx(
        sum(found[t].logprob for t, found in zip(out.token_ids, out.logprobs, strict=True))
    )
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    for i, found in enumerate(result.prompt_logprobs[1:], start=1):
        assert found[PROMPT[i]].logprob == pytest.approx(lp[i - 1, PROMPT[i]].item(), abs=1e-4)
        assert len(found) in (2, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"device must be cpu.*got 'cuda:0'"):
        LLM(folder, device="cuda", pool_bytes=8 << 20)


def test_prompt_alone(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0)
    result = llm.generate(PROMPT, params)[0]
    assert result.outputs[0].token_ids == []
    assert result.outputs[0].finish_reason == "length"
    assert len(result.prompt_logprobs or []) == len(PROMPT)


def test_bias_and_penalties_reach_the_sampler(llm: LLM) -> None:
    assert greedy(llm, PROMPT, logit_bias={17: 100.0}) == [17] * 12
    with_bias = greedy(llm, PROMPT, logit_bias={17: 100.0, 18: 99.0}, presence_penalty=2.0)
    assert with_bias[:2] == [17, 18]


def test_max_tokens_is_cut_to_the_window(llm: LLM) -> None:
    long = list(range(1, 251))
    out = llm.generate(long, SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))[0].outputs[0]
    assert len(out.token_ids) == 256 - 250
    assert out.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        ([300], "outside the vocabulary"),
        ([1, -1], "outside the vocabulary"),
        ([1] * 256, "This model's maximum context length is 256"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_and_leaves_nothing(
    llm: LLM, prompt: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate([PROMPT, prompt], GREEDY)
    assert greedy(llm, PROMPT) == greedy(llm, PROMPT)


def add(llm: LLM, rid: int, max_tokens: int = 30) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    llm.engine.add(EngineRequest(rid=rid, prompt=tuple(PROMPT), params=params))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 10])
def test_abort_in_every_state_leaves_nothing_and_spares_the_other(llm: LLM, steps: int) -> None:
    want = greedy(llm, PROMPT, max_tokens=30)
    add(llm, 1000)
    add(llm, 1001)
    events = [e for _ in range(steps) for e in llm.engine.step()]
    assert llm.engine.abort(1001)
    assert not llm.engine.abort(1001)
    after = []
    while llm.engine.has_work:
        after += llm.engine.step()
    assert not [e for e in after if e.rid == 1001]
    assert [t for e in events + after if e.rid == 1000 for t in e.token_ids] == want


def test_a_step_that_raises_ends_its_requests_and_no_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(llm, 2000)
    for _ in range(4):
        llm.engine.step()

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as m:
        m.setattr(llm.engine.runner, "_forward", broken)
        add(llm, 2001)
        events = []
        while llm.engine.has_work:
            events += llm.engine.step()
    ended = {e.rid: e for e in events if e.finish_reason}
    assert ended.keys() == {2000, 2001}
    assert all(e.finish_reason == "error" and "out of memory" in (e.error or "") for e in ended.values())
    check_empty(llm)
    assert greedy(llm, PROMPT)


def test_an_interrupted_wait_loses_no_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    want, waits = greedy(llm, PROMPT), itertools.count()

    def wait(self: StepHandle, whole: Any = StepHandle.wait) -> Any:
        if next(waits) == 3:
            raise KeyboardInterrupt  # as Ctrl-C does
        return whole(self)

    with monkeypatch.context() as m:
        m.setattr(StepHandle, "wait", wait)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT, PROMPT], GREEDY)
    check_empty(llm)
    assert greedy(llm, PROMPT) == want


@pytest.mark.parametrize("memory", [False, True])
def test_a_gpu_fault_ends_the_process_and_a_full_memory_the_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, memory: bool
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory") if memory else RuntimeError("illegal memory access")

    def broken(*_: object) -> None:
        raise error

    with monkeypatch.context() as m:
        m.setattr(Runner, "on_gpu", True)
        m.setattr(llm.engine.runner, "_forward", broken)
        add(llm, 2100)
        if memory:
            events = [e for _ in range(3) for e in llm.engine.step()]
            assert [e.finish_reason for e in events] == ["error"]
        else:
            llm.engine.step()
            with pytest.raises(RuntimeError, match="illegal"):
                llm.engine.step()
    llm.engine.abort(2100)
    check_empty(llm)


@pytest.mark.parametrize("given", [{"logit_bias": {300: 1.0}}, {"stop_token_ids": [4, 300], "min_tokens": 2}])
def test_tokens_outside_the_vocabulary_are_refused_at_once(llm: LLM, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"vocabulary \[0, 300\), got 300"):
        llm.generate(PROMPT, SamplingParams(max_tokens=3, **given))


def test_a_batch_may_be_longer_than_a_servers_queue(llm: LLM) -> None:
    assert llm.engine.batcher.limits.max_waiting > 100_000


def test_logits_that_are_not_finite_end_only_their_request(folder: Path) -> None:
    with LLM(folder, device="cpu", dtype="fp32", pool_bytes=8 << 20) as llm:
        want = greedy(llm, [7, 8])
        llm.engine.runner.model.embed_VD[5] = float("nan")  # the first token of PROMPT
        bad, good = llm.generate([PROMPT, [7, 8]], GREEDY)
        assert bad.outputs[0].finish_reason == "error"
        assert "not finite" in (bad.outputs[0].error or "")
        assert good.outputs[0].token_ids == want
        check_empty(llm)


def test_more_requests_than_rows_are_served_in_turn(folder: Path) -> None:
    with LLM(
        folder, device="cpu", dtype="fp32", pool_bytes=8 << 20, max_num_seqs=3, max_num_batched_tokens=8
    ) as llm:
        prompts = [[i + 1, i + 2, i + 3] for i in range(20)]
        got = llm.generate(prompts, GREEDY)
        assert [o.outputs[0].token_ids for o in got[:2]] == [greedy(llm, p) for p in prompts[:2]]
        check_empty(llm)


def test_quantized_activations_are_seen_in_the_report_and_the_tokens_run(folder: Path) -> None:
    for scheme in ("w8a8-int8", "w4a8-int8"):
        with LLM(
            folder, device="cpu", dtype="bf16", quantization=scheme, kv_dtype="int8", pool_bytes=8 << 20
        ) as llm:
            assert any(row.kernel == f"gemm_{scheme[:4]}" for row in llm._local.report.rows.values())
            assert len(greedy(llm, PROMPT)) == 12


def test_weights_are_loaded_with_their_gpu_current(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Config.single(folder).models[0]

    def set_device(device: str) -> None:
        raise LookupError(device)  # as far as a machine without a GPU can go

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LookupError, match="cuda:1"):
        load_model(resolve_model(entry, "cpu"), "cuda:1")


def test_closing_twice_is_no_error_and_unknown_arguments_are(folder: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        LLM("/nowhere/at/all", device="cpu")
    with pytest.raises(ValueError, match="max_num_seq"):
        LLM(folder, device="cpu", max_num_seq=3)
    llm = LLM(folder, device="cpu", pool_bytes=8 << 20)
    llm.close()
    llm.close()


def test_logits_wait_for_what_is_no_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step beyond a stop, and a device that takes its time to let go of a set."""
    third = greedy(llm, PROMPT)[2]
    stop = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[third])
    tokens = llm.generate(PROMPT, stop)[0].outputs[0].token_ids
    assert llm.engine.has_work
    assert not llm.engine.has_requests
    logits = llm.logits(PROMPT + tokens)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    asked = itertools.count()
    monkeypatch.setattr(llm._local.sets, "_fence", lambda: lambda: next(asked) > 3)
    llm.engine.batcher.blocks.trim()
    assert llm.engine.runner.draining
    assert torch.equal(llm.logits(PROMPT + tokens), logits)
    assert not llm.engine.runner.draining


@torch.inference_mode()
def test_logits_need_an_idle_engine(llm: LLM) -> None:
    add(llm, 3000, max_tokens=3)
    with pytest.raises(ValueError, match="idle"):
        llm.logits(PROMPT)
    llm.engine.abort(3000)
