"""The sampler against plain definitions: distributions, filters, penalties, seeds, log probabilities."""

import math
from collections import Counter

import pytest
import torch

from minserve.sampler import Penalty, SampleBatch, sample, uniform

DRAWS = 20_000


def batch(rows: int, **kw) -> SampleBatch:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.5} | kw
    return SampleBatch(**{k: v if isinstance(v, list) else [v] * rows for k, v in values.items()})


def frequencies(logits_V: torch.Tensor, **kw) -> torch.Tensor:
    """How often each token is drawn in DRAWS rows that differ only in their uniform number."""
    u = [uniform(7, i) for i in range(DRAWS)]
    tokens = sample(logits_V.expand(DRAWS, -1), batch(DRAWS, uniform=u, **kw)).tokens_R
    return torch.bincount(tokens, minlength=len(logits_V)).float() / DRAWS


def expected(logits_V: torch.Tensor, keep: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    p = torch.softmax(logits_V / temperature, -1) * keep
    return p / p.sum()


LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.7, -3.0, 1.9, 0.0])


@pytest.mark.parametrize(
    ("kw", "keep"),
    [
        ({}, [1] * 8),
        ({"temperature": 0.5}, [1] * 8),
        ({"top_k": 3}, [0, 1, 0, 1, 0, 0, 1, 0]),
        ({"top_p": 0.6}, [0, 1, 0, 0, 0, 0, 1, 0]),
        ({"min_p": 0.3}, [0, 1, 0, 1, 0, 0, 1, 0]),
        ({"top_k": 2, "top_p": 0.99}, [0, 1, 0, 0, 0, 0, 1, 0]),
    ],
)
def test_draws_follow_the_filtered_distribution(kw: dict, keep: list[int]) -> None:
    if kw == {"top_p": 0.6}:
        # tokens 1 and 6 are the smallest set whose mass reaches 0.6
        p = torch.softmax(LOGITS, -1)
        assert p[1] < 0.6 <= p[[1, 6]].sum()
    want = expected(LOGITS, torch.tensor(keep), kw.get("temperature", 1.0))
    got = frequencies(LOGITS, **kw)
    assert (got[want == 0] == 0).all()
    # 5 standard deviations of a binomial
    assert ((got - want).abs() <= 5 * (want * (1 - want) / DRAWS).sqrt() + 1e-9).all(), (got, want)


def test_uniform_numbers_are_uniform_and_depend_on_both_arguments() -> None:
    values = [uniform(s, p) for s in range(100) for p in range(100)]
    counts = Counter(int(v * 10) for v in values)
    assert all(abs(c - 1000) < 5 * math.sqrt(900) for c in counts.values()), counts
    assert len(set(values)) == len(values)
    assert 0 <= min(values) < max(values) < 1


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    g = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(6, 50, generator=g)
    full = batch(
        6, temperature=[0.0, 1.0, 0.7, 1.3, 1.0, 2.0], top_k=[0, 0, 5, 0, 50, 7], top_p=[1, 1, 0.9, 0.5, 1, 1.0],
        uniform=[0.1, 0.9999999, 0.3, 0.6, 0.0, 0.77],
    )  # fmt: skip
    together = sample(logits_RV, full).tokens_R
    for r in range(6):
        one = SampleBatch(
            [full.temperature[r]], [full.top_k[r]], [full.top_p[r]], [full.min_p[r]], [full.uniform[r]]
        )
        assert sample(logits_RV[r : r + 1], one).tokens_R.item() == together[r]


def test_extreme_uniform_never_picks_an_excluded_token() -> None:
    logits = torch.tensor([[5.0, 4.0, -1e30, float("-inf")]])
    for u in (0.0, 1 - 2**-53):
        for kw in ({}, {"top_k": 2}, {"top_p": 0.999}):
            assert sample(logits, batch(1, uniform=u, **kw)).tokens_R.item() in (0, 1)


def test_greedy_bias_bans_and_penalties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    greedy = batch(1, temperature=0.0)
    assert sample(logits, greedy).tokens_R.item() == 1
    greedy.banned = [(0, torch.tensor([1]))]
    assert sample(logits, greedy).tokens_R.item() == 2
    greedy.biases = [(0, torch.tensor([3]), torch.tensor([100.0]))]
    assert sample(logits, greedy).tokens_R.item() == 3
    history = torch.tensor([3, 1, 1], dtype=torch.int32)  # prompt: 3; output: 1 1
    for presence, frequency, repetition, want in (
        (0.9, 0, 1, 1),
        (1.1, 0, 1, 2),
        (0, 0.6, 1, 2),
        (0, 0.4, 1, 1),
        (0, 0, 1.6, 2),
    ):
        b = batch(1, temperature=0.0)
        b.penalties = [Penalty(0, history, 1, presence, frequency, repetition)]
        assert sample(logits, b).tokens_R.item() == want, (presence, frequency, repetition)
    assert torch.equal(logits, torch.tensor([[1.0, 3.0, 2.0, -1.0]])), "sample changed its input"


def test_repetition_penalty_counts_the_prompt_and_divides_only_positive_logits() -> None:
    logits = torch.tensor([[2.0, 1.5, -0.5, -0.6]])
    b = batch(1, temperature=0.0)
    b.penalties = [Penalty(0, torch.tensor([0], dtype=torch.int32), 1, 0, 0, 1.5)]
    assert sample(logits, b).tokens_R.item() == 1
    b.biases = [(0, torch.tensor([0, 1]), torch.tensor([-100.0, -100.0]))]
    b.penalties = [Penalty(0, torch.tensor([2], dtype=torch.int32), 0, 0, 0, 1.5)]
    assert sample(logits, b).tokens_R.item() == 3, "a negative logit is multiplied"


def test_logprobs_are_those_of_the_raw_logits() -> None:
    g = torch.Generator().manual_seed(1)
    logits_RV = torch.randn(3, 20, generator=g)
    b = batch(3, temperature=0.0)
    b.logprobs = [2, None, 0]
    s = sample(logits_RV, b)
    lp = logits_RV.log_softmax(-1)
    assert s.logprobs is not None
    first, none, last = s.logprobs
    assert none is None
    assert last is not None
    assert last.top == ()
    assert last.logprob == lp[2].max().item()
    assert first is not None
    assert first.rank == 1
    assert first.top[0] == (s.tokens_R[0].item(), first.logprob), "the same float in both places"
    assert [v for _, v in first.top] == lp[0].topk(2).values.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_row_is_named_and_spares_the_others(bad: float) -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(2))
    clean = sample(logits, batch(3)).tokens_R
    logits[1, 4] = bad
    s = sample(logits, batch(3))
    assert s.broken_R.tolist() == [False, True, False]
    assert s.tokens_R[[0, 2]].tolist() == clean[[0, 2]].tolist()
