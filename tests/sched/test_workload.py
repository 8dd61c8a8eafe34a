"""Workloads: the same bytes for the same seed, laws that hold in the mean, changes that lose no request, a file that says what is wrong."""

import dataclasses
import hashlib
import itertools
import json
from typing import Any

import numpy as np
import pytest

from sched.arrivals import GroupBursts, Rows, consecutive, lognormal, popularity, renewal
from sched.metrics import Slo
from sched.synthetic import Laws, Lengths, Model, power_law, replayed, synthetic
from sched.workload import (
    Request,
    Workload,
    cut,
    described,
    from_lines,
    merged,
    ordered,
    rescaled,
    split,
    to_lines,
    token_ids,
)

MODELS = [Model("a", 3.0, slo=Slo(1.0, 0.1)), Model("b", 1.0, Lengths(100, 20, max_len=400)), Model("c", 0.5)]
EVERYTHING = Laws(cv=2.0, groups=2, prefix_share=0.4, prefixes=3, prefix_tokens=64, turns=2.0)


def drawn(seed: int = 0, laws: Laws = EVERYTHING, models: list[Model] = MODELS) -> Workload:
    return synthetic(models, laws, seconds=300.0, seed=seed)


def test_the_same_seed_is_the_same_bytes() -> None:
    digests = [hashlib.sha256("\n".join(to_lines(drawn(s))).encode()).hexdigest() for s in (7, 7, 8)]
    assert digests[0] == digests[1] != digests[2]


def test_the_file_gives_back_what_was_written() -> None:
    workload = drawn()
    assert from_lines(to_lines(workload)) == workload
    assert [r.rid for r in workload.requests] == list(range(len(workload.requests)))
    assert "req/s" in described(workload)


def test_another_models_rate_moves_nothing() -> None:
    def of_b(workload: Workload) -> list[tuple[float, int, int]]:
        return [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in workload.requests if r.model == "b"]

    other = [dataclasses.replace(MODELS[0], rate=9.0), *MODELS[1:]]
    assert of_b(drawn()) == of_b(drawn(models=other))


@pytest.mark.parametrize("cv", [0.3, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_spread_that_were_asked(cv: float) -> None:
    gaps = np.diff(renewal(np.random.default_rng(1), 20.0, cv, 10_000.0))
    assert gaps.mean() == pytest.approx(0.05, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_lengths_have_the_mean_and_the_median_that_were_asked() -> None:
    found = lognormal(np.random.default_rng(2), 100_000, 129, 211)
    assert np.median(found) == pytest.approx(129, rel=0.02)
    assert found.mean() == pytest.approx(211, rel=0.02)


@pytest.mark.parametrize(("alpha", "top"), [(0.7, 0.28), (1.3, 0.46), (2.1, 0.68)])
def test_the_top_of_eight_models_has_the_share_of_the_power_law(alpha: float, top: float) -> None:
    rates = power_law([f"m{i}" for i in range(8)], 10.0, alpha, seed=5)
    assert sum(rates.values()) == pytest.approx(10)
    assert max(rates.values()) / 10 == pytest.approx(top, abs=0.005)
    tops = {int(np.argmax(popularity(np.random.default_rng(s), 8, alpha))) for s in range(30)}
    assert len(tops) > 4, "the order is not shuffled"


@pytest.mark.parametrize("quiet", [0.0, 0.1])
def test_bursts_keep_the_mean_and_move_groups_together(quiet: float) -> None:
    rng = np.random.default_rng(3)
    bursts = GroupBursts(rng, 5, groups=2, on_s=30.0, quiet=quiet, seconds=605.0)
    assert sorted(np.bincount(bursts.group)) == [2, 3]
    for model in range(5):
        plain = renewal(rng, 50.0, 1.0, 605.0)
        times = bursts.warp(plain, model)
        assert len(times) == len(plain)
        assert (np.diff(times) >= 0).all()
        assert 0 <= times[0] <= times[-1] <= 605.0
        on = bursts.active[np.minimum(times // 30, len(bursts.active) - 1).astype(int)] == bursts.group[model]
        # of the slots, half are on: the rate there is 1 / quiet times the other
        assert on.mean() == pytest.approx(1 / (1 + quiet), abs=0.02)


def test_sessions_repeat_what_was_said_and_prefixes_are_shared() -> None:
    workload = drawn()
    by_session: dict[int, list[Request]] = {}
    for r in workload.requests:
        by_session.setdefault(r.session, []).append(r)
    assert max(map(len, by_session.values())) > 3
    ids = {r.rid: token_ids(r, workload.seed, 5, 1000) for r in workload.requests}
    for turns in by_session.values():
        assert [r.turn for r in turns] == list(range(len(turns)))
        assert len({r.model for r in turns}) == 1
        for before, after in itertools.pairwise(turns):
            assert after.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert (ids[after.rid][: before.prompt_tokens] == ids[before.rid]).all()
    firsts = [r for r in workload.requests if r.turn == 0]
    shared = [r for r in firsts if r.prefix >= 0]
    assert len(shared) / len(firsts) == pytest.approx(0.4, abs=0.06)
    heads = {r.prefix: tuple(ids[r.rid][:64]) for r in shared}
    assert sorted(heads) == [0, 1, 2]
    assert len(set(heads.values())) == 3
    assert all(tuple(ids[r.rid][:64]) == heads[r.prefix] for r in shared)
    alone = [tuple(ids[r.rid][:8]) for r in firsts if r.prefix < 0 and r.prompt_tokens >= 8]
    assert len(set(alone)) == len(alone), "two prompts that share nothing begin alike"
    for r in workload.requests:
        assert len(ids[r.rid]) == r.prompt_tokens
        assert r.prompt_tokens + r.output_tokens <= (400 if r.model == "b" else 1 << 24)


def contents(workload: Workload) -> list[tuple[Any, ...]]:
    """What is sent, without the numbers that only keep order."""
    return sorted(
        (r.model, r.arrival_s, r.output_tokens, token_ids(r, workload.seed, 0, 99).tobytes())
        for r in workload.requests
    )


def test_parts_come_together_as_they_were() -> None:
    workload = drawn()
    parts = split(workload)
    assert list(parts) == ["a", "b", "c"]
    assert all(p.models == [name] for name, p in parts.items())
    whole = merged(list(parts.values()))
    assert contents(whole) == contents(workload)
    assert (whole.slos, whole.duration_s) == (workload.slos, workload.duration_s)


def test_two_seeds_merged_share_no_session() -> None:
    one, two = drawn(1), drawn(2)
    both = merged([one, two])
    assert len(both.requests) == len(one.requests) + len(two.requests)
    sessions = len({r.session for r in one.requests}) + len({r.session for r in two.requests})
    assert len({r.session for r in both.requests}) == sessions
    assert [r.arrival_s for r in both.requests] == sorted(r.arrival_s for r in both.requests)
    loose = dataclasses.replace(two, slos={"a": Slo(9.0, 9.0)})
    with pytest.raises(ValueError, match="the SLO of a must be the same"):
        merged([one, loose])


def test_rescaled_and_cut() -> None:
    workload = drawn()
    twice = rescaled(workload, 2.0)
    assert twice.duration_s == 150.0
    assert twice.rates() == pytest.approx({m: 2 * r for m, r in workload.rates().items()})
    early, late = cut(workload, 0.0, 100.0), cut(workload, 100.0, 300.0)
    assert len(early.requests) + len(late.requests) == len(workload.requests)
    assert late.requests[0].arrival_s < 5.0
    assert early.info["made"] == ["cut 0 to 100 s"]
    for wrong in (0, 1e300, 1e-8, float("nan")):
        with pytest.raises(ValueError, match=r"> 0 and turn the 300 s into 0.001 to 1e\+09 s, got"):
            rescaled(workload, wrong)
    with pytest.raises(ValueError, match="0 <= start < end <= 300 s, got 100 to 301"):
        cut(workload, 100, 301)


def test_a_source_keeps_its_times_and_its_models() -> None:
    rows = Rows(np.array([10, 900, 30, 40]), np.array([1, 200, 3, 4]), np.array([0.0, 1.0, 1.0, 3.0]), ("x", "y", "x", "x"), ("", "s", "t", "t"))  # fmt: skip
    models = [Model("a", 1.0), Model("b", 1.0, Lengths(max_len=400))]
    found = replayed(rows, models, {"x": "a", "y": "b"}, seed=0)
    assert [(r.model, r.arrival_s, r.prompt_tokens, r.output_tokens, r.turn) for r in found.requests] == [
        ("a", 0.0, 10, 1, 0), ("b", 1.0, 300, 100, 0), ("a", 1.0, 30, 3, 0), ("a", 3.0, 40, 4, 1),
    ]  # fmt: skip
    assert found.duration_s == 4.0
    assert found.requests[2].session == found.requests[3].session
    with pytest.raises(ValueError, match="got none for y"):
        replayed(rows, models, {"x": "a"}, seed=0)


def test_rows_are_drawn_in_pairs_and_from_a_row_on() -> None:
    rows = Rows(np.arange(1, 51), np.arange(1, 51) * 2)
    prompts, outputs = Lengths(rows=rows).draw(np.random.default_rng(0), 1000)
    assert (outputs == 2 * prompts).all()
    assert len(set(prompts.tolist())) == 50
    assert (np.diff(consecutive(np.random.default_rng(0), 50, 200)) % 50 == 1).all()


GOOD = {"model": "m", "arrival_s": 1.0, "prompt_tokens": 3, "output_tokens": 2, "rid": 0}
HEAD = {"minserve_workload": 1, "requests": 1, "duration_s": 9.0, "seed": 0, "slos": {}, "info": {}}


@pytest.mark.parametrize(
    ("head", "row", "says"),
    [
        ({"minserve_workload": 2}, {}, r"line 1: minserve_workload must be 1, .*, got 2"),
        ({"requests": 2}, {}, r"line 1: requests must be 1, as many as follow, got 2"),
        ({"duration_s": 0}, {}, r"line 1: duration_s must be seconds > 0 and at most 1e\+09, got 0"),
        (
            {"duration_s": 1e308},
            {},
            r"line 1: duration_s must be seconds > 0 and at most 1e\+09, got 1e\+308",
        ),
        ({"seed": 1.5}, {}, r"line 1: seed must be an integer"),
        ({"info": 3}, {}, r"line 1: info must be an object"),
        ({"slos": {"m": {"ttft_s": 1}}}, {}, r"line 1: slos.m must have ttft_s and tpot_s"),
        (
            {"slos": {"m": {"ttft_s": 1, "tpot_s": -1}}},
            {},
            r"line 1: slos.m: tpot_s must be seconds >= 0 and at most 1e\+09, got -1",
        ),
        (
            {"slos": {"m": {"ttft_s": 1e10, "tpot_s": 1}}},
            {},
            r"slos.m: ttft_s must be seconds .*, got 10000000000.0",
        ),
        (
            {"slos": {"m": {"ttft_s": 1, "tpot_s": 1, "ttft_per_token_s": 1e4}}},
            {},
            r"line 1: slos.m: ttft_per_token_s must be seconds >= 0 and at most 1000, got 10000.0",
        ),
        ({"slos": {"m": {"ttft": 1}}}, {}, r"line 1: slos.m must have seconds for"),
        ({}, {"model": ""}, r"line 2: model must be a name, got ''"),
        ({}, {"arrival_s": -1}, r"line 2: arrival_s must be seconds >= 0 and at most 1e\+09, got -1"),
        ({}, {"arrival_s": 1e308}, r"line 2: arrival_s must be seconds >= 0 and at most 1e\+09, got 1e\+308"),
        ({}, {"arrival_s": 10**400}, r"line 2: arrival_s must be seconds"),
        ({}, {"arrival_s": True}, r"line 2: arrival_s"),
        ({}, {"prompt_tokens": 0}, r"line 2: prompt_tokens must be an integer in \[1, 2\^31\), got 0"),
        ({}, {"output_tokens": 2.0}, r"line 2: output_tokens"),
        ({}, {"prefix_tokens": 4}, r"line 2: prefix_tokens must be at most prompt_tokens=3, got 4"),
        ({}, {"prefix_tokens": 2}, r"line 2: prefix must be the number of a prefix >= 0 .*, got None"),
        ({}, {"rid": 1}, r"line 2: rid must count the requests from 0, here 0, got 1"),
        (
            {},
            {"ttft_slo_s": "1"},
            r"line 2: ttft_slo_s must be seconds >= 0 and at most 1e\+09, or null, got '1'",
        ),
        ({}, {"ttft_slo_s": 1e308}, r"line 2: ttft_slo_s must be seconds .*, got 1e\+308"),
        ({}, {"tpot_slo_s": 1e10}, r"line 2: tpot_slo_s must be seconds .*, got 10000000000.0"),
        ({}, {"priority": None}, r"line 2: priority must be an integer"),
        ({}, {"tokens": 3}, r"line 2: the keys are rid, model, .*, got 'tokens'"),
    ],
)
def test_a_wrong_file_is_said(head: dict[str, Any], row: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_lines([json.dumps(HEAD | head), json.dumps(GOOD | row)])


def test_a_file_by_hand_needs_no_sessions() -> None:
    rows = [json.dumps(GOOD | {"rid": i, "arrival_s": i}) for i in range(3)]
    found = from_lines([json.dumps(HEAD | {"requests": 3}), *rows])
    assert [r.session for r in found.requests] == [0, 1, 2]
    assert len({token_ids(r, found.seed, 0, 1 << 20).tobytes() for r in found.requests}) == 3


def test_any_damage_is_a_valueerror_or_another_workload() -> None:
    text = "\n".join(to_lines(cut(drawn(), 0, 20)))
    rng, said = np.random.default_rng(11), []
    for _ in range(400):
        data = list(text)
        for _ in range(int(rng.integers(1, 4))):
            at, kind = int(rng.integers(len(data))), rng.integers(3)
            if kind == 0:
                data[at] = chr(int(rng.integers(32, 127)))
            elif kind == 1:
                del data[at : at + int(rng.integers(1, 200))]
            else:
                data.insert(at, str(rng.choice(["-", "9" * 30, "null", "}", '"', "[[", "\n", "NaN"])))
        try:
            found = from_lines("".join(data).splitlines())
        except ValueError as error:
            said.append(str(error))
        else:
            assert all(r.prompt_tokens >= 1 and r.arrival_s >= 0 for r in found.requests)
    assert len(said) > 100
    assert all(s.startswith("line ") for s in said)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Laws(prefix_share=1.5), r"prefix_share must be in \[0, 1\], got 1.5"),
        (lambda: Laws(turns=0.5), r"turns must be a number in \[1, 10000\], got 0.5"),
        (lambda: drawn(laws=Laws(groups=4)), "at most the 3 models, got 4"),
        (lambda: drawn(laws=Laws(groups=2, on_s=200)), "2 of it at most the 300 s, got 200"),
        (lambda: drawn(laws=Laws(cv=0)), r"CV of gaps must be in \[0.01, 100\], got 0"),
        (lambda: power_law(["a"], -1, 1.0, 0), "a total rate must be > 0"),
        (lambda: lognormal(np.random.default_rng(), 1, 5, 4), "0 < median <= mean, got median 5 and mean 4"),
        (lambda: token_ids(Request(0, "a", 0.0, 1, 1), 0, 5, 5), r"0 <= low < high, got 5, 5"),
        (lambda: merged([]), "needs a workload"),
    ],
)
def test_what_cannot_be_is_said(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_order_is_kept_among_equal_arrivals() -> None:
    found = ordered(Request(0, name, 1.0 + i * 1e-9, 1, 1) for i, name in enumerate("dcba"))
    assert [r.model for r in found] == list("dcba")
    assert [r.session for r in found] == [0, 1, 2, 3]
