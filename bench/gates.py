"""What the static figures must keep: hard limits, and no regression against the recorded values.

A limit names its rows by op, kernel, target and words of the case; one that finds no row in a whole run fails too, so
that a renamed case cannot slip out of it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

# (kernel, target, word of the case) -> why its spills are borne
SPILLS: dict[tuple[str, int, str], str] = {}
# kernel -> why its loop may load single bytes
BYTE_LOADS = {
    "_rope_kv_write_kernel": "V is stored transposed: a token's bytes lie apart, and a nibble of V shares its byte; "
    "a loop turn is one head, and no stream of them is waited for",
}
TOLERANCE = 0.1


@dataclass(frozen=True)
class Limit:
    """At most (or, for tiles, at least) `bound` in the rows of `kernel` that serve a case with all `words` between dashes."""

    kernel: str
    figure: str
    bound: float
    words: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    target: int = 90

    def covers(self, row: Row) -> bool:
        if row["kernel"].split("#")[0] != self.kernel or row["target"] != self.target:
            return False
        served = (name.split("-") for name in row["served"])
        return any(
            all(w in words for w in self.words) and not any(w in words for w in self.without)
            for words in served
        )

    def holds(self, row: Row) -> bool:
        value = (row["loop"] or {}).get(self.figure)
        if value is None:
            return False
        return value >= self.bound if self.figure == "tiles" else value <= self.bound


# two-level addressing and masks included; head dim 128, for that is where the bytes of a tile outweigh its softmax
LIMITS: tuple[Limit, ...] = (
    # several tokens a sequence repeat the softmax for each of them
    Limit("_attn_decode_kernel", "issue_mem", 0.17, ("fmtbf16", "K128"), ("tokens4",)),
    Limit("_attn_decode_kernel", "issue_mem", 0.31, ("fmtint8", "K128"), ("tokens4",)),
    Limit("_attn_decode_kernel", "issue_mem", 0.25, ("fmtint8", "K128", "int8_qk")),
    Limit("_attn_decode_kernel", "issue_mem", 0.57, ("fmtint4", "K128"), ("tokens4",)),
    Limit("_attn_decode_kernel", "issue_mem", 0.48, ("fmtint4", "K128", "int8_qk")),
    Limit("_attn_decode_kernel", "tiles", 2),
    Limit("_gemm_w4a8_kernel", "issue_mem", 0.50, ("T16", "kindgroup")),
    Limit("_gemm_w4a8_kernel", "issue_mem", 0.50, ("kindprogressive",), ("T2048",)),
    Limit("_gemm_w4a8_kernel", "issue_mem", 0.38, ("kindchannel",), ("T2048",)),
    Limit("_gemm_w4a8_kernel", "issue_mem", 0.55, ("T16", "kindfp8")),
    Limit("_gemm_w4a8_kernel", "tiles", 2),
    # decoded weights stay in registers
    Limit("_gemm_w4a8_kernel", "shared_stores", 0),
)


def name(row: Row) -> str:
    return f"sm_{row['target']} {row['op']} {row['case']} {row['kernel']}"


def key(row: Row) -> tuple[Any, ...]:
    """Several configs of one op may share a small case: a config that changes is recorded anew."""
    return row["op"], row["case"], row["target"], row["kernel"], json.dumps(row["config"])


def spilling(row: Row) -> bool:
    kernel = row["kernel"].split("#")[0]
    words = {w for case in row["served"] for w in case.split("-")}
    borne = any((kernel, row["target"]) == k[:2] and k[2] in words for k in SPILLS)
    return bool(row["spill"]) and not borne


def hard(row: Row) -> Iterator[str]:
    loop = row.get("loop") or {}
    if spilling(row):
        yield f"{name(row)}: spills {row['spill']} bytes"
    if not row["ctas"]:
        yield f"{name(row)}: does not fit an SM ({row['shared']} bytes of shared memory, {row['regs']} registers)"
    for layout in row.get("astray", []):
        yield f"{name(row)}: asm that shares a scale finds its elements along another axis: {layout}"
    if loop.get("byte_loads") and row["kernel"].split("#")[0] not in BYTE_LOADS:
        yield f"{name(row)}: {loop['byte_loads']} loads of single bytes in the hot loop"
    for limit in LIMITS:
        if limit.covers(row) and not limit.holds(row):
            yield f"{name(row)}: {limit.figure} {loop.get(limit.figure)}, limit {limit.bound}"


def worse(row: Row, old: Row) -> Iterator[str]:
    """More than a tenth above (below, where more is better) what was recorded."""
    now, then = ({**r, **(r.get("loop") or {})} for r in (row, old))
    for figure, sign in (
        ("regs", 1), ("shared", 1), ("instructions", 1), ("issue_mem", 1), ("issue_mma", 1), ("ctas", -1), ("tiles", -1),
    ):  # fmt: skip
        if then.get(figure) is None:
            continue
        if now.get(figure) is None:
            yield f"{name(row)}: {figure} was {then[figure]} and is not read any more"
        elif sign * (now[figure] - then[figure]) > TOLERANCE * then[figure]:
            yield f"{name(row)}: {figure} {now[figure]}, recorded {then[figure]}"


def failures(rows: list[Row], recorded: list[Row] | None, *, whole: bool) -> list[str]:
    """`whole`: the rows are those of all cases, so every limit has its rows and every recorded row its successor."""
    found = [line for row in rows for line in hard(row)]
    if whole:
        found += [f"{limit} finds no row" for limit in LIMITS if not any(limit.covers(r) for r in rows)]
    if recorded is None:
        return found
    old = {key(r): r for r in recorded}
    for row in rows:
        if key(row) not in old:
            found.append(f"{name(row)}: nothing recorded (python -m bench.aot --record)")
        else:
            found += worse(row, old[key(row)])
    return found
