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
SPILLS = {
    (
        "_prefill_fp8_kernel",
        90,
        "K64",
    ): "8 bytes, for the 128 registers with which two programs overlap on an SM",
}
# (kernel, word of the case) -> why its loop may load single bytes
_NIBBLE = (
    "a nibble of V shares its byte with another token's; a turn is one head, no stream of them is waited for"
)
_TURNED = "V is stored transposed: its codes change places through shared memory; a turn is one head"
BYTE_LOADS = {
    ("_rope_kv_write_kernel", fmt): why
    for fmt, why in (("fmtint4", _NIBBLE), ("fmtint4z", _NIBBLE), ("fmtint8", _TURNED), ("fmtfp8", _TURNED))
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
    full_only: bool = False  # its rows are no served cases

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


# several tokens a sequence repeat the softmax for each of them
SEVERAL = ("tokens4", "tokens16")
# two-level addressing and masks included; at head dim 64 half the bytes of a tile meet the same softmax
LIMITS: tuple[Limit, ...] = (
    *(
        Limit("_attn_decode_kernel", "issue_mem", bound, (f"fmt{fmt}", f"K{K}"), SEVERAL)
        for fmt, at_64, at_128 in (
            ("bf16", 0.18, 0.14),
            ("fp8", 0.43, 0.31),
            ("int8", 0.36, 0.25),
            ("int4", 0.65, 0.47),
            ("int4z", 0.68, 0.50),
        )
        for K, bound in ((64, at_64), (128, at_128))
    ),
    Limit("_attn_decode_kernel", "issue_mem", 0.23, ("fmtint8", "K128", "int8_qk")),
    Limit("_attn_decode_kernel", "issue_mem", 0.46, ("fmtint4", "K128", "int8_qk")),
    Limit("_attn_decode_kernel", "tiles", 2),
    *(
        Limit(kernel, "tiles", 2, words)
        for kernel, words in (
            ("_attn_prefill_kernel", ("bfloat16",)),  # products of fp32 are not pipelined
            ("_prefill_fp8_kernel", ()),
            ("_gemm_w8a8_small_kernel", ()),
            ("_gemm_w8a8_tma_kernel", ()),
        )
    ),
    Limit("_gemm_w4a8_kernel", "issue_mem", 0.50, ("T16", "kindgroup")),
    # a tile of 64 tokens scales four times the sums of one of 16 for the same bytes of weights; a zero point adds as many
    # products with the sums of activations
    Limit("_gemm_w4a8_kernel", "issue_mem", 0.55, ("T64", "kindgroup"), ("zero",)),
    Limit("_gemm_w4a8_kernel", "issue_mem", 0.70, ("T64", "kindgroup", "zero")),
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
    borne = any((kernel, row["target"]) == k[:2] and k[2] in words_of(row) for k in SPILLS)
    return bool(row["spill"]) and not borne


def words_of(row: Row) -> set[str]:
    """Of its own case and of those that it serves."""
    return {w for case in (row["case"], *row["served"]) for w in case.split("-")}


def reading_bytes(row: Row) -> bool:
    kernel = row["kernel"].split("#")[0]
    borne = any(kernel == k and word in words_of(row) for k, word in BYTE_LOADS)
    return bool((row.get("loop") or {}).get("byte_loads")) and not borne


def hard(row: Row) -> Iterator[str]:
    loop = row.get("loop") or {}
    if spilling(row):
        yield f"{name(row)}: spills {row['spill']} bytes"
    if not row["ctas"]:
        yield f"{name(row)}: does not fit an SM ({row['shared']} bytes of shared memory, {row['regs']} registers)"
    for layout in row.get("astray", []):
        yield f"{name(row)}: asm that shares a scale finds its elements along another axis: {layout}"
    if reading_bytes(row):
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


def failures(rows: list[Row], recorded: list[Row] | None, *, whole: bool, full: bool = True) -> list[str]:
    """`whole`: no op, target or case was left out, so every limit has its rows; those of served cases alone if not `full`."""
    found = [line for row in rows for line in hard(row)]
    if whole:
        due = [limit for limit in LIMITS if full or not limit.full_only]
        found += [f"{limit} finds no row" for limit in due if not any(limit.covers(r) for r in rows)]
    if recorded is None:
        return found
    old = {key(r): r for r in recorded}
    for row in rows:
        if key(row) not in old:
            found.append(f"{name(row)}: nothing recorded (python -m bench.aot --record)")
        else:
            found += worse(row, old[key(row)])
    return found
