"""Runs a recipe over a model, layer by layer: in memory are one layer, its Hessians and the residual streams.

For every layer: rotate, look at what goes through it, fold, round part by part, and hand the quantized layer's outputs
to the next.  What is finished lies in a `Work` folder; a run that was killed goes on from there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from quant.ptq.folding import Target, fold, needs
from quant.ptq.judge import Errors, Judge, Quality
from quant.ptq.layerwise import LayerQuantizer, Runs
from quant.ptq.model import LINEARS, Layer, Source, embed
from quant.ptq.recipe import Recipe
from quant.ptq.rotate import Orthogonal, Rotation, rotate_layer, rotate_outer, rotation
from quant.ptq.spent import Spent
from quant.ptq.state import Work
from quant.ptq.stats import Stats, collect
from quant.ptq.weight import Made, rounding_of
from quant.ptq.write import Writer
from quant.scheme import Scheme

CALIB, REFERENCE, PLAIN_JUDGED, JUDGED = "calib", "reference", "plain", "quantized"


@dataclass(frozen=True, slots=True)
class Job:
    """`calib_ST`: windows of token ids, None for recipes that look at no data.  `judged_ST`: others, to report on."""

    model: Path
    recipe: Recipe
    target: Target
    calib_ST: Tensor | None = None
    judged_ST: Tensor | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        if self.recipe.wants_data and self.calib_ST is None:
            raise ValueError(f"{self.recipe} needs calibration text: give --calib or --calib-tokens")


@dataclass(slots=True)
class Outcome:
    """`layers`: figures of every decoder layer.  `outer`: the tensors outside them."""

    layers: list[dict[str, Any]] = field(default_factory=list)
    quality: Quality | None = None
    schemes: dict[Scheme, list[str]] = field(default_factory=dict)
    outer: dict[str, Tensor] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)


class Run:
    """One job; `writer` and `work` are None where only the report is wanted."""

    def __init__(
        self,
        job: Job,
        writer: Writer | None = None,
        work: Work | None = None,
        show: bool = False,
        spent: Spent | None = None,
    ) -> None:
        recipe = job.recipe
        rounding = rounding_of(recipe, job.target.rounding)
        self.job, self.target, self.writer, self.work = (
            job,
            replace(job.target, rounding=rounding),
            writer,
            work,
        )
        self.source = Source(job.model)
        self.shape = self.source.shape
        turn = recipe.find("rotate")
        self.turn: Rotation | None = None
        if turn is not None:
            seed = 0 if turn["signs"] else None
            self.turn = rotation(self.shape, residual=turn["residual"], heads=turn["heads"], seed=seed)
        self.outcome = Outcome(spent=spent or Spent())
        self.judge = None if job.judged_ST is None else Judge(job.judged_ST, job.batch)
        self.streams: list[Tensor] = []
        # of the model that is not rounded
        self.references: list[Tensor] | None = None
        self.show = show

    @torch.no_grad()
    def __call__(self) -> Outcome:
        first = self._start()
        bar = tqdm(
            range(first, self.shape.layers), desc=self.job.model.name, unit="layer", disable=not self.show
        )
        for i in bar:
            bar.set_postfix_str("reading")
            self._layer(i, bar)
        self.streams, self.references = [], None
        outer = self._outer()
        if self.judge is not None:
            with self.outcome.spent.timed("report"):
                wide = {name: x.float() for name, x in outer.items()}
                self.outcome.quality = self.judge.finish(self.source.outer(), wide, self.shape)
        self.outcome.outer = outer
        return self.outcome

    def _outer(self) -> dict[str, Tensor]:
        """Embeddings, last norm and head of the quantized model, as they will be stored.  Made anew when they are
        wanted: with a large vocabulary they are larger than a layer."""
        outer = self.source.outer()
        if self.turn is not None:
            rotate_outer(outer, self.turn)
        return {name: x.to(self.target.stored) for name, x in outer.items()}

    def _start(self) -> int:
        """The streams before the first layer that is to be done, and its number."""
        done = 0 if self.work is None else self.work.next_layer
        if done:
            assert self.work is not None, "done without a folder"
            held, self.work.streams = self.work.streams, {}
            if self.work.spent is not None:
                self.outcome.spent.add_before(self.work.spent)
            self.streams, self.references = held.get(CALIB, []), held.get(REFERENCE)
            if self.judge is not None:
                self.judge.plain, self.judge.quantized = held[PLAIN_JUDGED], held[JUDGED]
            for i in range(done):
                self._book(i, self.work.figures(i))
            return done
        if self.job.calib_ST is not None and self.job.recipe.wants_data:
            outer = self._outer()
            self.streams = [embed(outer, ids).float() for ids in self.job.calib_ST.split(self.job.batch)]
            if self.job.recipe.find("match") is not None:
                # of its own memory: both are added to in place
                self.references = [x.clone() for x in self.streams]
        if self.judge is not None:
            self.judge.start(self.source.outer(), {name: x.float() for name, x in self._outer().items()})
        return 0

    def _layer(self, i: int, bar: Any) -> None:
        timed = self.outcome.spent.timed
        with timed("read"):
            layer = self.source.layer(i)
        if self.judge is not None:
            with timed("report"):
                self.judge.plain_layer(layer, self.shape)
        bar.set_postfix_str("folding")
        with timed("fold"):
            channel_GK = self._fold(layer)
        # matrices are replaced, not written to: a shallow copy keeps the plain ones
        folded = None if self.judge is None else dict(layer)
        bar.set_postfix_str("rounding")
        with timed("round"):
            made = LayerQuantizer(
                layer, self.shape, self.target, self.job.recipe, self.streams, self.references, channel_GK
            ).run()
        errors: dict[str, Errors] = {}
        if self.judge is not None and folded is not None:
            with timed("report"):
                errors = self.judge.quantized_layer(
                    layer, folded, self.shape, Runs(self.target, channel_GK), self._turned
                )
            del folded
        figures = self._figures(made, errors)
        self._book(i, figures)
        if self.work is not None and self.writer is not None:
            with timed("write"):
                tensors = self.writer.layer(i, layer, made, channel_GK)
                self.work.finish_layer(i, tensors, figures, self._all_streams(), self.outcome.spent.told())

    def _fold(self, layer: Layer) -> Tensor | None:
        recipe = self.job.recipe
        if self.turn is not None:
            rotate_layer(layer, self.shape, self.turn)
        stats: Stats | None = None
        if (wanted := needs(recipe)) is not None:
            hessian = torch.float32 if wanted.hessian else None
            stats = collect(layer, self.shape, self.streams, hessian=hessian, sample=wanted.sample)
        channel_GK: Tensor | None = None
        for step in recipe.folds:
            scale_GK = fold(layer, self.shape, step, stats, self.target)
            if scale_GK is not None:
                # as bf16 factors of the keys, which is what the file will hold
                channel_GK = scale_GK.reciprocal().bfloat16().float().reciprocal()
        for name, value in layer.items():
            if name.removesuffix(".weight") not in LINEARS:
                layer[name] = value.to(self.target.stored).float()
        return channel_GK

    @property
    def _turned(self) -> Orthogonal | None:
        """How the quantized model's residual stream is rotated."""
        return None if self.turn is None else self.turn.residual

    def _figures(self, made: Mapping[str, Made], errors: Mapping[str, Errors]) -> dict[str, Any]:
        linears = {}
        for name, m in made.items():
            seen = errors.get(name)
            linears[name] = {
                "scheme": str(m.weight.scheme),
                "weight_error": m.weight_error,
                "output_error": m.output_error if seen is None else seen.output,
                "total_error": None if seen is None else seen.total,
                "note": m.note,
                "group_size": m.weight.scheme.group_size,
            }
        return {
            "linears": linears,
            "stream_error": None if self.judge is None else self.judge.stream_error(self._turned),
        }

    def _book(self, i: int, figures: dict[str, Any]) -> None:
        self.outcome.layers.append(figures)
        for name, row in figures["linears"].items():
            scheme = replace(self.target.rounding.scheme, group_size=row["group_size"])
            self.outcome.schemes.setdefault(scheme, []).append(f"model.layers.{i}.{name}")

    def _all_streams(self) -> dict[str, list[Tensor]]:
        streams = {CALIB: self.streams}
        if self.references is not None:
            streams[REFERENCE] = self.references
        if self.judge is not None:
            streams |= {PLAIN_JUDGED: self.judge.plain, JUDGED: self.judge.quantized}
        return streams
