"""Placement: what a plan may be, the estimate against the simulator, the search against all plans, and what does not fit."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from sched.placement import (
    Gpu,
    Plan,
    Problem,
    Replica,
    check,
    fits,
    pool_bytes,
    reserved_bytes,
    residents,
    use_of,
)
from sched.placement_estimate import Estimator
from sched.placement_exhaustive import exhaustive, plans
from sched.placement_moves import Migration, changes, replan
from sched.placement_search import Search, groups_of, options, solve
from sched.placement_simulate import Pool, Scorer, Sets, replicas_of, requests
from sched.placement_why import shortfalls
from sched.simulator import Simulation
from sched.slack import Slack
from tests.sched.placed import GB, model, problem


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_is_over_memory_and_every_model_is_placed_or_reported(seed: int) -> None:
    rng = random.Random(seed)
    p = problem(
        rng.randint(3, 9), gpus=rng.randint(1, 4), memory_gb=rng.choice((24, 40, 80)), seed=seed, per_node=2
    )
    found = solve(p, seed=seed, budget=400)
    check(p, found.plan)
    for g, on in enumerate(residents(p, found.plan)):
        assert pool_bytes(p, g, on) >= reserved_bytes(p, on) or not on
    placed = {r.model for r in found.plan}
    assert placed | set(found.missing) == set(range(len(p.models)))
    assert not placed & set(found.missing)
    attained = found.estimate.attained
    assert all(0 <= a <= 1 for a in attained)
    assert all(attained[i] == 0 for i in found.missing)
    reported = {s.model for s in shortfalls(p, found.plan, most=0)}
    below = {m.name for m, a in zip(p.models, attained, strict=True) if a < p.target}
    assert reported == below >= {p.models[i].name for i in found.missing}


def test_no_search_puts_a_model_twice_on_a_gpu() -> None:
    p = problem([model("hot", rate=90.0, degrees=(1,)), model("cold", rate=0.5)], gpus=2)
    found = solve(p, budget=300)
    check(p, found.plan)
    assert sum(r.model == 0 for r in found.plan) == 2


def test_the_same_seed_gives_the_same_plan() -> None:
    p = problem(7, gpus=3, seed=1)
    first, again = (solve(p, seed=4, budget=600) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("seed", range(4))
def test_who_was_on_an_emptied_gpu_is_placed_anew_and_nobody_else_moves(seed: int) -> None:
    p = problem(8, gpus=4, seed=seed)
    search = Search(p, Estimator(p), seed, 10_000)
    plan = search.greedy(range(8))
    changed = 0
    for _ in range(20):
        found = search.ruined(plan)
        check(p, found)
        assert {r.model for r in found} == {r.model for r in plan}
        moved = set(plan) - set(found)
        pairs = ({a, b} for a in range(4) for b in range(4))
        assert any(all(pair & set(r.gpus) for r in moved) for pair in pairs)
        changed += found != plan
    assert changed > 5
    assert search.ruined(()) == ()


def test_steps_that_the_simulator_finds_better_are_taken() -> None:
    p = problem(4, gpus=3, seed=1, memory_gb=80)
    asked: list[Plan] = []

    def score(plan: Plan) -> float:
        """Wants model 0 and nobody else on the last GPU, of which the estimate knows nothing."""
        asked.append(plan)
        return sum(0.1 for r in plan if (r.model == 0) == (2 in r.gpus)) / max(1, len(plan))

    plain = solve(p, budget=200, score=score, keep=1)
    asked.clear()
    refined = solve(p, budget=200, score=score, keep=1, refine=60)
    assert score(plain.plan) < score(refined.plan) == pytest.approx(0.1)
    assert refined.best[0] == (refined.plan, score(refined.plan))
    check(p, refined.plan)
    assert len(asked) <= 63
    asked.clear()
    solve(p, budget=200, score=score, keep=1, refine=2)
    assert len(asked) == 3


@pytest.mark.parametrize("seed", range(5))
def test_ranks_stay_on_one_node(seed: int) -> None:
    p = problem(
        [model(f"m{i}", "14b", rate=3.0) for i in range(4)], gpus=4, per_node=2, seed=seed, max_replicas=2
    )
    found = solve(p, seed=seed, budget=500)
    check(p, found.plan)
    assert {len({p.gpus[g].node for g in r.gpus}) for r in found.plan} == {1}
    assert {len({g // 2 for g in gpus}) for gpus in groups_of(p, 2)} == {1}
    with pytest.raises(ValueError, match="one node"):
        check(p, (Replica(0, (1, 2)),))


def test_what_is_no_plan_is_refused() -> None:
    p = problem([model("a", "14b"), model("b", "14b")], gpus=2, memory_gb=40)
    with pytest.raises(ValueError, match=r"GPU 'g0' has .* their reserves take"):
        check(p, (Replica(0, (0,)), Replica(1, (0,))))
    with pytest.raises(ValueError, match="a model twice"):
        check(p, (Replica(0, (0,)), Replica(0, (0, 1))))
    with pytest.raises(ValueError, match="no costs for tp=1 and 50 %"):
        check(p, (Replica(0, (0,), 50),))
    with pytest.raises(ValueError, match="GPUs of their own"):
        check(p, (Replica(0, (0, 0)),))
    with pytest.raises(ValueError, match="no costs for tp=4"):
        problem([model("a", tp=4)])
    with pytest.raises(ValueError, match="different names"):
        problem([model("a"), model("a")])
    with pytest.raises(ValueError, match="tpot_s must be above 0"):
        model(tpot_s=0.0)


@pytest.mark.parametrize("seed", range(4))
def test_search_reaches_the_best_of_all_plans(seed: int) -> None:
    p = problem(6, gpus=2 + seed % 2, seed=seed, max_replicas=1)
    everything = list(plans(p, Estimator(p)))
    assert len(set(everything)) == len(everything)
    best = exhaustive(p)
    assert best.num_looked_at == len(everything)
    assert exhaustive(p, bounded=True).estimate.value == pytest.approx(best.estimate.value, abs=1e-6)
    assert solve(p, seed=seed, budget=1500).estimate.value >= 0.999 * best.estimate.value


def test_bounds_cut_nothing_that_is_best_where_ranks_are_neighbours() -> None:
    for seed in range(3):
        rng = random.Random(seed)
        models = [model(f"m{i}", rng.choice(("8b", "14b")), rate=rng.uniform(2, 20)) for i in range(4)]
        p = problem(models, gpus=4, memory_gb=70, max_replicas=1)
        assert groups_of(p, 2) == [(0, 1), (2, 3)]
        whole, cut = exhaustive(p), exhaustive(p, bounded=True)
        assert cut.estimate.value == pytest.approx(whole.estimate.value, abs=1e-6)
        assert cut.num_looked_at <= whole.num_looked_at


def test_a_model_that_comes_makes_nobody_better() -> None:
    """From hardly any load to three times what fits: estimates that swing would."""
    p = problem([model(f"m{i}", "3b", rate=1.0, tpot_s=0.02) for i in range(9)], gpus=1, memory_gb=100)
    for scale in (0.3, 1.0, 3.0, 10.0):
        estimate = Estimator(p.with_rates({m.name: scale for m in p.models}))
        before = (1.0,) * 9
        for n in range(1, 10):
            found = estimate(tuple(Replica(i, (0,)) for i in range(n))).attained
            assert all(found[i] <= before[i] + 0.01 for i in range(n - 1)), (scale, n, found, before)
            before = found


def test_all_plans_are_set_partitions() -> None:
    p = problem([model(f"m{i}", "3b", "w4", degrees=(1,)) for i in range(5)], gpus=5)
    assert len(list(plans(p, Estimator(p)))) == 52  # Bell's number of 5
    # on GPUs that differ all 5^2 assignments of two models count
    mixed = tuple(Gpu(f"g{i}", (60 + i) * GB) for i in range(5))
    q = replace(p, models=p.models[:2], gpus=mixed)
    assert len(list(plans(q, Estimator(q)))) == 25


def test_the_estimate_orders_plans_as_the_simulator_does() -> None:
    calm = problem(6, gpus=2, seed=3, max_replicas=1)
    p = calm.with_rates({m.name: 3.0 * m.rate for m in calm.models})
    estimator, score = Estimator(p), Scorer(p, requests(p, 12.0, seed=5))
    found = sorted(plans(p, estimator), key=lambda plan: estimator(plan).value)
    low, middle, high = (score(found[k]).joint for k in (0, len(found) // 2, -1))
    assert low < high
    assert low <= middle <= high + 0.02
    # where nothing is overloaded it is near, too
    alone = Scorer(calm, requests(calm, 8.0, seed=5))
    assert Estimator(calm)(found[-1]).joint == pytest.approx(alone(found[-1]).joint, abs=0.05)
    assert score(found[0]) == score(found[0])
    assert score.num_runs == 3


def test_more_load_attains_less_and_nobody_asked_attains_all() -> None:
    p = problem([model("a", rate=1.0), model("b", rate=0.0)], gpus=1)
    plan: Plan = (Replica(0, (0,)), Replica(1, (0,)))
    values = [
        Estimator(p.with_rates({"a": rate}))(plan).attained[0] for rate in (1.0, 10.0, 30.0, 100.0, 400.0)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.95 > 0.5 > values[-1]
    assert Estimator(p)(plan).attained[1] == 1.0


def test_a_neighbour_costs_and_two_replicas_help() -> None:
    p = problem([model("a", rate=14.0), model("b", rate=14.0)], gpus=2)
    estimate = Estimator(p)
    apart, together = (Replica(0, (0,)), Replica(1, (1,))), (Replica(0, (0,)), Replica(1, (0,)))
    assert estimate(apart).joint > estimate(together).joint
    assert estimate(apart).headroom[0] > estimate(together).headroom[0]
    hot = problem([model("a", rate=60.0)], gpus=2)
    assert (
        Estimator(hot)((Replica(0, (0,)), Replica(0, (1,)))).joint > Estimator(hot)((Replica(0, (0,)),)).joint
    )


@pytest.mark.parametrize("seed", range(3))
def test_pools_of_the_scorer_keep_reserves(seed: int) -> None:
    rng = random.Random(seed)
    pool = Pool(100.0, {"a": 20.0, "b": 10.0}, 15.0)
    sources = {"a": Sets("a", [pool], 4.0), "b": Sets("b", [pool], 3.0)}
    held: dict[str, list[int]] = {"a": [], "b": []}
    for _ in range(400):
        name = rng.choice("ab")
        if rng.random() < 0.6:
            got = sources[name].lease(urgent=rng.random() < 0.3)
            if got is not None:
                assert got not in held[name]
                held[name].append(got)
        elif held[name]:
            sources[name].give_back(held[name].pop())
        taken = {n: len(held[n]) * sources[n].set_bytes for n in held}
        assert sum(taken.values()) <= 100.0 + 1e-6
        for n, kept in pool.kept.items():
            if taken[n] + sources[n].set_bytes <= kept:
                assert pool.has(n, sources[n].set_bytes, urgent=False), (
                    f"{n} is refused its reserve at {taken}"
                )


def test_reasons_and_changes_of_what_does_not_fit() -> None:
    big = model("big", "14b", rate=0.1, degrees=(1,))
    p = problem([model("a", "3b", rate=0.1, degrees=(1,)), big], gpus=1, memory_gb=30)
    found = solve(p, budget=200)
    (said,) = shortfalls(p, found.plan)
    assert said.model == "big"
    assert said.reason.startswith("no GPU holds it")
    more = next(c for c in said.changes or () if c.what == "memory")
    larger = replace(p, gpus=tuple(replace(g, memory_bytes=g.memory_bytes * (1 + more.size)) for g in p.gpus))
    assert min(solve(larger, budget=1500).estimate.attained) >= p.target
    smaller = replace(
        p, gpus=tuple(replace(g, memory_bytes=g.memory_bytes * (1 + more.size * 0.9)) for g in p.gpus)
    )
    assert min(solve(smaller, budget=1500).estimate.attained) < p.target
    assert all(a.size <= b.size for a, b in pairwise(said.changes or ()))


def test_too_many_requests_and_too_tight_an_slo() -> None:
    hot = problem([model("hot", "8b", rate=80.0)], gpus=1, max_replicas=1)
    (said,) = shortfalls(hot, solve(hot, budget=50).plan)
    rate = next(c for c in said.changes or () if c.what == "rate")
    less = hot.with_rates({"hot": 80.0 * (1 - rate.size)})
    assert solve(less, budget=50).estimate.worst >= hot.target
    assert f"{80.0 * (1 - rate.size):.3g} requests/s in place of 80" == rate.words
    tight = problem([model("tight", tpot_s=1e-3)], gpus=1)
    (said,) = shortfalls(tight, solve(tight, budget=50).plan)
    assert said.reason.startswith("its SLO is too tight")
    assert {c.what for c in said.changes or ()} <= {"slo"}


def test_nothing_moves_for_nothing_and_something_for_much() -> None:
    p = problem([model(f"m{i}", "8b", rate=0.3, degrees=(1,)) for i in range(4)], gpus=2, max_replicas=1)
    old = solve(p, budget=500).plan
    same, moves = replan(p, old, budget=500)
    assert (same.plan, moves) == (old, [])
    # two that share a GPU become hot
    first, second = next(on for on in residents(p, old) if len(on) > 1)[:2]
    hot = p.with_rates({p.models[r.model].name: 15.0 for r in (first, second)})
    found, moves = replan(hot, old, budget=800)
    assert Estimator(hot)(found.plan).value > Estimator(hot)(old).value
    assert {m.what for m in moves} == {"load", "remove"}
    assert all(m.lost > 0 for m in moves if m.what == "load")
    # the same gain is not worth the way where it holds for seconds only
    brief, none = replan(hot, old, Migration(horizon_s=10.0), budget=800)
    assert (brief.plan, none) == (old, [])


def test_a_changed_share_is_a_restart() -> None:
    p = problem([model("a")], gpus=2)
    cost = dict(p.models[0].costs["h100"])
    p = replace(p, models=(replace(p.models[0], costs={"h100": cost | {(1, 50): cost[1, 100]}}),))
    assert {r.sm for r in options(p, 0) if r.tp == 1} == {50, 100}
    (change,) = changes(
        p, (Replica(0, (0,)),), (Replica(0, (0,), 50),), Migration(start_s=10.0, load_bytes_s=1e9)
    )
    assert change.what == "restart"
    assert change.seconds == pytest.approx(10 + 16)
    assert change.lost == pytest.approx(26 * p.models[0].rate)
    with pytest.raises(ValueError, match="horizon_s must be above 0"):
        Migration(horizon_s=0)


def test_shares_are_no_second_gpu() -> None:
    """Half of the multiprocessors decode as fast as all of them, as bandwidth is what decodes want: two models on halves
    share that bandwidth, and are no faster than two that take turns.  Prompts on a half leave room for a neighbour."""
    models = []
    for name in "ab":
        m = model(name, rate=8.0, degrees=(1,))
        whole = m.costs["h100"][1, 100]
        half = replace(
            whole, per_prefill_token_s=2 * whole.per_prefill_token_s, per_pair_s=2 * whole.per_pair_s
        )
        models.append(replace(m, costs={"h100": {(1, 50): half, (1, 100): whole}}))
    p = problem(models, gpus=1)
    decode, prompt = use_of(p, Replica(0, (0,), 50))
    assert decode == 1.0
    assert 0.5 < prompt < 1.0
    assert use_of(p, Replica(0, (0,))) == (1.0, 1.0)
    plans_ = [tuple(Replica(i, (0,), sm) for i in range(2)) for sm in (50, 100)]
    estimate, score = Estimator(p), Scorer(p, requests(p, 6.0, seed=1))
    for judge in (lambda plan: estimate(plan).value, lambda plan: score(plan).tokens / simulated_s(p, plan)):
        half_gpu, whole_gpu = map(judge, plans_)
        assert half_gpu <= whole_gpu * 1.02


def test_the_scorer_serves_as_each_model_says() -> None:
    burst = {"rate": 20.0, "burst": 4.0}
    models = [model(name, **burst) for name in "ab"]
    plan = (Replica(0, (0,)), Replica(1, (0,)))

    def scored(*policies: str, options: tuple[tuple[str, str], ...] = ()) -> tuple[float | None, ...]:
        own = [
            replace(m, policy=name, policy_options=options) for m, name in zip(models, policies, strict=True)
        ]
        p = problem(own, 1)
        return Scorer(p, requests(p, 6.0, seed=1))(plan).attained

    plain = problem(models, 1)
    assert scored("slack", "slack") == Scorer(plain, requests(plain, 6.0, seed=1), Slack)(plan).attained
    arms = [
        scored("slack", "slack"),
        scored("fcfs", "fcfs"),
        scored("fcfs", "slack"),
        scored("slack", "slack", options=(("shed", "hopeless"),)),
    ]
    assert len(set(arms)) == len(arms)
    # one that is handed in is everybody's
    own = problem([replace(m, policy="fcfs") for m in models], 1)
    assert Scorer(own, requests(own, 6.0, seed=1), Slack)(plan).attained == arms[0]
    with pytest.raises(ValueError, match="policy must be one of"):
        scored("slack", "none")


def simulated_s(p: Problem, plan: Plan) -> float:
    """Until the last answer has ended."""
    run = Simulation(replicas_of(p, plan), requests(p, 6.0, seed=1))
    run.run()
    return run.now


def test_fits_counts_the_longest_sequence() -> None:
    p = problem([model("a", "8b", degrees=(1,), max_len=65536)], gpus=1, memory_gb=60)
    lone = [Replica(0, (0,))]
    need = p.models[0].fixed_bytes(1) + 65536 * p.models[0].kv_bytes(1)
    for memory, held in ((need + 1, True), (need - 1, False)):
        q = Problem(p.models, (Gpu("g", memory),))
        assert fits(q, 0, lone) is held
