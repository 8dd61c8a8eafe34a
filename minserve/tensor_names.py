"""The names of a folder's tensors without its weights and without torch: from the index, or the header of the one file.

Enough to see what a checkpoint declares, and no more: keys are picked out of the JSON, which checkpoint.py alone parses
(a large header takes seconds) and checks.
"""

import re
import struct
from pathlib import Path

from minserve.model_config import MAX_HEADER_BYTES, MAX_INDEX_BYTES

INDEX = "model.safetensors.index.json"
KEY = re.compile(rb'"([^"\\]*)"\s*:')


def tensor_names(folder: str | Path) -> tuple[str, ...]:
    """All names of tensors, among other keys; empty where the folder holds no weights (a plan needs none).

    ValueError where a file cannot be one of tensors by its size.
    """
    folder = Path(folder)
    index = folder / INDEX
    files = [index] if index.exists() else sorted(folder.glob("*.safetensors"))
    path = folder / "model.safetensors" if len(files) > 1 else next(iter(files), None)
    if path is None or not path.is_file():
        return ()
    try:
        with path.open("rb") as file:
            length = path.stat().st_size
            most = MAX_INDEX_BYTES
            if path != index:
                start = file.read(8)
                most = min(MAX_HEADER_BYTES, length)
                length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= most:
                raise ValueError(f"{path}: its JSON must be 1 to {most} bytes, got {length}")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    return tuple(key.decode(errors="replace") for key in KEY.findall(text))
