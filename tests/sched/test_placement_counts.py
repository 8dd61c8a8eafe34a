"""Models that are to have a number of replicas, or replicas on GPUs that are given, have them, or are named."""

import random
from dataclasses import replace

import pytest

from sched.placement import Plan, Problem, Replica, check, lacking
from sched.placement_estimate import Estimator
from sched.placement_moves import replan
from sched.placement_search import Search, solve
from sched.placement_why import doubted, shortfalls
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


def shapes(plan: Plan, of: int) -> set[tuple[int, int]]:
    return {(r.tp, r.sm) for r in plan if r.model == of}


def test_replicas_are_alike_where_they_must_be() -> None:
    """The same problems without that rule have plans that mix degrees, of which a file could say no more than one."""
    mixed = 0
    for seed in (1, 4):
        rng = random.Random(100 + seed)
        models = [
            model(f"m{i}", rng.choice(list(SHAPES)), rng.choice(list(BITS)), rng.uniform(5, 60))
            for i in range(3)
        ]
        p = problem(models, 4, 60.0)
        free = solve(p, seed=seed, budget=1500)
        mixed += any(len(shapes(free.plan, i)) > 1 for i in range(3))
        alike = replace(p, alike=True)
        found = solve(alike, seed=seed, budget=1500)
        check(alike, found.plan)
        assert all(len(shapes(found.plan, i)) == 1 for i in range(3))
        assert found.estimate.value > 0.99 * free.estimate.value
        if mixed:
            with pytest.raises(
                ValueError, match=r"must have one tp and one share, got \[\(1, 100\), \(2, 100"
            ):
                check(alike, free.plan)
    assert mixed == 2


@pytest.mark.parametrize("seed", range(4))
def test_all_replicas_of_a_model_change_their_share_at_once(seed: int) -> None:
    """One at a time they may not, and with a fixed number none can go before."""
    models = []
    for i in range(3):
        m = model(f"m{i}", rate=4.0 + seed, degrees=(1,))
        whole = m.costs["h100"][1, 100]
        costs = {(1, 100): whole, (1, 50): replace(whole, per_prefill_token_s=2 * whole.per_prefill_token_s)}
        models.append(replace(m, costs={"h100": costs}, replicas=2))
    p = problem(models, 3, 80.0, alike=True)
    search = Search(p, Estimator(p), seed, 400)
    plan = tuple(sorted(Replica(i, (g,), 50) for i in range(3) for g in ((i, (i + 1) % 3))))
    near = set(search.steps(plan, Estimator(p)(plan)))
    assert {frozenset(shapes(q, 0)) for q in near} == {frozenset({(1, 50)}), frozenset({(1, 100)})}
    for q in near:
        check(p, q)
        assert search.miscount(q) == 0
    found, value = search.climb(plan)
    assert value >= Estimator(p)(plan).value
    check(p, found)


def test_what_is_short_is_what_the_simulator_says() -> None:
    p = problem(
        [model("a", rate=1.0), model("b", rate=90.0), model("c", rate=0.0), model("d", rate=1.0)], 1, 120.0
    )
    plan: Plan = tuple(Replica(i, (0,)) for i in range(3))
    estimated = Estimator(p)(plan).attained
    assert estimated[1] < p.target < estimated[0]
    for simulated, expected, doubts in (
        (None, {"b", "d"}, []),
        ((0.99, 0.95, None, 0.0), {"d"}, [1]),
        ((0.85, 0.2, None, 0.0), {"a", "b", "d"}, []),
        # not asked in the simulator: by the estimate
        ((None, None, None, None), {"b", "d"}, []),
    ):
        found = shortfalls(p, plan, most=0, simulated=simulated)
        assert {s.model for s in found} == expected
        if simulated is not None:
            assert doubted(p, plan, simulated) == doubts
            assert all(s.simulated == simulated["abcd".index(s.model)] for s in found)
    worst = shortfalls(p, plan, most=0, simulated=(0.5, 0.4, None, 0.0))
    assert [s.model for s in worst] == ["d", "b", "a"]
    assert all(s.changes is None for s in worst)
