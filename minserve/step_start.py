"""What an engine predicts its steps with before it has made any: a profile's, else that of a few steps made for it.

The steps are the engine's own, in a few blocks of its pool that it gives back; each is made twice, and the second
counts, as the first may have to load what it runs.  Whatever is wrong with a start is mended by the steps that follow.
"""

import logging
import time
from collections.abc import Callable, Iterator

from minserve.engine import Engine
from minserve.inputs import Join
from minserve.sampling import SamplingParams
from minserve.step_profile import read_profile
from minserve.step_watch import StepWatch, point_of
from sched.latency import StepCost
from sched.step import Chunk, Grant, StepPlan
from sched.step_time import Point, fit

log = logging.getLogger(__name__)
SPEND_S = 0.5
LONG = 512
# of a start that was measured a few times, and of one that was not at all
FEW, NONE = 20.0, 1.0
UNKNOWN = StepCost(base_s=1e-3, per_prefill_token_s=1e-5)
GREEDY = SamplingParams(temperature=0.0)

Shape = tuple[int, int, int]  # decodes, their context, tokens of a prompt


def watch_steps(engine: Engine, name: str, profile: str | None, known: StepCost | None = None) -> str:
    """From now on the engine's Batcher has a cost model that follows the steps.  Says where it began: at what is `known`, at
    the profile's, or at steps made for it.  ValueError for a profile that has nothing to say of the model."""
    if known is not None:
        engine.watch = StepWatch(engine.batcher, known)
        return "step times: as they were"
    if profile is not None:
        cost, error = read_profile(profile).cost_of(name)
        engine.watch = StepWatch(engine.batcher, cost)
        return f"step times: {profile}, off by {error:.1%} in the mean"
    points = measure(engine)
    if not points:
        engine.watch = StepWatch(engine.batcher, UNKNOWN, trust=NONE)
        return "step times: not known yet, there was no room to measure"
    # as many knots as sizes: few steps, each of its own size
    cost, _ = fit(points, sorted({p.rows for p in points}))
    engine.watch = StepWatch(engine.batcher, cost, trust=FEW)
    seen = ", ".join(f"{p.rows:.0f} rows {1e3 * p.seconds:.1f}" for p in points)
    return f"step times, measured in ms: {seen}"


def measure(
    engine: Engine, spend_s: float = SPEND_S, clock: Callable[[], float] = time.perf_counter
) -> list[Point]:
    """Steps of an idle engine, the small ones first, until they have taken `spend_s`; none without room in the pool."""
    blocks, limits = engine.batcher.blocks, engine.batcher.limits
    longest = min(LONG, limits.max_model_len)
    held = blocks.allocate(-(-longest // blocks.block_tokens))
    if held is None:
        return []
    begin, points = clock(), []
    try:
        for shape in _shapes(limits.max_running, min(longest, limits.max_step_tokens), longest):
            plan, joins = _plan(shape, tuple(held), blocks.block_tokens)
            for _ in range(2):
                since = clock()
                engine.runner.execute(plan, joins).wait()
                seconds = clock() - since
                engine.runner.rows.drop(plan.decode + tuple(c.rid for c in plan.chunks))
            points.append(point_of(plan, seconds))
            if clock() - begin > spend_s:
                break
    finally:
        blocks.release(held)
        blocks.give_up(blocks.num_sets)
    return points


def _shapes(running: int, chunk: int, longest: int) -> Iterator[Shape]:
    """Decodes and prompts by turns: sizes far apart first, then those between."""
    short = min(32, longest)
    for i in (0, 2, 4, 1, 3, 5, 6, 7):
        decodes, tokens = 1 << i, 16 << i
        if decodes <= running:
            yield decodes, short, 0
        if tokens <= chunk:
            yield 0, 0, tokens
    yield min(8, running), longest, 0


def _plan(shape: Shape, held: tuple[int, ...], block_tokens: int) -> tuple[StepPlan, tuple[Join, ...]]:
    """All requests are in the same blocks: what they read and write means nothing."""
    decodes, context, tokens = shape
    length = context or tokens
    rids = tuple(range(-1, -1 - max(decodes, 1), -1))
    joins = tuple(Join(rid, (0,) * length, length, GREEDY, 0, ()) for rid in rids)
    grants = tuple(Grant(rid, held[: -(-length // block_tokens)]) for rid in rids)
    chunks = () if decodes else (Chunk(rids[0], 0, tokens, True),)
    return StepPlan(0, rids[:decodes], chunks, grants, (), context=decodes * context), joins
