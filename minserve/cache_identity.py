"""What cached keys and values depend on beside tokens, in one digest: part of every root of keys (sched/prefix.py).

All of a model's entry, what became of its `auto` keys, and every file of its folder by name, size and time of change.
More than need be: a difference that would have been none only costs a hit, and the cache ends with its process.
"""

import dataclasses
import json
from pathlib import Path

from minserve.resolve import ResolvedModel
from sched.prefix import root_key


def cache_identity(resolved: ResolvedModel) -> str:
    """Equal only for the same weights, computed and stored in the same way."""
    folder = Path(resolved.entry.path)
    files = sorted(
        (str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file() and (stat := file.stat())
    )
    parts = {
        "entry": dataclasses.asdict(resolved.entry),
        "files": files,
        "dtype": resolved.dtype,
        "layout": dataclasses.asdict(resolved.layout),
        "kv": [resolved.kv.fmt, resolved.kv.static],
        "max_model_len": resolved.max_model_len,
        "rope": dataclasses.asdict(resolved.config.rope),
    }
    return root_key(json.dumps(parts, sort_keys=True)).hex()
