"""What each policy decides.  That none of them loses a request is in test_batching_random.py."""

import random
from itertools import combinations, permutations

import pytest

from examples import policy as example
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.latency import StepCost
from sched.limits import Limits
from sched.policies import POLICIES, make_policy, options_of
from sched.policy import Load, Policy, Took, pick_shortest
from sched.simulator import Arrival, Replica, Simulation
from sched.slack import DEBT_TOKENS, LATE_SHARE, LOOK, Slack
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


# -- FineServe's rule, on the figures of its own code


def test_saab_sends_what_the_earliest_deadline_allows_and_drops_the_hopeless() -> None:
    b = build("saab")
    prompts(b, (500, 1500, 200, 900, 2600), ttft_s=1.0)
    plan = b.plan(0.0)
    assert plan.shed == (4,), "2,600 tokens at 0.4 ms are late alone"
    assert plan.joins == (0, 2, 3), "1,600 tokens are done in 0.64 s, with the 1,500 in 1.24"
    assert [s.rid for s in b.policy.waiting()] == [1]


def test_saab_goes_over_its_budget_by_one_request() -> None:
    b = build("saab", small(max_step_tokens=1000, max_chunk_tokens=1000))
    prompts(b, (500, 700, 800), ttft_s=10.0)
    b.plan(0.0)
    sent = [s.rid for s in b.policy.waiting()]
    assert sent == [2], "500 and 700 were sent, though they are 1,200"
    assert b.num_running == 2


def test_saab_waits_while_its_batch_is_under_way() -> None:
    b = build("saab", small(max_step_tokens=600, max_chunk_tokens=600))
    prompts(b, (900, 900), ttft_s=10.0)
    first, second = b.plan(0.0), b.plan(0.0)
    assert (first.joins, second.joins) == ((0,), ()), "900 tokens under way are over the 600 of a step"


def test_prism_counts_each_prompts_own_completion() -> None:
    # together they would be late for the first deadline, one after another they are not
    saab, prism = build("saab"), build("prism")
    for b in (saab, prism):
        b.add(Request(rid=0, prompt_tokens=500, max_tokens=4, ttft_s=0.3))
        b.add(Request(rid=1, prompt_tokens=900, max_tokens=4, ttft_s=2.0))
    assert saab.plan(0.0).joins == (0,)
    assert prism.plan(0.0).joins == (0, 1)


# -- the others


@pytest.mark.parametrize(
    ("name", "order"),
    [("fcfs", [0, 1, 2]), ("sjf", [2, 0, 1]), ("lsf", [2, 0, 1]), ("slack", [1, 0, 2])],
)
def test_order(name: str, order: list[int]) -> None:
    limits = small(max_running=1)
    b = build(name, limits)
    for rid, (prompt, ttft) in enumerate(((300, 5.0), (400, 4.0), (100, 6.0))):
        b.add(Request(rid=rid, prompt_tokens=prompt, max_tokens=1, ttft_s=ttft))
    assert [rid for _ in range(3) for rid in turn(b, 0.5).joins] == order


def test_lower_priority_numbers_first_in_every_policy() -> None:
    for name in POLICIES:
        b = build(name, small(max_running=1))
        for rid, priority in enumerate((0, 5, -3)):
            b.add(Request(rid=rid, prompt_tokens=100, max_tokens=1, priority=priority))
        joins = [rid for _ in range(6) for rid in turn(b).joins]
        assert joins == [2, 0, 1], name


def test_sarathi_has_one_chunk_for_decodes_and_prompts() -> None:
    b = build("sarathi", chunk=128)
    b.add(Request(rid=0, prompt_tokens=100, max_tokens=50))
    b.add(Request(rid=1, prompt_tokens=300, max_tokens=50))
    assert [turn(b).num_tokens for _ in range(4)] == [128, 128, 128, 19]


def test_fixed_holds_its_batch() -> None:
    b = build("fixed", batch=3)
    prompts(b, (10,) * 9)
    running = []
    while b.has_work:
        turn(b)
        running.append(b.num_running)
    assert max(running) == 3


def test_itl_feedback_grows_until_steps_are_too_long() -> None:
    cost = StepCost(base_s=1e-3, per_decode_s=1e-3, per_prefill_token_s=1e-6)
    b = build("itl-feedback", cost=cost)
    for rid in range(200):
        b.add(Request(rid=rid, prompt_tokens=4, max_tokens=2000, tpot_s=0.0105))
    now, running = 0.0, []
    for _ in range(400):
        plan = b.plan(now)
        now += plan.seconds
        b.advance(plan, 1, now)
        running.append(len(plan.decode))
    assert max(running) in range(9, 14), "nine decodes take 10 ms"


def test_adbs_follows_its_use() -> None:
    limits = small(max_running=100)
    policy = make_policy("adbs", limits, None)
    caps = []
    for second in range(1, 40):
        policy.observe(Took(0.01, 0.0, 0.0, 100, float(second)))
        caps.append(policy.cap(_load(active=10)))
    assert caps[0] == 50
    assert 10 <= caps[-1] < 15, "used by ten, a twentieth left"


def _load(active: int) -> Load:
    return Load(0.0, 0.0, 0.0, 0, 0, active, ())


# -- ours


def brute_force(prompts: list[int], due: list[int]) -> int:
    """The most jobs that can all be in time."""
    for n in range(len(prompts), 0, -1):
        for some in combinations(range(len(prompts)), n):
            for order in permutations(some):
                done = 0
                for i in order:
                    done += prompts[i]
                    if done > due[i]:
                        break
                else:
                    return n
    return 0


def test_the_most_prompts_that_can_be_in_time() -> None:
    rng = random.Random(5)
    several = 0
    for _ in range(200):
        n = rng.randint(1, 6)
        lengths = [rng.randint(1, 20) for _ in range(n)]
        due = [rng.randint(1, 50) for _ in range(n)]
        order = sorted(range(n), key=lambda i: due[i])
        kept = pick_shortest(lengths, due, order)
        done = 0
        for i in order:
            done += lengths[i] if i in kept else 0
            assert i not in kept or done <= due[i]
        assert len(kept) == brute_force(lengths, due)
        several += 0 < len(kept) < n
    assert several > 50


def attained(b: Batcher, arrivals: list[Request]) -> int:
    replica = Replica("r", "m", ("gpu",), b)
    asked = [
        Arrival(r.arrival_s, r.rid, "m", r.prompt_tokens, r.max_tokens, r.ttft_s, r.tpot_s) for r in arrivals
    ]
    simulation = Simulation([replica], asked)
    simulation.run()
    simulation.check()
    records = simulation.records.values()
    return sum(r.first_s is not None and r.first_s <= r.arrival.at_s + r.arrival.ttft_s for r in records)


def test_in_overload_more_are_in_time_than_by_any_baseline() -> None:
    rng = random.Random(1)
    cost = StepCost(base_s=8e-3, per_decode_s=3e-5, per_prefill_token_s=1.5e-5, per_context_token_s=2e-8)
    at, asked = 0.0, []
    for rid in range(1500):
        at += rng.expovariate(60.0)
        prompt = min(3000, int(rng.lognormvariate(6.5, 1.0)) + 1)
        asked.append(Request(rid=rid, prompt_tokens=prompt, max_tokens=8, arrival_s=at, ttft_s=0.5))
    ours = attained(build("slack", cost=cost), asked)
    shedding = attained(build("slack", cost=cost, shed="hopeless"), asked)
    others = {name: attained(build(name, cost=cost), asked) for name in POLICIES if name != "slack"}
    print(f"{ours=} {shedding=} {others=}")
    assert shedding > max(others.values())
    assert ours > others["fcfs"]


def test_a_late_request_waits_for_a_bounded_number_of_admissions() -> None:
    b = build("slack", small(max_running=1))
    late = 3
    for rid in range(late):
        b.add(Request(rid=rid, prompt_tokens=50, max_tokens=1, ttft_s=0.01, priority=9))
    joined: list[int] = []
    for i in range(100):
        # one in time for each that is admitted, and more urgent by priority: the late ones are never the only choice
        b.add(Request(rid=100 + i, prompt_tokens=50, max_tokens=1, arrival_s=1.0 + i, ttft_s=50.0))
        joined += turn(b, 1.0 + i).joins
    # all prompts are of one length: tokens count as admissions do
    assert [joined.index(rid) for rid in range(late)] == [LATE_SHARE * n - 1 for n in range(1, late + 1)]


def test_a_late_request_is_found_behind_any_number_of_more_urgent_ones() -> None:
    b = build("slack", small(max_running=1))
    b.add(Request(rid=0, prompt_tokens=50, max_tokens=1, ttft_s=5.0, priority=9))
    for rid in range(1, 4 * LOOK):
        b.add(Request(rid=rid, prompt_tokens=50, max_tokens=1, ttft_s=1e3))
    joined: list[int] = []
    for i in range(40):
        # as many in time wait always
        b.add(Request(rid=1000 + i, prompt_tokens=50, max_tokens=1, arrival_s=1.0 * i, ttft_s=1e3))
        joined += turn(b, 1.0 * i).joins
    # late from the step at 6 s on: by then six had been admitted
    assert joined.index(0) == 6 + LATE_SHARE - 1


def test_a_long_prompt_does_not_take_the_short_ones_along() -> None:
    b = build("slack", small(max_step_tokens=500, max_chunk_tokens=500))
    # 2,000 tokens and ten times 200 take 1.6 s
    b.add(Request(rid=0, prompt_tokens=2000, max_tokens=1, ttft_s=1.0))
    for rid in range(1, 11):
        b.add(Request(rid=rid, prompt_tokens=200, max_tokens=1, ttft_s=1.001))
    now, first = 0.0, {}
    while b.has_work:
        plan = b.plan(now)
        now += plan.seconds
        for rid in b.advance(plan, 1, now):
            first[rid] = now
    assert all(first[rid] <= 1.001 for rid in range(1, 11))
    assert first[0] > 1.0, "it would have been in time alone, and ten others late"


def test_the_hopeless_are_shed_only_where_that_is_asked_for() -> None:
    for shed, gone in (("never", ()), ("hopeless", (0,))):
        b = build("slack", shed=shed)
        b.add(Request(rid=0, prompt_tokens=3000, max_tokens=1, ttft_s=1.0))
        b.add(Request(rid=1, prompt_tokens=100, max_tokens=1, ttft_s=1.0))
        plan = turn(b)
        assert plan.shed == gone
        assert plan.joins[0] == 1


def test_admission_stops_where_decodes_would_miss_their_tpot() -> None:
    cost = StepCost(base_s=2e-3, per_decode_s=1e-3, per_prefill_token_s=1e-6)
    b = build("slack", cost=cost)
    for rid in range(50):
        b.add(Request(rid=rid, prompt_tokens=4, max_tokens=2000, tpot_s=0.0125))
    now = 0.0
    for _ in range(100):
        plan = b.plan(now)
        now += plan.seconds
        b.advance(plan, 1, now)
    assert b.num_running in range(10, 52)
    # the first step has no decodes yet, and admits what it has room for


def test_pace_follows_what_steps_take() -> None:
    policy = Slack(LIMITS, COST)
    for _ in range(60):
        policy.observe(Took(0.02, 0.01))
    assert policy.pace == pytest.approx(2.0, abs=0.01)
    once = Slack(LIMITS, COST)
    once.observe(Took(0.02, 0.01, 0.0, 60))
    assert once.pace == pytest.approx(policy.pace, abs=1e-6)


def test_a_mean_over_a_stretch_is_that_of_its_steps() -> None:
    one = 0.02
    for i in range(9):
        one = Took(0.01 + 0.001 * i, 0.01).mean(one, 0.1)
    assert Took(0.014, 0.014, 0.001, 9).mean(0.02, 0.1) == pytest.approx(one, abs=1e-15)


# -- choosing one


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("edf", {}, "policy must be one of slack, fcfs, .*, got 'edf'"),
        ("fcfs", {"batch": 3}, "policy fcfs has no option 'batch'; its options are none"),
        ("fixed", {"batch": 0}, "batch must be at least 1 request, got 0"),
        ("sarathi", {"chunk": 0}, "chunk must be at least 1 token, got 0"),
        ("slack", {"shed": "always"}, "shed must be one of never, hopeless, got 'always'"),
        ("slack", {"debt": -1}, "debt must be 0 tokens or more, got -1"),
        ("slack", {"late_share": 1}, "late_share must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_chosen(name: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_policy(name, LIMITS, COST, options)


def test_options() -> None:
    assert options_of("slack") == {
        "shed": "never",
        "late_share": LATE_SHARE,
        "debt": DEBT_TOKENS,
        "follow": True,
    }
    assert options_of("fcfs") == {}
    assert all(isinstance(make_policy(name, LIMITS, None), Policy) for name in POLICIES)


def test_the_example_is_a_policy_that_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "impatient", example.Impatient)
    assert example.attained("impatient", example.arrivals(20.0, 200)) > 0.9
    b = build("impatient", cost=example.COST, most_s=0.02)
    b.add(Request(rid=0, prompt_tokens=2000, max_tokens=2))
    assert [c.count for c in b.plan(0.0).chunks] == [800], "12 ms beside the 8 of a step"
