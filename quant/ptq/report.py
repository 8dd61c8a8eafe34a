"""What quantization cost: errors of every matrix and layer, KL and perplexity against the plain model; JSON and a table.

`Judge` runs held-back text through the plain layers and the quantized ones side by side, one layer at a time, so that
a model larger than memory is judged too.  KL is KL(plain || quantized) in nats, mean over tokens; perplexity is over
whole windows from their second token on.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quant.ptq.model import PLAIN, Hooks, Layer, Shape, embed, forward, logits
from quant.ptq.rotate import Orthogonal

ROWS_AT_ONCE = 256  # tokens whose logits are held at once


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
        self.ids_ST, self.batch = ids_ST, batch
        self.plain: list[Tensor] = []
        self.quantized: list[Tensor] = []

    def start(self, plain_outer: Mapping[str, Tensor], outer: Mapping[str, Tensor]) -> None:
        """The embeddings of both."""
        self.plain = [embed(dict(plain_outer), ids) for ids in self.ids_ST.split(self.batch)]
        self.quantized = [embed(dict(outer), ids) for ids in self.ids_ST.split(self.batch)]

    @torch.no_grad()
    def plain_layer(self, layer: Layer, shape: Shape) -> None:
        self.plain = [forward(layer, shape, x, PLAIN) for x in self.plain]

    @torch.no_grad()
    def quantized_layer(self, layer: Layer, shape: Shape, hooks: Hooks) -> None:
        self.quantized = [forward(layer, shape, x, hooks) for x in self.quantized]

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
        for ids_BT, x, y in zip(self.ids_ST.split(self.batch), self.plain, self.quantized, strict=True):
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


def figures(job: Any, outcome: Any, before: list[tuple[str, Any]]) -> dict[str, Any]:
    """The report as JSON holds it; `before`: shorter recipes and their outcomes."""
    return {
        "model": str(job.model),
        "recipe": str(job.recipe),
        "scheme": str(job.target.rounding.scheme),
        "kv": job.target.kv,
        "calibration_tokens": 0 if job.calib_ST is None else job.calib_ST.numel(),
        "quality": None if outcome.quality is None else asdict(outcome.quality),
        "steps": [{"recipe": name, "quality": asdict(o.quality)} for name, o in before],
        "layers": outcome.layers,
        "seconds": {name: round(s, 2) for name, s in outcome.seconds.items()},
    }


def table(report: Mapping[str, Any]) -> str:
    """What a person wants to see of it."""
    lines = [
        "layer   weight error   output error   stream error   (squared, relative; mean over the matrices)"
    ]
    for i, layer in enumerate(report["layers"]):
        rows = list(layer["linears"].values())
        cells = [
            mean([r["weight_error"] for r in rows]),
            mean([r["output_error"] for r in rows]),
            layer["stream_error"],
        ]
        lines.append(f"{i:5d}" + "".join(f"{'-':>15}" if c is None else f"{c:15.2e}" for c in cells))
        lines += [
            f"      {name}: {r['note']}, rounded to nearest"
            for name, r in layer["linears"].items()
            if r["note"]
        ]
    judged = [(s["recipe"], s["quality"]) for s in report["steps"]]
    if report["quality"] is not None:
        judged.append((report["recipe"], report["quality"]))
        plain = report["quality"]["plain_perplexity"]
        lines.append(f"held-back text, {report['quality']['tokens']} tokens: plain perplexity {plain:.4f}")
        lines += [
            f"  perplexity {q['perplexity']:.4f} ({100 * (q['perplexity'] / plain - 1):+.2f} %), KL {q['kl']:.5f}, "
            f"top-1 {100 * q['top1']:.2f} %: {name}"
            for name, q in judged
        ]
    seconds = ", ".join(f"{name} {s:.1f}" for name, s in report["seconds"].items())
    return "\n".join([*lines, f"seconds: {seconds}"])


def mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
