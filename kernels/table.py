"""Launch shapes as data: what a tuner measured on a GPU, looked up by op and shape; None where nothing near was measured.

Every op's config asks here first and falls back on its own rule, so no table at all is a valid state.  A file of
`tables/` holds one kind of GPU; `python -m bench.tune` writes it.  An entry is the fastest config at one shape:
    {"op": "gemm_w8a8", "sm_count": 132, "dims": {"T": 16, "N": 4096, "K": 4096, "dtype": "bf16"},
     "config": {"block_n": 64, ...}, "measured": {"us": 7.1, "by": ..., "date": ..., "torch": ..., ...}}
"""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kernels.launch import GpuFacts

C = TypeVar("C")
TABLES = Path(__file__).parent / "tables"
# no number of SMs and no dimension may be further from the measured one
FARTHEST = math.log(2) + 1e-9
TYPES: dict[str, type] = {"op": str, "sm_count": int, "dims": dict, "config": dict, "measured": dict}
PROVENANCE = {"us", "by", "date", "torch", "triton", "driver"}
PLAIN = (bool, int, str)


class Entry(NamedTuple):
    """`where`: the file and the place in it, for messages."""

    op: str
    sm_count: int
    dims: dict[str, Any]
    config: dict[str, Any]
    measured: dict[str, Any]
    where: str


def family(gpu_name: str) -> str:
    """H200 of "NVIDIA H200 NVL", A100 of "NVIDIA A100-SXM4-80GB": the first word with a digit."""
    found = re.search(r"[A-Za-z]*\d\w*", gpu_name)
    return found[0] if found else gpu_name


def read_table(path: Path) -> tuple[int, tuple[Entry, ...]]:
    """(capability, entries) of one file.  ValueError names the file, the entry and what is wrong with it."""
    try:
        table = json.loads(path.read_text())
        capability, entries = table["capability"], table["entries"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path.name} must hold {{"capability": ..., "entries": [...]}}: {error!r}'
        ) from None
    return capability, tuple(_entry(value, f"{path.name} entry {i}") for i, value in enumerate(entries))


def _entry(value: Any, where: str) -> Entry:
    if not isinstance(value, dict) or value.keys() != TYPES.keys():
        raise ValueError(f"{where} must have the keys {sorted(TYPES)}, got {value!r}")
    for key, kind in TYPES.items():
        if type(value[key]) is not kind:
            raise ValueError(f"{where}: {key} must be of type {kind.__name__}, got {value[key]!r}")
    for key in ("dims", "config"):
        for name, x in value[key].items():
            if not isinstance(x, PLAIN):
                raise ValueError(
                    f"{where}: {key}.{name} must be an integer, a word, true or false, got {x!r}"
                )
    if missing := PROVENANCE - value["measured"].keys():
        raise ValueError(f"{where}: measured lacks {sorted(missing)}")
    return Entry(*(value[key] for key in TYPES), where)


@functools.cache
def _entries(folder: Path, name: str, capability: int, op: str) -> tuple[Entry, ...]:
    path = folder / f"{name}.json"
    if not path.is_file():
        return ()
    of, entries = read_table(path)
    return tuple(e for e in entries if of == capability and e.op == op)


def _apart(a: Any, b: Any) -> float:
    """Logarithm of a ratio of integers; words, true and false are equal or infinitely far apart."""
    if type(a) is int and type(b) is int and min(a, b) > 0:
        return abs(math.log(a / b))
    return 0.0 if a == b and type(a) is type(b) else math.inf


def tuned(cls: type[C], op: str, gpu: GpuFacts, **dims: Any) -> C | None:
    """The measured `cls` for this op at the nearest shape; `dims` as the op's bench case names them.

    Nearest over the number of SMs and all integers of `dims`, none more than twice or half the measured one; what else
    is in `dims` is equal.  An integer that a config may not be off by goes as a word.
    """
    # with the type of each, or the cache would take 1 for True
    return _nearest(
        cls, op, gpu, tuple((name, dims[name], type(dims[name])) for name in sorted(dims)), TABLES
    )


@functools.lru_cache(maxsize=65536)
def _nearest(
    cls: type[C], op: str, gpu: GpuFacts, dims: tuple[tuple[str, Any, type], ...], folder: Path
) -> C | None:
    best, least = None, math.inf
    for entry in _entries(folder, family(gpu.name), gpu.capability, op):
        config = _config(cls, entry)
        if (names := sorted(entry.dims)) != [name for name, _, _ in dims]:
            raise ValueError(f"{entry.where}: {op} has the dims {[name for name, _, _ in dims]}, got {names}")
        apart = [_apart(gpu.num_sms, entry.sm_count), *(_apart(x, entry.dims[name]) for name, x, _ in dims)]
        if max(apart) <= FARTHEST and sum(apart) < least:
            best, least = config, sum(apart)
    return best


def _config(cls: type[C], entry: Entry) -> C:
    fields = {f.name: f.type for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if entry.config.keys() != fields.keys():
        raise ValueError(
            f"{entry.where}: a {cls.__name__} has the fields {sorted(fields)}, got {sorted(entry.config)}"
        )
    for name, x in entry.config.items():
        wanted = fields[name]
        wanted = wanted if isinstance(wanted, str) else wanted.__name__
        if type(x).__name__ != wanted:
            raise ValueError(f"{entry.where}: {cls.__name__}.{name} must be of type {wanted}, got {x!r}")
    return cls(**entry.config)
