"""Step-time models: what is known is found again, what is noisy within its noise, and errors are stated."""

import random
from itertools import combinations

import numpy as np
import pytest

from sched.latency import StepCost
from sched.step import Chunk
from sched.step_time import (
    BATCH,
    DEVICES,
    FIELDS,
    Corrected,
    Point,
    Work,
    best_fit,
    coefficients,
    decode_point,
    error_of,
    fit,
    nonnegative,
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


HUMP = StepCost(
    base_s=5e-3, per_decode_s=1e-4, per_prefill_token_s=8e-4, per_context_token_s=2e-7, per_pair_s=3e-7,
    rows=((1.0, 5e-3), (3.0, 6e-3), (4.0, 2e-2), (64.0, 1e-3), (128.0, 0.0)),
)  # fmt: skip


def measured(cost: StepCost, n: int, seed: int, noise: float = 0.03) -> list[Point]:
    """Steps as a small engine makes them: few decodes, chunks of up to 256."""
    rng, made = random.Random(seed), []
    for _ in range(n):
        decodes, start = rng.choice((1, 2, 3, 4, 6, 8, 12)), rng.choice((0, 0, 256))
        tokens = rng.choice((0, 0, 0, 16, 32, 64, 128, 192, 256))
        context = decodes * rng.randint(10, 500)
        plan = context + (start + tokens if tokens else 0)
        point = Point(1.0, 1, decodes, tokens, plan, tokens * (start + tokens))
        made.append(point._replace(seconds=point.predicted(cost) * (1 + rng.uniform(-noise, noise))))
    return made


def test_a_point_counts_as_the_cost_counts_a_step() -> None:
    chunks = (Chunk(1, 256, 64, True), Chunk(2, 0, 10, False))
    point = Point(1.0, 1, 3, 74, 900 + 320 + 10, 64 * 320 + 10 * 10)
    assert point.predicted(HUMP) == pytest.approx(HUMP.step_s(3, 900, chunks), rel=1e-12)
    # two steps alike are two of one
    twice = Point(1.0, 2, 6, 0, 1800)
    assert twice.predicted(HUMP) == pytest.approx(2 * HUMP.step_s(3, 900, ()), rel=1e-12)


def test_rows_are_straight_between_knots_and_flat_outside() -> None:
    assert [HUMP.rows_s(r) for r in (0, 1, 2, 3, 34, 1000)] == pytest.approx(
        [5e-3, 5e-3, 5.5e-3, 6e-3, 1.05e-2, 0]
    )
    assert HUMP.decode_s(3, 103) - HUMP.decode_s(3, 100) == pytest.approx(HUMP.slope_s(3), rel=1e-6)
    for wrong in (((2.0, 0.0), (1.0, 0.0)), ((1.0, -1.0),)):
        with pytest.raises(ValueError, match="rows"):
            StepCost(base_s=0.0, rows=wrong)


def test_a_kernel_that_changes_with_the_rows_is_found_by_knots_alone() -> None:
    seen, unseen = measured(HUMP, 400, seed=1), measured(HUMP, 400, seed=2)
    plain, best = fit(seen), best_fit(seen)
    assert best.cost.rows
    assert error_of(plain.cost, unseen) > 0.08
    assert error_of(best.cost, unseen) < 0.03
    assert best.cost.per_prefill_token_s == pytest.approx(8e-4, rel=0.15), (
        "prompts are priced by their tokens"
    )


def test_the_stated_error_is_that_of_steps_the_fit_has_not_seen() -> None:
    seen, unseen = measured(HUMP, 120, seed=3, noise=0.2), measured(HUMP, 2000, seed=4, noise=0.2)
    found = best_fit(seen)
    assert found.error > error_of(found.cost, seen)
    assert found.error == pytest.approx(error_of(found.cost, unseen), rel=0.2)


def test_knots_that_are_worth_nothing_are_left_out() -> None:
    assert not best_fit(measured(TRUE, 400, seed=5)).cost.rows


def test_nonnegative_least_squares_against_all_subsets() -> None:
    rng = np.random.default_rng(6)
    for _ in range(40):
        a, b = rng.normal(size=(12, 5)), rng.normal(size=12)
        best = float(b @ b)
        for n in range(1, 6):
            for columns in combinations(range(5), n):
                x = np.linalg.lstsq(a[:, columns], b, rcond=None)[0]
                if (x >= 0).all():
                    best = min(best, float(((a[:, columns] @ x - b) ** 2).sum()))
        found = nonnegative(a, b)
        assert (found >= 0).all()
        assert float(((a @ found - b) ** 2).sum()) == pytest.approx(best, rel=1e-9)


def test_a_start_that_knows_little_learns_the_curve() -> None:
    corrected = Corrected(StepCost(base_s=1e-3, per_prefill_token_s=1e-5), trust=1.0)
    changes = sum(corrected.observe(p) for p in measured(HUMP, 1500, seed=7))
    assert error_of(corrected.cost, measured(HUMP, 300, seed=8)) < 0.03
    assert 1500 / BATCH <= changes < 1500 / BATCH + 8, "solved for once in a batch, more often at first"


def test_a_share_of_the_sms_slows_prompts_at_once_and_decodes_late() -> None:
    work = Work(weight_bytes=16e9, parameters=7.5e9, kv_token_bytes=131072, pair_flops=4 * 32 * 4096)
    whole, half, fifth = (roofline(work, DEVICES["h100"], share) for share in (1.0, 0.5, 0.2))
    assert half.per_prefill_token_s == pytest.approx(2 * whole.per_prefill_token_s)
    assert half.decode_s(1, 600) == pytest.approx(whole.decode_s(1, 600), rel=0.01)
    assert fifth.decode_s(1, 600) > 1.1 * half.decode_s(1, 600)
    # beside the weights' time rows are free until there are many
    assert whole.decode_s(64, 0) == pytest.approx(whole.decode_s(1, 0), rel=0.01)
    prompt = (Chunk(1, 0, 8192, True),)
    assert whole.step_s(0, 0, prompt) > 8192 * whole.per_prefill_token_s
    with pytest.raises(ValueError, match="share"):
        roofline(work, DEVICES["h100"], 0.0)
