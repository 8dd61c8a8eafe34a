"""LLM: a model in this process, from Python.  Prompts in, finished outputs back, in the order they came.

Names of arguments, outputs and fields are vLLM's, so that code written for it runs here.  The same engine, pool and
kernels as the server's; no HTTP and no other process.
"""

import numbers
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from minserve.config import Config, pick_device
from minserve.engine import EngineRequest
from minserve.loading import LocalEngine
from minserve.outputs import Answer, CompletionOutput, Logprobs, RequestOutput, spelled
from minserve.sampler import TokenLogprobs
from minserve.sampling import SamplingParams
from minserve.text import Tokenizer

# vLLM's forms: a text, token ids (of numpy or torch too), or either in a dict, beside a `cache_salt` if need be
Prompt = str | Sequence[int] | Mapping[str, Any]
MAX_QUEUED = 1_000_000


class Asked(NamedTuple):
    """A prompt as it was given, and whose cached prefixes it may use."""

    prompt: str | list[int]
    salt: str = ""


class LLM:
    """Loads `model`, a Hugging Face folder.  ValueError names what is wrong with a folder or an argument.

    `quantization`: auto (what the checkpoint is), none, or w8a8-int8, w8a8-fp8, w4a8-int8, w4a8-fp8 (quantized at load;
    `quantization_group_size` and `quantization_overrides`, a dict of layers to schemes, refine it).  `kv_dtype`: auto, fp32, bf16, fp16, fp8, int8, int4, int4z.  `pool_bytes`: size of the KV slab pool, auto where None.  `deterministic`: a request
    gets the same tokens whatever else runs, slower.  `overlap`: plan a step while the one before runs; default on a GPU
    only.  Other keywords are keys of a model in examples/full.yaml (max_num_seqs, max_num_batched_tokens, reserve_tokens, ...).
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str = "auto",
        kv_dtype: str = "auto",
        max_model_len: int | None = None,
        pool_bytes: int | None = None,
        deterministic: bool = False,
        **keys: Any,
    ) -> None:
        overlap = keys.pop("overlap", None)
        # a batch is handed over whole, however long: only a server has callers to turn away
        keys.setdefault("max_queued_requests", MAX_QUEUED)
        config = Config.single(
            model,
            gpu={"device": pick_device(device), "pool_bytes": pool_bytes},
            dtype=dtype,
            quantization=quantization,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
            deterministic=deterministic,
            **keys,
        )
        self._local = LocalEngine.start(config, overlap=overlap)
        self.engine = self._local.engine
        folder = Path(config.models[0].tokenizer or config.models[0].path)
        found = folder.is_file() or (folder / "tokenizer.json").is_file()
        self.tokenizer = Tokenizer.load(folder, config.models[0].chat_template) if found else None
        self._next_rid = 0
        self._closed = False

    @property
    def max_model_len(self) -> int:
        return self._local.resolved.max_model_len

    @property
    def dtype(self) -> str:
        """What the model computes in, `auto` resolved: fp32, bf16 or fp16."""
        return self._local.resolved.dtype

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answers of all prompts, in their order.  ValueError for a prompt that cannot be served, before any runs.

        `prompts`: a text, token ids, or a list of either; in a dict (`prompt` or `prompt_token_ids`) it may have a
        `cache_salt`: prefixes are cached for prompts of the same one.  The bar shows on a terminal unless `use_tqdm` says so.
        """
        self._check_open()
        asked = _listed(prompts)
        params = _spread(sampling_params, len(asked))
        ids = [self._encode(a.prompt) for a in asked]
        results = [
            RequestOutput(str(i), a.prompt if isinstance(a.prompt, str) else None, t, [])
            for i, (a, t) in enumerate(zip(asked, ids, strict=True))
        ]
        answers: dict[int, tuple[RequestOutput, Answer]] = {}
        with interrupts_held() as let_in:
            try:
                for a, result, sampling in zip(asked, results, params, strict=True):
                    for index in range(sampling.n):
                        output = CompletionOutput(index, "", [])
                        result.outputs.append(output)
                        rid = self._add(result.prompt_token_ids, sampling, index, a.salt)
                        answers[rid] = (result, Answer(output, sampling, self.tokenizer))
                self._run(answers, use_tqdm, let_in)
            finally:
                # a mistake in the last prompt, or Ctrl-C: nothing of this call stays behind
                for rid in answers:
                    self.engine.abort(rid)
        return results

    def _run(
        self,
        answers: dict[int, tuple[RequestOutput, Answer]],
        use_tqdm: bool | None,
        let_in: Callable[[], None],
    ) -> None:
        hidden = not sys.stderr.isatty() if use_tqdm is None else not use_tqdm
        left = set(answers)
        with tqdm(total=len(answers), unit="req", disable=hidden, dynamic_ncols=True) as bar:
            while left:
                let_in()
                for event in self.engine.step():
                    if event.rid not in left:
                        continue
                    result, answer = answers[event.rid]
                    if event.prompt_logprobs is not None:
                        result.prompt_logprobs = self._spell_prompt(result, event.prompt_logprobs)
                    if not answer.output.token_ids:  # its first event
                        known = result.num_cached_tokens
                        found = event.cached_tokens
                        result.num_cached_tokens = found if known is None else min(known, found)
                    if answer.take(event):
                        self.engine.abort(event.rid)
                    if answer.output.finish_reason is not None:
                        left.discard(event.rid)
                        result.finished = all(o.finish_reason for o in result.outputs)
                        bar.update()

    def _spell_prompt(
        self, result: RequestOutput, found: Sequence[TokenLogprobs | None]
    ) -> list[Logprobs | None]:
        pairs = zip(result.prompt_token_ids, found, strict=True)
        return [None if lp is None else spelled(t, lp, self.tokenizer) for t, lp in pairs]

    def _add(self, prompt: list[int], params: SamplingParams, index: int, salt: str) -> int:
        rid = self._next_rid
        self._next_rid += 1
        request = EngineRequest(rid=rid, prompt=tuple(prompt), params=params, index=index, cache_salt=salt)
        self.engine.add(request)
        return rid

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise ValueError("the model folder has no tokenizer.json: pass token ids instead of text")
        return self.tokenizer.encode(prompt)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this LLM has been closed: make a new one")

    def chat(
        self, messages: list[dict[str, Any]], sampling_params: SamplingParams | None = None
    ) -> RequestOutput:
        """The answer to a conversation, rendered by the model's own chat template."""
        if self.tokenizer is None or self.tokenizer.chat is None:
            raise ValueError("the model folder has no chat template")
        text = self.tokenizer.chat.render(messages)
        return self.generate(self.tokenizer.encode(text, add_special_tokens=False), sampling_params)[0]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """fp32 logits [T, V] on the CPU of every position of one sequence, computed as a prompt."""
        self._check_open()
        if self.engine.has_requests:
            raise ValueError("logits needs an idle engine: finish or abort the running requests first")
        self.engine.settle()
        return self._local.logits(tuple(token_ids))

    def close(self) -> None:
        """Gives the weights and the pool back.  Calling it twice is no error."""
        if not self._closed:
            self._closed = True
            self._local.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits until the function yielded here is called, or the end: in the middle of a step it would leave the
    Batcher and the steps under way at odds.  Elsewhere than in the main thread none can come."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    held: list[tuple[int, Any]] = []

    def let_in() -> None:
        if held:
            number, frame = held[0]
            held.clear()
            before(number, frame)

    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield let_in
    finally:
        signal.signal(signal.SIGINT, before)
        let_in()


def _listed(prompts: Any) -> list[Asked]:
    """Texts and token ids; one prompt becomes a list of one."""
    prompts = _plain(prompts)
    if not isinstance(prompts, list | tuple):
        return [_read_prompt(prompts)]
    ids = [p for p in prompts if isinstance(p, numbers.Integral)]
    if not ids:
        return [_read_prompt(p) for p in prompts]
    if len(ids) < len(prompts):
        raise ValueError(
            "prompts must be a text, token ids, or a list of either: got token ids mixed with others"
        )
    return [_read_prompt(prompts)]


def _read_prompt(given: Any) -> Asked:
    salt: Any = None
    if isinstance(given, Mapping):
        rest = {name: value for name, value in given.items() if name != "cache_salt"}
        salt = given.get("cache_salt")
        if salt is not None and not (isinstance(salt, str) and salt):
            raise ValueError(f"cache_salt must be a text that is not empty, got {salt!r:.80}")
        if len(rest) == 1 and rest.keys() <= {"prompt", "prompt_token_ids"}:
            given = next(iter(rest.values()))
    given = _plain(given)
    if isinstance(given, str):
        return Asked(given, salt or "")
    if isinstance(given, list | tuple) and all(isinstance(t, numbers.Integral) for t in given):
        return Asked([int(t) for t in given], salt or "")
    says = "a text, a list of token ids, or a dict with one of them as prompt or prompt_token_ids"
    raise ValueError(f"a prompt must be {says}, got {given!r:.80}")


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _spread(params: Any, count: int) -> list[SamplingParams]:
    """One SamplingParams for each prompt."""
    params = SamplingParams() if params is None else params
    listed = [params] * count if isinstance(params, SamplingParams) else params
    if not isinstance(listed, list | tuple) or not all(isinstance(p, SamplingParams) for p in listed):
        raise ValueError(f"sampling_params must be SamplingParams, or a list of them, got {params!r:.80}")
    if len(listed) != count:
        raise ValueError(
            f"sampling_params must be one or one a prompt: got {len(listed)} for {count} prompts"
        )
    return list(listed)


def kl_divergence(reference_TV: Tensor, other_TV: Tensor) -> float:
    """Mean KL(reference || other) in nats over the rows of two logits tensors."""
    p = torch.log_softmax(reference_TV.double(), -1)
    q = torch.log_softmax(other_TV.double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean().item()
