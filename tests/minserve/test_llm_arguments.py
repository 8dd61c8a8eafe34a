"""What a caller of LLM may pass, what is refused, and Ctrl-C at any moment."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minserve import LLM, SamplingParams
from tests.tiny import write_llama, write_tokenizer

PROMPT = [5, 9, 200, 33, 7]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = write_tokenizer(write_llama(tmp_path_factory.mktemp("llm"), seed=21))
    with LLM(folder, device="cpu", dtype="fp32", pool_bytes=8 << 20, overlap=True) as llm:
        yield llm


def tokens(llm: LLM, prompts: Any) -> list[list[int]]:
    return [r.outputs[0].token_ids for r in llm.generate(prompts, GREEDY)]


@pytest.mark.parametrize(
    "given",
    [
        tuple(PROMPT),
        [tuple(PROMPT)],
        np.array(PROMPT),
        [np.array(PROMPT)],
        list(np.array(PROMPT)),
        np.array([PROMPT]),
        torch.tensor(PROMPT),
        {"prompt_token_ids": PROMPT},
        [{"prompt_token_ids": PROMPT}],
    ],
)
def test_token_ids_come_in_many_forms(llm: LLM, given: Any) -> None:
    assert tokens(llm, given) == tokens(llm, PROMPT)


def test_a_dict_holds_a_text(llm: LLM) -> None:
    assert tokens(llm, {"prompt": "hello there"}) == tokens(llm, "hello there")
    assert llm.generate([{"prompt": "hello there"}], GREEDY)[0].prompt == "hello there"
    assert llm.generate([], GREEDY) == []


@pytest.mark.parametrize(
    "given",
    [
        None,
        5,
        1.5,
        b"abc",
        [None],
        [1.5],
        [[1.5]],
        [["a"]],
        {},
        [{"prompt": "a", "multi_modal_data": 1}],
        [1, "a"],
    ],
)
def test_what_is_no_prompt_is_refused(llm: LLM, given: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        llm.generate(given, GREEDY)


@pytest.mark.parametrize("given", [{"max_tokens": 3}, [None], 7, [GREEDY, GREEDY]])
def test_what_are_no_sampling_params_is_refused(llm: LLM, given: Any) -> None:
    with pytest.raises(ValueError, match="sampling_params must be"):
        llm.generate([PROMPT], given)


@pytest.mark.parametrize(
    "given",
    [
        {"stop": 5},
        {"stop_token_ids": 3},
        {"stop_token_ids": "12"},
        {"logit_bias": [1]},
        {"ignore_eos": "yes"},
    ],
)
def test_sampling_params_name_the_field_of_a_wrong_type(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(given))} must"):
        SamplingParams(**given)


def test_a_closed_llm_says_so(tmp_path: Path) -> None:
    llm = LLM(write_llama(tmp_path, seed=1), device="cpu", pool_bytes=8 << 20)
    llm.close()
    for call in (lambda: llm.generate(PROMPT, GREEDY), lambda: llm.logits(PROMPT)):
        with pytest.raises(ValueError, match="closed"):
            call()


@contextlib.contextmanager
def sigint(handler: Any) -> Iterator[None]:
    """A suite started in the background inherits an ignored SIGINT: a test of Ctrl-C says what it starts from."""
    inherited = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("part", ["runner.execute", "batcher.plan", "batcher.advance"])
def test_ctrl_c_in_any_part_of_a_step_leaves_an_engine_that_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, part: str, before: bool
) -> None:
    want, handler, calls = tokens(llm, PROMPT), signal.default_int_handler, itertools.count()
    owner, name = getattr(llm.engine, part.split(".")[0]), part.split(".")[1]
    whole = getattr(owner, name)

    def interrupted(*args: Any) -> Any:
        press = next(calls) == 3
        if press and before:
            signal.raise_signal(signal.SIGINT)
        done = whole(*args)
        if press and not before:
            signal.raise_signal(signal.SIGINT)
        return done

    with monkeypatch.context() as m, sigint(handler):
        m.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT] * 3, SamplingParams(max_tokens=200, ignore_eos=True))
        assert signal.getsignal(signal.SIGINT) is handler
    assert next(calls) < 8, "Ctrl-C waited for more than its step"
    assert tokens(llm, PROMPT) == want
    while llm.engine.has_work:
        llm.engine.step()
    llm.engine.batcher.check()
    assert llm.engine.batcher.blocks.num_live == 0


def test_an_ignored_sigint_stays_ignored(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    want, plan = tokens(llm, PROMPT), llm.engine.batcher.plan

    def interrupted(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return plan(*args)

    with monkeypatch.context() as m, sigint(signal.SIG_IGN):
        m.setattr(llm.engine.batcher, "plan", interrupted)
        assert tokens(llm, PROMPT) == want
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_may_generate(llm: LLM) -> None:
    found: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: found.append(tokens(llm, PROMPT)))
    thread.start()
    thread.join()
    assert found == [tokens(llm, PROMPT)]
