"""Checkpoint: the tensors of a folder's safetensors files, mapped, never read twice, and trusted in nothing.

Every header is checked against its file before any tensor is handed out: lengths, offsets, holes, overlaps, dtypes,
shapes, duplicates, and that the index and the shards name the same tensors.  Whatever is wrong is a ValueError naming
the file and the tensor.  Pickled weights (.bin, .pt, .pth) are refused: loading them can run code.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minserve.model_config import MAX_HEADER_BYTES, MAX_INDEX_BYTES, parse_json_object, read_json_object

MAX_DIMS = 8
MAX_FILES, MAX_FILE_NAME = 4096, 255
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: bytes [start, end) of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Checkpoint:
    """All tensors of a model folder by name; `tensor` gives a view of the mapped file."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.infos: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            self._open_shards(index)
        else:
            self.infos = self._open_file(_single_file(self.folder))

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos.values())

    def tensor(self, name: str) -> Tensor:
        """A view of the file's bytes: private (writes stay here), alive as long as the tensor is."""
        info = self.infos.get(name)
        if info is None:
            raise ValueError(f"{self.folder}: tensor {name!r} is missing from the checkpoint")
        if not info.nbytes:
            return torch.empty(info.shape, dtype=info.dtype)
        mapped = self._maps[info.file]
        if info.start % info.dtype.itemsize:
            # the format allows unaligned tensors; torch's kernels may read them whole words at a time
            raw = torch.frombuffer(bytearray(mapped[info.start : info.end]), dtype=info.dtype)
        else:
            count = info.nbytes // info.dtype.itemsize
            raw = torch.frombuffer(mapped, dtype=info.dtype, count=count, offset=info.start)
        return raw.view(info.shape)

    def release(self, name: str) -> None:
        """Lets go of the memory that reading a tensor took; a view of it that is left reads the file again."""
        info = self.infos[name]
        page = mmap.ALLOCATIONGRANULARITY
        start, end = -(-info.start // page) * page, info.end // page * page
        if end > start and info.file in self._maps:
            self._maps[info.file].madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Forgets the mappings; each is unmapped when the last tensor that views it is gone."""
        self._maps.clear()

    def _open_file(self, path: Path) -> dict[str, TensorInfo]:
        self._maps[path] = mapped = _map(path)
        return read_header(path, mapped)

    def _open_shards(self, index: Path) -> None:
        raw = read_json_object(index, MAX_INDEX_BYTES)
        weight_map = raw.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(
                f"{index}: weight_map must be an object of tensor -> file, got {weight_map!r:.80}"
            )
        for name, file in weight_map.items():
            if not isinstance(file, str) or not file.endswith(".safetensors"):
                raise ValueError(
                    f"{index}: {name!r:.120} must lie in a .safetensors file beside it, got {file!r:.120}"
                )
        files = dict.fromkeys(weight_map.values())
        if len(files) > MAX_FILES:
            raise ValueError(f"{index}: names {len(files)} files, more than the {MAX_FILES} allowed")
        for file in files:
            # a plain name beside the index: no way out of the folder, and nothing that a terminal would obey
            if Path(file).name != file or not file.isprintable() or len(file) > MAX_FILE_NAME:
                raise ValueError(f"{index}: a .safetensors file beside it must be named, got {file!r:.120}")
        for file in files:
            self._merge(index, weight_map, self._open_file(self.folder / file))
        missing = [name for name in weight_map if name not in self.infos]
        if missing:
            raise ValueError(
                f"{index}: {weight_map[missing[0]]!r} lacks {listed(missing)}, which the index says it holds"
            )

    def _merge(self, index: Path, weight_map: dict[str, str], infos: dict[str, TensorInfo]) -> None:
        for name, info in infos.items():
            if weight_map.get(name) != info.file.name:
                where = repr(weight_map[name]) if name in weight_map else "in no file"
                raise ValueError(f"{info.file}: holds {name!r:.120}, which {index.name} places {where}")
        self.infos |= infos


def listed(names: list[str], most: int = 8) -> str:
    """Some names for a message, with a count of the rest."""
    shown = ", ".join(repr(n)[:120] for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def read_header(path: Path, data: mmap.mmap) -> dict[str, TensorInfo]:
    """The tensors that the file's header declares, checked against the file's size; `data` is the whole file."""
    if len(data) < 8:
        raise ValueError(f"{path}: {len(data)} bytes, too short for a safetensors header")
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER_BYTES or length > len(data) - 8:
        limit = min(MAX_HEADER_BYTES, len(data) - 8)
        raise ValueError(
            f"{path}: header length must be at most {limit} bytes, got {length} (truncated or not safetensors)"
        )
    header = parse_json_object(data[8 : 8 + length], f"{path}: header")
    _check_metadata(path, header.pop("__metadata__", {}))
    infos = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_cover(path, infos, 8 + length, len(data))
    return infos


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map strings to strings, got {metadata!r:.120}")


def _entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    def fail(what: str, got: Any) -> ValueError:
        return ValueError(f"{path}: tensor {name!r:.120}: {what}, got {got!r:.120}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("its entry must hold dtype, shape and data_offsets and nothing else", entry)
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise fail(f"dtype must be one of {', '.join(DTYPES)}", entry["dtype"])
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _is_sizes(shape) or len(shape) > MAX_DIMS:
        raise fail(f"shape must be a list of at most {MAX_DIMS} sizes", shape)
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("data_offsets must be [begin, end] with begin <= end", offsets)
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise fail(f"data_offsets must span {size} bytes for {entry['dtype']} {shape}", offsets)
    return TensorInfo(path, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**62 for v in value)


def _check_cover(path: Path, infos: dict[str, TensorInfo], base: int, size: int) -> None:
    """The tensors must tile [base, size) without a hole, an overlap or a rest."""
    at, last = base, "the header"
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            kind = "overlaps" if info.start < at else "leaves a hole after"
            raise ValueError(
                f"{path}: tensor {name!r:.120} at byte {info.start} {kind} {last!r:.120}, which ends at {at}"
            )
        at, last = info.end, name
    if at != size:
        kind = "truncated" if at > size else "has bytes that no tensor owns"
        raise ValueError(f"{path}: tensors end at byte {at}, the file at {size}: it is {kind}")


def _single_file(folder: Path) -> Path:
    path = folder / "model.safetensors"
    if path.exists() or path.is_symlink():
        return path
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        names = listed([f.name for f in files])
        raise ValueError(f"{folder}: model.safetensors.index.json is missing beside the shards {names}")
    pickled = [f.name for pattern in PICKLED for f in sorted(folder.glob(pattern))]
    if pickled:
        raise ValueError(
            f"{folder}: holds only pickled weights ({listed(pickled)}), which can run code when loaded; "
            f"minserve reads safetensors: `python -m quant convert {folder} --out DST` makes them of .bin files"
        )
    if gguf := [f.name for f in sorted(folder.glob("*.gguf"))]:
        raise ValueError(f"{folder}: holds only GGUF files ({listed(gguf)}); minserve reads safetensors")
    raise ValueError(f"{folder}: holds no *.safetensors file")


def _map(path: Path) -> mmap.mmap:
    try:
        if not path.is_file():
            raise ValueError(f"{path} is missing or not a regular file")
        with path.open("rb") as file:
            # copy-on-write: torch wants a writable buffer, the file must never change
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be mapped: {error.strerror or error}") from error
