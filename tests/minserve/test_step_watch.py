"""The watch over an engine's steps: what it counts as a step's time, and that the Batcher's cost follows."""

from pathlib import Path
from typing import Any

import pytest

from minserve.config import Config
from minserve.engine import EngineRequest
from minserve.loading import LocalEngine
from minserve.sampling import SamplingParams
from minserve.step_profile import Profile
from minserve.step_start import UNKNOWN, measure, watch_steps
from minserve.step_watch import TOGETHER, StepWatch, point_of
from sched.latency import StepCost
from sched.slowdown import complete
from sched.step import Chunk, Move, StepPlan
from sched.step_time import Fitted, Point, error_of
from tests.tiny import write_llama

TRUE = StepCost(base_s=0.02, per_decode_s=1e-3, per_prefill_token_s=5e-4, per_context_token_s=1e-6)


class Costs:
    """In the place of a Batcher."""

    def __init__(self) -> None:
        self.seen: list[StepCost] = []

    def recost(self, cost: StepCost) -> None:
        self.seen.append(cost)


def decodes(n: int, context: int = 100) -> StepPlan:
    return StepPlan(0, tuple(range(n)), (), (), (), context=context)


def prompt(tokens: int) -> StepPlan:
    return StepPlan(0, (), (Chunk(1, 0, tokens, True),), (), ())


def watch() -> tuple[StepWatch, list[float]]:
    made, seconds = StepWatch(Costs(), TRUE), list[float]()
    made.heard = lambda plan, s, now: seconds.append(round(s, 9))
    return made, seconds


def test_a_step_lasts_from_the_end_of_the_one_before() -> None:
    """Whether it was planned before that, as with overlap, or after it, as without."""
    w, seconds = watch()
    w.landed(decodes(1), 10.0, 10.03)
    w.landed(decodes(1), 10.01, 10.05)
    w.landed(decodes(1), 10.06, 10.10)
    assert seconds == [0.03, 0.02, 0.05]


def test_after_a_pause_it_lasts_from_its_plan() -> None:
    w, seconds = watch()
    w.landed(decodes(1), 10.0, 10.03)
    w.paused()
    w.landed(decodes(1), 12.0, 12.02)
    assert seconds == [0.03, 0.02]


def test_steps_that_move_blocks_say_nothing_of_the_model() -> None:
    w, seconds = watch()
    w.landed(StepPlan(0, (1,), (), (), (), moves=(Move(1, 2),)), 1.0, 2.0)
    w.landed(decodes(1), 1.5, 2.02)
    assert seconds == [0.02]


def test_alike_decodes_are_one_point_and_a_prompt_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    w, _ = watch()
    points: list[Point] = []
    monkeypatch.setattr(w.corrected, "observe", lambda p: points.append(p) or False)
    now = 0.0
    plans = [*[decodes(2, 50)] * (TOGETHER + 1), decodes(3, 60), prompt(10), decodes(3, 60)]
    for plan in plans:
        now += 0.5
        w.landed(plan, now - 0.5, now)
    n = TOGETHER
    assert points == [
        (0.5 * n, n, 2 * n, 0, 50 * n, 0),
        (0.5, 1, 2, 0, 50, 0),
        (0.5, 1, 3, 0, 60, 0),
        (0.5, 1, 0, 10, 10, 100),
    ], "and the last decode waits for its like"


def engine_of(tmp_path: Path, **keys: Any) -> LocalEngine:
    folder = write_llama(tmp_path / "m", max_position_embeddings=512)
    gpu = {"device": "cpu", "pool_bytes": "8 MiB"}
    return LocalEngine.start(Config.single(folder, gpu=gpu, max_num_seqs=8, **keys))


class Clock:
    """A device whose steps take what TRUE says: the clock goes on when a step is executed."""

    def __init__(self) -> None:
        self.now = 1.0

    def __call__(self) -> float:
        return self.now


def slowed(local: LocalEngine, clock: Clock, cost: StepCost) -> list[Point]:
    """The engine's steps advance the clock; returns what they were."""
    engine, points = local.engine, list[Point]()
    execute = engine.runner.execute

    def run(plan: StepPlan, joins: Any) -> Any:
        point = point_of(plan, 1.0)
        clock.now += point.predicted(cost)
        points.append(point._replace(seconds=point.predicted(cost)))
        return execute(plan, joins)

    engine.runner.execute = run  # type: ignore[method-assign]
    engine._clock = clock
    return points


def test_an_engine_whose_steps_are_other_than_predicted_corrects_its_batcher(tmp_path: Path) -> None:
    local = engine_of(tmp_path)
    engine, clock = local.engine, Clock()
    try:
        points = slowed(local, clock, TRUE)
        engine.watch = StepWatch(engine.batcher, UNKNOWN, trust=1.0)
        for wave in range(12):
            for i in range(1 + wave % 5):
                ids = tuple(range(1, 20 + 7 * ((wave + i) % 9)))
                params = SamplingParams(max_tokens=9 + i, ignore_eos=True, temperature=0.0)
                engine.add(EngineRequest(rid=100 * wave + i, prompt=ids, params=params))
            while engine.has_work:
                engine.step()
            clock.now += 5.0
        cost = engine.batcher.cost
        assert cost is not None
        assert error_of(UNKNOWN, points) > 0.9
        assert error_of(cost, points[-40:]) < 0.05
        assert engine.watch.error < 0.3, "its own word for it"
        assert engine.watch.corrected.num_steps == pytest.approx(len(points), abs=TOGETHER)
    finally:
        local.close()


def test_a_start_is_measured_and_leaves_nothing_behind(tmp_path: Path) -> None:
    local = engine_of(tmp_path)
    try:
        engine = local.engine
        assert "measured in ms: 1 rows" in watch_steps(engine, "m", None)
        assert engine.batcher.cost is not None
        assert engine.batcher.cost.decode_s(1, 32) > 0
        assert (engine.batcher.blocks.num_live, local.sets.num_leased) == (0, 0)
        ticks = iter(range(1000))
        few = measure(engine, 2.5, lambda: float(next(ticks)))
        assert len(few) == 1, "no more than its time allows"
    finally:
        local.close()


def test_a_full_pool_leaves_the_start_open(tmp_path: Path) -> None:
    local = engine_of(tmp_path)
    blocks = local.engine.batcher.blocks
    held = []
    try:
        while (more := blocks.allocate(1)) is not None:
            held += more
        assert "no room" in watch_steps(local.engine, "m", None)
        assert local.engine.batcher.cost == UNKNOWN
    finally:
        blocks.release(held)
        local.close()


def test_a_profile_is_where_it_begins(tmp_path: Path) -> None:
    local = engine_of(tmp_path)
    try:
        file = tmp_path / "profile.json"
        Profile({"m": Fitted(TRUE, 0.05)}, complete({}), {}).write(file)
        assert "off by 5.0%" in watch_steps(local.engine, "m", str(file))
        assert local.engine.batcher.cost == TRUE
        assert "as they were" in watch_steps(local.engine, "m", str(file), UNKNOWN)
        assert local.engine.batcher.cost == UNKNOWN
        Profile({"a": Fitted(TRUE, 0.0), "b": Fitted(TRUE, 0.0)}, {}, {}).write(file)
        with pytest.raises(ValueError, match="no model 'm'; it has a, b"):
            watch_steps(local.engine, "m", str(file))
    finally:
        local.close()
