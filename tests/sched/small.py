"""Small batchers for tests that state one behaviour each."""

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.slack import Slack
from sched.step import StepPlan
from tests.sched.witness import Sets

COST = StepCost(base_s=2e-3, per_prefill_token_s=1e-4)


def build(
    num_sets: int = 100,
    *,
    P: int = 4,
    slots: int = 2,
    cost: StepCost | None = None,
    reserve: int = 0,
    debt: int | None = None,
    **limits: int,
) -> Batcher:
    defaults = {
        "max_running": 8,
        "max_step_tokens": 64,
        "max_chunk_tokens": 32,
        "max_model_len": 400,
        "max_waiting": 1000,
    }
    given = Limits(**defaults | limits)
    policy = None if debt is None else Slack(given, cost, debt=debt)
    return Batcher(BlockPool(Sets(num_sets, reserve), slots, P), given, cost, policy)


def step(b: Batcher, now: float = 0.0, stopped: tuple[int, ...] = ()) -> tuple[StepPlan, tuple[int, ...]]:
    plan = b.plan(now)
    ended = b.advance(plan, 1, now, stopped)
    b.check()
    return plan, ended
