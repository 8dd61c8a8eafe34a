"""Model folders that `bench.recipes` compares: with outliers put in, with keys scaled alone, and with plain weights again.

All are written as plain float32 checkpoints, so that what is measured is what was done to them and no rounding beside.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minserve.checkpoint import Checkpoint
from quant.formats import fireq
from quant.formats.catalog import recognise
from quant.ptq.folding import Target, fold, needs
from quant.ptq.grid import Rounding
from quant.ptq.model import HEAD, LINEARS, Layer, Shape, Source, embed, forward, read_shape
from quant.ptq.pairs import inject_outer_outliers, inject_outliers
from quant.ptq.recipe import Recipe
from quant.ptq.rotate import rotate_layer, rotate_outer, rotation
from quant.ptq.stats import collect
from quant.scheme import ONLINE

OUTLIERS, FACTOR = 6, 50.0
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


def _save(out: Path, model: Path, tensors: dict[str, Tensor]) -> None:
    """`tensors` beside the tokenizer of `model`, with its config less what that says of quantization."""
    out.mkdir(parents=True, exist_ok=True)
    raw = json.loads((model / "config.json").read_text())
    for key in ("quantization_config", "compression_config", "torch_dtype"):
        raw.pop(key, None)
    raw |= {"dtype": "float32", "tie_word_embeddings": HEAD not in tensors}
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    for name in TOKENIZER:
        if (model / name).is_file():
            shutil.copyfile(model / name, out / name)
    save_file(
        {name: x.contiguous() for name, x in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )


def _rewrite(
    model: Path,
    out: Path,
    change: Callable[[Layer, Shape], Layer],
    change_outer: Callable[[dict[str, Tensor], Shape], None],
) -> None:
    """`model` with every layer as `change` returns it."""
    source = Source(model)
    tensors = source.outer()
    change_outer(tensors, source.shape)
    for i in range(source.shape.layers):
        layer = change(source.layer(i), source.shape)
        tensors |= {f"model.layers.{i}.{name}": x for name, x in layer.items()}
    _save(out, model, tensors)


def with_outliers(model: Path, out: Path, seed: int = 0) -> None:
    """x FACTOR in OUTLIERS channels of every norm, drawn by `seed`; the function stays."""
    hidden = read_shape(model).hidden
    channels = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))[:OUTLIERS].tolist()

    def change(layer: Layer, shape: Shape) -> Layer:
        inject_outliers(layer, shape, channels, FACTOR)
        return layer

    _rewrite(model, out, change, lambda outer, shape: inject_outer_outliers(outer, shape, channels, FACTOR))


@torch.no_grad()
def with_folds(model: Path, out: Path, recipe: Recipe, calib_ST: Tensor, kv: str) -> None:
    """Rotation and folds of `recipe` and nothing rounded, for a cache of format `kv`; ValueError for other steps."""
    turn = recipe.find("rotate")
    if len(recipe.steps) != len(recipe.folds) + (turn is not None):
        raise ValueError(f"the recipe must be of rotate and folds alone, got {recipe}")
    target = Target(Rounding(ONLINE["w8a8-int8"], torch.float32), kv, torch.float32)
    turned = None
    if turn is not None:
        seed = 0 if turn["signs"] else None
        turned = rotation(read_shape(model), residual=turn["residual"], heads=turn["heads"], seed=seed)
    outer = Source(model).outer()

    def change_outer(outer: dict[str, Tensor], shape: Shape) -> None:
        if turned is not None:
            rotate_outer(outer, turned)

    change_outer(outer, read_shape(model))
    streams = [embed(outer, ids) for ids in calib_ST.split(8)]
    wanted = needs(recipe)

    def change(layer: Layer, shape: Shape) -> Layer:
        if turned is not None:
            rotate_layer(layer, shape, turned)
        stats = collect(layer, shape, streams, sample=wanted.sample) if wanted is not None else None
        streams[:] = [forward(layer, shape, x_BTD) for x_BTD in streams]
        buffers: Layer = {}
        for step in recipe.folds:
            scale_GK = fold(layer, shape, step, stats, target)
            if scale_GK is not None:
                saved = fireq.save_post_rope(
                    scale_GK.reciprocal().bfloat16().float().reciprocal(), shape.heads
                )
                buffers |= {f"self_attn.{name}": x for name, x in saved.items()}
        return layer | buffers

    _rewrite(model, out, change, change_outer)


def _linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """Every linear layer's weight [N, K] of the decoder, by the module's name."""
    return {
        f"model.layers.{i}.{name}": shape.weight_shape(name) for i in range(shape.layers) for name in LINEARS
    }


def is_quantized(folder: Path) -> bool:
    """Whether a linear layer is: config.json says so, or the tensors do, as FireQ's and QServe's files have no config."""
    raw = json.loads((folder / "config.json").read_text())
    if raw.get("quantization_config") or raw.get("compression_config"):
        return True
    checkpoint = Checkpoint(folder)
    try:
        reader = recognise(checkpoint.infos, None)
        return any(reader.fields(module, checkpoint.infos) for module in _linears(read_shape(folder)))
    finally:
        checkpoint.close()


def weights_alone(quantized: Path, out: Path, shape: Shape) -> None:
    """A checkpoint of any format with each matrix as the plain one that its codes stand for."""
    raw = json.loads((quantized / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    taken: set[str] = set()
    checkpoint = Checkpoint(quantized)
    try:
        reader = recognise(checkpoint.infos, raw.get("quantization_config"))
        for module, (N, K) in _linears(shape).items():
            suffixes = reader.fields(module, checkpoint.infos)
            fields = {s: checkpoint.tensor(f"{module}.{s}") for s in suffixes}
            if fields:
                tensors[f"{module}.weight"] = reader.load(module, fields, N, K).dequantize().float()
                taken |= {f"{module}.{s}" for s in suffixes}
            if (bias := f"{module}.bias") in checkpoint:
                tensors[bias] = checkpoint.tensor(bias).float() * reader.bias_factor(fields)
                taken.add(bias)
    finally:
        checkpoint.close()
    with safe_open(quantized / "model.safetensors", framework="pt") as file:
        left = [name for name in file.keys() if name not in taken and not name.endswith(fireq.POST_ROPE)]  # noqa: SIM118  the handle is not a mapping
        tensors |= {name: file.get_tensor(name).float() for name in left}
    _save(out, quantized, tensors)
