"""The prefix cache in a simulation: what prompts share is computed once, and a router sends them to where it is."""

import pytest

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.simulated_prompts import Prompts
from sched.simulated_replica import Arrival, Replica
from sched.simulated_routes import Routes
from sched.simulator import Simulation
from sched.workload import Request, Workload, ordered
from tests.sched.witness import Sets

LIMITS = Limits(
    max_running=32, max_step_tokens=2048, max_chunk_tokens=2048, max_model_len=4096, max_waiting=10**6
)
COST = StepCost(base_s=8e-3, per_decode_s=5e-5, per_prefill_token_s=4e-5, per_context_token_s=1.6e-8)
BLOCK = 16


def talks(shared: bool = True) -> Workload:
    """Four sessions of three turns, two a common prefix of 1,024 tokens, and a turn every two seconds."""
    requests = [
        Request(
            0, "m", 2.0 * (3 * s + turn), 1100 + 200 * turn, 20,
            session=s if shared else -1, turn=turn, prefix=s // 2 if shared else -1, prefix_tokens=1024 if shared else 0,
        )
        for s in range(4)
        for turn in range(3)
    ]  # fmt: skip
    return Workload(ordered(requests), duration_s=24.0, seed=3)


def run(workload: Workload, *, cached: bool = True, replicas: int = 1, stretch: bool = True) -> Simulation:
    prompts = Prompts(workload)
    made = [
        Replica(f"r{i}", "m", (f"gpu{i}",), Batcher(BlockPool(Sets(600), 16, BLOCK), LIMITS, COST),
                keys=prompts.keys(BLOCK) if cached else None)
        for i in range(replicas)
    ]  # fmt: skip
    arrivals = [
        Arrival(r.arrival_s, r.rid, r.model, r.prompt_tokens, r.output_tokens) for r in workload.requests
    ]
    simulation = Simulation(made, arrivals, route=Routes(marks=prompts.marks), stretch=stretch)
    simulation.run()
    simulation.check()
    return simulation


def test_what_an_earlier_prompt_had_is_not_computed_again() -> None:
    workload = talks()
    simulation = run(workload)
    for r in workload.requests:
        # its own last turn, else what another session of the prefix left
        before = 1100 + 200 * (r.turn - 1) if r.turn else (1024 if r.session % 2 else 0)
        record = simulation.records[r.rid]
        assert record.cached_tokens == before // BLOCK * BLOCK
        assert record.first_s is not None
        left = r.prompt_tokens - before // BLOCK * BLOCK
        assert record.first_s - r.arrival_s == pytest.approx(COST.base_s + left * 4e-5, rel=0.2)


def test_without_a_cache_or_without_anything_shared_all_is_computed() -> None:
    for simulation in (run(talks(), cached=False), run(talks(shared=False))):
        assert not any(r.cached_tokens for r in simulation.records.values())
    assert not Prompts(talks(shared=False)).share


def test_with_stretches_it_is_the_same_as_step_by_step() -> None:
    fast, slow = run(talks()), run(talks(), stretch=False)
    assert fast.events < slow.events
    for rid, record in fast.records.items():
        assert record.cached_tokens == slow.records[rid].cached_tokens
        assert record.end_s == pytest.approx(slow.records[rid].end_s, abs=1e-9)


def test_turns_go_to_the_replica_that_has_their_session() -> None:
    workload = talks()
    simulation = run(workload, replicas=3)
    for r in workload.requests[1:]:
        if r.turn:
            (first,) = (o for o in workload.requests if o.session == r.session and o.turn == 0)
            assert simulation.records[r.rid].replica == simulation.records[first.rid].replica
    cached = sum(r.cached_tokens or 0 for r in simulation.records.values())
    assert cached == sum(r.cached_tokens or 0 for r in run(workload).records.values())
