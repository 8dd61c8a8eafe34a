"""The front end: finds models, admits requests, chooses among replicas and precisions, and knows when to say no.

What becomes of a request that was admitted is a Job's (jobs.py).  Knows no HTTP.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from minserve.agent import Agent
from minserve.config import Config
from minserve.jobs import Job, slo_of
from minserve.protocol import MAX_SEQUENCES, ApiError, ChatBody, CompletionBody, read_messages
from minserve.sampling import SamplingParams
from minserve.served import Served, Target, memory_of, targets_of
from minserve.text import Tokenizer
from sched.router import RouteRequest, cached_tokens, marks_of, with_pace

# texts this short are tokenized at once, longer ones in a thread
INLINE_CHARS = 4096
FINISHES_KEPT = 64
# log probabilities of prompt tokens in one answer: about 25 bytes each, all held at once
MAX_ECHOED = 1 << 20
# states in which a model stays until somebody asks for it, and what to ask
RESTING = {"asleep": "wake", "unloaded": "load"}


class Frontend:
    """All methods belong to the event loop's thread."""

    def __init__(self, config: Config, agent: Agent, tokenizers: dict[str, Tokenizer | None]) -> None:
        """`config` has an entry for each replica."""
        self.agent = agent
        memory = {name: memory_of(p.table, name) for p in agent.pools for name in p.plan.models}
        self.models = {
            m.name: Served(m, agent.hosts[m.name], tokenizers.get(m.name), memory.get(m.name, lambda: None))
            for m in config.models
        }
        self._by_name = targets_of(config, self.models)
        self.groups = tuple(self._by_name[group.name] for group in config.groups)
        self._max_queued = config.server.max_queued_requests
        self._finishes: dict[str, deque[float]] = {name: deque(maxlen=FINISHES_KEPT) for name in self.models}
        self.draining = False

    @property
    def num_requests(self) -> int:
        return sum(s.busy for s in self.models.values())

    @property
    def names(self) -> tuple[Target, ...]:
        """What /v1/models lists: models in the order of the file, then groups."""
        return tuple(dict.fromkeys(self._by_name[s.entry.model] for s in self.models.values())) + self.groups

    def target(self, name: str | None) -> Target:
        """What requests for `name` (a model, an alias, a replica, a group) go to; None only where there is no choice."""
        if name is None and len({s.entry.model for s in self.models.values()}) == 1:
            return self.names[0]
        names = ", ".join(self._by_name)
        if name is None:
            raise ApiError(400, f"model is required: one of {names}", "missing_parameter", "model")
        target = self._by_name.get(name)
        if target is None:
            raise ApiError(
                404,
                f"The model {name!r:.130} does not exist. Served are: {names}",
                "model_not_found",
                "model",
            )
        return target

    def find(self, name: str | None) -> Served:
        """One model of that name: of several the first that is ready."""
        members = self.target(name).members
        return next((s for s in members if s.host.state == "ready"), members[0])

    def one(self, name: str) -> Served:
        """The one worker of that name; ApiError where it stands for several."""
        target = self.target(name)
        if target.several:
            names = ", ".join(s.entry.name for s in target.members)
            raise ApiError(400, f"{name} stands for several: name one of {names}", param="model")
        return target.members[0]

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
        arrival_s, target = time.monotonic(), self.target(body.model)
        params = body.checked_params()
        given = body.prompts()
        served = self.able(target, lambda s: self.check_room(s, len(given) * body.n))[0]
        ids = []
        for prompt in given:
            ids.append(await self.encode(served, prompt, body.add_special_tokens))
            await asyncio.sleep(0)  # 256 prompts are no reason for other streams to stand still
        job = self._admit(target, body, ids, params, arrival_s)
        if body.echo:
            job.prompt_texts = [p if isinstance(p, str) else job.tokenizer.decode(p) for p in given]
        return job

    async def chat(self, body: ChatBody) -> Job:
        arrival_s, target = time.monotonic(), self.target(body.model)
        params = body.checked_params()
        served = self.able(target, lambda s: self.check_room(s, body.n))[0]
        ids = await self.encode_chat(served, body)
        return self._admit(target, body, [ids], params, arrival_s)

    def able(self, target: Target, check: Callable[[Served], None]) -> list[Served]:
        """The members that are ready and pass `check`, at least one; else why not: of several, what may pass in time."""
        found, refusals = [], []
        for served in target.members:
            try:
                self.check_ready(served)
                check(served)
                found.append(served)
            except ApiError as error:
                refusals.append(error)
        if not found:
            raise next((e for e in refusals if e.status == 503), refusals[0])
        return found

    def _admit(
        self,
        target: Target,
        body: CompletionBody | ChatBody,
        prompts: list[list[int]],
        params: SamplingParams,
        arrival_s: float,
    ) -> Job:
        # ready again: tokenizing took its time
        able = self.able(target, lambda s: self.check_fits(s, prompts, params))
        served, cached = able[0], 0
        if target.several:
            served, cached = self.routed(target, able, body, prompts)
        job = Job(self, target, served, body, arrival_s)
        job.submit(prompts, params, cached)
        return job

    def routed(
        self, target: Target, able: list[Served], body: CompletionBody | ChatBody, prompts: list[list[int]]
    ) -> tuple[Served, int]:
        """Who of those `able` gets the request, and how much of its first prompt it is likely to have cached."""
        now, slo = time.monotonic(), slo_of(body, target)
        marks = marks_of(prompts[0], body.cache_salt or "")
        ask = RouteRequest(sum(map(len, prompts)), slo.ttft_s, slo.tpot_s, marks)
        well = [s for s in able if not s.host.stalled] or able
        states = with_pace([s.state(now, s in well) for s in target.members])
        state = target.route(ask, states)
        assert state is not None, f"{[s.entry.name for s in well]} take the request"
        served = self.models[state.name]
        target.chosen[state.name] += 1
        cached = cached_tokens(ask, served.recent)
        if served.entry.enable_prefix_caching:
            served.recent.add(marks)
        return served, cached

    def check_fits(self, served: Served, prompts: list[list[int]], params: SamplingParams) -> None:
        """ApiError where the model cannot take these prompts, or cannot now."""
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
