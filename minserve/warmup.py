"""Warm-up: launches every kernel variant that a step can need before the first request comes, and watches from then on.

Steps run on a runner of their own over one block of memory that every block id leads to: what they read and write means
nothing, and no block of the pool is touched.  What Triton compiles does not depend on how many layers or requests
there are, nor on how long they are, but kernels choose their tiles by the number of tokens: hence the many sizes.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from kernels.kv_layout import KvLayout
from minserve.inputs import Join
from minserve.linear import Linear
from minserve.memory import HEAD_ROWS
from minserve.models import Block, Llama
from minserve.runner import Runner
from minserve.sampling import SamplingParams
from sched.step import Chunk, Grant, Move, StepPlan

log = logging.getLogger(__name__)
LONG = 8192  # the longest context a step is given: nothing is compiled anew for a longer one
MORE_THAN_SHORT = 65  # tokens of a chunk that no model's decode kernel takes
FEW_ROWS = 33
GREEDY = SamplingParams(temperature=0.0)
# one row of each; together in one batch too
SAMPLINGS = (
    GREEDY,
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=20),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=0.7, min_p=0.05),
    SamplingParams(temperature=0.0, logprobs=0),
    SamplingParams(temperature=1.0, logprobs=3),
    SamplingParams(temperature=1.0, presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1),
    SamplingParams(temperature=0.0, logit_bias={0: 1.0}, min_tokens=4),
)


class CompileMonitor:
    """Triton calls it after each compile.  While `serving`, requests wait for it: `late` counts those, and the log has
    a warning for each kernel, not for each of its variants."""

    def __init__(self) -> None:
        self.compiles = 0
        self.late = 0
        self.serving = False
        self._warned: set[str] = set()

    def __call__(self, *, repr: str, **rest: Any) -> None:
        self.compiles += 1
        if not self.serving:
            return
        self.late += 1
        kernel = repr.partition("[")[0]
        if kernel not in self._warned:
            self._warned.add(kernel)
            log.warning("kernel %s was compiled while serving: %s", kernel, repr)


def compile_monitor() -> CompileMonitor:
    """The one of this process: there is one Triton in it."""
    monitor = knobs.runtime.jit_post_compile_hook
    if not isinstance(monitor, CompileMonitor):
        assert monitor is None, f"{monitor!r} watches Triton already"
        monitor = knobs.runtime.jit_post_compile_hook = CompileMonitor()
    return monitor


class _Memory(NamedTuple):
    bytes: Tensor


class OneBlock:
    """Where blocks lie, for a Runner: all in one."""

    num_draining = 0

    def __init__(self, block_bytes: int, num_layers: int, device: torch.device) -> None:
        self.pool = _Memory(torch.zeros(block_bytes, dtype=torch.uint8, device=device))
        self.slab_table_SL = torch.zeros(1, num_layers, dtype=torch.int64)

    def take_changed(self) -> list[int]:
        return []

    def poll(self) -> None:
        pass


class Shape(NamedTuple):
    """A step: contexts of its decodes, (start, tokens) of its chunks."""

    decodes: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]
    params: Sequence[SamplingParams] = (GREEDY,)


class Sizes(NamedTuple):
    """What bounds a step: requests, tokens, and positions of one request."""

    max_running: int
    max_step_tokens: int
    max_model_len: int


def token_counts(most: int) -> list[int]:
    """All up to 33, then around every power of two and every multiple of 64: tiles are chosen by such limits."""
    powers = [1 << i for i in range(most.bit_length() + 1)]
    near = [p + d for p in powers for d in (-1, 0, 1)] + [3 * p // 2 for p in powers]
    steps = range(64, min(most, 4096) + 1, 64)
    return sorted(n for n in {*range(1, 34), *near, *steps, most} if 1 <= n <= most)


def step_shapes(sizes: Sizes, head_rows: int) -> Iterator[Shape]:
    """Steps of these sizes, such that any other launches nothing that none of them does.

    `head_rows`: how many rows at most are multiplied with the head, to log probabilities of a prompt.
    """
    return (shape for shape in _shapes(sizes, head_rows) if _fits(shape, sizes))


def _fits(shape: Shape, sizes: Sizes) -> bool:
    rows = len(shape.decodes) + sum(n for _, n in shape.chunks)
    ends = (*shape.decodes, *(start + n for start, n in shape.chunks))
    return (
        0 < rows <= sizes.max_step_tokens
        and min((start for start, _ in shape.chunks), default=0) >= 0
        and len(ends) <= sizes.max_running
        and max(ends) <= sizes.max_model_len
    )


def _shapes(sizes: Sizes, head_rows: int) -> Iterator[Shape]:
    last = sizes.max_model_len
    for n in token_counts(min(sizes.max_running, sizes.max_step_tokens)):
        yield Shape((1,) * n, ())
        yield Shape((last, *(1,) * (n - 1)), ())
    for n in token_counts(min(last, sizes.max_step_tokens)):
        # one row fewer than its tokens: nothing predicts the first
        yield Shape((), ((0, n),), (SamplingParams(prompt_logprobs=0),) if n <= head_rows + 1 else (GREEDY,))
        yield Shape((), ((last - n, n),))
        yield Shape((last,), ((0, n - 1),) if n > 1 else ())
    # short chunks share a kernel with decodes; how it is launched depends on the other rows, and on longer chunks
    for n in (1, 2, 4, 8, 16, 32, 64):
        for decodes in ((), (last,), (last, 1), (last, *(1,) * 3), (last, *(1,) * 7)):
            yield Shape(decodes, ((last - n, n),))
            yield Shape(decodes, ((last - n, n), (0, min(last, MORE_THAN_SHORT))))
    # as many long chunks as there are: their keys and values fill the scratch, so that warm-up holds the most it can
    many = min(sizes.max_running, sizes.max_step_tokens // MORE_THAN_SHORT)
    longest = min(last, sizes.max_step_tokens // max(many, 1))
    yield Shape((), ((last - longest, longest),) * many)
    for params in (*((p,) for p in SAMPLINGS), SAMPLINGS):
        yield Shape((min(8, last),) * min(max(3, len(params)), sizes.max_running), (), params)


def distinct(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """One layer of each kind: those of a kind launch the same."""
    return tuple({_kind(b): b for b in blocks}.values())


def _kind(value: Any) -> Any:
    """Equal for values that differ in nothing but the numbers in their tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, Linear):
        return tuple(_kind(p) for p in value.parts), value.out_dtype
    if dataclasses.is_dataclass(value):
        return type(value), tuple(_kind(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, tuple):
        return tuple(_kind(v) for v in value)
    if isinstance(value, float):
        return float  # a scale: kernels are compiled for none
    return value


def run_shape(runner: Runner, shape: Shape) -> None:
    """One step of requests that are new, and gone afterwards; all their blocks are block 0."""
    lengths = [*shape.decodes, *(start + count for start, count in shape.chunks)]
    joins = tuple(
        Join(rid, (0,) * n, n, shape.params[rid % len(shape.params)], rid, (0,))
        for rid, n in enumerate(lengths)
    )
    grants = tuple(Grant(rid, (0,) * runner.layout.blocks_for(n)) for rid, n in enumerate(lengths))
    first = len(shape.decodes)
    chunks = tuple(Chunk(first + i, *chunk, True) for i, chunk in enumerate(shape.chunks))
    # block 0 to itself: what compaction launches, which does not depend on how many it moves
    moves = (Move(0, 0),)
    runner.execute(StepPlan(0, tuple(range(first)), chunks, grants, (), moves=moves), joins).wait()
    runner.rows.drop(tuple(range(len(lengths))))


def scratch_runner(
    model: Llama, layout: KvLayout, sizes: Sizes, device: torch.device, *, deterministic: bool = False
) -> Runner:
    """A runner whose steps leave nothing behind.  Of layers that launch the same it has one."""
    few = dataclasses.replace(model, blocks=distinct(model.blocks))
    # as many columns as the real table: its stride is a constant of the model that kernels may be compiled for
    size = max((b.layout or layout).block_bytes for b in model.blocks)
    blocks = OneBlock(size, len(model.blocks), device)
    return Runner(
        few,
        layout,
        blocks,
        max_rows=sizes.max_running + 1,
        max_model_len=sizes.max_model_len,
        deterministic=deterministic,
        overlap=False,
    )


def warm_up(
    model: Llama, layout: KvLayout, sizes: Sizes, device: torch.device, *, deterministic: bool = False
) -> None:
    """Compiles, or loads from Triton's cache, all that steps of these sizes launch."""
    monitor = compile_monitor()
    monitor.serving = False  # another model of this process may have begun
    compiled, start = monitor.compiles, time.monotonic()
    sizes = sizes._replace(max_model_len=min(sizes.max_model_len, LONG))
    runner = scratch_runner(model, layout, sizes, device, deterministic=deterministic)
    # the library's product needs no compiler, and logits of many rows need much memory
    head_rows = FEW_ROWS if model.head.wants is None else HEAD_ROWS
    for shape in step_shapes(sizes, head_rows):
        run_shape(runner, shape)
    runner.close()
    log.info("warm-up: %d kernels in %.1f s", monitor.compiles - compiled, time.monotonic() - start)
