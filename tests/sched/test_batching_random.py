"""Random request streams over tiny pools, every step judged by the Witness."""

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.policies import POLICIES, make_policy
from sched.policy import Policy
from sched.slack import SHED
from sched.step import Request
from tests.sched.witness import Sets, Witness

COST = StepCost(base_s=2e-3, per_decode_s=6e-6, per_prefill_token_s=2.2e-5, per_context_token_s=1.6e-9)


def build(rng: random.Random, cost: StepCost | None) -> tuple[Witness, Sets]:
    """A pool that just holds the longest sequence, or up to four times as much."""
    P, slots, max_len = rng.choice((1, 2, 4, 7, 16)), rng.randint(1, 9), rng.randint(8, 90)
    longest = -(-max_len // (P * slots))
    sets = Sets(rng.randint(longest, 4 * longest), reserve=rng.choice((0, 0, longest)))
    max_running = rng.randint(1, 12)
    limits = Limits(
        max_running=max_running,
        max_step_tokens=max_running + rng.randint(0, 60),
        max_chunk_tokens=rng.randint(1, 70),
        max_model_len=max_len,
        max_waiting=1000,
    )
    witness = Witness(Batcher(BlockPool(sets, slots, P), limits, cost, some_policy(rng, limits, cost)))

    def nothing_else_can_progress() -> None:
        assert not witness.planned, "urgent with a step in flight"
        assert witness.batcher.num_running <= 1, f"urgent beside {witness.batcher.num_running} running"

    sets.on_urgent = nothing_else_can_progress
    return witness, sets


def some_policy(rng: random.Random, limits: Limits, cost: StepCost | None) -> Policy:
    """Ours in half of the runs."""
    name = rng.choice(list(POLICIES)) if rng.random() < 0.5 else "slack"
    options = {
        "slack": {"shed": rng.choice(SHED), "late_share": rng.randint(2, 5)},
        "sarathi": {"chunk": rng.randint(1, 40)},
        "fixed": {"batch": rng.randint(1, 9)},
    }
    return make_policy(name, limits, cost, options.get(name))


def some_request(rng: random.Random, rid: int, max_len: int, now: float) -> Request:
    prompt = rng.randint(1, max_len - 1)
    output = rng.randint(1, max_len - prompt) if rng.random() < 0.7 else 1
    ttft = rng.choice((0.01, 0.1, 1.0, 30.0))
    tpot = rng.choice((1e-4, 0.01, 1.0))
    priority = rng.choice((0, 0, 0, 1, -5))
    return Request(
        rid=rid,
        prompt_tokens=prompt,
        max_tokens=output,
        arrival_s=now,
        ttft_s=ttft,
        tpot_s=tpot,
        priority=priority,
    )


def random_run(seed: int, turns: int = 150) -> Counter[str]:
    rng = random.Random(seed)
    witness, sets = build(rng, rng.choice((None, COST)))
    depth = rng.choice((1, 2, 2, 3))
    p_add, p_abort, p_stop, p_refuse = (
        rng.choice((0.1, 0.5, 0.9)),
        rng.choice((0, 0.1)),
        rng.choice((0, 0.05)),
        0.0,
    )
    if rng.random() < 0.5:
        p_refuse = rng.choice((0.2, 0.9, 1.0))
    sets.refuses = lambda: rng.random() < p_refuse
    now, rid = 0.0, 0
    for _ in range(turns):
        if rng.random() < p_add:
            witness.add(some_request(rng, rid, witness.limits.max_model_len, now))
            rid += 1
        if rng.random() < p_abort and rid:
            witness.abort(rng.randrange(rid))
        if rng.random() < 0.1:
            sets.foreign = rng.randint(0, sets.num_sets)
        if rng.random() < 0.2:
            witness.batcher.compactor.ask(rng.randint(1, 4), rng.randint(0, 30))
        while len(witness.planned) < depth:
            plan = witness.plan(now)
            if plan.empty:
                break
        if witness.planned and rng.random() < 0.9:
            witness.advance(now, lambda rid: rng.random() < p_stop)
        now += rng.choice((0.0, 1e-3, 0.05))
    p_refuse, sets.foreign = 0.0, 0
    # with the sets back, one step at a time: each live request can be computed from the start once alone
    longest = witness.limits.max_model_len
    witness.finish(now, 50 + (len(witness.live) + 1) * (longest + 1) * 4)
    ends = Counter(r.ended for r in witness.records.values())
    ends.update(preempted=witness.batcher.num_preemptions, urgent=sets.num_urgent, steps=witness.num_steps)
    ends.update(moved=witness.num_moves)
    return ends + Counter(empty=witness.num_empty, restarts=witness.num_restarts, chunks=witness.num_chunks)


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_every_request_ends_and_nothing_leaks(part: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(part * 40, part * 40 + 40):
        try:
            seen += random_run(seed)
        except AssertionError as e:
            e.add_note(f"random_run({seed})")
            raise
    # the runs really visited what they are for
    for what in ("length", "stop", "abort", "preempted", "restarts", "urgent", "empty", "moved", "shed"):
        assert seen[what] > 20, f"{what} happened {seen[what]} times in {seen}"


@pytest.mark.slow
def test_every_request_ends_and_nothing_leaks_in_many_runs() -> None:
    for seed in range(1000, 4000):
        random_run(seed)


class BatcherMachine(RuleBasedStateMachine):
    """The same by hypothesis, which shrinks what it finds.  Plans run up to three steps ahead of advances."""

    @initialize(seed=st.integers(0, 2**16), cost=st.sampled_from((None, COST)))
    def start(self, seed: int, cost: StepCost | None) -> None:
        self.witness, self.sets = build(random.Random(seed), cost)
        self.now = 0.0

    @rule(prompt=st.integers(1, 89), output=st.integers(1, 89), ttft=st.sampled_from((0.0, 0.1, 9.0)))
    def add(self, prompt: int, output: int, ttft: float) -> None:
        longest = self.witness.limits.max_model_len
        prompt = min(prompt, longest - 1)
        self.witness.add(
            Request(
                rid=len(self.witness.records),
                prompt_tokens=prompt,
                max_tokens=min(output, longest - prompt),
                arrival_s=self.now,
                ttft_s=ttft,
                tpot_s=0.01,
            )
        )

    @precondition(lambda self: self.witness.records)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.witness.abort(data.draw(st.sampled_from(sorted(self.witness.records))))

    @precondition(lambda self: len(self.witness.planned) < 3)
    @rule(seconds=st.sampled_from((0.0, 0.001, 1.0)))
    def plan(self, seconds: float) -> None:
        self.now += seconds
        self.witness.plan(self.now)

    @precondition(lambda self: self.witness.planned)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        sampled = sorted(self.witness.planned[0].sampled)
        stopped = data.draw(st.sets(st.sampled_from(sampled), max_size=2)) if sampled else set()
        self.witness.advance(self.now, stopped.__contains__)

    @rule(sets=st.integers(1, 5), blocks=st.integers(0, 40))
    def compact(self, sets: int, blocks: int) -> None:
        self.witness.batcher.compactor.ask(sets, blocks)

    @rule(foreign=st.integers(0, 40))
    def other_model(self, foreign: int) -> None:
        self.sets.foreign = foreign

    def teardown(self) -> None:
        if hasattr(self, "witness"):
            self.sets.foreign = 0
            while self.witness.planned:
                self.witness.advance(self.now)
            longest = self.witness.limits.max_model_len
            self.witness.finish(self.now, 50 + (len(self.witness.live) + 1) * (longest + 1) * 4)


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
