"""The process of one model: loads it, takes its share of the pool, and runs the loop until its agent is gone.

Started by the agent only: `... worker NAME SOCKET_FD PARENT_PID`.  A model that cannot be loaded is reported in one
line; any other end is a crash, which the agent sees by waitpid and answers with a new process.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from minserve.config import ModelEntry
from minserve.cuda_memory import GONE, PoolHandle
from minserve.device_share import take_share
from minserve.engine import Engine, EngineRequest, TokenEvent
from minserve.kv_moves import KvMoves
from minserve.kv_share import KvShare
from minserve.loading import LoadedModel, load_model, memory_line, start_engine, warm
from minserve.loop import REFUSALS, ServedEngine, serve
from minserve.offload import HostCopy, free_unused
from minserve.pool import LeasedSets, SlabPool
from minserve.prefill_token import prefill_token
from minserve.resolve import check_planned, resolve_model
from minserve.step_start import watch_steps
from minserve.step_watch import StepWatch
from minserve.warmup import compile_monitor
from minserve.wire import Loaded, Start, Stats, Submit
from sched.latency import StepCost
from sched.pressure import demand, offer, preempt_for


@dataclass(slots=True)
class _Active:
    """What a model has while it is awake: an engine, the sets that it leases, and its part in sharing the pool.  `note`: what
    its steps are predicted with."""

    engine: Engine
    sets: LeasedSets
    share: KvShare
    note: str

    @classmethod
    def start(cls, model: LoadedModel, pool: SlabPool, cost: StepCost | None = None) -> "_Active":
        """`cost`: of its steps, where it has been awake before."""
        sets = LeasedSets(pool, model.resolved.entry.name)
        engine = start_engine(model, sets)
        entry, batcher = model.resolved.entry, engine.batcher
        note = watch_steps(engine, entry.name.partition("@")[0], entry.profile, cost)
        block_bytes = sum(group.layers * group.block_bytes for group in sets.shape.groups)
        share = KvShare(
            sets,
            batcher.blocks,
            lambda ahead: demand(batcher, time.monotonic(), ahead),
            lambda n: preempt_for(batcher, n),
            moves=KvMoves(
                pool.table,
                sets.owner,
                batcher.compactor,
                lambda: offer(batcher),
                engine.compact,
                lambda: engine.counters.moved_blocks * block_bytes,
            ),
        )
        engine.turns = prefill_token(pool.table, sets.owner, batcher)
        return cls(engine, sets, share, note)

    def end(self) -> None:
        """Every set is back in the pool, what was cached is gone, and no enqueued work can touch either."""
        self.engine.close()
        self.engine.batcher.blocks.give_up(self.sets.num_leased)
        self.sets.close()


class EngineServed:
    """The engine behind the loop's interface, and its share of the pool."""

    def __init__(self, model: LoadedModel, pool: SlabPool, device: str) -> None:
        self._model: LoadedModel | None = model
        self._resolved, self._pool, self._device = model.resolved, pool, device
        self._active: _Active | None = _Active.start(model, pool)
        self._copy: HostCopy | None = None
        self._counters, self._stats = self._engine.counters, Stats()
        self._cost = self._engine.batcher.cost

    @property
    def _on(self) -> _Active:
        assert self._active is not None, f"{self._resolved.entry.name} is asleep"
        return self._active

    @property
    def _engine(self) -> Engine:
        return self._on.engine

    @property
    def has_work(self) -> bool:
        return self._active is not None and self._engine.has_work

    def add(self, request: Submit) -> None:
        if self._active is None:
            raise ValueError(f"the model {self._resolved.entry.name} is asleep")
        self._engine.add(EngineRequest(**{name: getattr(request, name) for name in Submit.__struct_fields__}))

    def abort(self, rid: int) -> bool:
        return self._active is not None and self._engine.abort(rid)

    def step(self) -> Sequence[TokenEvent]:
        steps, began = self._engine.counters.steps, time.monotonic()
        events = self._engine.step()
        if self._engine.counters.steps > steps:
            self._on.share.stepped(time.monotonic() - began)
        self._on.share.turn()
        return events

    def idle(self) -> float | None:
        if self._active is None:
            return None
        self._engine.idle()
        self._on.share.turn()
        return self._on.share.idle_wait_s

    def sleep(self, level: int) -> str:
        """Level 1 keeps the weights in host memory, where a CPU's are already; level 2 drops them."""
        began = time.monotonic()
        self._stats = msgspec.structs.replace(self.stats(), running=0, waiting=0, cached_blocks=0)
        active, self._active = self._on, None
        self._cost = active.engine.batcher.cost
        active.end()
        self._counters = active.engine.counters
        del active  # its graphs and tables are no use any more
        where = self._put_away(level)
        return f"asleep in {time.monotonic() - began:.2f} s, {where}"

    def _put_away(self, level: int) -> str:
        assert self._model is not None, f"{self._resolved.entry.name} sleeps without weights"
        size = f"{self._model.report.nbytes / 1e6:,.1f} MB of weights"
        on_gpu = self._device.startswith("cuda")
        free = torch.cuda.mem_get_info(self._device)[0] if on_gpu else 0
        if level == 2:
            self._model = None
        elif on_gpu:
            self._copy = HostCopy(self._model.llama)
        free_unused(self._device)
        where = f"{size} {'dropped' if level == 2 else 'in host memory'}"
        freed = torch.cuda.mem_get_info(self._device)[0] - free if on_gpu else 0
        return f"{where}, {freed / 2**30:.2f} GiB given back to {self._device}" if on_gpu else where

    def wake(self) -> str:
        """As it was before `sleep`; where there is no memory for that, or the files are gone, asleep as before."""
        began, model = time.monotonic(), self._model
        compile_monitor().serving = False  # until the graphs are captured
        try:
            if model is None:
                model = load_model(self._resolved, self._device)
            if self._copy is not None:
                self._copy.restore()
            self._active = _Active.start(model, self._pool, self._cost)
        except REFUSALS:
            if self._copy is not None and self._copy.restored and model is not None:
                self._copy = HostCopy(model.llama)
            del model
            free_unused(self._device)
            raise
        self._model, self._copy = model, None
        self._engine.counters = self._counters
        return f"awake in {time.monotonic() - began:.2f} s"

    def segment(self, index: int, fd: int | None) -> None:
        """ValueError where the pool's memory comes and goes as a whole."""
        segments = self._pool.segments
        if segments is None:
            raise ValueError("this pool has no segments")
        if fd is not None:
            segments.map(index, fd)
            return
        if self._active is not None:
            # rows of sets that were given back still name slabs there, and a kernel may look
            self._engine.runner.forget_slabs()
        segments.unmap(index)

    def stats(self) -> Stats:
        if self._active is None:
            return self._stats
        e, c = self._engine.batcher, self._engine.counters
        late = compile_monitor().late
        return Stats(
            running=e.num_running,
            waiting=e.num_waiting,
            steps=c.steps,
            prompt_tokens=c.prompt_tokens,
            output_tokens=c.output_tokens,
            late_compiles=late,
            prefix_queries=c.prefix_queries,
            prefix_hits=c.prefix_hits,
            cached_blocks=e.blocks.num_cached,
            preemptions=e.num_preemptions,
            step_error=self.watch.error,
        )

    @property
    def note(self) -> str:
        return self._on.note

    @property
    def watch(self) -> StepWatch:
        """Of the steps, while it is awake."""
        assert self._engine.watch is not None, "an engine that serves is watched"
        return self._engine.watch

    def close(self) -> None:
        if self._active is not None:
            self._engine.close()


def attach_pool(start: Start) -> SlabPool:
    if not start.pool_handle:
        return SlabPool.attach(start.table_fd, start.pool_fds[0])
    handle = PoolHandle.from_json(start.pool_handle)
    pool = SlabPool.attach_device(start.table_fd, handle, start.pool_fds, start.device)
    for fd in start.pool_fds:
        if fd != GONE:
            os.close(fd)  # a segment's memory would stay as long as this is open
    return pool


def open_engine(start: Start) -> tuple[ServedEngine, Loaded]:
    """Weights, then this model's share of the pool.  ValueError says what is wrong with the model's files."""
    logging.getLogger("minserve").setLevel(logging.DEBUG if start.debug else logging.NOTSET)
    began = time.monotonic()
    take_share(start)
    resolved = resolve_model(ModelEntry.read(start.entry), start.device)
    model = load_model(resolved, start.device)
    loaded_s = time.monotonic() - began
    before = warm(model, start.device)
    pool = attach_pool(start)
    check_planned(resolved, pool.plan)
    served = EngineServed(model, pool, start.device)
    tokens = pool.plan.max_sets(resolved.entry.name) * pool.plan.models[resolved.entry.name].set_tokens
    report = (
        *model.report.lines(),
        f"weights: {model.report.nbytes / 1e6:.1f} MB in {resolved.dtype}, loaded in {loaded_s:.1f} s",
        f"KV cache: {resolved.kv_formats}, at most {tokens:,} tokens of the shared pool, "
        f"{tokens / resolved.max_model_len:.1f} requests of {resolved.max_model_len:,} tokens",
        served.note,
        *([memory_line(model, start.device, before)] if start.device.startswith("cuda") else []),
    )
    return served, Loaded(resolved.max_model_len, resolved.config.vocab_size, report)


def main() -> None:
    torch.set_grad_enabled(False)
    serve(open_engine, sys.argv[1:])
