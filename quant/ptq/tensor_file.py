"""Writes a safetensors file one tensor at a time, so that no second copy of all of them is in memory.

Layout: 8 bytes of length, a JSON header of name -> dtype, shape, [begin, end), padded to 8 bytes, then the tensors.  The
largest elements come first, so that every tensor begins at a multiple of its own.  The file appears whole: it is
written beside its place and renamed.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


class Info(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, infos: Mapping[str, Info], get: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """`get` hands over each tensor when its turn comes."""
    names = sorted(infos, key=lambda n: (-infos[n].dtype.itemsize, n))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        end = at + infos[name].nbytes
        header[name] = {
            "dtype": DTYPES[infos[name].dtype],
            "shape": list(infos[name].shape),
            "data_offsets": [at, end],
        }
        at = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    beside = path.with_name(path.name + ".part")
    with naming(path), beside.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            tensor = get(name)
            assert Info(tensor.dtype, tuple(tensor.shape)) == infos[name], f"{name}: {infos[name]}"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    os.replace(beside, path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Tensors that are there already."""
    infos = {name: Info(x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    write_tensors(path, infos, tensors.__getitem__, metadata)


def write_bytes(path: Path, data: bytes) -> None:
    """A file that appears whole."""
    beside = path.with_name(path.name + ".part")
    with naming(path):
        beside.write_bytes(data)
    os.replace(beside, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk is told by errors that do not say which file had no room."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
