"""FineServe's slab-aware placement (arXiv 2509.06261) as its public code has it up to commit 9973898.

Per model and degree of tensor parallelism the least batch that sustains the rate is read from a profile, by times a
token that are averaged over lengths; the degree with the smallest such batch is taken.  Models go by falling need,
1.3 x weights + the KV of that batch, each to the GPUs of one node where the blocks that stay free are most:

    score = sum over GPUs of floor((free - need / tp) / H) / 1e5,   H the harmonic mean of layers x block bytes / tp

of those on the GPU and the newcomer.  Sizes are GB of 80 a GPU as there, KV in GiB; lengths are 0.8 of LMSYS's P95.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, floor
from typing import NamedTuple

PROMPT, ANSWER = 903 * 0.8, 631 * 0.8
P95_PROMPT, SLO_BUFFER_S = 903, 0.004
DEGREES = (1, 2, 4, 8)
ACTIVATION_GB, PROCESS_GB, WEIGHT_FACTOR = 3.0, 1.6, 1.3
BLOCK_TOKENS = 16
GIB = 1 << 30


class Row(NamedTuple):
    """A row of the profile: a batch of prompts and answers of so many tokens, and what both phases took, seconds."""

    batch: int
    prompt_tokens: int
    answer_tokens: int
    ttft_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llm:
    """`billions` of parameters; bits of weights, activations and KV; `profile` by degree.  `slo_s`: of TTFT, None: computed."""

    name: str
    billions: float
    bits: tuple[int, int, int]
    layers: int
    kv_heads: int
    head_dim: int
    rate: float
    profile: Mapping[int, Sequence[Row]]
    zeros: bool = False  # QoQ: a zero point beside each scale
    base_tp: int = 1
    slo_s: float | None = None
    prompt: float = PROMPT
    answer: float = ANSWER

    @property
    def weights_gb(self) -> float:
        return self.billions * self.bits[0] / 8

    @property
    def sequence_gb(self) -> float:
        """Keys and values of a mean request."""
        token = 2 * self.layers * self.kv_heads * self.head_dim * self.bits[2] / 8
        return token * (self.prompt + self.answer) / GIB

    @property
    def block_gb(self) -> float:
        """Of all layers."""
        per_head = self.head_dim + (2 if self.zeros else 1)
        return self.layers * 2 * per_head * self.kv_heads * self.bits[2] / 8 * BLOCK_TOKENS / GIB


class Choice(NamedTuple):
    """`batch`: the least that sustains the rate, of each of `copies`."""

    tp: int
    copies: int
    batch: int


def line(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """On the line through the two neighbours of x, beyond the ends too."""
    if len(xs) == 1:
        return ys[0] / xs[0] * x
    i = 1
    while i < len(xs) - 1 and xs[i] < x:
        i += 1
    x0, x1, y0, y1 = xs[i - 1], xs[i], ys[i - 1], ys[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def per_token(rows: Sequence[Row], batch: int) -> tuple[float, float]:
    """Seconds of a prompt token and of an answer token in a batch: means by length, then over lengths."""
    mine = [r for r in rows if r.batch == batch]

    def mean(length: Callable[[Row], int], seconds: Callable[[Row], float]) -> float:
        of: dict[int, list[float]] = {}
        for r in mine:
            of.setdefault(length(r), []).append(seconds(r))
        each = [sum(v) / len(v) / n for n, v in of.items()]
        return sum(each) / len(each)

    return mean(lambda r: r.prompt_tokens, lambda r: r.ttft_s), mean(
        lambda r: r.answer_tokens, lambda r: r.decode_s
    )


def choose(llm: Llm, slo_s: float, gpu_gb: float, most_tp: int) -> Choice | None:
    """The satisfied degree with the smallest batch; None where there is none (the model is dropped there)."""
    found = []
    for tp in DEGREES:
        if tp <= most_tp and llm.profile.get(tp):
            choice = _at(llm, tp, slo_s, gpu_gb)
            if choice is not None:
                found.append(choice)
    return min(found, key=lambda c: c.batch, default=None)


def _at(llm: Llm, tp: int, slo_s: float, gpu_gb: float) -> Choice | None:
    rows = llm.profile[tp]
    batches = sorted({r.batch for r in rows})
    times = [per_token(rows, b) for b in batches]
    ttft = [prompt * llm.prompt for prompt, _ in times]
    rates = [
        b / (prompt * llm.prompt + answer * llm.answer)
        for b, (prompt, answer) in zip(batches, times, strict=True)
    ]
    kept_gb = llm.weights_gb + ACTIVATION_GB * llm.bits[1] / 8 + PROCESS_GB
    by_memory = max(0.0, gpu_gb * tp - kept_gb) // llm.sequence_gb
    by_slo = floor(line(slo_s, ttft, batches))
    rate, copies = llm.rate, 1
    while rate > 0:
        batch = ceil(line(rate, rates, batches))
        if batch <= min(by_memory, by_slo):
            return Choice(tp, copies, max(batch, 1))
        copies += 1
        rate = llm.rate // copies  # whole requests a second, as there
    return None


def slo_of(llm: Llm, scale: float) -> float:
    if llm.slo_s is not None:
        return llm.slo_s
    prompt, _ = per_token(llm.profile[llm.base_tp], min(r.batch for r in llm.profile[llm.base_tp]))
    return scale * prompt * P95_PROMPT + SLO_BUFFER_S


class Placed(NamedTuple):
    """A copy of model number `model`: its need, and the GPUs it is on, none where it found no room."""

    model: int
    choice: Choice
    need_gb: float
    gpus: tuple[int, ...]


def slab_aware(
    llms: Sequence[Llm], nodes: Sequence[Sequence[int]], *, gpu_gb: float = 80.0, slo_scale: float = 50.0
) -> list[Placed]:
    """In the order in which they were placed.  `nodes`: numbers of the GPUs of each."""
    wanted = []
    for i, llm in enumerate(llms):
        choice = choose(llm, slo_of(llm, slo_scale), gpu_gb, max(map(len, nodes)))
        if choice is not None:
            need = WEIGHT_FACTOR * llm.weights_gb + llm.sequence_gb * choice.batch
            wanted += [(need, i, choice)] * choice.copies
    wanted.sort(key=lambda w: -w[0])
    free = {g: gpu_gb for node in nodes for g in node}
    on: dict[int, list[float]] = {g: [] for g in free}  # tp / (layers x block bytes) of those on it
    placed = []
    for need, i, choice in wanted:
        part = need / choice.tp
        own = choice.tp / llms[i].block_gb
        best: tuple[int, ...] = ()
        most = 0.0
        for node in nodes:
            fitting = [g for g in node if free[g] >= part]
            for gpus in combinations(fitting, choice.tp):
                score = 0.0
                for g in gpus:
                    mean = (len(on[g]) + 1) / (sum(on[g]) + own)
                    score += (free[g] - part) // mean / 1e5
                if score > most:
                    best, most = gpus, score
        for g in best:
            free[g] -= part
            on[g].append(own)
        placed.append(Placed(i, choice, need, best))
    return placed
