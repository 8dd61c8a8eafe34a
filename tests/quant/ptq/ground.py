"""Random Llamas in float64 as layers and outer tensors, the ground that folds are tested on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.ptq.model import EMBED, FINAL_NORM, HEAD, PLAIN, Hooks, Layer, embed, forward, layer_sizes, logits
from quant.ptq.shape import Shape
from quant.ptq.stats import Collector, Stats

GQA = Shape(
    hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, layers=2, vocab=120, eps=1e-5
)  # fmt: skip
# options of the command for a model this small
SMALL = ["--samples", "6", "--length", "24", "--judged", "2", "--batch", "4", "--quiet"]
SHAPES = {
    "gqa": GQA,
    "mha": replace(GQA, kv_heads=4),
    "tied": replace(GQA, tied=True),
    "biases": replace(GQA, attention_bias=True, mlp_bias=True),
    "no power of two": replace(GQA, hidden=60, heads=6, kv_heads=3, head_dim=12, intermediate=100),
    "no hadamard": replace(GQA, hidden=54, head_dim=10),
}


@dataclass
class Model:
    shape: Shape
    layers: list[Layer]
    outer: dict[str, Tensor]

    def copy(self) -> "Model":
        layers = [{n: t.clone() for n, t in layer.items()} for layer in self.layers]
        return Model(self.shape, layers, {n: t.clone() for n, t in self.outer.items()})

    def tensors(self) -> dict[str, Tensor]:
        named = {f"model.layers.{i}.{n}": t for i, layer in enumerate(self.layers) for n, t in layer.items()}
        return named | self.outer

    def put(self, name: str, value: Tensor) -> None:
        if not name.startswith("model.layers."):
            self.outer[name] = value
            return
        index, _, inside = name.removeprefix("model.layers.").partition(".")
        self.layers[int(index)][inside] = value

    def run(self, ids_BT: Tensor, hooks: Callable[[int], Hooks] = lambda i: PLAIN) -> Tensor:
        x_BTD = embed(self.outer, ids_BT)
        for i, layer in enumerate(self.layers):
            x_BTD = forward(layer, self.shape, x_BTD, hooks(i))
        return logits(self.outer, self.shape, x_BTD)

    def stats(self, ids_BT: Tensor, sample: int = 24) -> list[Stats]:
        collectors = [Collector(self.shape, hessian=torch.float64, sample=sample) for _ in self.layers]
        for ids_T in ids_BT:
            self.run(ids_T[None], lambda i: collectors[i])
        return [c.stats() for c in collectors]


def random_model(shape: Shape = GQA, seed: int = 0) -> Model:
    """Weights spread so that logits differ; a few channels of keys and of the residual stream stand out."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64) * scale

    layers = []
    for _ in range(shape.layers):
        layer: Layer = {}
        for name, size in layer_sizes(shape).items():
            if len(size) == 2:
                layer[name] = normal(*size, scale=1.2 / size[1] ** 0.5)
            elif name.endswith("bias"):
                layer[name] = normal(*size, scale=0.3)
            else:
                layer[name] = 0.7 + 0.6 * torch.rand(size, generator=g, dtype=torch.float64)
        layer["self_attn.k_proj.weight"][[3, shape.head_dim + 5]] *= 12
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            layer[name][[1, 17]] *= 20
        layers.append(layer)
    outer = {EMBED: normal(shape.vocab, shape.hidden), FINAL_NORM: torch.ones(shape.hidden).double() * 1.25}
    outer[EMBED][:, [1, 17]] *= 20
    outer[FINAL_NORM][::3] = 0.8
    if not shape.tied:
        outer[HEAD] = normal(shape.vocab, shape.hidden, scale=0.2)
    return Model(shape, layers, outer)


def token_ids(rows: int = 3, length: int = 17, vocab: int = 120, seed: int = 5) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def group_round(w_NK: Tensor, group: int = 16, top: float = 7.0) -> Tensor:
    """Round to nearest in 4 bits with a scale a group (no largest value on a tie): enough of a quantizer for what is tested here."""
    w_NQg = w_NK.view(len(w_NK), -1, group)
    scale = (w_NQg.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12)
    return ((w_NQg / scale).round().clamp(-8, 7) * scale).view_as(w_NK)


def row_round(x: Tensor, top: int = 127) -> Tensor:
    """Each row (last axis) to integers of at most `top` with a scale of its own."""
    scale = (x.abs().amax(-1, keepdim=True) / top).clamp_min(1e-12)
    return (x / scale).round() * scale
