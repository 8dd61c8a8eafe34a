"""The engine of one model: requests in, tokens out, one turn of plan -> execute -> commit a step.

The Batcher decides and owns blocks, the Runner owns tensors, the engine owns token ids and token-level stops.  With
overlap a step is planned and enqueued while the one before runs, so a stop is seen one step late and what was
computed beyond it is thrown away.  Stop strings and text are not known here.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from minserve.inputs import Join
from minserve.runner import Runner, SampledToken, StepHandle, StepResult
from minserve.sampler import TokenLogprobs
from minserve.sampling import SamplingParams
from minserve.step_watch import StepWatch
from sched.batching import Batcher
from sched.prefix import KeyChain, root_key
from sched.step import Request, StepPlan

log = logging.getLogger(__name__)
# of the device, in a step: requests that run are held up by it
COMPACTION_S = 0.001
SHED = "The request was shed: its first token could not have come in time."


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One sequence to generate.  `index` is its place among the n samples of one call; times in seconds.

    Requests of different `tenant` or `cache_salt` share no cached prefix.
    """

    rid: int
    prompt: tuple[int, ...]
    params: SamplingParams
    index: int = 0
    arrival_s: float | None = None
    ttft_s: float = 10.0
    tpot_s: float = 1.0
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""


class TokenEvent(NamedTuple):
    """New tokens of a request; the last event of a request has a `finish_reason` (stop, length, error or shed: the policy gave
    it up before it had a token; `error` says why).

    A stop token is the last of `token_ids`, with `stop_reason` its id (None for an end-of-sequence token).
    `cached_tokens` of the prompt were not computed; the first event of a request says so.
    """

    rid: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    error: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int = 0


@dataclass(slots=True)
class _Sequence:
    """`chain` has hashed the first `hashed` tokens; None where nothing is cached.  `cached`: at its first start."""

    request: EngineRequest
    max_tokens: int
    seed: int
    chain: KeyChain | None
    hashed: int
    cached: int | None = None
    output: list[int] = field(default_factory=list)
    prompt_logprobs: dict[int, TokenLogprobs | None] = field(default_factory=dict)


@dataclass(slots=True)
class Counters:
    """Totals since the start, in tokens, steps and requests.

    `prefix_queries`: prompt tokens that were looked up in the cache; `prefix_hits`: those that were found.
    `moved_blocks`: copied together, in all layers, in `move_s` seconds of the device.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    shed: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    moved_blocks: int = 0
    move_s: float = 0.0


class Turns(Protocol):
    """Who else computes prompts on the device: asked before each plan, told of each plan and each end of a step."""

    def cap(self) -> int | None: ...
    def planned(self, tokens: int, runs: bool) -> None: ...
    def landed(self) -> None: ...
    def idle(self) -> None: ...


class Engine:
    """`eos_ids` end a sequence unless it ignores them.  `seed` makes requests without one of their own reproducible, in
    the order in which they come.  `identity`: what cached keys and values depend on beside tokens, None caches none.
    Not thread safe: one thread calls everything."""

    def __init__(
        self,
        runner: Runner,
        batcher: Batcher,
        *,
        eos_ids: tuple[int, ...],
        max_model_len: int,
        overlap: bool = True,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        identity: str | None = None,
    ) -> None:
        self.runner = runner
        self.batcher = batcher
        self.counters = Counters()
        self._eos_ids = frozenset(eos_ids)
        self._vocab_size = runner.model.config.vocab_size
        self._max_model_len = max_model_len
        self._overlap = overlap
        self._clock = clock
        self._identity = identity
        self.turns: Turns | None = None
        self.watch: StepWatch | None = None
        self._seeds = random.SystemRandom() if seed is None else random.Random(seed)
        self._sequences: dict[int, _Sequence] = {}
        # under way, oldest first, and when each was planned
        self._flights: deque[tuple[StepPlan, StepHandle, float]] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self._flights) or self.batcher.has_work or self.runner.draining

    @property
    def has_requests(self) -> bool:
        """Somebody still waits for tokens; without, what work there is ends by itself."""
        return bool(self._sequences)

    def add(self, r: EngineRequest) -> None:
        """Queues a request.  ValueError for what can never run: the message goes to the caller."""
        if r.rid in self._sequences:
            raise ValueError(f"request id {r.rid} is in use")
        if not r.prompt:
            raise ValueError("the prompt is empty: at least one token is needed")
        worst = max(r.prompt) if min(r.prompt) >= 0 else min(r.prompt)
        if not 0 <= worst < self._vocab_size:
            raise ValueError(f"token id {worst} is outside the vocabulary [0, {self._vocab_size})")
        named = max((*(r.params.logit_bias or ()), *r.params.stop_token_ids), default=0)
        if named >= self._vocab_size:
            raise ValueError(
                f"logit_bias and stop_token_ids must be in the vocabulary [0, {self._vocab_size}), got {named}"
            )
        room = self._max_model_len - len(r.prompt)
        if room < 1:
            raise ValueError(
                f"This model's maximum context length is {self._max_model_len} tokens. "
                f"However, your prompt has {len(r.prompt)} tokens and no room is left for an answer."
            )
        wanted = room if r.params.max_tokens is None else min(r.params.max_tokens, room)
        seed = self._seeds.getrandbits(64) if r.params.seed is None else r.params.seed + r.index
        chain = self._chain(r)
        seq = _Sequence(r, wanted, seed, chain, len(r.prompt))
        self.batcher.add(
            Request(
                rid=r.rid,
                prompt_tokens=len(r.prompt),
                # 0 computes the prompt alone; the one token sampled is thrown away
                max_tokens=max(wanted, 1),
                arrival_s=self._clock() if r.arrival_s is None else r.arrival_s,
                ttft_s=r.ttft_s,
                tpot_s=r.tpot_s,
                priority=r.priority,
                tenant=r.tenant,
                keys=() if chain is None else chain.extend(r.prompt),
                # log probabilities of the prompt are computed from its rows
                reads_cache=r.params.prompt_logprobs is None,
            )
        )
        self._sequences[r.rid] = seq

    def _chain(self, r: EngineRequest) -> KeyChain | None:
        if self._identity is None:
            return None
        root = root_key(self._identity, r.tenant, r.cache_salt)
        return KeyChain(root, self.batcher.blocks.block_tokens)

    def abort(self, rid: int) -> bool:
        """Ends a request in whatever state it is; no event follows.  False if it is not known (any more)."""
        if self._sequences.pop(rid, None) is None:
            return False
        self.counters.aborted += 1
        self.batcher.abort(rid)
        return True

    def step(self) -> list[TokenEvent]:
        """One turn of the ring.  An empty list means nothing ended a step: idle, filling up, or blocks are awaited."""
        self.runner.poll()
        now = self._clock()
        plan = self.batcher.plan(now, self.turns.cap() if self.turns else None)
        if self.turns:
            self.turns.planned(sum(c.count for c in plan.chunks), not plan.empty)
        if plan.empty:
            self.runner.rows.drop(plan.left)
        else:
            # the Batcher lets a preempted request back in only when all its tokens are here
            starts = {c.rid: c.start for c in plan.chunks}
            joins = tuple(self._join(self._sequences[rid], starts[rid]) for rid in plan.joins)
            self.counters.steps += 1
            self._flights.append((plan, self.runner.execute(plan, joins), now))
        keep = 1 if self._overlap and not plan.empty else 0
        events = self._shed(plan)
        while len(self._flights) > keep:
            events += self._land()
        if self.watch and not self._flights and (plan.empty or not self.batcher.has_work):
            self.watch.paused()
        return events

    def _shed(self, plan: StepPlan) -> list[TokenEvent]:
        for rid in plan.shed:
            del self._sequences[rid]
        self.counters.shed += len(plan.shed)
        return [TokenEvent(rid, (), finish_reason="shed", error=SHED) for rid in plan.shed]

    def idle(self) -> None:
        """In place of a step, while there is no work."""
        if self.turns:
            self.turns.idle()

    def compact(self, sets: int) -> None:
        """The next step makes room for at most `sets` sets to leave; its copies take COMPACTION_S, as far as is known."""
        c = self.counters
        self.batcher.compactor.ask(sets, int(COMPACTION_S * c.moved_blocks / c.move_s) if c.move_s else 0)

    def _join(self, seq: _Sequence, cached: int) -> Join:
        r = seq.request
        if seq.cached is None:
            seq.cached = cached
            if seq.chain is not None and r.params.prompt_logprobs is None:
                self.counters.prefix_queries += len(r.prompt)
                self.counters.prefix_hits += cached
        stop_ids = tuple(sorted({*r.params.stop_token_ids, *(() if r.params.ignore_eos else self._eos_ids)}))
        return Join(r.rid, (*r.prompt, *seq.output), len(r.prompt), r.params, seq.seed, stop_ids)

    def _land(self) -> list[TokenEvent]:
        """Waits for the oldest step under way and commits it."""
        plan, handle, planned_s = self._flights[0]
        failure: RuntimeError | None = None
        try:
            result = handle.wait()
        except RuntimeError as e:
            # a GPU fault leaves nothing of its context to go on with: the process ends and a new one takes over
            if self.runner.on_gpu and not isinstance(e, torch.OutOfMemoryError):
                raise
            failure = e
        # only now: Ctrl-C may have cut the wait short, and the Batcher wants every step
        self._flights.popleft()
        if self.turns:
            self.turns.landed()
        if failure is None:
            events = self._commit(plan, result)
            if self.watch:
                self.watch.landed(plan, planned_s, self._clock())
            return events
        log.error("step %d failed", plan.step, exc_info=failure)
        return self._fail(plan, f"the step failed: {failure}")

    def _commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        self.counters.moved_blocks += result.moved
        self.counters.move_s += result.move_s
        for p in result.prompt_logprobs:
            if p.rid in self._sequences:
                self._sequences[p.rid].prompt_logprobs.update(enumerate(p.values, p.position))
        events = []
        stopped = set()
        for s in result.sampled:
            seq = self._sequences.get(s.rid)
            if seq is None:
                continue  # aborted, or stopped one step earlier
            event = self._accept(seq, s)
            events.append(event)
            if event.finish_reason is not None:
                del self._sequences[s.rid]
                if event.finish_reason != "length":
                    stopped.add(s.rid)
        self.batcher.advance(plan, 1, self._clock(), stopped)
        return events

    def _accept(self, seq: _Sequence, s: SampledToken) -> TokenEvent:
        """Takes one token: does the request go on, and why not?"""
        r, p = seq.request, seq.request.params
        if s.broken:
            self.counters.failed += 1
            return TokenEvent(s.rid, (), finish_reason="error", error="the model's logits are not finite")
        seq.output.append(s.token)
        self._cache(seq)
        first = len(seq.output) == 1
        prompt_lp = self._prompt_logprobs(seq) if first else None
        if first:
            self.counters.prompt_tokens += len(r.prompt)
        if seq.max_tokens == 0:
            self.counters.finished += 1
            return TokenEvent(
                s.rid, (), finish_reason="length", prompt_logprobs=prompt_lp, cached_tokens=seq.cached or 0
            )
        self.counters.output_tokens += 1
        reason, stop_reason = None, None
        if len(seq.output) >= p.min_tokens:
            if s.token in self._eos_ids and not p.ignore_eos:
                reason = "stop"
            elif s.token in p.stop_token_ids:
                reason, stop_reason = "stop", s.token
        if reason is None and len(seq.output) >= seq.max_tokens:
            reason = "length"
        self.counters.finished += reason is not None
        logprobs = (s.logprobs,) if s.logprobs is not None else None
        cached = (seq.cached or 0) if first else 0
        return TokenEvent(s.rid, (s.token,), logprobs, reason, stop_reason, None, prompt_lp, cached)

    def _cache(self, seq: _Sequence) -> None:
        """A block of the answer may be full: all tokens but the newest are stored by now."""
        prompt, stored = len(seq.request.prompt), len(seq.request.prompt) + len(seq.output) - 1
        if seq.chain is None or stored % self.batcher.blocks.block_tokens or stored == seq.hashed:
            return
        keys = seq.chain.extend(seq.output[seq.hashed - prompt : stored - prompt])
        seq.hashed = stored
        self.batcher.extend(seq.request.rid, keys)

    @staticmethod
    def _prompt_logprobs(seq: _Sequence) -> tuple[TokenLogprobs | None, ...] | None:
        if seq.request.params.prompt_logprobs is None:
            return None
        # nothing predicts the first token
        return (None, *(seq.prompt_logprobs[i] for i in range(1, len(seq.request.prompt))))

    def _fail(self, plan: StepPlan, why: str) -> list[TokenEvent]:
        """Ends every request of a step that raised, or that relied on what it was to cache; the others go on."""
        events = []
        for rid in sorted(self.batcher.fail(plan, self._clock())):
            if self._sequences.pop(rid, None) is not None:
                self.counters.failed += 1
                events.append(TokenEvent(rid, (), finish_reason="error", error=why))
        return events

    def settle(self) -> None:
        """Lands the steps that requests left behind when they ended, and waits until their sets are back in the pool."""
        assert not self._sequences, f"{len(self._sequences)} requests are under way"
        while self.has_work:
            self.step()

    def close(self) -> None:
        """Ends the step under way and drops all requests."""
        for rid in list(self._sequences):
            self.abort(rid)
        self.settle()
        self.runner.close()
