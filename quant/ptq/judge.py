"""Held-back text through the plain layers and the quantized ones side by side, one layer at a time.

So a model larger than memory is judged too.  KL is KL(plain || quantized) in nats, mean over tokens; perplexity is over
whole windows from their second token on.  On the first windows the outputs of every matrix are compared as well.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.ptq.model import PLAIN, Hooks, Layer, Shape, embed, forward, logits
from quant.ptq.rotate import Orthogonal

ROWS_AT_ONCE = 256  # tokens whose logits are held at once
ERROR_TOKENS = 512  # whose outputs are compared, matrix by matrix: each costs two more passes


@dataclass(slots=True)
class Errors:
    """Of the outputs of one matrix, biases apart; sums of squares, and the ratios that the report has.

    `output`: of the rounded matrix against the one that was rounded, on the same rows, rounded as they are multiplied.
    `total`: against the plain model's, on the rows that this has: what was lost before is in it, and what `match` makes
    up for.
    """

    wrong: float = 0.0
    whole: float = 0.0
    wrong_total: float = 0.0
    whole_total: float = 0.0

    @property
    def output(self) -> float:
        return self.wrong / max(self.whole, 1e-30)

    @property
    def total(self) -> float:
        return self.wrong_total / max(self.whole_total, 1e-30)


class _Meant(Hooks):
    """Keeps what every matrix puts out."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = self.outputs[name] = F.linear(x, weight)
        return y if bias is None else y + bias


class _Compared(Hooks):
    """The quantized layer as `inner` runs it, its outputs compared with those of `folded` and with those `meant`."""

    def __init__(self, inner: Hooks, folded: Layer, meant: dict[str, Tensor]) -> None:
        self.query, self.kv = inner.query, inner.kv  # type: ignore[method-assign]
        self.inner, self.folded, self.meant = inner, folded, meant
        self.errors: dict[str, Errors] = {}

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = self.inner.linear(name, x, weight, None)
        same = self.inner.linear(name, x, self.folded[f"{name}.weight"], None)
        meant = self.meant.pop(name)
        self.errors[name] = Errors(*(float(z.square().sum()) for z in (y - same, same, y - meant, meant)))
        return y if bias is None else y + bias


@dataclass(frozen=True, slots=True)
class Quality:
    """`top1`: the share of tokens at which both models find the same one likeliest."""

    perplexity: float
    plain_perplexity: float
    kl: float
    top1: float
    tokens: int


class Judge:
    """Both models' residual streams on `ids_ST` (S windows of T tokens)."""

    def __init__(self, ids_ST: Tensor, batch: int = 8) -> None:
        count, length = ids_ST.shape
        compared = min(count, max(1, ERROR_TOKENS // length))
        # the first part is the one whose outputs are compared
        self.parts = [p for p in (ids_ST[:compared], *ids_ST[compared:].split(batch)) if len(p)]
        self.plain: list[Tensor] = []
        self.quantized: list[Tensor] = []
        self.before: Tensor | None = None  # the first part's plain stream, one layer back

    def start(self, plain_outer: Mapping[str, Tensor], outer: Mapping[str, Tensor]) -> None:
        """The embeddings of both."""
        self.plain = [embed(dict(plain_outer), ids) for ids in self.parts]
        self.quantized = [embed(dict(outer), ids) for ids in self.parts]

    @torch.no_grad()
    def plain_layer(self, layer: Layer, shape: Shape) -> None:
        self.before = self.plain[0]
        self.plain = [forward(layer, shape, x, PLAIN) for x in self.plain]

    @torch.no_grad()
    def quantized_layer(
        self, layer: Layer, folded: Layer, shape: Shape, hooks: Hooks, turned: Orthogonal | None = None
    ) -> dict[str, Errors]:
        """After `plain_layer`.  `folded`: the layer before it was rounded; `turned`: see `stream_error`."""
        assert self.before is not None, "the plain layer comes first"
        x_BTD, self.before = self.before, None
        meant = _Meant()
        forward(folded, shape, x_BTD if turned is None else turned.apply(x_BTD).float(), meant)
        compared = _Compared(hooks, folded, meant.outputs)
        for i, x in enumerate(self.quantized):
            self.quantized[i] = forward(layer, shape, x, hooks if i else compared)
        return compared.errors

    def stream_error(self, turned: Orthogonal | None) -> float:
        """|quantized - plain|^2 / |plain|^2 of the residual streams; `turned`: how the quantized one is rotated."""
        error = whole = 0.0
        for x_BTD, y_BTD in zip(self.plain, self.quantized, strict=True):
            if turned is not None:
                x_BTD = turned.apply(x_BTD).float()
            error += float((y_BTD - x_BTD).square().sum())
            whole += float(x_BTD.square().sum())
        return error / max(whole, 1e-30)

    @torch.no_grad()
    def finish(self, plain_outer: dict[str, Tensor], outer: dict[str, Tensor], shape: Shape) -> Quality:
        loss = plain_loss = kl = same = 0.0
        count = predicted = 0
        for ids_BT, x, y in zip(self.parts, self.plain, self.quantized, strict=True):
            for ids_T, x_TD, y_TD in zip(ids_BT, x, y, strict=True):
                for start in range(0, len(ids_T), ROWS_AT_ONCE):
                    rows = slice(start, start + ROWS_AT_ONCE)
                    p_TV = logits(plain_outer, shape, x_TD[rows]).log_softmax(-1)
                    q_TV = logits(outer, shape, y_TD[rows]).log_softmax(-1)
                    kl += float(F.kl_div(q_TV, p_TV, reduction="sum", log_target=True))
                    same += int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
                    next_T = ids_T[start + 1 : start + 1 + ROWS_AT_ONCE]
                    plain_loss += float(F.nll_loss(p_TV[: len(next_T)], next_T, reduction="sum"))
                    loss += float(F.nll_loss(q_TV[: len(next_T)], next_T, reduction="sum"))
                    count, predicted = count + len(p_TV), predicted + len(next_T)
        return Quality(
            perplexity=math.exp(min(700.0, loss / max(1, predicted))),
            plain_perplexity=math.exp(min(700.0, plain_loss / max(1, predicted))),
            kl=max(0.0, kl / count),
            top1=same / count,
            tokens=count,
        )
