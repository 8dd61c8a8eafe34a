"""The sampler's kernels against an fp64 definition, with blocks so small that every path through them is taken.

A draw may differ from the truth only where its uniform number lies within float32 rounding of a border.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.sample import sample_rows_cpu
from kernels.sample_triton import SampleConfig, sample_rows_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# lists that hold every likely token; lists that overflow, so that rows are gone through as a whole
CONFIGS = [SampleConfig(128, 128, 1), SampleConfig(128, 4, 1)]
DRAWS = 20_000


class Ask(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


ASKS = [
    Ask(),
    Ask(temperature=0.6),
    Ask(top_k=1),
    Ask(top_k=7),
    Ask(top_k=40, temperature=1.8),
    Ask(top_p=0.5),
    Ask(top_p=0.99, temperature=1.4),
    Ask(top_p=1e-9),
    Ask(min_p=0.2),
    Ask(top_k=20, top_p=0.7, min_p=0.01),
    Ask(top_k=10_000),
    Ask(temperature=0.0),
]


def logits(rows: int, vocab: int, ties: bool = False) -> Tensor:
    x = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab + ties))
    return (2 * x).round() / 2 if ties else x


def asks_for(ask: Ask, uniform_R: Tensor) -> Tensor:
    return torch.cat([torch.tensor([ask]).expand(len(uniform_R), -1), uniform_R[:, None]], 1).contiguous()


def draw(logits_RV: Tensor, asks_R5: Tensor, config: SampleConfig) -> Tensor:
    return sample_rows_triton(logits_RV.to(DEVICE), asks_R5.to(DEVICE), config)[0].cpu()


def probabilities(x_V: Tensor, ask: Ask) -> Tensor:
    """What each token may be drawn with, in fp64, token by token as the definition says."""
    top_p, min_p = torch.tensor([ask.top_p, ask.min_p]).double().tolist()
    if ask.temperature == 0:
        return torch.nn.functional.one_hot(x_V.argmax(), len(x_V)).double()
    p_V = torch.softmax(x_V.double() / torch.tensor(ask.temperature).double(), -1)
    x, p, floor = x_V.tolist(), p_V.tolist(), min_p * p_V.max().item()
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if 0 < ask.top_k < len(x):
        order = order[: ask.top_k]
    order = [i for i in order if p[i] >= floor]
    total, before, kept = sum(p[i] for i in order), 0.0, [0.0] * len(x)
    for i in order:
        if ask.top_p == 1 or before < top_p * total * (1 - 1e-12):
            kept[i] = p[i]
        before += p[i]
    kept_V = torch.tensor(kept, dtype=torch.float64)
    return kept_V / kept_V.sum()


def assert_drawn(token: int, uniform: float, p_V: Tensor) -> None:
    assert p_V[token] > 0, f"token {token} is not kept"
    high = p_V[: token + 1].sum().item()
    low = high - p_V[token].item()
    assert low - 1e-6 <= uniform <= high + 1e-6, f"{uniform=} lies outside [{low}, {high}] of token {token}"


@pytest.mark.parametrize("config", CONFIGS, ids=["listed", "whole"])
@pytest.mark.parametrize("ask", ASKS, ids=str)
def test_draws_invert_the_distribution_of_the_kept(ask, config):
    vocab = 300  # two blocks of 128 and a part
    uniform_R = torch.tensor([0.37, 0.9999999])
    x = logits(2, vocab, ties=True)
    tokens = draw(x, asks_for(ask, uniform_R), config)
    for r in range(2):
        assert_drawn(int(tokens[r]), uniform_R[r].item(), probabilities(x[r], ask))


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129])
def test_vocabularies_around_a_block(vocab):
    ask = Ask(top_k=3, top_p=0.9)
    x = logits(2, vocab)
    uniform_R = torch.tensor([0.2, 0.8])
    tokens = draw(x, asks_for(ask, uniform_R), CONFIGS[0])
    for r in range(2):
        assert_drawn(int(tokens[r]), uniform_R[r].item(), probabilities(x[r], ask))


@pytest.mark.parametrize("ask", [Ask(), Ask(top_k=5), Ask(top_p=0.6)], ids=str)
def test_the_draw_changes_where_the_cumulative_distribution_does(ask):
    """On both sides of every border: which proves each probability to 2e-6, and the order of the vocabulary."""
    x = logits(1, 9)
    p_V = probabilities(x[0], ask)
    kept = p_V.nonzero()[:, 0].tolist()
    borders = p_V.cumsum(0)[kept[:-1]]
    uniform_R = torch.cat([borders - 2e-6, borders + 2e-6]).float()
    tokens = draw(x.expand(len(uniform_R), -1).contiguous(), asks_for(ask, uniform_R), CONFIGS[0])
    assert tokens.tolist() == kept[:-1] + kept[1:]


@pytest.mark.gpu
@pytest.mark.parametrize("ask", [Ask(), Ask(top_k=6, top_p=0.9)], ids=str)
def test_chi_square_of_many_draws(ask):
    vocab = 12
    x = logits(1, vocab) / 3
    uniform_R = torch.rand(DRAWS, generator=torch.Generator().manual_seed(1))
    tokens = draw(x.expand(DRAWS, -1).contiguous(), asks_for(ask, uniform_R), SampleConfig(16, 16, 1))
    want = DRAWS * probabilities(x[0], ask)
    counts = torch.bincount(tokens, minlength=vocab).double()
    assert (counts[want == 0] == 0).all()
    kept = want > 0
    statistic = ((counts - want)[kept].square() / want[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    # the 0.9999 quantile lies below mean + 5 standard deviations + 10 for every number of degrees of freedom here
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 10


def test_equal_logits_are_kept_from_the_first_on():
    x = torch.full((2, 200), -0.0)
    x[:, ::2] = 0.0
    x[:, 150] = 1.0
    uniform_R = torch.tensor([0.0, 0.999999])
    for config in CONFIGS:
        tokens = draw(x, asks_for(Ask(top_k=4), uniform_R), config)
        assert tokens.tolist() == [0, 150]
        third = draw(x[:1], asks_for(Ask(top_k=4), torch.tensor([0.5])), config)
        assert third.item() == 2, "of 199 equal tokens the first three stand beside the largest"
        # half of the mass exactly: the second of two equal tokens has that much before it, and is out
        pair = torch.full((2, 130), float("-inf"))
        pair[:, [3, 129]] = 2.0
        assert draw(pair, asks_for(Ask(top_p=0.5), uniform_R), config).tolist() == [3, 3]


def test_a_row_is_the_same_in_any_batch():
    x = logits(5, 300)
    uniform_R = torch.rand(5, generator=torch.Generator().manual_seed(2))
    asks = torch.cat([asks_for(ask, uniform_R[i : i + 1]) for i, ask in enumerate(ASKS[5:10])])
    whole = draw(x, asks, CONFIGS[1])
    order = torch.tensor([3, 0, 4])
    assert draw(x[order], asks[order], CONFIGS[1]).tolist() == whole[order].tolist()


def test_broken_rows_are_named_and_their_tokens_stay_in_the_vocabulary():
    x = logits(5, 200)
    x[0, 130] = float("nan")
    x[1, 7] = float("inf")
    x[2] = float("-inf")
    x[3, 1:] = float("-inf")
    for asks in (
        None,
        asks_for(Ask(), torch.full((5,), 0.5)),
        asks_for(Ask(top_p=0.9), torch.full((5,), 0.5)),
    ):
        moved = None if asks is None else asks.to(DEVICE)
        tokens, broken = sample_rows_triton(x.to(DEVICE), moved, CONFIGS[0])
        assert broken.tolist() == [True, True, True, False, False]
        assert torch.equal(broken.cpu(), sample_rows_cpu(x, asks).broken_R)
        assert tokens[3] == 0
        assert ((tokens >= 0) & (tokens < 200)).all()


def test_greedy_takes_the_first_of_the_largest_across_blocks():
    x = torch.zeros(2, 300)
    x[0, [290, 140, 141]] = 5.0
    x[1, 299] = 1e-30
    assert sample_rows_triton(x.to(DEVICE), None, CONFIGS[0])[0].tolist() == [140, 299]


@pytest.mark.slow
@pytest.mark.parametrize(
    "ask", [Ask(temperature=0.0), Ask(), Ask(top_k=50, top_p=0.9), Ask(top_p=0.95)], ids=str
)
def test_the_vocabulary_of_llama_3(ask):
    x, uniform_R = logits(1, 128256), torch.tensor([0.61])
    tokens = draw(x, asks_for(ask, uniform_R), SampleConfig(4096, 256, 8))
    assert_drawn(int(tokens[0]), 0.61, probabilities(x[0], ask))
