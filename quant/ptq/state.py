"""What a run leaves on disk as it goes, so that one that was killed goes on where it was, to the same bytes.

A folder named after the hash of all that the result depends on: a file of tensors and one of figures for every finished
layer, and the residual streams before the next.  Files appear whole: each is written beside its place and renamed.
The result is put together in there too, and moved out when it is complete.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from quant.ptq.tensor_file import save_tensors, write_bytes

STATE, LOCK = "streams.safetensors", ".quant.lock"
KEY = re.compile(r"[0-9a-f]{24}")
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


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """One run at a time: ValueError while another has the folder, which is made here and removed when nothing is left."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        busy = ValueError(f"another run works in {folder}: wait for it to end, or choose another --out")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # one that has just ended may have taken away the file that was opened here
            same = os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat())
        except (BlockingIOError, FileNotFoundError):
            raise busy from None
        if not same:
            raise busy
        try:
            yield folder
        finally:
            (folder / LOCK).unlink()
            # what other runs left stays
            with suppress(OSError):
                folder.rmdir()


class Work:
    """`next_layer` is the first that is not finished.  `spent`: what the legs until then have cost."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self.next_layer = 0
        self.spent: Mapping[str, Any] | None = None
        self.streams: dict[str, list[Tensor]] = {}
        path = self.folder / STATE
        if path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            self.next_layer, self.spent = int(metadata["next_layer"]), json.loads(metadata["spent"])
            names = sorted(file.keys(), key=lambda n: (n.partition(".")[0], int(n.partition(".")[2])))
            for name in names:
                self.streams.setdefault(name.partition(".")[0], []).append(file.get_tensor(name))

    def finish_layer(
        self,
        i: int,
        tensors: Mapping[str, Tensor],
        figures: Any,
        streams: Mapping[str, list[Tensor]],
        spent: Mapping[str, Any] | None = None,
    ) -> None:
        """Layer `i` is done; `streams` are those before the next one."""
        save_tensors(self.layer_path(i), tensors, PT)
        write_bytes(self.figures_path(i), json.dumps(figures).encode())
        flat = {f"{name}.{j}": x for name, xs in streams.items() for j, x in enumerate(xs)}
        # last: it says that the other two are whole
        save_tensors(self.folder / STATE, flat, {"next_layer": str(i + 1), "spent": json.dumps(spent)})
        self.next_layer = i + 1

    def new_result(self) -> Path:
        """An empty folder to put the checkpoint together in; what an earlier leg left there is removed."""
        path = self.folder / "result"
        if path.exists():
            shutil.rmtree(path)
        path.mkdir()
        return path

    def others(self) -> list[Path]:
        """What runs with other options, models or texts have left beside this one."""
        found = sorted(p for p in self.folder.parent.iterdir() if KEY.fullmatch(p.name))
        return [p for p in found if p != self.folder]

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

    def leave(self) -> None:
        """At the end, however it came: where no layer is finished there is nothing to go on from."""
        if not self.next_layer and self.folder.exists():
            shutil.rmtree(self.folder)

    def remove(self) -> None:
        """The result is written: nothing here is needed any more."""
        shutil.rmtree(self.folder)
