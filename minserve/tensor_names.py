"""The names of a folder's tensors without its weights and without torch: from the index, or the header of the one file.

Enough to see what a checkpoint declares; checkpoint.py reads the same files again and trusts nothing.
"""

import struct
from pathlib import Path

from minserve.model_config import parse_json_object, read_json_object

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
MAX_INDEX_BYTES = 256 << 20
INDEX = "model.safetensors.index.json"


def tensor_names(folder: str | Path) -> tuple[str, ...]:
    """Empty where the folder holds no weights (a plan needs none).  ValueError where a file is no safetensors file."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        weight_map = read_json_object(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
        return tuple(weight_map) if isinstance(weight_map, dict) else ()
    files = sorted(folder.glob("*.safetensors"))
    path = folder / "model.safetensors" if len(files) > 1 else next(iter(files), None)
    if path is None or not path.is_file():
        return ()
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
            header = file.read(length) if length <= min(MAX_HEADER_BYTES, path.stat().st_size) else b""
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not header:
        raise ValueError(
            f"{path}: header must be 1 to {MAX_HEADER_BYTES} bytes within the file, got {length}"
        )
    return tuple(name for name in parse_json_object(header, f"{path}: header") if name != "__metadata__")
