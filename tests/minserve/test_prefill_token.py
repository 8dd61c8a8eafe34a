"""The prefill token: one model's prompts at a time, whoever dies or stops; the decodes of all go on."""

import random
from collections.abc import Iterator

import pytest

from minserve.prefill_token import PrefillToken, prefill_token, turn_off
from minserve.slab_table import SlabTable
from sched.batching import Batcher
from sched.blocks import BlockPool
from sched.limits import Limits
from sched.prefill_turn import CHANCE_S, LEASE_S, NS, next_due_s, wants_prefill
from sched.slabs import PoolPlan
from sched.slack import MIN_PREFILL_TOKENS
from sched.step import Request
from tests.minserve.small_table import PLAN
from tests.sched.small import Sets

INFINITY = float("inf")


class Side:
    """One model's token on the test's clock; a step without prompts takes 10 ms, each token of a prompt 0.1 ms."""

    def __init__(self, table: SlabTable, owner: int, clock: list[float]) -> None:
        self.table, self.owner, self.clock = table, owner, clock
        self.wants, self.due_s = True, INFINITY
        self.token = PrefillToken(
            table, owner, lambda: self.wants, lambda: self.due_s, lambda: int(clock[0] * NS)
        )
        self.said()

    def said(self) -> None:
        self.table.publish(self.owner, heartbeat_ns=int(self.clock[0] * NS), step_us=10_000)

    def plan(self, most: int = 1000) -> int:
        self.said()
        cap = self.token.cap()
        tokens = min(most, most if cap is None else cap) if self.wants else 0
        self.token.planned(tokens, True)
        return tokens

    def land(self, tokens: int) -> None:
        self.clock[0] += 0.01 + tokens * 1e-4
        self.token.landed()
        self.said()

    def step(self, most: int = 1000) -> int:
        tokens = self.plan(most)
        self.land(tokens)
        return tokens

    def status(self, name: str) -> int:
        return self.table.status(self.owner)[name]


@pytest.fixture
def clock() -> list[float]:
    return [1000.0]


@pytest.fixture
def sides(clock: list[float]) -> Iterator[list[Side]]:
    table = SlabTable.create(PLAN)
    yield [Side(table, owner, clock) for owner in range(3)]
    table.close()


def test_one_has_it_until_another_waits_then_they_take_turns(sides: list[Side]) -> None:
    a, b, c = sides
    assert [a.step() for _ in range(3)] == [1000] * 3, "nobody waits: it keeps it"
    tokens = a.plan()
    assert (b.step(), c.step()) == (0, 0), "decodes, no chunk"
    a.land(tokens)
    assert a.step() == 0, "its turn is over"
    assert (c.plan(), b.plan()) == (0, 1000), "the eldest waiter is next"
    b.land(1000)
    c.token.landed()
    order = []
    for _ in range(12):
        for side in (a, b, c):
            if side.step():
                order.append(side.owner)
    counts = [order.count(owner) for owner in range(3)]
    assert max(counts) - min(counts) <= 1, counts
    assert min(counts) >= 4, "of 12 rounds"
    assert b.status("prefill_waits") > 0
    assert b.status("prefill_wait_us") > 0
    assert sum(side.status("prefill_takeovers") for side in sides) == 0


def test_steps_that_overlap_hand_over_when_their_chunks_have_landed(sides: list[Side]) -> None:
    a, b, _ = sides
    first = a.plan()
    second = a.plan()
    assert (first, second) == (1000, 1000)
    assert b.step() == 0
    assert a.plan() == 0, "somebody waits: no third chunk behind the two under way"
    a.land(first)
    assert b.step() == 0, "the second is still under way"
    a.land(second)
    assert b.step() == 1000


@pytest.mark.parametrize("how", ["stopped", "buried", "came back"])
def test_a_holder_that_is_gone_loses_it(sides: list[Side], clock: list[float], how: str) -> None:
    a, b, _ = sides
    a.plan()
    assert b.step() == 0
    if how == "buried":
        b.table.reclaim(a.owner)
        assert b.step() == 1000, "a row without a sign of life is nobody's"
    else:
        clock[0] += LEASE_S / 2
        assert b.step() == 0
        clock[0] += LEASE_S / 2
        assert b.step() == 1000
    assert b.status("prefill_takeovers") == 1
    if how == "came back":
        tokens = b.plan()
        a.token.landed()
        assert a.step() == 0, "what it had is not its own any more"
        b.land(tokens)
        clock[0] += 0.001
        assert a.step() == 1000


def test_a_new_life_of_the_holder_starts_with_nothing(sides: list[Side], clock: list[float]) -> None:
    a, b, _ = sides
    a.plan()
    again = Side(a.table, a.owner, clock)
    assert b.step() == 1000, "what the dead life had was given back by the new one"
    again.wants = False
    again.step()


def test_a_long_chunk_is_not_taken_for_a_death(sides: list[Side], clock: list[float]) -> None:
    a, b, _ = sides
    for _ in range(5):
        a.step(10_000)  # a second each
    a.plan(10_000)
    b.step()
    clock[0] += 2 * LEASE_S
    assert b.step() == 0
    clock[0] += 4 * LEASE_S
    assert b.step() == 1000


def test_who_does_not_take_its_chance_is_passed_over_and_who_waits_longest_is_not_forgotten(
    sides: list[Side], clock: list[float]
) -> None:
    a, b, c = sides
    tokens = a.plan()
    b.step()  # the eldest waiter, which then does not look for a while
    c.step()
    a.land(tokens)
    assert c.step() == 0, "b may still come"
    clock[0] += CHANCE_S + 0.03
    assert c.plan() == 1000
    assert b.step() == 0
    c.land(1000)
    assert b.step() == 1000


def test_chunks_leave_every_model_its_slack(sides: list[Side], clock: list[float]) -> None:
    a, b, c = sides
    a.wants = False
    a.step()  # what its decodes alone take
    a.wants = True
    assert [a.step() for _ in range(20)][-1] == 1000, "nobody decodes: no limit"
    b.wants = c.wants = False
    for slack_s, tokens in ((0.06, 500), (0.03, 200)):
        b.due_s = clock[0] + slack_s
        b.plan()
        planned = a.plan()
        assert planned == pytest.approx(tokens, rel=0.05), "0.1 ms a token, and b's own step takes 10 ms"
        a.land(planned)
    c.due_s, b.due_s = clock[0] + 0.02, clock[0] + 5
    for side in (b, c):
        side.plan()
    assert a.step() == pytest.approx(100, rel=0.1), "the tightest of all counts"


def test_with_no_slack_left_half_of_the_time_is_the_decodes(sides: list[Side], clock: list[float]) -> None:
    a, b, _ = sides
    for _ in range(20):
        a.step()
    b.wants, b.due_s = False, clock[0] - 0.5
    b.token.cap()
    taken = []
    for _ in range(40):
        b.due_s = clock[0] - 0.5
        b.token.cap()
        b.said()
        taken.append(a.step())
    assert set(taken) == {0, MIN_PREFILL_TOKENS}
    assert taken.count(MIN_PREFILL_TOKENS) in range(10, 21), "it is slowed, and not starved"
    b.due_s = clock[0] - 60
    b.token.cap()
    assert a.step() == 1000, "what is hopelessly late is not made up for by anybody's waiting"
    clock[0] += 5
    b.due_s = INFINITY
    assert a.step() == 1000


def test_what_a_model_said_before_it_fell_silent_binds_nobody(sides: list[Side], clock: list[float]) -> None:
    a, b, _ = sides
    for _ in range(20):
        a.step()
    b.wants = False
    for later_s, silent in ((1.9, False), (2.1, True)):
        b.due_s = clock[0] + later_s + 0.05
        b.plan()
        clock[0] += later_s
        assert (a.step() == 1000) == silent
    b.due_s = clock[0] + 0.05
    b.plan()
    b.token.idle()
    assert a.step() == 1000, "idle, it has nothing that is due"


def test_who_gets_no_memory_lets_the_others(sides: list[Side]) -> None:
    a, b, _ = sides
    assert a.step(0) == 0, "it has the token and nothing that could be admitted"
    assert b.step() == 0
    assert a.step(0) == 0
    assert b.step() == 1000


def test_random_turns_never_overlap(clock: list[float]) -> None:
    """Any order of plans and landings: never two models with chunks under way, and nobody is starved."""
    rng = random.Random(11)
    table = SlabTable.create(PLAN)
    sides = [Side(table, owner, clock) for owner in range(3)]
    flights: dict[int, list[int]] = {0: [], 1: [], 2: []}
    done = [0, 0, 0]
    for _ in range(3000):
        side = rng.choice(sides)
        mine = flights[side.owner]
        if mine and (len(mine) == 2 or rng.random() < 0.5):
            side.land(mine.pop(0))
        else:
            side.wants = rng.random() < 0.9
            mine.append(side.plan(rng.randint(1, 300)))
            done[side.owner] += mine[-1] > 0
        clock[0] += rng.random() * 0.002
        assert sum(any(f) for f in flights.values()) <= 1, flights
    assert min(done) > 0.2 * sum(done), done
    table.close()


# ---- the Batcher's side


def batcher() -> Batcher:
    limits = Limits(max_running=4, max_step_tokens=64, max_chunk_tokens=64, max_model_len=256, max_waiting=99)
    return Batcher(BlockPool(Sets(8), 16, 16), limits)


def test_a_plan_has_no_more_prompt_tokens_than_it_may_and_decodes_all_the_same() -> None:
    b = batcher()
    assert not wants_prefill(b)
    b.add(Request(rid=1, prompt_tokens=20, max_tokens=50, arrival_s=0.0, tpot_s=0.5))
    assert wants_prefill(b)
    assert next_due_s(b) == INFINITY
    plan = b.plan(0.0, 0)
    assert plan.empty
    plan = b.plan(0.0, 8)
    assert [c.count for c in plan.chunks] == [8]
    b.advance(plan, 1, 1.0)
    b.advance(b.plan(1.0), 1, 2.0)
    assert not wants_prefill(b)
    assert next_due_s(b) == 2.5, "the first token came at 2.0, then one every half second"
    b.add(Request(rid=2, prompt_tokens=20, max_tokens=5))
    plan = b.plan(2.0, 0)
    assert (plan.decode, plan.chunks) == ((1,), ())
    b.advance(plan, 1, 2.1)
    assert next_due_s(b) == 3.0
    b.check()


def test_who_cannot_admit_anybody_does_not_want_the_token() -> None:
    b = batcher()
    for rid in range(5):
        b.add(Request(rid=rid, prompt_tokens=8, max_tokens=50))
    plan = b.plan(0.0)
    b.advance(plan, 1, 0.1)
    assert b.num_waiting == 1
    assert not wants_prefill(b), "four run, no more may"


def test_a_model_alone_or_with_the_token_off_has_none() -> None:
    alone = SlabTable.create(PoolPlan(4096, 24, {"deep": PLAN.models["deep"]}, 0))
    assert prefill_token(alone, 0, batcher()) is None
    table = SlabTable.create(PLAN)
    assert prefill_token(table, 0, batcher()) is not None
    turn_off(table)
    assert prefill_token(table, 0, batcher()) is None
    alone.close()
    table.close()
