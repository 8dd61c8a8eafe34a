"""Writes the quantized model: a folder that our engine, and for compressed-tensors transformers too, loads.

Layer by layer into the tensors of a format (compressed-tensors, QServe, FireQ), then the files of the layers and of
what lies outside them become the shards of one checkpoint.  Everything else of the model's folder (tokenizer, chat
template, generation settings) is copied, config.json changed where the model has.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant.formats import ct_save, fireq, qserve
from quant.ptq.model import HEAD, Layer, Shape
from quant.ptq.state import PT
from quant.ptq.tensor_file import Info, naming, write_bytes, write_tensors
from quant.ptq.weight import Made
from quant.scheme import QuantWeight, Scheme

FORMATS = ("compressed-tensors", "qserve", "fireq")
# the most that lies in one file; above it every layer keeps a file of its own
ONE_FILE_BYTES = 2 << 30
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# what each format stores the scales of the weights in; None: the model's own type
SCALE_TYPES = {"compressed-tensors": None, "qserve": torch.float16, "fireq": torch.float32}


@dataclass(frozen=True, slots=True)
class Writer:
    """`container`: of compressed-tensors, packed or int8.  `stored`: the type of what is not quantized."""

    format: str
    container: str
    stored: torch.dtype
    shape: Shape

    def layer(
        self, i: int, layer: Layer, made: Mapping[str, Made], channel_GK: Tensor | None
    ) -> dict[str, Tensor]:
        """The tensors of decoder layer `i` by their full names."""
        prefix = f"model.layers.{i}."
        out: dict[str, Tensor] = {}
        for name, value in layer.items():
            linear = name.removesuffix(".weight")
            if linear in made and name.endswith(".weight"):
                fields = self._fields(made[linear].weight)
                out |= {f"{prefix}{linear}.{suffix}": x for suffix, x in fields.items()}
                # FireQ multiplies the product and what was added to it by the inverse of the factor
                if self.format == "fireq" and (bias := layer.get(f"{linear}.bias")) is not None:
                    scaled = bias / fireq.bias_factor(fields)
                    out[f"{prefix}{linear}.bias"] = scaled.to(self.stored)
            elif f"{prefix}{name}" not in out:
                out[f"{prefix}{name}"] = value.to(self.stored)
        if channel_GK is not None:
            if self.format != "fireq":
                raise ValueError(
                    f"scales of keys after RoPE (scale_keys with top_k above 0) need the format fireq, got {self.format}"
                )
            fields = fireq.save_post_rope(channel_GK, self.shape.heads)
            out |= {f"{prefix}self_attn.{suffix}": x for suffix, x in fields.items()}
        return out

    def _fields(self, weight: QuantWeight) -> dict[str, Tensor]:
        if self.format == "qserve":
            return qserve.save(weight)
        if self.format == "fireq":
            return fireq.save(weight)
        return ct_save.save(weight, self.container, self.stored)

    def config(
        self, raw: Mapping[str, Any], schemes: Mapping[Scheme, list[str]], outer: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """config.json of the quantized model."""
        config = dict(raw) | {"tie_word_embeddings": HEAD not in outer}
        config["torch_dtype" if "dtype" not in raw else "dtype"] = TYPES[self.stored]
        config.pop("quantization_config", None)
        if self.format == "compressed-tensors":
            # one scheme for all is spelled by class: other tools read it more easily
            targets = {scheme: ["Linear"] for scheme in schemes} if len(schemes) == 1 else schemes
            config["quantization_config"] = ct_save.config_object(targets, self.container, ["lm_head"])
        return config


def fill(folder: Path, model: Path, files: list[Path], config: Mapping[str, Any]) -> None:
    """Makes a checkpoint in `folder` of the finished `files` of tensors (which it links or merges)."""
    total = sum(path.stat().st_size for path in files)
    if total <= ONE_FILE_BYTES:
        _merge(files, folder / "model.safetensors")
    else:
        _shards(files, folder)
    for path in sorted(model.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHT_FILES) and path.name != "config.json":
            with naming(folder / path.name):
                shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", config, indent=2)


def publish(result: Path, out: Path) -> list[Path]:
    """The finished folder takes the place of `out`, which is not there or empty; returns what it holds."""
    os.replace(result, out)
    return sorted(out.iterdir())


def write_json(path: Path, value: Any, indent: int) -> None:
    """NaN and infinities, which JSON has not, become null."""
    write_bytes(path, (json.dumps(_finite(value), indent=indent, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _merge(files: list[Path], to: Path) -> None:
    infos: dict[str, Info] = {}
    where: dict[str, Path] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  the handle is not a mapping
                tensor = file.get_tensor(name)
                infos[name], where[name] = Info(tensor.dtype, tuple(tensor.shape)), path

    def get(name: str) -> Tensor:
        with safe_open(where[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    write_tensors(to, infos, get, PT)


def _shards(files: list[Path], folder: Path) -> None:
    weight_map: dict[str, str] = {}
    total = 0
    for i, path in enumerate(files, start=1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        with safe_open(path, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118  the handle is not a mapping
                weight_map[tensor] = name
                total += file.get_tensor(tensor).nbytes
        _place(path, folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index, indent=2)


def _place(path: Path, to: Path) -> None:
    """The finished file stays where it is until the whole is done: a link, or a copy where there can be none."""
    try:
        os.link(path, to)
    except OSError:
        with naming(to):
            shutil.copyfile(path, to)
