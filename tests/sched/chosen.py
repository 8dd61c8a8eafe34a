"""Batchers of one policy, for tests of what it decides."""

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.policies import make_policy
from sched.step import Request, StepPlan
from tests.sched.witness import Sets

# 0.4 ms a token of TTFT, whatever the length
COST = StepCost(base_s=0.0, per_prefill_token_s=4e-4)
LIMITS = Limits(
    max_running=256, max_step_tokens=2048, max_chunk_tokens=2048, max_model_len=4096, max_waiting=4096
)


def build(name: str, limits: Limits = LIMITS, cost: StepCost | None = COST, **options: object) -> Batcher:
    return Batcher(BlockPool(Sets(4000), 16, 32), limits, cost, make_policy(name, limits, cost, options))


def small(**changes: int) -> Limits:
    limits = {
        "max_running": 256,
        "max_step_tokens": 2048,
        "max_chunk_tokens": 2048,
        "max_model_len": 4096,
        "max_waiting": 4096,
    }
    return Limits(**limits | changes)


def prompts(b: Batcher, lengths: tuple[int, ...], **how: float) -> None:
    for rid, length in enumerate(lengths):
        b.add(Request(rid=rid, prompt_tokens=length, max_tokens=4, **how))  # type: ignore[arg-type]


def turn(b: Batcher, now: float = 0.0) -> StepPlan:
    plan = b.plan(now)
    b.check()
    if not plan.empty:
        b.advance(plan, 1, now + plan.seconds)
        b.check()
    return plan
