"""Baselines: FineServe's placement as its public code makes it, KVPR's figures, and rules that keep to memory."""

import random
from typing import Any

import pytest

from bench.placement_fineserve import AS_THEIRS, seven
from sched.placement import Replica, check
from sched.placement_arms import BASELINES, baseline, completed
from sched.placement_baselines import alpaserve, memory_balanced, meshes, partitions, prism, round_robin
from sched.placement_estimate import Estimator
from sched.placement_fineserve import Row, slab_aware, slo_of
from sched.placement_kvpr import Pressure, bound, problem_of, ratios
from sched.placement_muxserve import mesh_rates, muxserve
from sched.placement_search import solve
from tests.sched.placed import model, problem

BATCHES = (1, 2, 4, 8, 16, 32)
# microseconds of a prompt token and of an answer token at those batches, by degree of tensor parallelism: the means that the
# rule makes of the profile on H100 of arXiv 2509.06261's artifact (BSD-3-Clause, Samsung SDS 2025), to four digits
PROFILE: dict[str, dict[int, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "llama-3.1-70b/awq": {
        1: ((431.0, 704.9, 1410.0, 3040.0, 6610.0, 13590.0), (21450.0, 21920.0, 22450.0, 23100.0, 24160.0, 28190.0)),
        4: ((195.0, 238.8, 456.8, 864.6, 1800.0, 3951.0), (23150.0, 23710.0, 23760.0, 23850.0, 24230.0, 24710.0)),
    },
    "llama-3.1-8b/org": {
        1: ((39.68, 66.64, 97.89, 192.2, 388.8, 744.1), (7981.0, 8011.0, 8100.0, 8340.0, 8734.0, 9409.0)),
        2: ((66.84, 61.07, 99.09, 171.3, 304.7, 506.7), (9667.0, 9669.0, 9870.0, 9920.0, 10100.0, 10460.0)),
        4: ((58.88, 58.3, 90.15, 118.7, 266.5, 374.3), (10180.0, 10180.0, 9935.0, 10080.0, 10580.0, 10860.0)),
    },
    "llama-3.1-8b/fp8_kv8": {
        1: ((36.04, 54.1, 101.7, 158.7, 294.3, 571.4), (10150.0, 10320.0, 10530.0, 10670.0, 10800.0, 11000.0)),
        2: ((58.23, 64.31, 113.2, 137.2, 268.7, 487.0), (11860.0, 12240.0, 12360.0, 12490.0, 12620.0, 12810.0)),
        4: ((58.1, 76.53, 75.86, 137.3, 186.7, 327.4), (11830.0, 12630.0, 12480.0, 12520.0, 12850.0, 13040.0)),
    },
    "llama-3.1-8b/awq": {
        1: ((55.43, 89.6, 156.5, 337.1, 708.7, 1457.0), (8406.0, 8264.0, 8323.0, 8567.0, 8509.0, 9018.0)),
        2: ((67.16, 148.5, 125.2, 207.7, 508.1, 760.9), (10200.0, 9922.0, 10250.0, 10290.0, 10420.0, 10660.0)),
        4: ((88.51, 65.43, 90.76, 149.5, 267.0, 485.3), (10470.0, 10630.0, 11070.0, 11150.0, 11090.0, 11280.0)),
    },
    "llama-3-8b/qoq": {
        1: ((104.4, 144.8, 222.8, 382.3, 698.6, 1174.0), (8068.0, 8157.0, 8257.0, 8457.0, 9006.0, 10480.0)),
    },
    "qwen-3-32b/org": {
        2: ((112.1, 138.9, 236.7, 471.9, 865.1, 1798.0), (19950.0, 22480.0, 21010.0, 21250.0, 21650.0, 22370.0)),
        4: ((94.44, 127.3, 180.3, 302.3, 571.6, 1097.0), (20480.0, 21470.0, 21690.0, 21430.0, 22290.0, 22410.0)),
    },
    "qwen-3-32b/fp8_kv8": {
        2: ((109.4, 147.1, 251.7, 418.6, 829.0, 1377.0), (24410.0, 25730.0, 26150.0, 26200.0, 26470.0, 26910.0)),
        4: ((101.8, 125.9, 178.5, 290.9, 519.4, 852.2), (25070.0, 25830.0, 26380.0, 26910.0, 26290.0, 27300.0)),
    },
}  # fmt: skip


def rows(times: tuple[tuple[float, ...], tuple[float, ...]]) -> list[Row]:
    return [Row(b, 1, 1, p * 1e-6, a * 1e-6) for b, p, a in zip(BATCHES, *times, strict=True)]


def test_fineserve_places_seven_models_as_its_code_did() -> None:
    llms = seven({name: {tp: rows(times) for tp, times in of.items()} for name, of in PROFILE.items()})
    placed = slab_aware(llms, [range(4)], slo_scale=50)
    assert {llms[p.model].name: (p.choice.tp, p.choice.batch, p.gpus) for p in placed} == AS_THEIRS
    needs = {llms[p.model].name: round(p.need_gb, 1) for p in placed}
    assert list(needs.values()) == [87.7, 50.7, 44.3, 23.8, 12.2, 8.3, 5.6]
    slos = {m.name: round(slo_of(m, 40), 2) for m in llms}
    assert slos["llama-3.1-8b/org"] == 1.44
    assert slos["qwen-3-32b/org"] == 4.05
    assert slos["llama-3-8b/qoq"] == pytest.approx(3.78, abs=0.011)


def case(seed: int, gpus: int) -> dict[str, Any]:
    """By the law of the public instances: two models a GPU, 10 to 29 GB, rates 1 to 9, SLOs 5 to 9."""
    rng = random.Random(seed)
    models = [
        {"weights_gb": rng.randint(10, 29), "rate": rng.randint(1, 9), "slo": rng.randint(5, 9)}
        for _ in range(2 * gpus)
    ]
    return {"gpus": gpus, "gpu_memory_gb": 80, "models": models}


def test_kvpr_orders_the_rules_as_the_public_instances_do() -> None:
    over: dict[str, list[float]] = {}
    for seed in range(8):
        p = problem_of(case(seed, 5))
        plans = {
            "round robin": round_robin(p),
            "memory balanced": memory_balanced(p),
            "prism": prism(p),
            "ours": solve(p, estimator=Pressure(p), budget=1500, seed=seed).plan,
        }
        for name, plan in plans.items():
            check(p, plan)
            assert len(plan) == 10
            over.setdefault(name, []).append(max(ratios(p, plan)) / bound(p))
    assert all(x >= 1 for of in over.values() for x in of)
    mean = {name: sum(of) / len(of) for name, of in over.items()}
    assert mean["ours"] < mean["prism"] < min(mean["memory balanced"], mean["round robin"])
    assert mean["ours"] <= 1.17
    assert all(a <= b + 1e-9 for a, b in zip(over["ours"], over["prism"], strict=True))


def test_kvpr_by_hand() -> None:
    p = problem_of({"gpus": 2, "gpu_memory_gb": 80, "models": [
        {"weights_gb": 20, "rate": 6, "slo": 2}, {"weights_gb": 30, "rate": 5, "slo": 5}, {"weights_gb": 10, "rate": 4, "slo": 2},
    ]})  # fmt: skip
    # 3 over 60 on one GPU; then 2 over 70 on the other; 1 over 50 added: 4 over 30 or 3 over 40
    plan = prism(p)
    assert plan == (Replica(0, (0,)), Replica(1, (1,)), Replica(2, (1,)))
    assert ratios(p, plan) == pytest.approx([3 / 60, 3 / 40])
    assert bound(p) == pytest.approx(6 / 100)
    # heaviest first: 30 | 20, then 10 where 20 is
    assert memory_balanced(p) == (Replica(0, (1,)), Replica(1, (0,)), Replica(2, (1,)))


@pytest.mark.parametrize("name", sorted(BASELINES))
@pytest.mark.parametrize("seed", range(2))
def test_every_baseline_keeps_to_memory_and_places_all(name: str, seed: int) -> None:
    p = problem(5, gpus=2, seed=seed, max_replicas=2)
    plan = baseline(name, p, seed=seed)
    check(p, plan)
    assert {r.model for r in plan} == set(range(5))
    assert baseline(name, p, seed=seed) == plan


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of round-robin, .*exhaustive, got 'best'"):
        baseline("best", problem(2))


def test_what_a_rule_leaves_out_is_placed_where_memory_is_left() -> None:
    p = problem([model("a", "8b"), model("b", "8b"), model("c", "3b")], gpus=2)
    plan = completed(p, (Replica(0, (0,)),))
    assert plan == (Replica(0, (0,)), Replica(1, (1,)), Replica(2, (1,))) or len({r.model for r in plan}) == 3
    check(p, plan)


def test_meshes_are_powers_of_two() -> None:
    assert sorted(partitions(4)) == [(1, 1, 1, 1), (2, 1, 1), (2, 2), (4,)]
    assert len(list(partitions(8))) == 10  # as the paper enumerates
    p = problem([model("a")], gpus=4, per_node=2)
    cuts = list(meshes(p))
    assert len(cuts) == 3  # two nodes that are alike: both whole, one cut, both cut
    assert all(sorted(g for group in cut for g in group) == [0, 1, 2, 3] for cut in cuts)


def test_muxserve_serves_no_more_than_is_asked_and_slips_where_released() -> None:
    p = problem([model("a", rate=5.0), model("b", rate=1.0)], gpus=1)
    on = [Replica(0, (0,)), Replica(1, (0,))]
    low = mesh_rates(p, on, released=False)
    assert low == pytest.approx([5.0, 1.0])
    hot = p.with_rates({"a": 500.0})
    assert mesh_rates(hot, on, released=False)[0] < 500.0
    # both rules agree on one mesh; on several the published one may read the increase of another
    assert muxserve(p) == muxserve(p, released=True) == tuple(on)
    plans = [
        (muxserve(q), muxserve(q, released=True))
        for q in (problem(6, gpus=4, seed=s, max_replicas=1) for s in range(6))
    ]
    assert any(a != b for a, b in plans)


def test_alpaserve_helps_who_misses_most() -> None:
    p = problem(
        [model("cold", rate=0.5, degrees=(1,)), model("hot", rate=45.0, degrees=(1,))], gpus=2, max_replicas=2
    )
    estimator = Estimator(p)
    plan = alpaserve(p, lambda plan: estimator(plan).attained)
    assert sum(r.model == 1 for r in plan) == 2
    assert estimator(plan).joint >= estimator((Replica(0, (0,)), Replica(1, (1,)))).joint
