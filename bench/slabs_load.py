"""What E1 replays: four models that share a pool, and requests whose lengths are like Azure's conversations.

Lengths and gaps come from a generator (lognormal, Poisson) or from a trace in Azure's CSV form, from a row that the
seed picks.  Which model a request is for follows k^-alpha over a shuffled order, and each model is busy for 30 s and
nearly idle for 30 s, out of phase.  The rate is set so that the blocks of a pool without end would take `load` times
the bytes of this one, in the mean.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kernels.kv_layout import KvLayout
from minserve.workload_tables import read_azure
from sched.arrivals import busy, consecutive, lognormal, pick, popularity
from sched.slabs import ModelShape

GIB = 1 << 30
STEP_S = 0.03
CHUNK_TOKENS = 2048  # prompt tokens a model computes in a step
MAX_MODEL_LEN = 8192
BUSY_S, QUIET = 30.0, 0.1
# before a trace's first row: 0.1 s on the grid that seconds since 1970 have in double precision
FIRST_GAP_S = round(0.1 * 2**22) / 2**22
# of Azure's conversations: prompts have median 1,020 and mean 1,155 tokens, answers 129 and 211
PROMPT_MEDIAN, PROMPT_MEAN, ANSWER_MEDIAN, ANSWER_MEAN = 1020, 1155, 129, 211


@dataclass(frozen=True, slots=True)
class Model:
    """One model as the pool sees it: `block_bytes` of `P` tokens in one layer, K and V and their scales."""

    name: str
    layers: int
    fmt: str
    heads: int
    head_dim: int
    P: int
    block_bytes: int

    @property
    def token_bytes(self) -> float:
        return self.layers * self.block_bytes / self.P

    @property
    def whole_bytes(self) -> int:
        """Of a block in all layers."""
        return self.layers * self.block_bytes

    def shape(self, reserve_tokens: int = 0) -> ModelShape:
        return ModelShape(
            name=self.name,
            layers=self.layers,
            block_bytes=self.block_bytes,
            block_tokens=self.P,
            max_model_len=MAX_MODEL_LEN,
            reserve_tokens=reserve_tokens,
        )

    def with_blocks(self, P: int) -> "Model":
        size = KvLayout(self.fmt, self.heads, self.head_dim, P).block_bytes
        return dataclasses.replace(self, P=P, block_bytes=size)

    def without_scales(self) -> "Model":
        """8-bit codes with one constant scale for the tensor, which no block stores."""
        layout = KvLayout(self.fmt, self.heads, self.head_dim, self.P)
        return dataclasses.replace(self, block_bytes=self.block_bytes - layout.scale_bytes * self.heads)


def mix(P: int | None = 32) -> tuple[Model, ...]:
    """An 8B in bf16, int8 and int4 with zeros, and a 7B of 28 layers in bf16; P None: what our kernels like best."""
    rows = (
        ("8b-kv16", 32, "bf16", 8, 128),
        ("8b-kv8", 32, "int8", 8, 128),
        ("8b-kv4", 32, "int4z", 8, 128),
        ("7b-kv16", 28, "bf16", 4, 128),
    )
    found = []
    for name, layers, fmt, heads, width in rows:
        layout = KvLayout(fmt, heads, width, P or 0)
        found.append(Model(name, layers, fmt, heads, width, layout.block_tokens, layout.block_bytes))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Regime:
    """`load`: mean bytes that blocks would take in a pool without end, over the pool's."""

    name: str
    load: float
    alpha: float


# deep is the deep saturation of the allocator study that set the targets: what no allocator could serve is refused in a
# few steps of a hundred.  In overload every model is short all the time, and all pools are full of something
REGIMES = (
    Regime("light", 0.55, 1.3),
    Regime("deep", 0.8, 0.9),
    Regime("overload", 2.5, 0.9),
)


class Arrival(NamedTuple):
    at_s: float
    model: int
    prompt: int
    answer: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Rows of a trace: seconds since the row before, and tokens of prompt and answer."""

    gaps_s: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray


@dataclass(frozen=True, slots=True)
class Workload:
    """`shares[m]`: model m's part of the byte-seconds of all blocks; `rates[m]`: its requests a second."""

    arrivals: tuple[Arrival, ...]
    seconds: float
    shares: tuple[float, ...]
    rates: tuple[float, ...]


def read_trace(path: str) -> Lengths:
    """Azure's CSV.  ValueError where it is another."""
    try:
        rows = read_azure(Path(path))
    except ValueError as error:
        raise ValueError(f"--trace {error}") from error
    assert rows.times_s is not None, "Azure's trace has times"
    return Lengths(np.diff(rows.times_s, prepend=-FIRST_GAP_S), rows.prompts, rows.outputs)


def make_lengths(rng: np.random.Generator, n: int) -> Lengths:
    prompts = lognormal(rng, n, PROMPT_MEDIAN, PROMPT_MEAN)
    return Lengths(rng.exponential(1.0, n), prompts, lognormal(rng, n, ANSWER_MEDIAN, ANSWER_MEAN))


def draw_lengths(rng: np.random.Generator, trace: Lengths | None, n: int) -> Lengths:
    """`n` rows, the gaps with mean 1."""
    if trace is None:
        found = make_lengths(rng, n)
    else:
        rows = consecutive(rng, len(trace.prompts), n)
        found = Lengths(trace.gaps_s[rows], trace.prompts[rows], trace.answers[rows])
    answers = np.minimum(found.answers, MAX_MODEL_LEN // 4)
    prompts = np.minimum(found.prompts, MAX_MODEL_LEN - answers)
    return Lengths(found.gaps_s / max(found.gaps_s.mean(), 1e-9), prompts, answers)


def make_workload(
    models: tuple[Model, ...],
    regime: Regime,
    seed: int,
    *,
    pool_bytes: int,
    seconds: float,
    trace: Lengths | None = None,
) -> Workload:
    """The same for every arm: nothing here depends on block sizes but through `models`, which are the reference mix."""
    rate = 20.0
    for _ in range(4):
        arrivals = _arrivals(len(models), regime, seed, rate, seconds, trace)
        taken = byte_seconds(arrivals, models)
        load = sum(taken) / (pool_bytes * seconds)
        rate *= regime.load / max(load, 1e-9)
    counts = np.bincount([a.model for a in arrivals], minlength=len(models))
    total = sum(taken)
    return Workload(
        tuple(arrivals),
        seconds,
        tuple(t / total for t in taken),
        tuple(float(c) / seconds for c in counts),
    )


def _arrivals(
    n_models: int, regime: Regime, seed: int, rate: float, seconds: float, trace: Lengths | None
) -> list[Arrival]:
    rng = np.random.default_rng(seed)
    weights = popularity(rng, n_models, regime.alpha)
    n = int(rate * seconds * 1.5) + 50
    rows = draw_lengths(rng, trace, n)
    at = np.cumsum(rows.gaps_s) / rate
    model = pick(rng, weights * np.where(busy(at, n_models, BUSY_S), 1.0, QUIET))
    return [
        Arrival(float(at[i]), int(model[i]), int(rows.prompts[i]), int(rows.answers[i]))
        for i in range(n)
        if at[i] < seconds
    ]


def byte_seconds(arrivals: list[Arrival], models: tuple[Model, ...]) -> list[float]:
    """By model, were nobody ever to wait."""
    taken = [0.0] * len(models)
    for a in arrivals:
        steps = -(-a.prompt // CHUNK_TOKENS) + a.answer
        taken[a.model] += models[a.model].token_bytes * (a.prompt + a.answer / 2) * steps * STEP_S
    return taken
