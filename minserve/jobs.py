"""The life of a request in the front end once it is admitted: handed to a worker, its tokens turned into text.

A Job is one HTTP request with its sequences (prompts x n).  Text waits in the sequence until somebody takes it, merged
if it was not taken in time, so a slow reader costs no queue.  Knows no HTTP; every way out goes through `Job.close`.
"""

import asyncio
import time
from typing import Any, Protocol

from minserve.agent import Agent
from minserve.protocol import ApiError, ChatBody, CompletionBody
from minserve.sampling import SamplingParams
from minserve.served import Passage, Served, Slo, Target, cold_tokens
from minserve.text import AnswerText, Tokenizer
from minserve.wire import Submit, TokenEvent, TokenLogprobs


class Desk(Protocol):
    """What a job asks of the front end."""

    agent: Agent
    draining: bool

    def tokenizer(self, served: Served) -> Tokenizer: ...
    def note_finish(self, served: Served) -> None: ...
    def retry_after_s(self, served: Served) -> int: ...


class Sequence:
    """One answer in the making.  `text`, `token_ids` and `logprobs` are what has not been taken yet."""

    def __init__(
        self, job: "Job", rid: int, index: int, prompt: list[int], params: SamplingParams, passage: Passage
    ) -> None:
        self.rid, self.index, self.prompt, self.passage = rid, index, prompt, passage
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs | None] = []
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.cached_tokens: int | None = None  # of its prompt; None until its first token
        self.finish: tuple[str, Any] | None = None
        self.closed = False  # its end has been sent
        self._job = job
        self._answer = AnswerText(job.tokenizer, params)

    @property
    def num_tokens(self) -> int:
        return self.passage.num_tokens

    def token(self, event: TokenEvent) -> None:
        if event.finish_reason == "error":
            self._job.fail(ApiError(500, event.error or "The engine failed.", "engine_error"))
            return
        if event.finish_reason == "shed":
            self._job.shed(event.error or "The request was given up: it could not be served in time.")
            return
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        if self.cached_tokens is None:
            self.cached_tokens = event.cached_tokens
        self.passage.heard(event, time.monotonic())
        for i, token_id in enumerate(event.token_ids):
            ends = event.finish_reason is not None and i == len(event.token_ids) - 1
            self.passage.num_tokens += 1
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

    def refused(self, error: str) -> None:
        code = "context_length_exceeded" if "context length" in error else "invalid_value"
        self._job.fail(ApiError(400, error, code))

    def lost(self, error: str) -> None:
        # the same request may be sent again: nothing of it is left behind
        self._job.fail(ApiError(503, error, self._job.lost_code, retry_after_s=1))


class Job:
    """All sequences of one HTTP request.  `wake` is set when there is something new to look at."""

    def __init__(
        self, front: Desk, target: Target, served: Served, body: CompletionBody | ChatBody, arrival_s: float
    ) -> None:
        self.target, self.served, self.body, self.arrival_s = target, served, body, arrival_s
        self.tokenizer = front.tokenizer(served)
        self.sequences: list[Sequence] = []
        self.prompt_texts: list[str] = []
        self.prompt_tokens = 0
        self.wake = asyncio.Event()
        self.error: ApiError | None = None
        self.gone = False
        self._front = front
        self._open: dict[int, Sequence] = {}

    def submit(self, prompts: list[list[int]], params: SamplingParams, cached: int = 0) -> None:
        """Hands everything to the worker; there is no await in here, so all is registered or nothing.

        `cached`: tokens of the first prompt that the worker is believed to have already.
        """
        now, slo = time.monotonic(), slo_of(self.body, self.target)
        self.prompt_tokens = sum(map(len, prompts))
        for i, prompt in enumerate(prompts):
            for k in range(params.n):
                queued = cold_tokens(len(prompt), k, self.served.entry.enable_prefix_caching)
                queued -= min(cached, queued) if i == k == 0 else 0
                way = Passage(self.target, self.served, slo, self.arrival_s, len(prompt), queued)
                seq = Sequence(self, self._front.agent.next_rid(), i * params.n + k, prompt, params, way)
                self.sequences.append(seq)
                self._open[seq.rid] = seq
                request = Submit(
                    rid=seq.rid, prompt=tuple(prompt), params=params, index=k, arrival_s=self.arrival_s,
                    ttft_s=slo.ttft_s, tpot_s=slo.tpot_s, priority=self.body.priority,
                    cache_salt=self.body.cache_salt or "",
                )  # fmt: skip
                self.served.host.submit(request, seq)
                way.begin(now)

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
        seq.passage.over(time.monotonic())
        if abort:
            self.served.host.abort(seq.rid)
        self._front.note_finish(self.served)
        self.wake.set()

    def fail(self, error: ApiError, why: str = "failed") -> None:
        """The whole request ends here; `why` as a Passage knows it."""
        self.error = self.error or error
        self.close("gone" if error.status < 500 else why)
        self.wake.set()

    def shed(self, says: str) -> None:
        """The policy gave one of its sequences up, and so all of it."""
        self.fail(ApiError(503, says, "shed", retry_after_s=self._front.retry_after_s(self.served)), "shed")

    @property
    def lost_code(self) -> str:
        """Why a worker gave no more answers."""
        if self._front.draining:
            return "shutting_down"
        return "model_unloaded" if self.served.host.state == "draining" else "worker_died"

    def disconnect(self) -> None:
        self.gone = True
        self.wake.set()

    def close(self, why: str = "gone") -> None:
        """Aborts what still runs.  May be called at any time and any number of times."""
        now = time.monotonic()
        for rid, seq in self._open.items():
            self.served.host.abort(rid)
            seq.passage.over(now, why)
        self._open.clear()

    async def news(self) -> None:
        """Waits until something changed since the last call."""
        await self.wake.wait()
        self.wake.clear()


def slo_of(body: CompletionBody | ChatBody, target: Target) -> Slo:
    """The request's own, and what it does not say from the configuration."""
    own = body.slo or {}
    ttft_ms, tpot_ms = own.get("ttft_ms"), own.get("tpot_ms")
    return Slo(
        target.slo.ttft_s if ttft_ms is None else ttft_ms / 1000,
        target.slo.tpot_s if tpot_ms is None else tpot_ms / 1000,
    )
