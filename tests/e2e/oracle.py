"""A worker whose engine is an oracle: token t of a request is a hash of (prompt, seed, index, t).  No torch.

It runs in the same process arrangement and behind the same loop as the real one, so every byte that a client gets is
known in advance.  Prompts that begin with one of DIE .. FREEZE make it misbehave, or repeat the rest of the prompt; models whose
names hold "refuses", "dies", "collapses", "hoards", "dreams", "faints" or "snores"
do when they load, sleep or wake.
"""

import hashlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field

from minserve.config import ModelEntry
from minserve.host import ROOT
from minserve.loop import ServedEngine, serve
from minserve.resolve import resolve_model
from minserve.sampling import SamplingParams
from minserve.slab_table import Lease, SlabTable
from minserve.slab_words import H_DIRTY
from minserve.wire import Loaded, Start, Stats, Submit, TokenEvent, TokenLogprobs

BOOT = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.e2e.oracle import main; main()"
STEP_S = 0.002
LATE_COMPILES = 3  # what it says of its kernels
DIE, HANG, BREAK, SLOW, SPEAK, FREEZE = 90, 91, 92, 93, 94, 95


def oracle_tokens(prompt: tuple[int, ...], seed: int, index: int, count: int, vocab: int) -> list[int]:
    """What every stream must say; the last two ids are special and never chosen."""
    out = []
    for position in range(count):
        key = repr((prompt, seed, index, position)).encode()
        out.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % (vocab - 2))
    return out


def fake_logprobs(token: int, params: SamplingParams) -> TokenLogprobs:
    likely = [token, *(t for t in range(20) if t != token)][: params.logprobs]
    return TokenLogprobs(-0.5, 1, tuple((t, -0.5 - i) for i, t in enumerate(likely)))


@dataclass
class Running:
    request: Submit
    tokens: list[int]
    lease: Lease
    done: int = 0


@dataclass
class Oracle:
    """One token a request a step, all requests at once; each holds a set of the real slab table."""

    table: SlabTable
    owner: int
    layers: int
    vocab: int
    window: int
    name: str = "oracle"
    running: dict[int, Running] = field(default_factory=dict)
    num_steps: int = 0
    output_tokens: int = 0
    wakes: int = 0
    newest: int = -1

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, r: Submit) -> None:
        if r.prompt[0] == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        if r.prompt[0] == FREEZE:
            with self.table._lock:
                self.table._head[H_DIRTY] = 1
                os.kill(os.getpid(), signal.SIGSTOP)
        if len(r.prompt) >= self.window:
            raise ValueError(f"This model's maximum context length is {self.window} tokens.")
        if len(r.prompt) == 77:
            raise ValueError("the request needs more blocks than there are")
        count = min(r.params.max_tokens or self.window, self.window - len(r.prompt))
        lease = self.table.lease(self.owner, self.layers, urgent=True)
        assert lease is not None, "the pool of the test is too small"
        tokens = oracle_tokens(r.prompt, r.params.seed or 0, r.index, count, self.vocab)
        if r.prompt[0] == SPEAK:
            tokens = list(r.prompt[1 : count + 1])
        self.running[r.rid], self.newest = Running(r, tokens, lease), r.rid

    def abort(self, rid: int) -> bool:
        run = self.running.pop(rid, None)
        if run is not None:
            self._free(run)
        return run is not None

    def _free(self, run: Running) -> None:
        self.table.drain(self.owner, run.lease)
        self.table.free(self.owner, run.lease)

    def step(self) -> list[TokenEvent]:
        self.num_steps += 1
        slow = any(r.request.prompt[0] == SLOW or self._waits(r.request) for r in self.running.values())
        time.sleep(0.05 if slow else STEP_S)
        return [self._advance(run) for run in list(self.running.values())]

    def _waits(self, r: Submit) -> bool:
        """BREAK with more behind it breaks once another request has come: a client can have read something by then."""
        return r.prompt[0] == BREAK and len(r.prompt) > 1 and self.newest == r.rid

    def _advance(self, run: Running) -> TokenEvent:
        r, p = run.request, run.request.params
        if r.prompt[0] == HANG and run.done == 2:
            time.sleep(3600)
        if r.prompt[0] == BREAK and run.done >= 2 and not self._waits(r):
            self.abort(r.rid)
            return TokenEvent(r.rid, (), finish_reason="error", error="the model's logits are not finite")
        if p.max_tokens == 0:
            self.abort(r.rid)
            return TokenEvent(r.rid, (), finish_reason="length", prompt_logprobs=self._prompt_logprobs(r))
        token = run.tokens[run.done]
        first = run.done == 0
        run.done += 1
        self.output_tokens += 1
        reason, stop = None, None
        if token in p.stop_token_ids and run.done >= p.min_tokens:
            reason, stop = "stop", token
        elif run.done == len(run.tokens):
            reason = "length"
        if reason is not None:
            self.abort(r.rid)
        logprobs = None if p.logprobs is None else (fake_logprobs(token, p),)
        prompt = self._prompt_logprobs(r) if first else None
        return TokenEvent(r.rid, (token,), logprobs, reason, stop, None, prompt)

    def idle(self) -> None:
        """It holds nothing without a request."""

    def sleep(self, level: int) -> str:
        assert not self.running, f"{list(self.running)} run"
        if "collapses" in self.name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hoards" in self.name:
            self.table.lease(self.owner, self.layers)
        return f"asleep at level {level}"

    def wake(self) -> str:
        self.wakes += 1
        if "dreams" in self.name and self.wakes == 1:
            raise RuntimeError("out of memory")
        if "faints" in self.name:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
        if "snores" in self.name:
            time.sleep(3600)
        return "awake"

    @staticmethod
    def _prompt_logprobs(r: Submit) -> tuple[TokenLogprobs | None, ...] | None:
        if r.params.prompt_logprobs is None:
            return None
        return (None, *(fake_logprobs(t, r.params) for t in r.prompt[1:]))

    def stats(self) -> Stats:
        return Stats(len(self.running), 0, self.num_steps, 0, self.output_tokens, late_compiles=LATE_COMPILES)

    def close(self) -> None:
        for rid in list(self.running):
            self.abort(rid)


def open_oracle(start: Start) -> tuple[ServedEngine, Loaded]:
    resolved = resolve_model(ModelEntry.read(start.entry), start.device)
    if "refuses" in resolved.entry.name:
        raise ValueError("tensor model.norm.weight is missing")
    if "dies" in resolved.entry.name:
        os.kill(os.getpid(), signal.SIGKILL)
    table = SlabTable.attach(start.table_fd)
    shape = table.plan.models[resolved.entry.name]
    vocab, window, name = resolved.config.vocab_size, resolved.max_model_len, resolved.entry.name
    return Oracle(table, start.owner, shape.layers, vocab, window, name), Loaded(
        resolved.max_model_len, resolved.config.vocab_size, ("an oracle",)
    )


def main() -> None:
    """The worker's."""
    serve(open_oracle, sys.argv[1:])
