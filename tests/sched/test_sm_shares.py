"""Shares of a GPU's multiprocessors: what is given stays, what is left goes by weight, and chunks are whole."""

import random

import pytest

from sched.sm_shares import divide, in_chunks

WEIGHTS = {"a": 16.0, "b": 8.0, "c": 8.0}


def test_automatic_shares_go_by_weight() -> None:
    auto = dict.fromkeys(WEIGHTS)
    assert divide(auto, WEIGHTS, disjoint=True) == {"a": 50, "b": 25, "c": 25}
    assert divide(auto, WEIGHTS, disjoint=False) == {"a": 100, "b": 50, "c": 50}
    assert divide({"a": None}, WEIGHTS, disjoint=True) == {"a": 100}
    assert divide({"a": None}, WEIGHTS, disjoint=False) == {"a": 100}


def test_numbers_stay_as_they_are() -> None:
    assert divide({"a": 70, "b": None}, WEIGHTS, disjoint=True) == {"a": 70, "b": 30}
    assert divide({"a": 70, "b": None}, WEIGHTS, disjoint=False) == {"a": 70, "b": 60}
    assert divide({"a": 100, "b": 100}, WEIGHTS, disjoint=False) == {"a": 100, "b": 100}
    assert divide({"a": 100, "b": None}, WEIGHTS, disjoint=False) == {"a": 100, "b": 100}
    assert divide({"a": 40, "b": 40}, WEIGHTS, disjoint=True) == {"a": 40, "b": 40}
    with pytest.raises(ValueError, match=r"together at most 100, .* got a 100, b auto"):
        divide({"a": 100, "b": None}, WEIGHTS, disjoint=True)


def test_chunks_are_whole_and_together_no_more_than_there_are() -> None:
    assert in_chunks({"a": 50, "b": 50}, 16) == {"a": 8, "b": 8}
    assert in_chunks({"a": 98, "b": 1, "c": 1}, 16) == {"a": 14, "b": 1, "c": 1}
    assert in_chunks({"a": 40, "b": 40}, 16) == {"a": 7, "b": 6}
    with pytest.raises(ValueError, match="for 3 models on a GPU with 2 chunks"):
        in_chunks({"a": 1, "b": 1, "c": 1}, 2)
    rng = random.Random(5)
    for _ in range(500):
        names = [str(i) for i in range(rng.randint(1, 8))]
        given = {n: rng.choice([None, rng.randint(1, 12)]) for n in names}
        weights = {n: rng.uniform(0.1, 80) for n in names}
        shares = divide(given, weights, disjoint=True)
        assert sum(shares.values()) <= 100
        assert all(shares[n] == s for n, s in given.items() if s is not None)
        if None in given.values():
            assert sum(shares.values()) == 100
        chunks = rng.randint(len(names), 40)
        found = in_chunks(shares, chunks)
        assert min(found.values()) >= 1
        assert sum(found.values()) <= chunks
        if sum(shares.values()) == 100:
            assert sum(found.values()) == chunks, "nothing is left unused"
