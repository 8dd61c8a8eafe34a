"""The life of a request in the front end: admitted, tokenized, handed to a worker, its tokens turned into text.

A Job is one HTTP request with its sequences (prompts x n).  Text waits in the sequence until somebody takes it, merged
if it was not taken in time, so a slow reader costs no queue.  Knows no HTTP; every way out goes through `Job.close`.
"""

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from minserve.agent import Agent
from minserve.config import Config, ModelEntry
from minserve.host import Host
from minserve.protocol import MAX_SEQUENCES, ApiError, ChatBody, CompletionBody, read_messages
from minserve.sampling import SamplingParams
from minserve.text import AnswerText, Tokenizer
from minserve.wire import Submit, TokenEvent, TokenLogprobs

# texts this short are tokenized at once, longer ones in a thread
INLINE_CHARS = 4096
FINISHES_KEPT = 64
# log probabilities of prompt tokens in one answer: about 25 bytes each, all held at once
MAX_ECHOED = 1 << 20
# states in which a model stays until somebody asks for it, and what to ask
RESTING = {"asleep": "wake", "unloaded": "load"}


class Sequence:
    """One answer in the making.  `text`, `token_ids` and `logprobs` are what has not been taken yet."""

    def __init__(self, job: "Job", rid: int, index: int, prompt: list[int], params: SamplingParams) -> None:
        self.rid, self.index, self.prompt = rid, index, prompt
        self.text, self.num_tokens = "", 0
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs | None] = []
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.cached_tokens: int | None = None  # of its prompt; None until its first token
        self.finish: tuple[str, Any] | None = None
        self.closed = False  # its end has been sent
        self._job = job
        self._waiting = len(prompt)
        job.served.waiting_tokens += self._waiting
        self._answer = AnswerText(job.tokenizer, params)

    def token(self, event: TokenEvent) -> None:
        if event.finish_reason == "error":
            self._job.fail(ApiError(500, event.error or "The engine failed.", "engine_error"))
            return
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if self.cached_tokens is None:
            self.cached_tokens = event.cached_tokens
        self.settle()
        for i, token_id in enumerate(event.token_ids):
            ends = event.finish_reason is not None and i == len(event.token_ids) - 1
            self.num_tokens += 1
            self.token_ids.append(token_id)
            self.text += self._answer.push(token_id, ends and event.finish_reason == "stop")
            if event.logprobs is not None:
                self.logprobs.append(event.logprobs[i])
            if self._answer.matched is not None:
                self.finish = ("stop", self._answer.matched)
                self._job.ended(self, abort=event.finish_reason is None)
                return
        if event.finish_reason is not None:
            self.text += self._answer.finish()
            self.finish = (event.finish_reason, event.stop_reason)
            self._job.ended(self, abort=False)
        self._job.wake.set()

    def settle(self) -> None:
        """Its prompt no longer waits to be computed."""
        self._job.served.waiting_tokens -= self._waiting
        self._waiting = 0

    def refused(self, error: str) -> None:
        code = "context_length_exceeded" if "context length" in error else "invalid_value"
        self._job.fail(ApiError(400, error, code))

    def lost(self, error: str) -> None:
        # the same request may be sent again: nothing of it is left behind
        self._job.fail(ApiError(503, error, self._job.lost_code, retry_after_s=1))


@dataclass(slots=True)
class Served:
    """A model that requests may name; without a tokenizer only where it failed."""

    entry: ModelEntry
    host: Host
    tokenizer: Tokenizer | None
    waiting_tokens: int = 0

    @property
    def busy(self) -> int:
        return self.host.num_requests


class Job:
    """All sequences of one HTTP request.  `wake` is set when there is something new to look at."""

    def __init__(self, front: "Frontend", served: Served, body: CompletionBody | ChatBody) -> None:
        self.served, self.body, self.tokenizer = served, body, front.tokenizer(served)
        self.sequences: list[Sequence] = []
        self.prompt_texts: list[str] = []
        self.prompt_tokens = 0
        self.wake = asyncio.Event()
        self.error: ApiError | None = None
        self.gone = False
        self._front = front
        self._open: dict[int, Sequence] = {}

    def submit(self, prompts: list[list[int]], params: SamplingParams) -> None:
        """Hands everything to the worker; there is no await in here, so all is registered or nothing."""
        now = time.monotonic()
        slo = self.served.entry.slo
        self.prompt_tokens = sum(map(len, prompts))
        for i, prompt in enumerate(prompts):
            for k in range(params.n):
                seq = Sequence(self, self._front.agent.next_rid(), i * params.n + k, prompt, params)
                self.sequences.append(seq)
                self._open[seq.rid] = seq
                request = Submit(
                    rid=seq.rid, prompt=tuple(prompt), params=params, index=k, arrival_s=now,
                    ttft_s=slo.ttft_ms / 1000, tpot_s=slo.tpot_ms / 1000, priority=self.body.priority,
                    cache_salt=self.body.cache_salt or "",
                )  # fmt: skip
                self.served.host.submit(request, seq)

    @property
    def done(self) -> bool:
        return not self._open

    @property
    def completion_tokens(self) -> int:
        return sum(s.num_tokens for s in self.sequences)

    @property
    def cached_tokens(self) -> int:
        """Of all prompts, what was not computed; of the n samples of one, the first to come has found the least."""
        found: dict[int, int] = {}
        for s in self.sequences:
            if s.cached_tokens is not None:
                prompt = s.index // self.body.n
                found[prompt] = min(s.cached_tokens, found.get(prompt, s.cached_tokens))
        return sum(found.values())

    def ended(self, seq: Sequence, abort: bool) -> None:
        self._open.pop(seq.rid, None)
        seq.settle()
        if abort:
            self.served.host.abort(seq.rid)
        self._front.note_finish(self.served)
        self.wake.set()

    def fail(self, error: ApiError) -> None:
        """The whole request ends here."""
        self.error = self.error or error
        self.close()
        self.wake.set()

    @property
    def lost_code(self) -> str:
        """Why a worker gave no more answers."""
        if self._front.draining:
            return "shutting_down"
        return "model_unloaded" if self.served.host.state == "draining" else "worker_died"

    def disconnect(self) -> None:
        self.gone = True
        self.wake.set()

    def close(self) -> None:
        """Aborts what still runs.  May be called at any time and any number of times."""
        for rid, seq in self._open.items():
            self.served.host.abort(rid)
            seq.settle()
        self._open.clear()

    async def news(self) -> None:
        """Waits until something changed since the last call."""
        await self.wake.wait()
        self.wake.clear()


class Frontend:
    """Finds models, admits requests and knows when to say no."""

    def __init__(self, config: Config, agent: Agent, tokenizers: dict[str, Tokenizer | None]) -> None:
        self.agent = agent
        self.models = {m.name: Served(m, agent.hosts[m.name], tokenizers.get(m.name)) for m in config.models}
        self._by_name = self.models | {a: self.models[m.name] for m in config.models for a in m.aliases}
        self._max_queued = config.server.max_queued_requests
        self._finishes: dict[str, deque[float]] = {name: deque(maxlen=FINISHES_KEPT) for name in self.models}
        self.draining = False

    @property
    def num_requests(self) -> int:
        return sum(s.busy for s in self.models.values())

    def find(self, name: str | None) -> Served:
        """The model by its name or an alias; None only where there is no choice."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        names = ", ".join(self._by_name)
        if name is None:
            raise ApiError(400, f"model is required: one of {names}", "missing_parameter", "model")
        served = self._by_name.get(name)
        if served is None:
            raise ApiError(
                404,
                f"The model {name!r:.130} does not exist. Served are: {names}",
                "model_not_found",
                "model",
            )
        return served

    def note_finish(self, served: Served) -> None:
        self._finishes[served.entry.name].append(time.monotonic())

    def retry_after_s(self, served: Served) -> int:
        """About how long until what is queued now has been answered."""
        times = self._finishes[served.entry.name]
        if len(times) < 2:
            return 1
        each_s = (times[-1] - times[0]) / (len(times) - 1)
        return min(30, max(1, math.ceil(each_s * served.busy)))

    def check_ready(self, served: Served) -> None:
        name, host = served.entry.name, served.host
        if self.draining:
            raise ApiError(503, "The server is shutting down.", "shutting_down", retry_after_s=10)
        if host.state == "failed":
            raise failed(served)
        if host.state in RESTING:
            verb = RESTING[host.state]
            how = f"POST /admin/models/{name}/{verb} brings it back"
            says = f"The model {name} is {host.state}: {how}."
            raise ApiError(503, says, f"model_{host.state}", retry_after_s=10)
        if host.state == "draining":
            says = f"The model {name} is being taken out of service."
            raise ApiError(503, says, "model_draining", retry_after_s=10)
        if host.state != "ready":
            raise ApiError(503, f"The model {name} is {host.state}.", "model_loading", retry_after_s=2)

    def check_room(self, served: Served, sequences: int, prompt_tokens: int = 0) -> None:
        """Queue caps, in sequences and tokens; cheap, so that refusing is too."""
        entry = served.entry
        if sequences > min(MAX_SEQUENCES, entry.max_queued_requests, self._max_queued):
            raise ApiError(
                400, f"The request asks for {sequences} sequences, more than can ever be queued.", param="n"
            )
        if prompt_tokens > entry.max_queued_tokens:
            raise ApiError(
                400, f"The prompts have {prompt_tokens} tokens, more than can ever be queued.", param="prompt"
            )
        full = served.busy + sequences > entry.max_queued_requests
        full = full or self.num_requests + sequences > self._max_queued
        if full or served.waiting_tokens + prompt_tokens > entry.max_queued_tokens:
            raise ApiError(
                503, f"The queue of model {entry.name} is full.", "queue_full",
                retry_after_s=self.retry_after_s(served),
            )  # fmt: skip

    async def completion(self, body: CompletionBody) -> Job:
        served = self.find(body.model)
        params = body.checked_params()
        given = body.prompts()
        self.check_ready(served)
        self.check_room(served, len(given) * body.n)
        ids = []
        for prompt in given:
            ids.append(await self.encode(served, prompt, body.add_special_tokens))
            await asyncio.sleep(0)  # 256 prompts are no reason for other streams to stand still
        job = Job(self, served, body)
        self._admit(job, ids, params)
        if body.echo:
            job.prompt_texts = [p if isinstance(p, str) else job.tokenizer.decode(p) for p in given]
        return job

    async def chat(self, body: ChatBody) -> Job:
        served = self.find(body.model)
        params = body.checked_params()
        self.check_ready(served)
        self.check_room(served, body.n)
        ids = await self.encode_chat(served, body)
        return self._admit(Job(self, served, body), [ids], params)

    def _admit(self, job: Job, prompts: list[list[int]], params: SamplingParams) -> Job:
        served = job.served
        self.check_ready(served)  # again: tokenizing took its time
        assert served.host.loaded is not None, f"{served.entry.name} is ready and was never loaded"
        vocab = served.host.loaded.vocab_size
        for i, prompt in enumerate(prompts):
            self._check_prompt(prompt, served, f"prompt[{i}]" if len(prompts) > 1 else "prompt")
        for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
            if any(t >= vocab for t in ids):
                raise ApiError(400, f"{name} names a token outside the vocabulary [0, {vocab})", param=name)
        prompt_tokens = params.n * sum(map(len, prompts))
        if params.prompt_logprobs is not None and prompt_tokens * (params.prompt_logprobs + 1) > MAX_ECHOED:
            raise ApiError(
                400,
                f"echo and logprobs of {prompt_tokens} prompt tokens are too many for one answer.",
                param="logprobs",
            )
        self.check_room(served, len(prompts) * params.n, prompt_tokens)
        job.submit(prompts, params)
        return job

    @staticmethod
    def _check_prompt(prompt: list[int], served: Served, where: str) -> None:
        loaded = served.host.loaded
        assert loaded is not None, f"{served.entry.name} is ready and was never loaded"
        if not prompt:
            raise ApiError(400, "The prompt has no tokens.", param=where)
        if not 0 <= min(prompt) <= max(prompt) < loaded.vocab_size:
            raise ApiError(
                400, f"{where} has token ids outside the vocabulary [0, {loaded.vocab_size})", param=where
            )
        if len(prompt) >= loaded.max_model_len:
            raise too_long(loaded.max_model_len, f"{len(prompt)} tokens", where)

    def tokenizer(self, served: Served) -> Tokenizer:
        if served.tokenizer is None:
            raise failed(served)
        return served.tokenizer

    async def encode(self, served: Served, prompt: str | list[int], special: bool) -> list[int]:
        """Token ids of a prompt; a text that cannot fit is refused before it is tokenized."""
        if not isinstance(prompt, str):
            return prompt
        tokenizer, loaded = self.tokenizer(served), served.host.loaded
        if loaded is not None and len(prompt) > loaded.max_model_len * tokenizer.longest_piece:
            raise too_long(loaded.max_model_len, f"{len(prompt)} characters", "prompt")
        if len(prompt) <= INLINE_CHARS:
            return tokenizer.encode(prompt, special)
        return await asyncio.to_thread(tokenizer.encode, prompt, special)

    async def encode_chat(self, served: Served, body: Any) -> list[int]:
        """Token ids of messages under the model's chat template; `body` is a chat or a tokenize body."""
        template = self.tokenizer(served).chat
        if template is None:
            raise ApiError(
                400, f"The model {served.entry.name} has no chat template.", "no_chat_template", "messages"
            )
        messages = read_messages(body.messages)
        try:
            # in a thread: a template may loop for as long as its deadline lets it
            text = await asyncio.to_thread(
                template.render, messages, add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message, extra=body.chat_template_kwargs,
            )  # fmt: skip
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        return await self.encode(served, text, body.add_special_tokens)


def failed(served: Served) -> ApiError:
    return ApiError(
        503, f"The model {served.entry.name} has failed; the server's log says why.", "model_failed"
    )


def too_long(max_model_len: int, found: str, param: str) -> ApiError:
    return ApiError(
        400, f"This model's maximum context length is {max_model_len} tokens, the prompt has {found}: "
        "it must leave room for at least one token.", "context_length_exceeded", param,
    )  # fmt: skip
