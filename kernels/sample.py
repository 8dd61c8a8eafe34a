"""One token a row from fp32 logits: temperature, min-p, top-k, top-p, then the inverse of the cumulative distribution.

R rows, V vocabulary entries.  A row of `asks` is (temperature, top_k, top_p, min_p, uniform): temperature 0 takes the
largest logit, the first of several; top_k 0 and top_p 1 are off.  Filters keep a prefix of the tokens by falling
logit, equal ones by index; the draw goes through what is kept in the order of the vocabulary.  Bandwidth-bound: the
GPU reads a row once for greedy, else twice (V = 128256: 0.5 and 1.0 MB), which a cache of 50 MB spares it the second
time for up to some 80 rows; a filter adds lists of a sixteenth of a row, gone through once a step of a bisection.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import backend
from kernels.launch import GpuFacts
from kernels.sample_triton import MIN_P, TEMPERATURE, TOP_K, TOP_P, UNIFORM, SampleConfig, sample_rows_triton
from kernels.spec import Case, Cost, KernelSpec, ModelShape, case


class Choice(NamedTuple):
    """`broken_R`: rows that hold NaN or inf, or nothing but -inf; their token means nothing."""

    tokens_R: Tensor
    broken_R: Tensor


def _weights(logits_RV: Tensor, asks_R5: Tensor) -> Tensor:
    finite_RV = torch.nan_to_num(logits_RV, nan=0.0, posinf=0.0, neginf=float("-inf"))
    probs_RV = torch.softmax(finite_RV / asks_R5[:, TEMPERATURE, None], dim=-1)
    return probs_RV * (probs_RV >= probs_RV.amax(-1, keepdim=True) * asks_R5[:, MIN_P, None])


def _filtered(probs_RV: Tensor, asks_R5: Tensor) -> Tensor:
    """Keeps the top_k most likely, then the smallest set of them whose mass reaches top_p; zeros elsewhere."""
    sorted_RV, order_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(probs_RV.shape[1], device=probs_RV.device)
    top_k_R1, top_p_R1 = asks_R5[:, TOP_K, None], asks_R5[:, TOP_P, None]
    sorted_RV = sorted_RV * ((rank_V < top_k_R1) | (top_k_R1 <= 0))
    sorted_RV = sorted_RV / sorted_RV.sum(-1, keepdim=True)
    before_RV = sorted_RV.cumsum(-1) - sorted_RV
    sorted_RV = sorted_RV * ((before_RV < top_p_R1) | (top_p_R1 >= 1))
    return torch.zeros_like(probs_RV).scatter_(-1, order_RV, sorted_RV)


def _draw(probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The first index whose cumulative probability exceeds uniform * total; [R] int64."""
    cum_RV = probs_RV.cumsum(-1)
    # a uniform just below 1 can round up to the total: the last index with weight is the right answer then
    threshold_R1 = (uniform_R * cum_RV[:, -1])[:, None]
    hit = (cum_RV > threshold_R1) & (probs_RV > 0)
    last = probs_RV.shape[1] - 1 - (probs_RV > 0).flip(-1).int().argmax(-1)
    return torch.where(hit.any(-1), hit.int().argmax(-1), last)


def sample_rows_ref(logits_RV: Tensor, asks_R5: Tensor | None = None) -> Choice:
    broken_R = ~torch.isfinite(logits_RV.amax(-1))
    greedy_R = logits_RV.argmax(-1)
    if asks_R5 is None:
        return Choice(greedy_R, broken_R)
    # greedy rows divide by zero: what comes of that is not used
    drawn_R = _draw(_filtered(_weights(logits_RV, asks_R5), asks_R5), asks_R5[:, UNIFORM])
    return Choice(torch.where(asks_R5[:, TEMPERATURE] > 0, drawn_R, greedy_R), broken_R)


def sample_rows_cpu(logits_RV: Tensor, asks_R5: Tensor | None = None) -> Choice:
    """As the reference, but only rows with a filter are sorted.  A row's path depends on that row alone."""
    broken_R = ~torch.isfinite(logits_RV.amax(-1))
    tokens_R = logits_RV.argmax(-1)
    if asks_R5 is not None:
        drawn = asks_R5[:, TEMPERATURE] > 0
        limited = (asks_R5[:, TOP_K] > 0) | (asks_R5[:, TOP_P] < 1)
        for rows, keep in (((drawn & ~limited), None), ((drawn & limited), _filtered)):
            index = rows.nonzero()[:, 0]
            if len(index):
                asks = asks_R5[index]
                probs_RV = _weights(logits_RV[index], asks)
                kept_RV = probs_RV if keep is None else keep(probs_RV, asks)
                tokens_R[index] = _draw(kept_RV, asks[:, UNIFORM])
    return Choice(tokens_R, broken_R)


def _sample_rows_triton(
    logits_RV: Tensor, asks_R5: Tensor | None = None, config: SampleConfig | None = None
) -> Choice:
    return Choice(*sample_rows_triton(logits_RV, asks_R5, config))


def sample_rows(logits_RV: Tensor, asks_R5: Tensor | None = None) -> Choice:
    """Without `asks` every row is greedy.  Nothing given is written to; the last axis must be contiguous."""
    run = _sample_rows_triton if backend.runs_triton(logits_RV.device) else sample_rows_cpu
    return run(logits_RV, asks_R5)


def _make(c: Case, generator: torch.Generator) -> tuple[Any, ...]:
    T, V, pad = c["T"], c["V"], c.dims.get("pad", 0)
    logits = (3 * torch.randn(T, V + pad, generator=generator))[:, :V]
    if c.dims.get("ties"):
        logits = (2 * logits).round() / 2
    if c.dims.get("broken"):
        logits[0, V // 2] = float("nan")
        logits[1, 0] = float("inf")
        logits[2] = float("-inf")
    if c.dims.get("greedy"):
        return logits, None
    asks = torch.tensor(
        [[c.dims.get("t", 1.0), c.dims.get("k", 0), c.dims.get("p", 1.0), c.dims.get("m", 0.0), 0.0]]
    )
    asks = asks.repeat(T, 1)
    asks[:, UNIFORM] = torch.rand(T, generator=generator)
    asks[1::4, TEMPERATURE] = 0.0  # greedy rows among the others
    return logits, asks


def _cost(c: Case) -> Cost:
    return Cost(4 * c["T"] * c["V"], 8 * c["T"] * c["V"])


def _serving(shape: ModelShape) -> tuple[Case, ...]:
    asks: tuple[dict[str, Any], ...] = ({"greedy": True}, {"k": 50, "p": 0.9})
    return tuple(case(torch.float32, T=T, V=shape.V, **ask) for ask in asks for T in (1, 16, 64, 256))


def _small(c: Case) -> Case:
    return Case(c.dtype, {**c.dims, "T": 1})


def _config(c: Case, gpu: GpuFacts) -> SampleConfig:
    return SampleConfig.pick(gpu, c["V"])


SPEC = KernelSpec(
    name="sample",
    runs={"cpu": sample_rows_cpu, "triton": _sample_rows_triton},
    ref=sample_rows_ref,
    make=_make,
    cost=_cost,
    row_args=(0, 1),
    tests=(
        case(torch.float32, T=1, V=1),
        case(torch.float32, T=3, V=257, greedy=True, ties=True),
        case(torch.float32, T=5, V=1031),
        case(torch.float32, T=3, V=259, pad=3, k=7),
        case(torch.float32, T=3, V=1000, p=0.8, ties=True),
        case(torch.float32, T=2, V=4099, t=0.6, k=50, p=0.9, m=0.01),
        case(torch.float32, T=0, V=17, p=0.5),
    ),
    compiles=(
        case(torch.float32, T=1, V=128256, greedy=True),
        case(torch.float32, T=1, V=128256, k=50, p=0.9),
    ),
    benches=(
        case(torch.float32, T=64, V=128256, greedy=True),
        case(torch.float32, T=64, V=128256),
        case(torch.float32, T=64, V=128256, k=50, p=0.9),
        case(torch.float32, T=256, V=128256, k=50, p=0.9),
    ),
    serving=_serving,
    config=_config,
    candidates=lambda c, gpu: SampleConfig.candidates(gpu, c["V"]),
    small=_small,
)
