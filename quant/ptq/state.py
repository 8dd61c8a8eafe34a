"""What a run leaves on disk as it goes, so that one that was killed goes on where it was, to the same bytes.

A folder named after the hash of all that the result depends on: a file of tensors and one of figures for every finished
layer, and the residual streams before the next.  Files appear whole: each is written beside its place and renamed.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant.ptq.tensor_file import save_tensors

STATE = "streams.safetensors"
PT = {"format": "pt"}  # which transformers asks for


def key_of(**parts: Any) -> str:
    """A hash of named values: text, numbers, tensors, and nests of these."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        value = parts[name]
        digest.update(f"{name}=".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(json.dumps(value, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]


def folder_key(folder: Path) -> list[Any]:
    """Name, size and time of every file of a model folder: cheap, and changed by any new save."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


class Work:
    """`next_layer` is the first that is not finished."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self.next_layer = 0
        self.streams: dict[str, list[Tensor]] = {}
        path = self.folder / STATE
        if path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.next_layer = int(file.metadata()["next_layer"])
            names = sorted(file.keys(), key=lambda n: (n.partition(".")[0], int(n.partition(".")[2])))
            for name in names:
                self.streams.setdefault(name.partition(".")[0], []).append(file.get_tensor(name))

    def finish_layer(
        self, i: int, tensors: Mapping[str, Tensor], figures: Any, streams: Mapping[str, list[Tensor]]
    ) -> None:
        """Layer `i` is done; `streams` are those before the next one."""
        save_tensors(self.layer_path(i), tensors, PT)
        _write(self.figures_path(i), json.dumps(figures).encode())
        flat = {f"{name}.{j}": x for name, xs in streams.items() for j, x in enumerate(xs)}
        # last: it says that the other two are whole
        save_tensors(self.folder / STATE, flat, {"next_layer": str(i + 1)})
        self.next_layer = i + 1

    def layer_path(self, i: int) -> Path:
        return self.folder / f"layer-{i:05d}.safetensors"

    def figures_path(self, i: int) -> Path:
        return self.folder / f"layer-{i:05d}.json"

    def write_outer(self, tensors: Mapping[str, Tensor]) -> Path:
        """What lies outside the layers."""
        path = self.folder / "outer.safetensors"
        save_tensors(path, tensors, PT)
        return path

    def figures(self, i: int) -> Any:
        return json.loads(self.figures_path(i).read_text())

    def remove(self) -> None:
        """The result is written: nothing here is needed any more."""
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def _write(path: Path, data: bytes) -> None:
    beside = path.with_suffix(".part")
    beside.write_bytes(data)
    os.replace(beside, path)
