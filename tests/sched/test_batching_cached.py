"""The Batcher with a cache: what is found, how it is counted, and who may never read what."""

import random
from collections import Counter

import pytest

from sched.limits import Limits
from tests.sched.content import Content
from tests.sched.witness import Sets

PROMPT = list(range(100, 130))


def build(
    num_sets: int = 40, *, slots: int = 4, P: int = 4, cache: bool = True, reserve: int = 0, **limits: int
) -> Content:
    defaults = {"max_running": 8, "max_step_tokens": 64, "max_chunk_tokens": 32}
    both = defaults | {"max_model_len": 200, "max_waiting": 1000} | limits
    return Content(Sets(num_sets, reserve), slots, P, Limits(**both), cache=cache)


def run(c: Content) -> None:
    while c.batcher.has_work:
        c.step()


def test_the_same_prompt_again_is_found() -> None:
    c = build()
    c.add(0, PROMPT, 3)
    run(c)
    c.add(1, PROMPT, 3)
    plan = c.plan()
    assert plan.joins == (1,)
    assert plan.chunks == ((1, 28, 2, True),), "7 full blocks of 30 tokens"
    assert len(plan.grants[0].blocks) == 8
    c.advance()
    run(c)
    assert c.sequences[0].tokens == c.sequences[1].tokens
    assert (c.queries, c.hits) == (60, 28)


@pytest.mark.parametrize(("length", "hit"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (16, 12)])
def test_the_last_token_is_always_computed(length: int, hit: int) -> None:
    c = build()
    for rid in (0, 1):
        c.add(rid, PROMPT[:length], 1)
        run(c)
    assert c.sequences[1].hit == hit


def test_salts_share_nothing() -> None:
    c = build()
    for rid, salt in enumerate(("a", "b", "", "a")):
        c.add(rid, PROMPT, 2, salt=salt)
        run(c)
    assert [c.sequences[rid].hit for rid in range(4)] == [0, 0, 0, 28]


def test_one_that_does_not_read_the_cache_fills_it() -> None:
    c = build()
    c.add(0, PROMPT, 2)
    run(c)
    c.add(1, PROMPT, 2, reads=False)
    plan = c.plan()
    assert plan.chunks[0].start == 0
    c.advance()
    run(c)
    assert (c.queries, c.hits) == (30, 0)
    c.add(2, list(reversed(PROMPT)), 2, reads=False)
    run(c)
    c.add(3, list(reversed(PROMPT)), 2)
    run(c)
    assert c.sequences[3].hit == 28


def test_answers_are_found_as_the_next_turn_of_a_conversation() -> None:
    c = build()
    first = c.add(0, PROMPT, 20)
    run(c)
    # 50 tokens, of which the last was never computed
    c.add(1, [*first.tokens, 1, 2, 3], 2)
    run(c)
    assert c.sequences[1].hit == 48


def test_a_prompt_under_way_is_found_as_far_as_it_is_planned() -> None:
    c = build(max_chunk_tokens=10, max_step_tokens=40)
    c.add(0, PROMPT, 2)
    assert c.plan().chunks == ((0, 0, 10, False),)
    c.add(1, PROMPT, 2)
    # request 0 goes on first, and what it writes in this step may be read in it
    assert c.plan().chunks == ((0, 10, 10, False), (1, 20, 10, True))
    while c.flights:
        c.advance()
    run(c)
    assert c.sequences[0].tokens == c.sequences[1].tokens


def test_a_batch_with_one_beginning_computes_it_once() -> None:
    c = build(max_step_tokens=80, max_chunk_tokens=80)
    for rid in range(6):
        c.add(rid, [*PROMPT, rid], 2)
    plan = c.plan()
    assert [chunk.start for chunk in plan.chunks] == [0, 28, 28, 28, 28, 28]
    c.advance()
    run(c)
    assert c.hits == 5 * 28


def test_an_aborted_request_leaves_what_it_computed() -> None:
    c = build(max_chunk_tokens=16)
    c.add(0, PROMPT, 9)
    c.plan()
    c.abort(0)
    c.add(1, PROMPT, 2)
    assert c.plan().chunks[0].start == 16, "the step that writes it is under way"
    while c.flights:
        c.advance()
    c.finish()


def test_a_preempted_request_finds_its_own_blocks() -> None:
    c = build(num_sets=5, slots=1, max_model_len=20)
    c.add(0, [1] * 7, 9)
    c.add(1, [2] * 7, 9)
    starts = []
    while c.batcher.has_work:
        plan = c.step()
        starts += [(chunk.rid, chunk.start) for chunk in plan.chunks]
    assert c.batcher.num_preemptions == 1
    assert starts[:2] == [(0, 0), (1, 0)]
    assert starts[2][0] == 1
    assert starts[2][1] >= 4, "its first block was idle, and nobody needed it"
    c.finish()


def test_running_ones_take_idle_blocks_and_nobody_is_preempted() -> None:
    c = build(num_sets=10, slots=1)
    c.add(0, list(range(30)), 1)
    run(c)
    assert c.pool.num_idle == 7
    c.add(1, [5] * 8, 12)
    c.add(2, [6] * 8, 12)
    run(c)
    assert c.batcher.num_preemptions == 0
    assert c.pool.num_evicted == 7, "10 blocks are needed, and 3 were to be had without"


def test_admission_counts_idle_blocks_as_room() -> None:
    c = build(num_sets=8, slots=1)
    c.add(0, list(range(32)), 1)
    run(c)
    c.add(1, [7] * 29, 1)
    assert c.step().chunks == ((1, 0, 29, True),)
    c.finish()


def test_hits_are_not_evicted_for_the_rest_of_the_same_request() -> None:
    c = build(num_sets=8, slots=1)
    c.add(0, PROMPT[:17], 1)  # 4 full blocks, the oldest in the cache
    run(c)
    c.add(1, list(range(8)), 1)
    run(c)
    c.add(2, [*PROMPT[:16], *range(200, 216)], 1)
    plan = c.plan()
    assert plan.chunks == ((2, 16, 16, True),)
    c.advance()
    c.finish()


def test_a_refused_one_gives_its_hits_back() -> None:
    sets = Sets(8)
    c = Content(
        sets,
        1,
        4,
        Limits(max_running=4, max_step_tokens=64, max_chunk_tokens=64, max_model_len=64, max_waiting=9),
    )
    c.add(0, PROMPT[:17], 1)
    run(c)
    c.add(1, [3] * 16, 15)
    c.step()
    c.add(2, [*PROMPT[:16], *range(200, 216)], 1)
    c.step()
    assert c.batcher.num_waiting == 1
    assert c.pool.num_live == 5
    c.finish()
    assert c.sequences[2].ended == "end"


def test_a_failed_step_takes_its_readers_along_and_nobody_else() -> None:
    c = build(max_chunk_tokens=16, max_step_tokens=64)
    c.add(9, [8] * 5, 9)
    c.step()
    c.add(0, PROMPT, 4)
    c.plan(fails=True)  # writes 16 tokens of the prompt, in vain
    c.add(1, PROMPT, 4)  # finds them
    c.add(2, [4] * 9, 4)
    c.plan()
    assert c.sequences[1].hit == 28
    assert sorted(c.advance()) == [0, 1, 9]
    assert c.pool.match(c.sequences[0].request.keys) == []
    c.advance()
    c.finish()
    assert c.sequences[2].ended == "end"
    assert c.spoiled == 1


def longest_known(known: set[tuple[str, tuple[int, ...]]], salt: str, prompt: list[int], P: int) -> int:
    n = 0
    while (n + 1) * P < len(prompt) and (salt, tuple(prompt[: (n + 1) * P])) in known:
        n += 1
    return n * P


@pytest.mark.parametrize("runs", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_hits_are_exact_while_nothing_is_evicted(runs: int) -> None:
    """Against a list of all beginnings that have been computed: neither a hit too few nor one too many."""
    rng = random.Random(3)
    for _ in range(runs):
        P = rng.choice((1, 2, 4, 8))
        c = build(num_sets=4000, slots=8, P=P, max_running=64, max_step_tokens=400, max_chunk_tokens=400)
        known: set[tuple[str, tuple[int, ...]]] = set()
        queries = hits = 0
        for rid in range(25):
            salt = rng.choice(("", "x"))
            base = rng.choice(list(c.sequences.values())).tokens if rid and rng.random() < 0.7 else []
            prompt = [
                *base[: rng.randint(0, len(base))],
                *(rng.randrange(3) for _ in range(rng.randint(1, 20))),
            ]
            expected = longest_known(known, salt, prompt, P)
            seq = c.add(rid, prompt, rng.randint(1, 12), salt=salt)
            run(c)
            assert seq.hit == expected, f"{rid=} {P=} {len(prompt)=}"
            queries, hits = queries + len(prompt), hits + expected
            # of its last tokens the last is not computed, and a block that the last step fills is not counted
            last = len(seq.tokens) - 2 if seq.request.max_tokens > 1 else len(prompt)
            known |= {(salt, tuple(seq.tokens[:n])) for n in range(P, last + 1, P)}
        assert (c.queries, c.hits) == (queries, hits)
        assert c.pool.num_evicted == 0


def random_run(seed: int, turns: int = 120) -> Counter[str]:
    """Few tokens, so that beginnings are often the same; a tiny pool; plans ahead; aborts, stops and failing steps."""
    rng = random.Random(seed)
    P, slots, max_len = rng.choice((1, 2, 4, 8)), rng.randint(1, 6), rng.randint(12, 60)
    longest = -(-max_len // (P * slots))
    sets = Sets(rng.randint(longest, 4 * longest), reserve=rng.choice((0, 0, longest)))
    most = rng.randint(1, 8)
    limits = Limits(
        max_running=most,
        max_step_tokens=most + rng.randint(0, 60),
        max_chunk_tokens=rng.randint(1, 70),
        max_model_len=max_len,
        max_waiting=1000,
    )
    c = Content(sets, slots, P, limits, cache=rng.random() < 0.95)
    depth, p_fail, p_stop = rng.choice((1, 2, 2)), rng.choice((0, 0.06)), rng.choice((0, 0.05))
    prompts: list[list[int]] = [[]]
    for _ in range(turns):
        if rng.random() < 0.5:
            base = rng.choice(prompts)
            prompt = [
                *base[: rng.randint(0, len(base))],
                *(rng.randrange(3) for _ in range(rng.randint(1, 30))),
            ]
            prompt = prompt[: max_len - 1]
            prompts.append(prompt)
            most_new = rng.randint(1, max_len - len(prompt))
            salt, reads = rng.choice(("", "", "s")), rng.random() < 0.9
            c.add(len(c.sequences), prompt, most_new, salt=salt, reads=reads)
        if rng.random() < 0.08 and c.sequences:
            c.abort(rng.choice(list(c.sequences)))
        if rng.random() < 0.1:
            sets.foreign = rng.randint(0, sets.num_sets)
        if rng.random() < 0.05:
            c.pool.give_up(rng.randint(1, 3))
        if rng.random() < 0.3:
            c.batcher.compactor.ask(rng.randint(1, 3), rng.randint(0, 20))
        while len(c.flights) < depth:
            plan = c.plan(fails=rng.random() < p_fail)
            if plan.empty:
                break
            if c.flights[-1].fails and plan.chunks:  # somebody who will find what this step should write
                like = c.sequences[plan.chunks[0].rid]
                c.add(len(c.sequences), like.tokens[: like.request.prompt_tokens], 1, salt=like.salt)
        if c.flights:
            c.advance(p_stop, rng)
    sets.foreign = 0
    preempted, evicted = c.batcher.num_preemptions, c.pool.num_evicted
    c.finish()
    seen = Counter(s.ended for s in c.sequences.values())
    seen.update(moved=c.moved, hits=c.hits, preempted=preempted, evicted=evicted, spoiled=c.spoiled)
    return seen


@pytest.mark.parametrize("seeds", [24, pytest.param(120, marks=pytest.mark.slow)])
def test_nobody_reads_what_was_not_written_for_his_tokens(seeds: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(seeds):
        try:
            seen += random_run(seed)
        except AssertionError as e:
            e.add_note(f"random_run({seed})")
            raise
    # of 60 runs
    least = {
        "end": 800,
        "abort": 90,
        "failed": 40,
        "hits": 6000,
        "preempted": 60,
        "evicted": 800,
        "spoiled": 2,
        "moved": 500,
    }
    assert all(seen[what] >= n * seeds / 60 for what, n in least.items()), (
        f"the runs did not visit what they are for: {seen}"
    )


@pytest.mark.slow
def test_nobody_reads_what_was_not_written_for_his_tokens_in_many_runs() -> None:
    for seed in range(1000, 4000):
        random_run(seed)
