"""Quantizes one layer part by part, so that each part is rounded for what the rounded parts before it put out.

q, k and v; then o, for what attention makes of them; then gate and up; then down.  The residual streams of the
calibration are advanced in place, and nothing of a layer is held for all tokens but the input of o.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.ptq import fake
from quant.ptq.folding import Target
from quant.ptq.model import ATTENTION_NORM, MLP_NORM, PLAIN, Hooks, Layer, Shape, forward, rms_norm
from quant.ptq.recipe import Recipe
from quant.ptq.weight import Made, Products, quantize_weight

Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
# columns of a Hessian that are made at once: the half below the diagonal is not
HESSIAN_BLOCK = 1024


class Runs(Hooks):
    """The arithmetic of the engine: rows, keys, values and queries rounded as `target` says."""

    def __init__(self, target: Target, channel_GK: Tensor | None = None) -> None:
        self.target, self.channel_GK = target, channel_GK
        self._last: tuple[Tensor, Tensor] | None = None

    def linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # q, k and v read one tensor: rounded once
        if self._last is None or self._last[0] is not x:
            self._last = (x, self.target.rows(x))
        return F.linear(self._last[1], weight, bias)

    def query(self, q_BTHK: Tensor) -> Tensor:
        return q_BTHK if self.target.queries is None else fake.queries(q_BTHK)

    def kv(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        if self.target.kv is None:
            return k_BTGK, v_BTGK
        return fake.kv(self.target.kv, k_BTGK, v_BTGK, self.channel_GK)


class _Reached(Exception):
    """The input that was waited for."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class _UpToO(Hooks):
    """Stops a forward pass at the output projection; until then all is as `inner` has it."""

    def __init__(self, inner: Hooks) -> None:
        self.linear, self.query, self.kv = inner.linear, inner.query, inner.kv  # type: ignore[method-assign]

    def input(self, name: str, x: Tensor) -> None:
        if name == O:
            raise _Reached(x)


@dataclass(slots=True)
class Passage:
    """Residual streams on their way through one layer, a part at a time; `streams`, x_BTD each, change in place."""

    layer: Layer
    shape: Shape
    hooks: Hooks
    streams: list[Tensor]

    def whole(self) -> None:
        for i, x_BTD in enumerate(self.streams):
            self.streams[i] = forward(self.layer, self.shape, x_BTD, self.hooks)

    def normed(self, norm: str) -> Iterator[Tensor]:
        """The inputs of q, k and v, or of gate and up."""
        return (rms_norm(x_BTD, self.layer[norm], self.shape.eps) for x_BTD in self.streams)

    def mixed(self) -> list[Tensor]:
        """The inputs of o."""
        return [self._up_to_o(x_BTD) for x_BTD in self.streams]

    def add_attention(self, mixed: list[Tensor]) -> None:
        """Adds what o makes of them, and takes them away one by one."""
        for i in range(len(self.streams)):
            self.streams[i] += self._linear(O, mixed.pop(0))

    def gated(self) -> Iterator[Tensor]:
        """The inputs of down."""
        for h_BTD in self.normed(MLP_NORM):
            yield F.silu(self._linear(GATE, h_BTD), inplace=True).mul_(self._linear(UP, h_BTD))

    def add_mlp(self) -> None:
        for i, gated_BTF in enumerate(self.gated()):
            self.streams[i] += self._linear(DOWN, gated_BTF)

    def _up_to_o(self, x_BTD: Tensor) -> Tensor:
        try:
            forward(self.layer, self.shape, x_BTD, _UpToO(self.hooks))
        except _Reached as reached:
            return reached.x
        raise AssertionError("forward passed o_proj without saying so")

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self.hooks.linear(name, x, self.layer[f"{name}.weight"], self.layer.get(f"{name}.bias"))


class LayerQuantizer:
    """Rounds `layer` (its matrices become what the codes stand for) and advances `streams`, x_BTD each, in place.

    `references`: the same tokens' streams in the model that is folded but not rounded, for the recipes that match them.
    `made` holds the results by linear layer.  Without a step that asks for Hessians everything is rounded at once.
    """

    def __init__(
        self,
        layer: Layer,
        shape: Shape,
        target: Target,
        recipe: Recipe,
        streams: list[Tensor],
        references: list[Tensor] | None = None,
        channel_GK: Tensor | None = None,
    ) -> None:
        self.layer, self.target, self.recipe = layer, target, recipe
        self.passages = [Passage(layer, shape, Runs(target, channel_GK), streams)]
        if references is not None:
            # matrices are replaced, not written to: a shallow copy keeps the plain ones
            self.passages.append(Passage(dict(layer), shape, PLAIN, references))
        self.made: dict[str, Made] = {}

    @torch.no_grad()
    def run(self) -> dict[str, Made]:
        passages = self.passages
        if not self.recipe.wants_hessian:
            self._round((Q, K, V, O, GATE, UP, DOWN), None)
            passages[0].whole()
            return self.made
        self._round((Q, K, V), self._products(*(p.normed(ATTENTION_NORM) for p in passages)))
        mixed = [p.mixed() for p in passages]
        self._round((O,), self._products(*mixed))
        for p, inputs in zip(passages, mixed, strict=True):
            p.add_attention(inputs)
        del mixed, inputs
        self._round((GATE, UP), self._products(*(p.normed(MLP_NORM) for p in passages)))
        self._round((DOWN,), self._products(*(p.gated() for p in passages)))
        for p in passages:
            p.add_mlp()
        return self.made

    def _round(self, names: Iterable[str], products: Products | None) -> None:
        for name in names:
            key = f"{name}.weight"
            self.made[name] = quantize_weight(self.layer[key], self.target.rounding, self.recipe, products)
            self.layer[key] = self.made[name].weight.dequantize()

    def _products(self, inputs: Iterable[Tensor], references: Iterable[Tensor] | None = None) -> Products:
        """Of the rows as they are multiplied: rounded."""
        hessian_KK: Tensor | None = None
        drift_KK: Tensor | None = None
        rows = 0
        others: Iterable[Tensor | None] = itertools.repeat(None) if references is None else references
        for x, reference in zip(inputs, others, strict=False):
            x_TK = self.target.rows(x.reshape(-1, x.shape[-1]))
            hessian_KK = add_products(hessian_KK, x_TK)
            if reference is not None:
                moved_TK = reference.reshape(x_TK.shape) - x_TK
                drift_KK = moved_TK.T @ x_TK if drift_KK is None else drift_KK.addmm_(moved_TK.T, x_TK)
            rows += len(x_TK)
        assert hessian_KK is not None, "no calibration rows"
        # mirrored, and a mean: sums of many rows would leave float32's range of comfort
        hessian_KK = hessian_KK.triu_().add_(hessian_KK.triu(1).T).div_(rows)
        return Products(hessian_KK, None if drift_KK is None else drift_KK.div_(rows))


def add_products(total_KK: Tensor | None, x_TK: Tensor) -> Tensor:
    """The part of X^T X on and above the diagonal, added to `total_KK` in place; below it may stand anything."""
    K = x_TK.shape[1]
    if total_KK is None:
        total_KK = torch.zeros(K, K)
    for start in range(0, K, HESSIAN_BLOCK):
        end = min(start + HESSIAN_BLOCK, K)
        total_KK[start:end, start:].addmm_(x_TK[:, start:end].T, x_TK[:, start:])
    return total_KK
