"""The process of one model: loads it, takes its share of the pool, and runs the loop until its agent is gone.

Started by the agent only: `... worker NAME SOCKET_FD PARENT_PID`.  A model that cannot be loaded is reported in one
line; any other end is a crash, which the agent sees by waitpid and answers with a new process.
"""

import logging
import sys
import time
from collections.abc import Sequence

import torch

from minserve.config import ModelEntry
from minserve.cuda_memory import PoolHandle
from minserve.device_share import take_share
from minserve.engine import Engine, EngineRequest, TokenEvent
from minserve.kv_share import KvShare
from minserve.loading import load_model, memory_line, start_engine, warm
from minserve.loop import ServedEngine, serve
from minserve.pool import LeasedSets, SlabPool
from minserve.resolve import resolve_model
from minserve.warmup import compile_monitor
from minserve.wire import Loaded, Start, Stats, Submit
from sched.pressure import demand, preempt_for


class EngineServed:
    """The engine behind the loop's interface, and its share of the pool."""

    def __init__(self, engine: Engine, sets: LeasedSets) -> None:
        self._engine, batcher = engine, engine.batcher
        self._share = KvShare(
            sets,
            batcher.blocks,
            lambda: demand(batcher, time.monotonic()),
            lambda n: preempt_for(batcher, n),
        )

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def add(self, request: Submit) -> None:
        self._engine.add(EngineRequest(**{name: getattr(request, name) for name in Submit.__struct_fields__}))

    def abort(self, rid: int) -> bool:
        return self._engine.abort(rid)

    def step(self) -> Sequence[TokenEvent]:
        steps, began = self._engine.counters.steps, time.monotonic()
        events = self._engine.step()
        if self._engine.counters.steps > steps:
            self._share.stepped(time.monotonic() - began)
        self._share.turn()
        return events

    def idle(self) -> float | None:
        self._share.turn()
        return self._share.idle_wait_s

    def stats(self) -> Stats:
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
        )

    def close(self) -> None:
        self._engine.close()


def attach_pool(start: Start) -> SlabPool:
    if not start.pool_handle:
        return SlabPool.attach(start.table_fd, start.pool_fds[0])
    handle = PoolHandle.from_json(start.pool_handle)
    return SlabPool.attach_device(start.table_fd, handle, start.pool_fds, start.device)


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
    sets = LeasedSets(pool, resolved.entry.name)
    engine = start_engine(model, sets)
    tokens = pool.plan.max_sets(resolved.entry.name) * sets.shape.set_tokens
    report = (
        *model.report.lines(),
        f"weights: {model.report.nbytes / 1e6:.1f} MB in {resolved.dtype}, loaded in {loaded_s:.1f} s",
        f"KV cache: {resolved.kv_formats}, at most {tokens:,} tokens of the shared pool, "
        f"{tokens / resolved.max_model_len:.1f} requests of {resolved.max_model_len:,} tokens",
        *([memory_line(model, start.device, before)] if engine.runner.on_gpu else []),
    )
    return EngineServed(engine, sets), Loaded(resolved.max_model_len, resolved.config.vocab_size, report)


def main() -> None:
    torch.set_grad_enabled(False)
    serve(open_engine, sys.argv[1:])
