"""From logits to tokens: bias, penalties, temperature, top-k, top-p, min-p, and log probabilities.

Every row is drawn from its own uniform number, a hash of (seed, position), by inverting the cumulative distribution
(kernels/sample.py): the same seed gives the same tokens whatever else is in the batch.  Order of the filters as vLLM's: bias and bans,
penalties, temperature, min-p, top-k, top-p.  Log probabilities are those of the raw logits.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import upload
from kernels.sample import sample_rows

MASK64 = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (splitmix64 of both)."""
    x = ((seed & MASK64) ^ (position * 0x9E3779B97F4A7C15)) & MASK64
    for _ in range(2):
        x = (x + 0x9E3779B97F4A7C15) & MASK64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
        x ^= x >> 31
    return (x >> 11) * 2.0**-53


class Penalty(NamedTuple):
    """Tokens of one row that penalties look at: `tokens[:prompt]` is the prompt, the rest was generated."""

    row: int
    tokens: Tensor
    prompt: int
    presence: float
    frequency: float
    repetition: float


@dataclass(slots=True)
class SampleBatch:
    """What the R rows of one step ask for.  Lists hold only the rows that want that treatment."""

    temperature: list[float]
    top_k: list[int]
    top_p: list[float]
    min_p: list[float]
    uniform: list[float]
    biases: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    banned: list[tuple[int, Tensor]] = field(default_factory=list)
    penalties: list[Penalty] = field(default_factory=list)
    logprobs: list[int | None] = field(default_factory=list)

    @property
    def greedy(self) -> bool:
        return not any(self.temperature)


class TokenLogprobs(NamedTuple):
    """Log probability and rank (1 = most likely) of one token, and the most likely ones as (token id, logprob)."""

    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class Sampled(NamedTuple):
    """tokens_R on the device of the logits; a row whose logits are not finite is named in `broken`."""

    tokens_R: Tensor
    broken_R: Tensor
    logprobs: list[TokenLogprobs | None] | None


def _adjust(logits_RV: Tensor, batch: SampleBatch) -> Tensor:
    """A copy with biases, bans and penalties applied; the argument itself where there are none."""
    if not (batch.biases or batch.banned or batch.penalties):
        return logits_RV
    out = logits_RV.clone()
    for row, ids, values in batch.biases:
        out[row, ids] += values
    for row, ids in batch.banned:
        out[row, ids] = float("-inf")
    for p in batch.penalties:
        vocab = out.shape[1]
        counts_V = torch.bincount(p.tokens[p.prompt :], minlength=vocab)[:vocab]
        seen_V = counts_V > 0
        mentioned_V = seen_V | (torch.bincount(p.tokens[: p.prompt], minlength=vocab)[:vocab] > 0)
        row_V = out[p.row]
        repeated_V = torch.where(row_V > 0, row_V / p.repetition, row_V * p.repetition)
        row_V = torch.where(mentioned_V, repeated_V, row_V)
        out[p.row] = row_V - p.frequency * counts_V - p.presence * seen_V
    return out


def _asks(batch: SampleBatch, vocab: int) -> Tensor:
    """What the rows ask of `sample_rows`, in the order of its columns."""
    # a k as large as the vocabulary is none, and float32 could not hold every one
    top_k = [k if 0 < k < vocab else 0 for k in batch.top_k]
    columns = (batch.temperature, top_k, batch.top_p, batch.min_p, batch.uniform)
    return torch.tensor(list(zip(*columns, strict=True)), dtype=torch.float32)


def gather_logprobs(
    logits_RV: Tensor, tokens_R: Tensor, counts: list[int | None]
) -> list[TokenLogprobs | None]:
    """Log probabilities of `tokens_R` and of the counts[r] most likely tokens; None where a row wants none."""
    rows = [r for r, n in enumerate(counts) if n is not None]
    if not rows:
        return [None] * len(counts)
    index = torch.tensor(rows, device=logits_RV.device)
    lp_RV = logits_RV[index].log_softmax(-1)
    own_R1 = lp_RV.gather(-1, tokens_R[index][:, None])
    rank_R = (lp_RV > own_R1).sum(-1) + 1
    most = min(max(counts[r] or 0 for r in rows), logits_RV.shape[1])
    top = lp_RV.topk(most, dim=-1) if most else None
    ids, values = (top.indices.tolist(), top.values.tolist()) if top else ([], [])
    out: list[TokenLogprobs | None] = [None] * len(counts)
    for i, (r, own, rank) in enumerate(zip(rows, own_R1[:, 0].tolist(), rank_R.tolist(), strict=True)):
        n = counts[r] or 0
        pairs = zip(ids[i][:n], values[i][:n], strict=True) if n else ()
        # -inf is not JSON; -9999.0 is what clients of vLLM know
        out[r] = TokenLogprobs(max(own, -9999.0), rank, tuple((t, max(v, -9999.0)) for t, v in pairs))
    return out


def sample(logits_RV: Tensor, batch: SampleBatch) -> Sampled:
    """One token a row from fp32 logits [R, V].  Does not change `logits_RV`."""
    adjusted_RV = _adjust(logits_RV, batch)
    asks_R5 = None if batch.greedy else upload(_asks(batch, logits_RV.shape[1]), logits_RV.device)
    tokens_R, broken_R = sample_rows(adjusted_RV, asks_R5)
    if adjusted_RV is not logits_RV:
        # a bias must not hide a broken row, nor bans make one
        broken_R = ~torch.isfinite(logits_RV.amax(-1))
    logprobs = None
    if any(n is not None for n in batch.logprobs):
        logprobs = gather_logprobs(logits_RV, tokens_R, batch.logprobs)
    return Sampled(tokens_R, broken_R, logprobs)
