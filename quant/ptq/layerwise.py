"""Quantizes one layer part by part, so that each part is rounded for what the rounded parts before it put out.

q, k and v; then o, for what attention makes of them; then gate and up; then down.  The residual streams of the
calibration are advanced in place, and nothing of a layer is held for all tokens but the input of o.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.ptq import fake
from quant.ptq.folding import Target
from quant.ptq.model import ATTENTION_NORM, MLP_NORM, Hooks, Layer, Shape, forward, rms_norm
from quant.ptq.recipe import Recipe
from quant.ptq.weight import Made, quantize_weight

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


class _UpToO(Runs):
    """Stops a forward pass at the output projection."""

    def input(self, name: str, x: Tensor) -> None:
        if name == O:
            raise _Reached(x)


@dataclass(slots=True)
class LayerQuantizer:
    """Rounds `layer` in place (its matrices become what the codes stand for) and advances `streams`, x_BTD each.

    `made` holds the results by linear layer.  Without a step that asks for Hessians everything is rounded at once.
    """

    layer: Layer
    shape: Shape
    target: Target
    recipe: Recipe
    streams: list[Tensor]
    channel_GK: Tensor | None = None
    made: dict[str, Made] = field(default_factory=dict)

    @torch.no_grad()
    def run(self) -> dict[str, Made]:
        hooks = Runs(self.target, self.channel_GK)
        if not self.recipe.wants_hessian:
            self._round((Q, K, V, O, GATE, UP, DOWN), None)
            for i, x_BTD in enumerate(self.streams):
                self.streams[i] = forward(self.layer, self.shape, x_BTD, hooks)
            return self.made
        self._round((Q, K, V), self._hessian(self._normed(ATTENTION_NORM)))
        inputs = [self._mixed(x_BTD) for x_BTD in self.streams]
        self._round((O,), self._hessian(inputs))
        for i, mixed_BTX in enumerate(inputs):
            self.streams[i] = self.streams[i] + self._linear(O, mixed_BTX, hooks)
        del inputs
        self._round((GATE, UP), self._hessian(self._normed(MLP_NORM)))
        self._round((DOWN,), self._hessian(self._gated(x, hooks) for x in self.streams))
        for i, x_BTD in enumerate(self.streams):
            self.streams[i] = x_BTD + self._linear(DOWN, self._gated(x_BTD, hooks), hooks)
        return self.made

    def _round(self, names: Iterable[str], hessian_KK: Tensor | None) -> None:
        for name in names:
            key = f"{name}.weight"
            self.made[name] = quantize_weight(self.layer[key], self.target.rounding, self.recipe, hessian_KK)
            self.layer[key] = self.made[name].weight.dequantize()

    def _hessian(self, inputs: Iterable[Tensor]) -> Tensor:
        """Of the rows as they are multiplied: rounded."""
        hessian_KK: Tensor | None = None
        rows = 0
        for x in inputs:
            x_TK = self.target.rows(x.reshape(-1, x.shape[-1]))
            hessian_KK = add_products(hessian_KK, x_TK)
            rows += len(x_TK)
        assert hessian_KK is not None, "no calibration rows"
        # mirrored, and a mean: sums of many rows would leave float32's range of comfort
        return hessian_KK.triu_().add_(hessian_KK.triu(1).T).div_(rows)

    def _normed(self, norm: str) -> Iterator[Tensor]:
        return (rms_norm(x_BTD, self.layer[norm], self.shape.eps) for x_BTD in self.streams)

    def _mixed(self, x_BTD: Tensor) -> Tensor:
        """The input of o."""
        try:
            forward(self.layer, self.shape, x_BTD, _UpToO(self.target, self.channel_GK))
        except _Reached as reached:
            return reached.x
        raise AssertionError("forward passed o_proj without saying so")

    def _gated(self, x_BTD: Tensor, hooks: Hooks) -> Tensor:
        """The input of down."""
        h_BTD = rms_norm(x_BTD, self.layer[MLP_NORM], self.shape.eps)
        return F.silu(self._linear(GATE, h_BTD, hooks)) * self._linear(UP, h_BTD, hooks)

    def _linear(self, name: str, x: Tensor, hooks: Hooks) -> Tensor:
        return hooks.linear(name, x, self.layer[f"{name}.weight"], self.layer.get(f"{name}.bias"))


def add_products(total_KK: Tensor | None, x_TK: Tensor) -> Tensor:
    """The part of X^T X on and above the diagonal, added to `total_KK` in place; below it may stand anything."""
    K = x_TK.shape[1]
    if total_KK is None:
        total_KK = torch.zeros(K, K)
    for start in range(0, K, HESSIAN_BLOCK):
        end = min(start + HESSIAN_BLOCK, K)
        total_KK[start:end, start:].addmm_(x_TK[:, start:end].T, x_TK[:, start:])
    return total_KK
