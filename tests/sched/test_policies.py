"""What each policy decides, ours apart (test_slack.py).  That none of them loses a request is in test_batching_random.py."""

import pytest

from examples import policy as example
from sched.latency import StepCost
from sched.policies import POLICIES, make_policy, options_of
from sched.policy import Load, Policy, Took
from sched.slack import DEBT_TOKENS, LATE_SHARE
from sched.step import Request
from tests.sched.chosen import COST, LIMITS, build, prompts, small, turn

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


def test_itl_feedback_forgets_a_target_when_its_request_has_gone() -> None:
    policy = make_policy("itl-feedback", small(max_running=100), None)

    def caps(paces: dict[float, int]) -> list[int]:
        found = []
        for second in range(40):
            n = sum(paces.values())
            found.append(policy.cap(Load(0.0, 0.0, 0.0, n, n, 200, (), paces=paces)))
            policy.observe(Took(0.02, 0.0, 0.0, 1, float(second)))
        return found

    assert caps({0.05: 3})[-1] == 40
    assert caps({0.05: 3, 1e-4: 1})[-1] < 5
    assert caps({0.05: 3})[-1] > 30


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
