"""Routers in a simulation: the same with stretches as step by step, and what they gain over those that look at less."""

import random
from collections.abc import Callable

import pytest

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.placement_simulate import attained as in_time
from sched.router import ROUTERS, Router, Tiers, named
from sched.simulated_replica import Arrival, Replica
from sched.simulated_routes import Routes
from sched.simulator import TIME_SLICED, Simulation
from tests.sched.witness import UNEVEN, Sets

LIMITS = Limits(
    max_running=32, max_step_tokens=2048, max_chunk_tokens=2048, max_model_len=4096, max_waiting=10**6
)
COST = StepCost(base_s=8e-3, per_decode_s=5e-5, per_prefill_token_s=4e-5, per_context_token_s=1.6e-8)
TIERS = {"fp16": 0, "w8": 1, "w4": 2}
SPEED = {"fp16": 1.0, "w8": 1.7, "w4": 2.4}


def replica(name: str, model: str, device: str, speed: float = 1.0) -> Replica:
    cost = StepCost(
        base_s=COST.base_s / speed, per_decode_s=COST.per_decode_s / speed,
        per_prefill_token_s=COST.per_prefill_token_s / speed, per_context_token_s=COST.per_context_token_s,
    )  # fmt: skip
    return Replica(name, model, (device,), Batcher(BlockPool(Sets(600), 16, 32), LIMITS, cost))


def asked(seed: int, n: int, rate: float, model: str, ttft_s: float, tpot_s: float = 0.05) -> list[Arrival]:
    """Bursts of a few seconds, of prompts that differ by a hundred times."""
    rng, t, made = random.Random(seed), 0.0, []
    for rid in range(n):
        t += rng.expovariate(rate * (4.0 if t % 8 < 2 else 0.25))
        prompt = int(rng.lognormvariate(6.0, 1.0))
        made.append(Arrival(t, rid, model, min(max(prompt, 20), 3000), rng.randint(5, 200), ttft_s, tpot_s))
    return made


def attained(simulation: Simulation) -> float:
    return sum(map(in_time, simulation.records.values())) / len(simulation.records)


def run(
    replicas: list[Replica],
    arrivals: list[Arrival],
    routes: Routes,
    stretch: bool = True,
    slowdown: dict[tuple[str, str], float] = TIME_SLICED,
) -> Simulation:
    groups = {"any": list(TIERS)}
    simulation = Simulation(
        replicas, arrivals, route=routes, groups=groups, stretch=stretch, slowdown=slowdown
    )
    simulation.run()
    simulation.check()
    assert simulation.num_open == 0
    return simulation


def twins(gpus: int = 4) -> list[Replica]:
    return [replica(f"m{i}", "m", f"gpu{i % gpus}") for i in range(4)]


def three(gpus: int = 3) -> list[Replica]:
    return [replica(name, name, f"gpu{i % gpus}", SPEED[name]) for i, name in enumerate(TIERS)]


@pytest.mark.parametrize(("seed", "gpus"), [(0, 4), (1, 2), (2, 1)])
@pytest.mark.parametrize("name", ["slo", *ROUTERS])
def test_routes_are_the_same_with_stretches_and_without(name: str, seed: int, gpus: int) -> None:
    """Alone on their devices or not: what a router sees of a stretch is what it sees of single steps."""
    tiers = name == "slo"
    arrivals = asked(seed, 150, 10.0 * gpus, "any" if tiers else "m", 0.5)
    runs = []
    for stretch in (True, False):
        routes = Routes(lambda _: Tiers() if tiers else named(name, seed), TIERS, UNEVEN)
        fleet = three(gpus) if tiers else twins(gpus)
        runs.append(run(fleet, arrivals, routes, stretch, UNEVEN))
    fast, slow = runs
    assert fast.events < slow.events
    for rid, record in fast.records.items():
        other = slow.records[rid]
        assert record.replica == other.replica
        assert record.end_s == pytest.approx(other.end_s, abs=1e-9)


def test_who_ends_in_the_step_under_way_is_gone_for_a_router() -> None:
    asked_for = [Arrival(0.0, 0, "m", 50, 30, 1.0, 1.0), Arrival(0.0, 1, "m", 80, 60, 1.0, 1.0)]
    seen = []
    for stretch in (True, False):
        routes, one = Routes(), replica("m", "m", "gpu0")
        simulation = Simulation([one], asked_for, stretch=stretch)
        states = []
        for step in range(60):
            # in the middle of it: the prompts take 22 ms, a decode 8.1
            now = 0.022 + 0.0081 * (step + 0.5)
            simulation.run(until_s=now)
            state = routes.state(one, Arrival(now, 9, "m", 10, 10), now)
            states.append((state.first_s, state.decode_s, state.open))
        seen.append(states)
    fast, slow = seen
    assert fast == [pytest.approx(state) for state in slow]
    assert {state[2] for state in slow} == {0, 1, 2}


@pytest.mark.parametrize("speeds", [(2.0, 1.0, 1.0, 0.25), (1.0, 1.0, 1.0, 1.0)])
def test_what_is_predicted_is_worth_most_where_replicas_differ(speeds: tuple[float, ...]) -> None:
    """Attained in the mean of a load that all can take and one that they cannot."""

    def share(make: Callable[[str], Router]) -> float:
        loads = [(16.0, 0), (26.0, 1)]
        fleets = ([replica(f"m{i}", "m", f"gpu{i}", s) for i, s in enumerate(speeds)] for _ in loads)
        runs = [
            run(fleet, asked(seed, 200, rate, "m", 0.3), Routes(make))
            for fleet, (rate, seed) in zip(fleets, loads, strict=True)
        ]
        return sum(map(attained, runs)) / len(runs)

    found = {name: share(lambda _, name=name: named(name, 1)) for name in ROUTERS}  # type: ignore[misc]
    ours = found.pop("least-ttft")
    if speeds[0] != speeds[1]:
        assert ours > found["round-robin"] + 0.05, (ours, found)
        assert ours > found["shortest-queue"] + 0.01, (ours, found)
        assert ours > found["two-choices"] + 0.01, (ours, found)
    # where they are all alike, counting requests does as well
    assert ours > max(found.values()) - 0.02, (ours, found)


def test_tiers_keep_the_slo_where_one_precision_does_not_and_quality_where_it_does() -> None:
    def share(policy: str, rate: float) -> tuple[float, float]:
        """(attained, part of the requests that the best precision answered)"""
        routes = Routes(lambda _: Tiers(policy), TIERS)
        done = run(three(), asked(1, 400, rate, "any", 0.4), routes)
        return attained(done), routes.chosen["any"].get("fp16", 0) / 400

    assert share("slo", 2.0) == (1.0, 1.0), "nobody leaves the best one without need"
    kept, best = share("slo", 25.0)
    assert kept > share("best", 25.0)[0] + 0.1
    assert kept > share("cheapest", 25.0)[0]
    assert 0.2 < best < 1.0


def test_who_fits_nowhere_is_refused_by_the_first() -> None:
    routes = Routes()
    simulation = Simulation(twins(), [Arrival(0.0, 0, "m", 4000, 97)], route=routes)
    simulation.run()
    assert "max_model_len" in (simulation.records[0].error or "")
    assert simulation.records[0].replica == "m0"
