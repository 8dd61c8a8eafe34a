"""Runner: the only owner of tensors.  `execute(plan)` enqueues one step, the handle it returns gives the tokens.

Steps run in the order they were enqueued: on a CUDA stream, or on one thread of a CPU.  So a step may be enqueued
while the one before it runs, and what it reads (token history, keys and values) is written by then.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.kv_layout import KvLayout
from kernels.kv_step import KvStep
from kernels.launch import upload
from minserve.graphs import Capture, DecodeGraphs
from minserve.inputs import Join, PromptRows, RowTable, StepInputs
from minserve.memory import HEAD_ROWS
from minserve.models import Llama
from minserve.moves import BlockMover, Copies
from minserve.sampler import TokenLogprobs, gather_logprobs, sample
from sched.step import Move, StepPlan


class SampledToken(NamedTuple):
    """`broken`: the logits of the row were not finite, the token means nothing."""

    rid: int
    token: int
    logprobs: TokenLogprobs | None
    broken: bool


class PromptLogprobs(NamedTuple):
    """Log probabilities of the prompt tokens of `rid` from `position` on."""

    rid: int
    position: int
    values: list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class StepResult:
    """`moved` blocks were copied ahead of the step, in so many seconds of the device."""

    sampled: tuple[SampledToken, ...]
    prompt_logprobs: tuple[PromptLogprobs, ...]
    moved: int = 0
    move_s: float = 0.0


class Memory(Protocol):
    @property
    def bytes(self) -> Tensor:
        """uint8, on the device of the model."""


class BlockStore(Protocol):
    """Where the blocks of a model lie: the sets it leases, or what stands for them."""

    slab_table_SL: Tensor

    @property
    def pool(self) -> Memory: ...

    @property
    def num_draining(self) -> int: ...

    def take_changed(self) -> list[int]:
        """The rows of `slab_table_SL` that changed since the last call."""

    def poll(self) -> None: ...


@dataclass(slots=True)
class _Pending:
    """A step that is enqueued: host copies that are ready when `event` has fired (at once on a CPU)."""

    inputs: StepInputs
    tokens_2R: Tensor | None
    logprobs: list[TokenLogprobs | None] | None
    prompt_logprobs: tuple[PromptLogprobs, ...]
    event: torch.cuda.Event | None
    copies: Copies | None = None

    def finish(self) -> StepResult:
        if self.event is not None:
            self.event.synchronize()
        moved, move_s = (self.copies.blocks, self.copies.seconds) if self.copies else (0, 0.0)
        if self.tokens_2R is None:
            return StepResult((), self.prompt_logprobs, moved, move_s)
        tokens, broken = self.tokens_2R.tolist()
        logprobs = self.logprobs or [None] * len(tokens)
        rows = zip(self.inputs.sampled_rids, tokens, logprobs, broken, strict=True)
        sampled = tuple(SampledToken(r, t, lp, bool(b)) for r, t, lp, b in rows)
        return StepResult(sampled, self.prompt_logprobs, moved, move_s)


class _Prepared(NamedTuple):
    """The host side of a step: arrays; token histories to write, slab table rows to change and blocks to copy first."""

    inputs: StepInputs
    uploads: list[tuple[int, tuple[int, ...]]]
    changed_sets: list[int]
    offsets_SL: Tensor
    moves: tuple[Move, ...] = ()


class StepHandle:
    """A step under way.  `wait` blocks until its tokens are on the host, and raises what the step raised."""

    def __init__(self, pending: "Future[_Pending]") -> None:
        self._pending = pending

    def wait(self) -> StepResult:
        return self._pending.result().finish()


class Runner:
    """Runs plans of one model on the slab sets it leases.  One thread calls it."""

    def __init__(
        self,
        model: Llama,
        layout: KvLayout,
        sets: BlockStore,
        *,
        max_rows: int,
        max_model_len: int,
        deterministic: bool = False,
        overlap: bool = True,
    ) -> None:
        self.model = model
        self.layout = layout
        self.deterministic = deterministic
        self._sets = sets
        self._pool = sets.pool.bytes
        self._device = self._pool.device
        # a copy of its own, changed in the order of the steps: a later lease must not reach one already enqueued
        self._slab_table_SL = sets.slab_table_SL.clone().to(self._device)
        # one more than the window: the token sampled from the last position is written, never read
        self.rows = RowTable(
            max_rows, max_model_len + 1, -(-max_model_len // layout.block_tokens), self._device
        )
        self._graphs: DecodeGraphs | None = None
        sizes = [(b.layout or layout).block_bytes for b in model.blocks]
        self._mover = BlockMover(self._pool, self._slab_table_SL, sizes)
        threaded = overlap and self._device.type == "cpu"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step") if threaded else None

    @property
    def on_gpu(self) -> bool:
        return self._device.type != "cpu"

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton and events take the thread's current device, whatever their tensors are on."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    @property
    def draining(self) -> bool:
        """Sets are on their way back to the pool: `poll` again soon."""
        return self._sets.num_draining > 0

    def poll(self) -> None:
        """Gives back the sets that no enqueued work can touch any more."""
        self._sets.poll()

    @property
    def num_replays(self) -> int:
        return self._graphs.num_replays if self._graphs is not None else 0

    @torch.inference_mode()
    def capture(self, sizes: list[int], capture: Capture) -> DecodeGraphs:
        """From now on, steps of single tokens replay graphs of these batch sizes.  Not for deterministic steps: the
        tables of theirs have no useful bound."""
        assert not self.deterministic, "graphs of deterministic steps"
        with self._on_device():
            self._graphs = DecodeGraphs(
                self.model, self.layout, self._pool, self._slab_table_SL, self.rows, sizes, capture
            )
        return self._graphs

    def execute(self, plan: StepPlan, joins: tuple[Join, ...]) -> StepHandle:
        """Enqueues the step.  `joins` holds the requests of `plan.joins`."""
        step = self._prepare(plan, joins)
        if self._thread is not None:
            return StepHandle(self._thread.submit(self._run, step))
        future: Future[_Pending] = Future()
        try:
            future.set_result(self._run(step))
        except RuntimeError as e:  # a CUDA or allocation failure belongs to this step: `wait` raises it
            future.set_exception(e)
        return StepHandle(future)

    @torch.inference_mode()
    def forget_slabs(self) -> None:
        """The device's slab table names the slabs of leased sets and no others; waits for all that is under way."""
        with self._on_device():
            self._slab_table_SL.copy_(self._sets.slab_table_SL)
            if self.on_gpu:
                torch.cuda.synchronize()

    def _prepare(self, plan: StepPlan, joins: tuple[Join, ...]) -> _Prepared:
        self.rows.drop(plan.left)
        uploads = [(self.rows.join(j).index, j.tokens) for j in joins]
        for grant in plan.grants:
            self.rows.grow(grant.rid, grant.blocks)
        for patch in plan.patches:
            self.rows.patch(*patch)
        changed = self._sets.take_changed()
        rows_SL = self._sets.slab_table_SL[changed]
        return _Prepared(self.rows.inputs(plan), uploads, changed, rows_SL, plan.moves)

    def _forward(self, p: _Prepared, *, eager: bool = False) -> tuple[Tensor, Tensor]:
        history = self.rows.history
        for row, tokens in p.uploads:
            history[row, : len(tokens)] = self._up(tokens)
        if self._graphs is not None and not eager and (done := self._graphs.run(p.inputs)) is not None:
            return done
        step = KvStep.build(
            self.layout,
            self._slab_table_SL,
            torch.from_numpy(p.inputs.block_table_BN),
            p.inputs.starts,
            p.inputs.counts,
            self._device,
            deterministic=self.deterministic,
            heads_per_kv=self.model.config.num_heads // self.layout.num_kv_heads,
        )
        ids_T = self.rows.tokens[upload(torch.from_numpy(p.inputs.history_index_T), self._device)]
        return self.model.hidden(ids_T, step, self._pool)

    @torch.inference_mode()
    def _run(self, prepared: _Prepared) -> _Pending:
        with self._on_device():
            return self._enqueue(prepared)

    def _enqueue(self, prepared: _Prepared) -> _Pending:
        inputs = prepared.inputs
        self._change_table(prepared)
        copies = self._mover.run(prepared.moves)
        x_TD, residual_TD = self._forward(prepared)
        prompts = tuple(self._prompt_logprobs(p, x_TD, residual_TD) for p in inputs.prompt_rows)
        if not inputs.sampled_rows_R:
            return _Pending(inputs, None, None, prompts, self._mark(), copies)
        rows_R = self._up(inputs.sampled_rows_R)
        s = sample(self._head(x_TD[rows_R], residual_TD[rows_R]), inputs.sampling)
        write_R = self._up(inputs.write_index_R)
        self.rows.tokens[write_R] = s.tokens_R.to(torch.int32)
        tokens_2R = torch.stack((s.tokens_R, s.broken_R.to(s.tokens_R.dtype)))
        pending = self._to_host(inputs, tokens_2R, s.logprobs, prompts)
        pending.copies = copies
        return pending

    def _change_table(self, p: _Prepared) -> None:
        if p.changed_sets:
            self._slab_table_SL.index_copy_(0, self._up(p.changed_sets), upload(p.offsets_SL, self._device))

    def _up(self, values: Sequence[int]) -> Tensor:
        return upload(torch.tensor(values), self._device)

    def _head(self, x_RD: Tensor, residual_RD: Tensor) -> Tensor:
        return self.model.logits(x_RD, residual_RD, deterministic=self.deterministic)

    @torch.inference_mode()
    def logits(self, plan: StepPlan, joins: tuple[Join, ...]) -> Tensor:
        """fp32 logits [T, V] on the host for all rows of a plan.  Nothing is sampled; the runner must be idle."""
        with self._on_device():
            prepared = self._prepare(plan, joins)
            assert not prepared.moves, "blocks are moved in steps that serve"
            self._change_table(prepared)
            x_TD, residual_TD = self._forward(prepared, eager=True)
            parts = zip(x_TD.split(HEAD_ROWS), residual_TD.split(HEAD_ROWS), strict=True)
            return torch.cat([self._head(x, r).cpu() for x, r in parts])

    def _to_host(
        self,
        inputs: StepInputs,
        tokens_2R: Tensor,
        logprobs: list[TokenLogprobs | None] | None,
        prompts: tuple[PromptLogprobs, ...],
    ) -> _Pending:
        if not self.on_gpu:
            return _Pending(inputs, tokens_2R, logprobs, prompts, None)
        host = torch.empty(tokens_2R.shape, dtype=tokens_2R.dtype, pin_memory=True)
        host.copy_(tokens_2R, non_blocking=True)
        return _Pending(inputs, host, logprobs, prompts, self._mark())

    def _mark(self) -> torch.cuda.Event | None:
        """Fires when a GPU has done all that was enqueued so far.  Every step has one, or the host would run ahead."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _prompt_logprobs(self, p: PromptRows, x_TD: Tensor, residual_TD: Tensor) -> PromptLogprobs:
        values: list[TokenLogprobs | None] = []
        for lo in range(0, p.num_rows, HEAD_ROWS):
            n = min(HEAD_ROWS, p.num_rows - lo)
            rows = slice(p.first_row + lo, p.first_row + lo + n)
            logits_RV = self._head(x_TD[rows], residual_TD[rows])
            next_R = self.rows.history[p.history_row, p.position + lo : p.position + lo + n].long()
            values += gather_logprobs(logits_RV, next_R, [p.num_top] * n)
        return PromptLogprobs(p.rid, p.position, values)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._graphs = None
