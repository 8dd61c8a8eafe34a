"""Slow-downs by phase are found from steps that overlapped."""

import random

import pytest

from sched.slowdown import PHASES, Ran, complete, slowdowns

TRUE = {
    ("decode", "decode"): 0.25,
    ("decode", "prefill"): 0.6,
    ("prefill", "decode"): 0.1,
    ("prefill", "prefill"): 0.9,
}


def side_by_side(seconds: float, noise: float, seed: int) -> dict[str, list[Ran]]:
    """Two models whose speed is that of TRUE at every moment; the second pauses now and then."""
    rng = random.Random(seed)
    steps: dict[str, list[Ran]] = {"a": [], "b": []}
    left, phase = {"a": 0.0, "b": 0.0}, {"a": "", "b": ""}
    began, alone = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
    now, tick = 0.0, 1e-4
    while now < seconds:
        for name in steps:
            if phase[name] and left[name] <= 0:
                steps[name].append(Ran(now, now - began[name], phase[name], alone[name]))
                phase[name] = ""
            if not phase[name] and (name == "a" or rng.random() < 0.02):
                phase[name] = rng.choice(PHASES)
                work = 0.01 if phase[name] == "decode" else rng.uniform(0.02, 0.08)
                began[name], left[name] = now, work
                alone[name] = work * (1 + rng.uniform(-noise, noise))
        for name, other in (("a", "b"), ("b", "a")):
            if phase[name]:
                left[name] -= tick / (1 + TRUE[phase[name], phase[other]] if phase[other] else 1)
        now += tick
    return steps


def test_what_was_true_is_found() -> None:
    found = slowdowns(side_by_side(20.0, noise=0.1, seed=1))
    assert found.keys() == TRUE.keys()
    for pair, slow in TRUE.items():
        assert found[pair] == pytest.approx(slow, abs=0.05), pair


def test_nothing_beside_nothing_is_nothing() -> None:
    steps = [Ran(0.1 * i, 0.1, "decode", 0.1) for i in range(1, 50)]
    assert slowdowns({"a": steps, "b": []}) == {}
    assert complete({}) == dict.fromkeys(TRUE, 0.0)
    known = complete({("decode", "decode"): 0.2, ("prefill", "decode"): 0.4})
    assert known["decode", "decode"] == 0.2
    assert known["decode", "prefill"] == pytest.approx(0.3)


def test_a_step_that_was_faster_than_alone_is_not_slowed_down() -> None:
    beside = [Ran(1.0 * i, 1.0, "decode", 1.0) for i in range(1, 5)]
    fast = [Ran(0.5 * i, 0.5, "prefill", 0.7) for i in range(1, 9)]
    assert slowdowns({"a": fast, "b": beside})["prefill", "decode"] == 0.0


def test_three_models_are_refused() -> None:
    with pytest.raises(ValueError, match="between two"):
        slowdowns({"a": [], "b": [], "c": []})
