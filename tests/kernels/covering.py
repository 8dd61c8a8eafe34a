"""Cases that cover every pair of values of an op's axes: few, where the full product has thousands.

The axes are read from the dims of the cases that a spec tests anyway: an op whose cases name a KV format, heads and a
head dim has those axes, an op with rows and columns has shapes that hurt; options (a bias, a kind of codes) take every
value seen there.  Greedy and deterministic: the same specs give the same cases, whose ids are the test's.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kernels.spec import Case, KernelSpec

Row = dict[str, Any]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 80, 96, 128, 256)
HEADS_PER_KV = (1, 2, 4, 5, 8, 16)
# 1, a prime, one past a tile; no rows
SIZES = {
    "T": (0, 1, 19, 33),
    "D": (1, 127, 257),
    "F": (1, 127, 257),
    "N": (1, 37, 65),
    "K": (1, 131, 257),
    "pad": (0, 3),
}
# tokens of a step: one, a prime, one past a block of 32; the first whose name stands in the dims of an op's cases
STEPS: dict[str, tuple[Row, ...]] = {
    "context": ({"chunk": 1, "context": 0}, {"chunk": 37, "context": 0}, {"chunk": 3, "context": 31}),
    "blocks": ({"blocks": 1}, {"blocks": 2}),
    "pad": ({"decodes": 1}, {"chunk": 1}, {"chunk": 37}, {"decodes": 3, "pad": 16}, {"chunk": 33, "pad": 16}),
    "fmt": (
        {"spans": ((0, 0, 1),)},
        {"spans": ((0, 36, 1),)},
        {"spans": ((0, 31, 2), (1, 0, 1))},
        {"spans": ((0, 12, 1), (1, 0, 33))},
    ),
}
# dims whose values belong together, and are taken as they stand together in the spec's own cases
BUNDLES = (("kind", "zero", "K", "Q"),)


def covering(axes: Mapping[str, Sequence[Any]], legal: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Rows such that every pair of values that some legal row holds is in one of them."""
    rows = [
        row
        for values in itertools.product(*axes.values())
        if legal(row := dict(zip(axes, values, strict=True)))
    ]
    numbers: dict[Any, int] = {}

    def pairs(row: Row) -> int:
        places = [(name, axes[name].index(value)) for name, value in row.items()]
        held = (numbers.setdefault(pair, len(numbers)) for pair in itertools.combinations(places, 2))
        return sum(1 << number for number in held)

    held = [pairs(row) for row in rows]
    if len(axes) < 2:
        return rows
    left = (1 << len(numbers)) - 1
    chosen = []
    while left:
        best = max(range(len(rows)), key=lambda i: (held[i] & left).bit_count())
        chosen.append(rows[best])
        left &= ~held[best]
    return chosen


def seen(spec: KernelSpec, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """The values of these dims in the spec's cases, each combination once; absent is False."""
    return list(dict.fromkeys(tuple(c.dims.get(name, False) for name in names) for c in spec.tests))


def axes_of(spec: KernelSpec) -> dict[str, Sequence[Any]]:
    names = list(dict.fromkeys(name for c in spec.tests for name in c.dims))
    axes: dict[str, Sequence[Any]] = {"dtype": FLOATS}
    taken = {"K", "fmt", "H", "G", "pad"}
    if "fmt" in names:
        axes |= {"K": HEAD_DIMS, "fmt": [fmt for (fmt,) in seen(spec, ["fmt"])]}
        if "H" in names:
            axes["heads"] = HEADS_PER_KV
        axes["step"] = next(steps for name, steps in STEPS.items() if name in names)
        taken |= {name for steps in STEPS.values() for dims in steps for name in dims}
    else:
        bundle = next((b for b in BUNDLES if set(b) <= set(names)), ())
        if bundle:
            axes["bundle"] = [dict(zip(bundle, values, strict=True)) for values in seen(spec, bundle)]
        taken = set(bundle)
    for name in names:
        if name not in taken:
            axes[name] = SIZES.get(name) or [value for (value,) in seen(spec, [name])]
    return axes


def is_legal(row: Row) -> bool:
    """What no caller asks for: a row of zeros where there is one row at most, options of another kind of codes."""
    return not (
        (row.get("zero_row") and row["T"] < 2)
        or (row.get("fast") and not row.get("fp8"))
        or (row.get("extreme") and row.get("fp8"))
    )


def case_of(row: Row) -> Case:
    dims: Row = {}
    for name, value in row.items():
        if name == "heads":
            groups = 2 if value <= 2 else 1
            dims |= {"H": value * groups, "G": groups}
        elif isinstance(value, dict):
            dims |= value
        elif name != "dtype":
            dims[name] = value
    if "fmt" in dims:
        dims = {"G": 2} | dims
    return Case(
        row["dtype"], {name: x for name, x in dims.items() if x is not False and (name, x) != ("pad", 0)}
    )


def has_axes(spec: KernelSpec) -> bool:
    """An op of one dtype has its cases in its spec and in a test of its own."""
    return len({c.dtype for c in spec.tests}) > 1


def covering_cases(spec: KernelSpec) -> list[Case]:
    return [case_of(row) for row in covering(axes_of(spec), is_legal)] if has_axes(spec) else []


def all_cases(spec: KernelSpec) -> list[Case]:
    axes = axes_of(spec) if has_axes(spec) else {}
    rows = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [case_of(row) for row in rows if row and is_legal(row)]
