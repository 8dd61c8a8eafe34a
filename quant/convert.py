"""`python -m quant convert SRC --out DST`: a folder of pickled weights (.bin) becomes one of safetensors.

The only place that opens such files: torch.load with weights_only, which builds tensors and plain containers and refuses
whatever else a pickle may call.  One file at a time, mapped; names, types and values stay as they are.  Config and
tokenizer files are copied.  DST appears when all of it is written, and is never written over.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

INDEX = "pytorch_model.bin.index.json"
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")
COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
# what trainers leave beside the weights
NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin", "random_states.bin")
METADATA = "__metadata__"
MOST_COPIES = 4  # times the memory that is viewed: tied tensors are twice
HELP = "write pickled weights (.bin) as safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="folder with config.json and *.bin")
    parser.add_argument("--out", metavar="DST", type=Path, required=True, help="folder to make")


def run(args: argparse.Namespace) -> int:
    convert(args.source, args.out, lambda line: sys.stdout.write(line + "\n"))
    return 0


def convert(source: Path, out: Path, say: Callable[[str], Any]) -> None:
    """Raises ValueError naming the file for what is missing, in the way, or no plain tensors; `out` is then not there."""
    shards = _shards(source)
    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: config.json is missing")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists: name a folder that does not")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    try:
        building.chmod(0o755)
        _write_all(shards, building, say)
        copied = [path for path in sorted(source.iterdir()) if _is_copied(path)]
        for path in copied:
            shutil.copyfile(path, building / path.name)
        say(f"copied {', '.join(path.name for path in copied)}")
        os.rename(building, out)
    except OSError as error:
        raise ValueError(f"{error.filename or out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    say(f"wrote {out}")


def _write_all(shards: Mapping[Path, set[str] | None], out: Path, say: Callable[[str], Any]) -> None:
    where: dict[str, str] = {}
    total = 0
    for i, (path, expected) in enumerate(shards.items()):
        tensors = _read(path, expected)
        if twice := set(tensors) & set(where):
            raise ValueError(f"{path}: {min(twice)!r:.120} is in another file too")
        many = f"-{i + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        name = f"model{many}.safetensors"
        try:
            save_file(tensors, out / name, {"format": "pt"})
        except SafetensorError as error:
            raise ValueError(f"{path}: {error}") from error
        size = sum(t.nbytes for t in tensors.values())
        say(f"{path.name} -> {name}: {len(tensors)} tensors, {size / 1e6:.1f} MB")
        where |= dict.fromkeys(tensors, name)
        total += size
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _shards(source: Path) -> dict[Path, set[str] | None]:
    """The files, and the names that the index expects in each (None: there is no index)."""
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder")
    if present := sorted(source.glob("*.safetensors")):
        raise ValueError(f"{source}: holds {present[0].name} already, which needs no conversion")
    if (source / INDEX).exists():
        return dict(_indexed(source))
    files = [path for path in sorted(source.glob("*.bin")) if path.name not in NO_WEIGHTS]
    if not files:
        raise ValueError(f"{source}: holds no *.bin file")
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise ValueError(f"{source}: {INDEX} is missing beside the {len(files)} files {names}")
    return {files[0]: None}


def _indexed(source: Path) -> Iterator[tuple[Path, set[str]]]:
    index = source / INDEX
    try:
        weight_map = json.loads(index.read_text()).get("weight_map")
    except (ValueError, AttributeError, OSError, RecursionError) as error:
        raise ValueError(f"{index} is not an index: {error!s:.200}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must be an object of tensor -> file, got {weight_map!r:.80}")
    for name, file in weight_map.items():
        # a plain name beside the index: no way out of the folder
        if not isinstance(file, str) or not file.endswith(".bin") or Path(file).name != file:
            raise ValueError(f"{index}: {name!r:.120} must lie in a .bin file beside it, got {file!r:.120}")
    for file in sorted(set(weight_map.values())):
        yield source / file, {name for name, at in weight_map.items() if at == file}


def _read(path: Path, expected: set[str] | None) -> dict[str, Tensor]:
    """The tensors of one file, contiguous and each in memory of its own."""
    if not path.is_file():
        raise ValueError(f"{path} is missing or not a regular file")
    if not path.stat().st_size:
        raise ValueError(f"{path} is not a file of plain tensors: it is empty")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(f"{path} is not a file of plain tensors: {_reason(error)}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(loaded).__name__}")
    if expected is not None and set(loaded) != expected:
        strays = sorted(map(str, set(loaded) ^ expected))
        raise ValueError(
            f"{path}: {strays[0]!r:.120} is only in one of the file and {INDEX} ({len(strays)} such)"
        )
    _check_size(path, loaded)
    seen: set[int] = set()
    return {name: _own(path, name, value, seen) for name, value in loaded.items()}


def _reason(error: Exception) -> str:
    """Why torch refused, without its advice to read the file with code and all."""
    text = str(error)
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it would call {wanted.group(1)}, which no file of tensors needs"
    first = text.strip().split("\n")[0]
    told = (
        first if first and "weights_only" not in text else "its pickle holds more than tensors and containers"
    )
    return f"{type(error).__name__}: {told:.300}"


def _check_size(path: Path, loaded: dict[Any, Any]) -> None:
    """Views of one memory become tensors of their own: few of them are meant, and many would fill a disk."""
    tensors = [
        x for x in loaded.values() if isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
    ]
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    # what is larger than its memory is refused by itself
    written = sum(x.nbytes for x in tensors if x.nbytes <= x.untyped_storage().nbytes())
    held = sum(memory.values())
    if written > MOST_COPIES * max(held, 1 << 20):
        raise ValueError(
            f"{path}: its {len(tensors)} tensors view {held} bytes and would take {written}, more than {MOST_COPIES} "
            "times as many"
        )


def _own(path: Path, name: Any, value: Any, seen: set[int]) -> Tensor:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise ValueError(f"{path}: {name!r:.120} must be a tensor, got {type(value).__name__}")
    if name == METADATA:
        raise ValueError(
            f"{path}: no tensor can be called {METADATA!r} in safetensors, which has that name for another thing"
        )
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_complex():
        raise ValueError(f"{path}: {name!r:.120} must be a dense tensor of real numbers, got {value.dtype}")
    tensor: Tensor = value.detach()
    storage = tensor.untyped_storage()
    # a view that repeats its memory could be of any size
    if tensor.nbytes > storage.nbytes():
        raise ValueError(f"{path}: {name!r:.120} is larger than the memory it views: {list(tensor.shape)}")
    # tied tensors share memory, which safetensors does not
    if storage.data_ptr() in seen or not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes:
        return tensor.contiguous().clone()
    seen.add(storage.data_ptr())
    return tensor


def _is_copied(path: Path) -> bool:
    named = path.suffix in COPIED or path.name.startswith(COPIED_NAMES)
    return named and path.is_file() and not path.name.endswith(".index.json")
