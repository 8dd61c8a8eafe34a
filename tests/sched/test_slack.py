"""What our policy decides: who is in time, who is late, how long a step may be, and whose pace is kept."""

import random
from itertools import combinations, permutations

import pytest

from sched.batching import Batcher
from sched.latency import StepCost
from sched.policies import POLICIES
from sched.policy import Load, Took, pick_shortest
from sched.sequence import Seq
from sched.simulated_replica import Arrival, Replica
from sched.simulator import Simulation
from sched.slack import LATE_SHARE, LOOK, Slack
from sched.step import Request
from tests.sched.chosen import COST, LIMITS, build, small, turn


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


@pytest.mark.parametrize("tpot_s", [1e-4, 0.0105, 0.012])
def test_one_request_whose_pace_allows_no_batch_does_not_shut_the_others_out(tpot_s: float) -> None:
    """A lone decode takes 10.2 ms: 10.5 and 12 ms can be kept, by a batch of one or of ten."""
    cost = StepCost(base_s=0.01, per_prefill_token_s=2e-5, per_decode_s=2e-4, per_context_token_s=1e-8)
    rng, t, asked = random.Random(1), 0.0, []
    while t < 20:
        t += rng.expovariate(20.0)
        asked.append(
            Request(rid=len(asked), prompt_tokens=200, max_tokens=100, arrival_s=t, ttft_s=1.0, tpot_s=0.06)
        )
    strict = Request(rid=10_000, prompt_tokens=10, max_tokens=700, ttft_s=3600.0, tpot_s=tpot_s)
    honest = attained(build("slack", small(max_running=256), cost=cost), asked)
    beside = attained(build("slack", small(max_running=256), cost=cost), [strict, *asked])
    assert beside >= 0.95 * honest > 0.9 * len(asked)


def test_a_pace_is_kept_for_many_and_given_up_for_one() -> None:
    cost = StepCost(base_s=0.01, per_decode_s=1e-3)
    policy = Slack(LIMITS, cost)
    for rid in range(6):
        policy.push(Seq(Request(rid=rid, prompt_tokens=9, max_tokens=9, tpot_s=1.0), rid))

    def kept(paces: dict[float, int], strictest: float = 0.0) -> float:
        n = sum(paces.values())
        return policy._kept(Load(0.0, 0.0, 0.0, n, n, n, (), tpot_s=strictest or min(paces), paces=paces))

    # 15 ms are five decodes, a second is all that may run
    assert kept({0.015: 1}) == 1.0, "six would be turned away for one"
    assert kept({0.015: 7}) == 0.015, "seven have it"
    assert kept({0.015: 1, 0.02: 7}) == 0.02
    assert kept({0.015: 7, 0.02: 1}, strictest=0.02) == 1.0, "the seven are lost already"
    assert kept({1.0: 3}) == 1.0


def test_an_important_request_is_not_left_out_for_many_others() -> None:
    for name in ("slack", "fcfs", "sjf"):
        b = build(name, small(max_running=64))
        b.add(Request(rid=0, prompt_tokens=2000, max_tokens=50, ttft_s=1.0, priority=-10))
        for rid in range(1, 6):
            b.add(Request(rid=rid, prompt_tokens=300, max_tokens=50, ttft_s=1.0, priority=10))
        now, first = 0.0, {}
        while len(first) < 6:
            plan = b.plan(now)
            now += plan.seconds
            first |= {c.rid: now for c in plan.chunks if c.samples}
            b.advance(plan, 1, now)
        # alone it takes 0.8 s, and the five together 0.6
        assert first[0] == min(first.values()) < 1.0, name


def test_a_late_request_goes_before_less_important_ones_in_time() -> None:
    b = build("slack", small(max_running=1))
    b.add(Request(rid=0, prompt_tokens=50, max_tokens=1, ttft_s=0.001, priority=-1))
    for rid in range(1, 20):
        b.add(Request(rid=rid, prompt_tokens=50, max_tokens=1, ttft_s=1e3, priority=1))
    assert turn(b).joins == (0,)


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
