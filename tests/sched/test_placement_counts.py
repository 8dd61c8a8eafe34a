"""Models that are to have a number of replicas, or replicas on GPUs that are given, have them, or are named."""

import random
from dataclasses import replace

import pytest

from sched.placement import Plan, Problem, Replica, check, lacking
from sched.placement_estimate import Estimator
from sched.placement_moves import replan
from sched.placement_search import Search, solve
from sched.placement_why import shortfalls
from tests.sched.placed import BITS, SHAPES, model, problem


def mixture(seed: int, **given: object) -> Problem:
    """Of four models one is to have two replicas, one is pinned to two GPUs, and two are free."""
    rng = random.Random(seed)
    models = [
        model(
            f"m{i}", rng.choice(list(SHAPES)), rng.choice(list(BITS)), rng.uniform(0.5, 8.0), degrees=(1, 2)
        )
        for i in range(4)
    ]
    models[0] = replace(models[0], replicas=2)
    models[1] = replace(models[1], places=(("g1",), ("g3",)), tp=1)
    return problem(models, 4, 80.0, **given)


def count(plan: Plan, of: int) -> int:
    return sum(r.model == of for r in plan)


@pytest.mark.parametrize("seed", range(8))
def test_counts_and_places_hold_whatever_the_search_does(seed: int) -> None:
    p = mixture(seed)
    found = solve(p, seed=seed, budget=800)
    check(p, found.plan)
    assert lacking(p, found.plan) == {}
    assert count(found.plan, 0) == 2
    assert {r.gpus for r in found.plan if r.model == 1} == {(1,), (3,)}
    assert found.missing == ()
    # a judge that hates replicas does not get rid of them
    few = solve(p, seed=seed, budget=300, score=lambda plan: -len(plan), refine=10)
    assert lacking(p, few.plan) == {}


@pytest.mark.parametrize("seed", range(6))
def test_who_is_ruined_gets_back_what_it_lacks(seed: int) -> None:
    p = mixture(seed)
    search = Search(p, Estimator(p), seed, 100_000)
    plan = search.greedy(range(4))
    lost = 0
    for _ in range(30):
        found = search.ruined(plan)
        check(p, found)
        assert [search.lacks(i, found) for i in range(4)] == [0] * 4
        assert (count(found, 0), count(found, 1)) == (2, 2)
        lost += any(r not in found for r in plan if r.model == 0)
    assert lost > 0
    # what is there is counted
    assert search.greedy(range(4), plan) == plan
    without = tuple(r for r in plan if r != next(o for o in plan if o.model == 0))
    assert search.lacks(0, without) == 1
    assert count(search.greedy(range(4), without), 0) == 2


def test_room_is_made_for_a_replica_that_is_asked_for() -> None:
    """The free model fits on either GPU, the pinned one needs both, each GPU holds two of the three."""
    pinned = replace(model("pinned", "14b", rate=0.1, degrees=(1,)), replicas=2)
    p = problem([pinned, model("a", "8b", degrees=(1,)), model("b", "8b", degrees=(1,))], 2, 60.0)
    start = (Replica(0, (0,)), Replica(1, (1,)), Replica(2, (1,)))
    search = Search(p, Estimator(p), 0, 2000)
    assert search.miscount(start) == 1
    found, _ = search.climb(start)
    assert search.miscount(found) == 0
    check(p, found)


def test_a_replica_too_many_goes() -> None:
    p = problem([replace(model("a", rate=20.0), replicas=1, tp=1), model("b")], 2)
    old: Plan = (Replica(0, (0,)), Replica(0, (1,)), Replica(1, (1,)))
    found, moves = replan(p, old, budget=200)
    assert count(found.plan, 0) == 1
    assert "remove" in {m.what for m in moves}


def test_too_few_replicas_do_not_fit_though_all_attain() -> None:
    many = replace(model("a", rate=1.0, degrees=(1,)), replicas=3)
    p = problem([many, model("b", rate=1.0, degrees=(1,))], 2)
    found = solve(p, budget=300)
    assert lacking(p, found.plan) == {0: (2, 3)}
    assert found.estimate.worst > p.target
    (said,) = shortfalls(p, found.plan)
    assert (said.model, said.replicas) == ("a", (2, 3))
    assert said.reason.startswith("even alone it has room for no more than 2")
    assert [c.what for c in said.changes or ()] == ["gpus"]


def test_a_place_that_is_not_taken_is_named() -> None:
    big = replace(model("big", "14b", rate=0.1, degrees=(1,)), places=(("g0",),))
    both = replace(model("both", "8b", rate=0.1, degrees=(1,)), places=(("g0",), ("g1",)))
    p = problem([big, both], 2, 40.0)
    found = solve(p, budget=300)
    (said,) = [s for s in shortfalls(p, found.plan, most=0) if s.model == "both"]
    assert said.replicas == (1, 2)
    assert said.reason == "memory: beside the others there is no room on g0"
