"""Step-time models: what is known is found again, what is noisy within its noise, and errors are stated."""

import random

import pytest

from sched.latency import StepCost
from sched.step_time import (
    DEVICES,
    FIELDS,
    Corrected,
    Point,
    Work,
    coefficients,
    decode_point,
    error_of,
    fit,
    prefill_point,
    roofline,
)

TRUE = StepCost(base_s=7e-3, per_decode_s=4e-5, per_prefill_token_s=2.3e-5, per_context_token_s=2e-8)


def points(cost: StepCost, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """A profile as FineServe's: batches 1 to 32 of prompts of 256 and 512, answers of 256."""
    rng, made = random.Random(seed), []
    for batch in (1, 2, 4, 8, 16, 32):
        for prompt in (256, 512):
            for point in (prefill_point(batch, prompt, 1.0), decode_point(batch, prompt, 256, 1.0)):
                made.append(point._replace(seconds=point.predicted(cost) * (1 + rng.uniform(-noise, noise))))
    return made


def test_an_exact_profile_gives_its_coefficients_back() -> None:
    found = fit(points(TRUE))
    assert coefficients(found.cost) == pytest.approx(coefficients(TRUE), rel=1e-9)
    assert found.error < 1e-12


def test_noise_leaves_an_error_of_its_size_and_says_so() -> None:
    found = fit(points(TRUE, noise=0.1))
    assert 0.01 < found.error < 0.1
    assert found.error == pytest.approx(error_of(found.cost, points(TRUE, noise=0.1)))
    assert error_of(found.cost, points(TRUE)) < 0.05


@pytest.mark.parametrize("missing", FIELDS[1:])
def test_a_coefficient_is_never_negative(missing: str) -> None:
    """Data that pull one below 0 leave it at 0, and the others at their best."""
    cost = StepCost(**{**{name: getattr(TRUE, name) for name in FIELDS}, missing: 0.0})
    for seed in range(20):
        found = fit(points(cost, noise=0.05, seed=seed))
        assert min(coefficients(found.cost)) >= 0
        assert found.error < 0.06


def test_what_a_profile_does_not_show_stays_0() -> None:
    found = fit([p for p in points(TRUE) if not p.prefill_tokens])
    assert found.cost.per_prefill_token_s == 0
    assert found.error < 1e-9


@pytest.mark.parametrize("wrong", [[], [Point(0.0, 1, 1, 0, 0)], [Point(float("nan"), 1, 1, 0, 0)]])
def test_no_profile_is_refused(wrong: list[Point]) -> None:
    with pytest.raises(ValueError, match=r"point|seconds"):
        fit(wrong)


def test_a_roofline_of_an_8b_is_in_the_region_of_what_was_published() -> None:
    """FineServe's profile of Llama-3.1-8B on an H100: 8.0 ms a step of one, 43,000 prompt tokens a second."""
    work = Work(weight_bytes=16e9, parameters=7.5e9, kv_token_bytes=131072)
    cost = roofline(work, DEVICES["h100"])
    assert cost.decode_s(1, 600) == pytest.approx(8.0e-3, rel=0.25)
    assert 1 / cost.per_prefill_token_s == pytest.approx(43e3, rel=0.35)
    half = roofline(Work(weight_bytes=8e9, parameters=7.5e9, kv_token_bytes=65536, bits=8), DEVICES["h100"])
    assert half.per_context_token_s == cost.per_context_token_s / 2
    assert half.per_prefill_token_s == pytest.approx(cost.per_prefill_token_s / 2, rel=0.01)


def steps(cost: StepCost, n: int, seed: int, noise: float = 0.05) -> list[Point]:
    rng, made = random.Random(seed), []
    for _ in range(n):
        decodes = rng.randint(0, 64)
        prefill = rng.choice((0, 0, rng.randint(1, 2048)))
        point = Point(1.0, 1, decodes, prefill, decodes * rng.randint(100, 2000) + prefill)
        made.append(point._replace(seconds=point.predicted(cost) * (1 + rng.uniform(-noise, noise))))
    return made


def test_a_wrong_model_is_corrected_by_the_steps_themselves() -> None:
    wrong = StepCost(base_s=14e-3, per_decode_s=1e-5, per_prefill_token_s=1e-5, per_context_token_s=4e-8)
    corrected = Corrected(wrong)
    for point in steps(TRUE, 3000, seed=1):
        corrected.observe(point)
    assert error_of(wrong, steps(TRUE, 300, seed=2)) > 0.2
    # the noise alone is 0.025 in the mean
    assert error_of(corrected.cost, steps(TRUE, 300, seed=2)) < 0.05
    assert corrected.error < 0.05, "its own word for it"


def test_it_follows_a_device_that_becomes_slower() -> None:
    corrected = Corrected(TRUE)
    for point in steps(TRUE, 500, seed=3):
        corrected.observe(point)
    slower = StepCost(**{name: 1.5 * getattr(TRUE, name) for name in FIELDS})
    for point in steps(slower, 3000, seed=4):
        corrected.observe(point)
    assert error_of(corrected.cost, steps(slower, 300, seed=5)) < 0.08


def test_steps_that_are_all_alike_do_not_run_away() -> None:
    """Nothing tells base from decodes: the sum is right, and stays finite for ever."""
    corrected = Corrected(TRUE)
    alike = Point(0.02, 1, 8, 0, 8000)
    for _ in range(20_000):
        corrected.observe(alike)
    assert alike.predicted(corrected.cost) == pytest.approx(0.02, rel=1e-3)
    assert all(0 <= c < 1 for c in coefficients(corrected.cost))
    corrected.observe(Point(0.0, 1, 1, 0, 0))
    assert corrected.num_steps == 20_000
