"""Statistics of one decoder layer over calibration batches: of every linear input, of keys, queries and values.

`Collector` hooks into `forward` and adds up; `stats()` hands them over.  Folds change them along with the weights, so
that they go on describing the layer.  The large part is a Hessian X^T X for each of the four distinct inputs: in float32
4 (2 D^2 + (H K)^2 + F^2) bytes (`hessian_bytes`), 1.0 GB for a layer of Llama-3-8B.  Kept rows take 4 rows (K) bytes each.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.ptq.model import LINEARS, PLAIN, Hooks, Layer, Shape, forward

# q, k and v read one tensor, gate and up another: collected once
FIRST = {name: name for name in LINEARS} | {
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "mlp.up_proj": "mlp.gate_proj",
}


@dataclass(slots=True)
class InputStats:
    """Of the rows that enter a linear layer (K: its inputs)."""

    low_K: Tensor
    high_K: Tensor
    abssum_K: Tensor
    rows: int
    hessian_KK: Tensor | None = None  # sum of x x^T over the rows
    sample_TK: Tensor | None = None

    @property
    def absmax_K(self) -> Tensor:
        return torch.maximum(self.high_K, -self.low_K)

    @property
    def absmean_K(self) -> Tensor:
        return self.abssum_K / self.rows

    def divide(self, s_K: Tensor) -> None:
        """As if every row had been divided by `s_K`, which is positive."""
        for name in ("low_K", "high_K", "abssum_K"):
            setattr(self, name, getattr(self, name) / s_K)
        if self.hessian_KK is not None:
            self.hessian_KK /= s_K[:, None]
            self.hessian_KK /= s_K
        if self.sample_TK is not None:
            self.sample_TK /= s_K

    def permute(self, order_K: Tensor) -> None:
        """As if every row had been x[order_K]."""
        for name in ("low_K", "high_K", "abssum_K"):
            setattr(self, name, getattr(self, name)[order_K])
        if self.hessian_KK is not None:
            self.hessian_KK = self.hessian_KK[order_K][:, order_K]
        if self.sample_TK is not None:
            self.sample_TK = self.sample_TK[:, order_K]


@dataclass(slots=True)
class HeadStats:
    """Of the KV heads; the largest over all tokens.  `pair_GI`: sqrt(k_i^2 + k_{i + K/2}^2), I = K / 2."""

    pair_GI: Tensor
    before_GK: Tensor  # |k| before rotation
    after_GK: Tensor  # |k| after it
    value_GK: Tensor
    query_gram_GKK: Tensor | None = None  # sum of q q^T after rotation, over the query heads of a KV head
    keys_TGK: Tensor | None = None  # a sample, after rotation

    def scale_keys(self, m_GK: Tensor) -> None:
        """As if keys had been multiplied by `m_GK` (alike in both halves) and queries divided by it."""
        self.pair_GI = self.pair_GI * m_GK[:, : m_GK.shape[1] // 2]
        self.before_GK, self.after_GK = self.before_GK * m_GK, self.after_GK * m_GK
        if self.query_gram_GKK is not None:
            self.query_gram_GKK /= m_GK[:, :, None]
            self.query_gram_GKK /= m_GK[:, None]
        if self.keys_TGK is not None:
            self.keys_TGK *= m_GK


@dataclass(slots=True)
class Stats:
    """`inputs` by the name of the linear layer; q, k and v share one entry, gate and up another."""

    inputs: dict[str, InputStats]
    heads: HeadStats


def hessian_bytes(shape: Shape, dtype: torch.dtype = torch.float32) -> int:
    """Memory of the Hessians of one layer."""
    names = dict.fromkeys(FIRST.values())
    return sum(shape.weight_shape(name)[1] ** 2 for name in names) * dtype.itemsize


class _Sample:
    """At most `limit` rows, evenly spread over all that came: every second is let go whenever it is full."""

    def __init__(self, limit: int) -> None:
        self.limit, self.step, self.seen = limit, 1, 0
        self.rows: Tensor | None = None

    def add(self, x: Tensor) -> None:
        if not self.limit:
            return
        taken = x[-self.seen % self.step :: self.step].clone()
        self.seen += len(x)
        self.rows = taken if self.rows is None else torch.cat((self.rows, taken))
        while len(self.rows) > self.limit:
            self.rows, self.step = self.rows[::2].clone(), self.step * 2


class _Largest:
    """The largest value of each element over all rows."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, x: Tensor) -> None:
        self.note(x.amax(0))

    def note(self, most: Tensor) -> None:
        self.value = most if self.value is None else torch.maximum(self.value, most)

    def get(self) -> Tensor:
        if self.value is None:
            raise ValueError("statistics need at least one calibration row, got none")
        return self.value


class _Input:
    def __init__(self, hessian: torch.dtype | None, sample: int) -> None:
        self.high, self.negated = _Largest(), _Largest()
        self.abssum_K: Tensor | None = None
        self.rows = 0
        self.hessian_dtype = hessian
        self.hessian_KK: Tensor | None = None
        self.sample = _Sample(sample)

    def add(self, x_TK: Tensor) -> None:
        K = x_TK.shape[1]
        self.high.add(x_TK)
        # of ways to the smallest value and to the sum, these are the fast ones on a CPU
        self.negated.note(-x_TK.amin(0))
        abssum_K = x_TK.abs().sum(0).double()
        self.abssum_K = abssum_K if self.abssum_K is None else self.abssum_K + abssum_K
        self.rows += len(x_TK)
        self.sample.add(x_TK)
        if self.hessian_dtype is not None:
            if self.hessian_KK is None:
                self.hessian_KK = torch.zeros(K, K, dtype=self.hessian_dtype, device=x_TK.device)
            x_TK = x_TK.to(self.hessian_dtype)
            self.hessian_KK.addmm_(x_TK.T, x_TK)

    def stats(self) -> InputStats:
        high_K = self.high.get()
        assert self.abssum_K is not None, "a range without a sum"
        return InputStats(
            -self.negated.get(),
            high_K,
            self.abssum_K.to(high_K.dtype),
            self.rows,
            self.hessian_KK,
            self.sample.rows,
        )


class Collector(Hooks):
    """Adds up statistics while `forward` runs; what `inner` replaces is replaced, after it was seen here.

    `hessian`: the type that Hessians are added up in (float32 or float64), None for no Hessians.  `sample`: rows kept
    of every input and of the keys, with which come the queries' products; 0 for none.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        hessian: torch.dtype | None = torch.float32,
        sample: int = 0,
        inner: Hooks = PLAIN,
    ) -> None:
        self.shape, self.inner, self.sampled = shape, inner, sample > 0
        self._inputs = {name: _Input(hessian, sample) for name in dict.fromkeys(FIRST.values())}
        self._pairs, self._before, self._after, self._values = (_Largest() for _ in range(4))
        self._keys = _Sample(sample)
        self._gram_GKK: Tensor | None = None

    def input(self, name: str, x: Tensor) -> None:
        if name in self._inputs:
            self._inputs[name].add(x.reshape(-1, x.shape[-1]))
        self.inner.input(name, x)

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.inner.linear(name, x, weight, bias)

    def keys(self, k_BTGK: Tensor) -> None:
        k_XGK = k_BTGK.flatten(0, 1)
        half = k_XGK.shape[-1] // 2
        self._pairs.add(torch.hypot(k_XGK[..., :half], k_XGK[..., half:]))
        self._before.add(k_XGK.abs())
        self.inner.keys(k_BTGK)

    def query(self, q_BTHK: Tensor) -> Tensor:
        if self.sampled:
            G, K = self.shape.kv_heads, self.shape.head_dim
            q_GXK = q_BTHK.flatten(0, 1).view(-1, G, self.shape.heads_per_kv, K).transpose(0, 1)
            q_GXK = q_GXK.reshape(G, -1, K)
            gram_GKK = q_GXK.transpose(1, 2) @ q_GXK
            self._gram_GKK = gram_GKK if self._gram_GKK is None else self._gram_GKK + gram_GKK
        return self.inner.query(q_BTHK)

    def kv(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        self._after.add(k_BTGK.flatten(0, 1).abs())
        self._values.add(v_BTGK.flatten(0, 1).abs())
        self._keys.add(k_BTGK.flatten(0, 1))
        return self.inner.kv(k_BTGK, v_BTGK)

    def stats(self) -> Stats:
        """What was collected; ValueError where that is nothing.  The tensors are handed over, not copied."""
        first = {name: one.stats() for name, one in self._inputs.items()}
        heads = HeadStats(
            self._pairs.get(),
            self._before.get(),
            self._after.get(),
            self._values.get(),
            self._gram_GKK,
            self._keys.rows,
        )
        return Stats({name: first[FIRST[name]] for name in LINEARS}, heads)


@torch.no_grad()
def collect(
    layer: Layer,
    shape: Shape,
    batches: Iterable[Tensor],
    *,
    hessian: torch.dtype | None = torch.float32,
    sample: int = 0,
    keep: Callable[[Tensor], object] | None = None,
) -> Stats:
    """Statistics of `layer` over residual streams x_BTD; each batch's output goes to `keep`."""
    collector = Collector(shape, hessian=hessian, sample=sample)
    for x_BTD in batches:
        out_BTD = forward(layer, shape, x_BTD, collector)
        if keep is not None:
            keep(out_BTD)
    return collector.stats()
