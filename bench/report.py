"""Tables of README and of docs from the results in bench/results, so that no number in them is typed.

    python -m bench.report            # prints the tables
    python -m bench.report --write    # puts them between their markers in those files

A result is the last line of a bench's output, one JSON object, saved as bench/results/<bench>.json; GPU runs leave JSON
lines in bench/results/gpu.  Every row says how it came about: measured, static (counted in machine code) or simulated
(arithmetic); a row that does not is refused.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.gates import LIMITS
from bench.placement_tables import kvpr_table, placement_table
from bench.scheduling_tables import (
    decisions_table,
    fidelity_table,
    headline_table,
    live_table,
    scheduling_table,
)
from bench.shapes import MODELS
from bench.slabs_tables import slab_paths_table, slabs_table
from kernels.catalog import SPECS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
TAGS = ("measured", "static", "simulated")
GPU = RESULTS / "gpu"
DOCUMENTS = (
    README,
    *(ROOT / "docs" / f"{name}.md" for name in ("kernels", "quantization", "kv-slabs", "scheduling")),
)


def checked(rows: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The rows, each with a tag; ValueError names the first without."""
    for i, row in enumerate(rows):
        if row.get("tag") not in TAGS:
            raise ValueError(
                f"row {i} of {where} must have a tag of {', '.join(TAGS)}, got {row.get('tag')!r}"
            )
    return rows


def tags(rows: list[dict[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(r["tag"] for r in rows))


def offline_table(result: dict[str, Any]) -> str:
    """Decode speed of a 150M Llama, by batch."""
    batches = sorted({r["batch"] for r in result["rows"]})
    cells = {(r["arm"], r["batch"]): r for r in result["rows"]}
    lines = [
        f"150M bf16 Llama, {tags(result['rows'])} with {result['threads']} threads of {result['device']}, {result['prompt']} + {result['new']} tokens, "
        f"transformers {result['transformers']}, torch {result['torch']}, {result['date']} (`python -m bench.offline`):",
        "",
        "| decode, tok/s | " + " | ".join(f"batch {b} | x best transformers" for b in batches) + " |",
        "|---|" + "---:|---:|" * len(batches),
    ]
    for arm in dict.fromkeys(r["arm"] for r in result["rows"]):
        row = [cells[arm, b] for b in batches]
        lines.append(
            f"| {arm} | " + " | ".join(f"{r['decode_tok_s']:.1f} | {r['x_best_hf']:.2f}" for r in row) + " |"
        )
    return "\n".join(lines)


def demo_table(result: dict[str, Any]) -> str:
    """Exact answers of the demo model, by precision of weights (rows) and of keys and values (columns)."""
    shares = {(r["weights"], r["kv"]): r["accuracy"]["all"] for r in result["rows"]}
    weights, formats = (list(dict.fromkeys(pair[i] for pair in shares)) for i in (0, 1))
    lines = [
        f"Right answers of the demo model to {result['items']} held-out questions (small talk apart, a list learned by "
        f"heart), mean over the kinds, {tags(result['rows'])} (`python -m bench.demo_accuracy`):",
        "",
        "| weights | " + " | ".join(f"KV {kv}" for kv in formats) + " |",
        "|---|" + "---:|" * len(formats),
    ]
    lines += [f"| {w} | " + " | ".join(f"{shares[w, kv]:.1%}" for kv in formats) + " |" for w in weights]
    return "\n".join(lines)


def quality_table(result: dict[str, Any]) -> str:
    """What each recipe costs, a table a model; a row as it is and with outliers put in."""
    tables = []
    for model in dict.fromkeys(r["model"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["model"] == model]
        base = next(r for r in rows if r["weights"] == "none" and not r["method"])
        spread = {(r["weights"], r["method"], r["kv"]): r for r in rows if r["outliers"]}
        lines = [
            f"`{model}`: perplexity {base['perplexity']:.4f} as stored, {base['tokens']} tokens, windows of {result['window']} every "
            f"{result['stride']}; calibrated on {base['samples']} x {result['window']} tokens of another text; "
            f"{tags(rows)} with torch {result['torch']}, {result['date']} (`python -m bench.recipes`). KL to the model as stored, in "
            "1e-3 nats a token:",
            "",
            "| weights | recipe | KV | perplexity | KL | of weights alone | same top-1 | outliers: perplexity | KL |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for r in rows:
            if r["outliers"] or not r["method"]:
                continue
            alone = "-" if r["kl_weights"] is None else f"{r['kl_weights'] * 1e3:.3g}"
            other = spread.get((r["weights"], r["method"], r["kv"]))
            more = "- | -" if other is None else f"{other['above']:+.2%} | {other['kl'] * 1e3:.3g}"
            lines.append(
                f"| {r['weights']} | {r['method']} | {r['kv']} | {r['above']:+.2%} | {r['kl'] * 1e3:.3g} | {alone} "
                f"| {r['top1']:.1%} | {more} |"
            )
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


class Variant(NamedTuple):
    """A line of the static table: what `kernel` launches for cases of Llama-3-8B with all `words` and none of `without`."""

    name: str
    kernel: str
    words: str
    without: str = ""


BLOCKS = "_gemm_fp8_block_kernel"
DECODE, W8, W4 = "_attn_decode_kernel", "_gemm_w8a8_small_kernel", "_gemm_w4a8_kernel"
VARIANTS = (
    Variant("rmsnorm + residual", "_rmsnorm_kernel", "residual", "quant quantfp8"),
    Variant("rmsnorm + residual, int8 rows", "_rmsnorm_kernel", "residual quant"),
    Variant("silu_mul, int8 rows", "_silu_mul_kernel", "quant"),
    Variant("quant_rows int8", "_quant_rows_kernel", "quant"),
    Variant("rope_kv_write bf16, 64 decodes", "_rope_kv_write_kernel", "fmtbf16 decodes64"),
    Variant("rope_kv_write int8, 64 decodes", "_rope_kv_write_kernel", "fmtint8 decodes64"),
    Variant("rope_kv_write int4, 64 decodes", "_rope_kv_write_kernel", "fmtint4 decodes64"),
    Variant("rope_kv_write bf16, a chunk", "_rope_kv_write_kernel", "fmtbf16 chunk2048"),
    Variant("rope_kv_write int8, a chunk", "_rope_kv_write_kernel", "fmtint8 chunk2048"),
    Variant("rope_kv_write int4, a chunk", "_rope_kv_write_kernel", "fmtint4 chunk2048"),
    Variant("decode bf16", DECODE, "fmtbf16", "tokens4 tokens16"),
    Variant("decode fp8", DECODE, "fmtfp8", "tokens4 tokens16"),
    Variant("decode int8", DECODE, "fmtint8", "tokens4 tokens16 int8_qk"),
    Variant("decode int8, 8-bit queries", DECODE, "fmtint8 int8_qk"),
    Variant("decode int4", DECODE, "fmtint4", "tokens4 tokens16 int8_qk"),
    Variant("decode int4, 8-bit queries", DECODE, "fmtint4 int8_qk"),
    Variant("decode int4z", DECODE, "fmtint4z", "tokens4 tokens16 int8_qk"),
    Variant("decode int4z, 8-bit queries", DECODE, "fmtint4z int8_qk"),
    Variant("decode bf16, 4 tokens", DECODE, "fmtbf16 tokens4"),
    Variant("decode int8, 4 tokens", DECODE, "fmtint8 tokens4"),
    Variant("decode int4, 4 tokens", DECODE, "fmtint4 tokens4"),
    Variant("decode bf16, 16 tokens", DECODE, "fmtbf16 tokens16"),
    Variant("decode int4, 16 tokens", DECODE, "fmtint4 tokens16"),
    Variant("merge", "_attn_merge_kernel", "fmtbf16"),
    Variant("prefill bf16", "_attn_prefill_kernel", "fmtbf16"),
    Variant("prefill fp8", "_prefill_fp8_kernel", "fmtfp8"),
    Variant("kv_dequant int8", "_kv_dequant_kernel", "fmtint8"),
    Variant("kv_dequant int4", "_kv_dequant_kernel", "fmtint4"),
    Variant("copy_blocks", "_copy_blocks_kernel", "fmtbf16"),
    Variant("w8a8 int8, T = 16", W8, "T16", "fp8"),
    Variant("w8a8 int8, T = 64", W8, "T64", "fp8"),
    Variant("w8a8 fp8, T = 16", W8, "T16 fp8"),
    Variant("w8a8 fp8, T = 64", W8, "T64 fp8"),
    Variant("w8a8 int8, T = 2048", "_gemm_w8a8_tma_kernel", "T2048", "fp8 kindprogressive kindchannel"),
    Variant("w8a8 fp8, T = 2048", "_gemm_w8a8_tma_kernel", "T2048 fp8"),
    Variant("fp8 by blocks, T = 16", BLOCKS, "T16"),
    Variant("fp8 by blocks, T = 64", BLOCKS, "T64"),
    Variant("fp8 by blocks, T = 2048", BLOCKS, "T2048"),
    Variant("w4a8 group, T = 16", W4, "T16 kindgroup", "zero"),
    Variant("w4a8 group, T = 64", W4, "T64 kindgroup", "zero"),
    Variant("w4a8 group with zeros, T = 16", W4, "T16 kindgroup zero"),
    Variant("w4a8 group with zeros, T = 64", W4, "T64 kindgroup zero"),
    Variant("w4a8 progressive, T = 16", W4, "T16 kindprogressive"),
    Variant("w4a8 progressive, T = 64", W4, "T64 kindprogressive"),
    Variant("w4a8 channel, T = 16", W4, "T16 kindchannel"),
    Variant("w4a8 channel, T = 64", W4, "T64 kindchannel"),
    Variant("w4a8 fp8, T = 16", W4, "T16 kindfp8"),
    Variant("w4a8 fp8, T = 64", W4, "T64 kindfp8"),
    Variant("w4_to_w8 progressive", "_w4_to_w8_kernel", "step zero"),
    Variant("sample: lists", "_weigh_kernel", "k50"),
    Variant("sample: choice", "_choose_kernel", "k50"),
)


def rows_of(variant: Variant, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ValueError where there is none."""
    model = MODELS["llama-3-8b"].shape
    served = {(s.name, c.id) for s in SPECS for c in s.serving(model)}

    def meant(op: str, case: str) -> bool:
        words = set(case.split("-"))
        wanted, unwanted = set(variant.words.split()), set(variant.without.split())
        return (op, case) in served and wanted <= words and not unwanted & words

    found = [
        r
        for r in rows
        if r["target"] == 90
        and r["kernel"].split("#")[0] == variant.kernel
        and any(meant(r["op"], case) for case in r["served"])
    ]
    if not found:
        raise ValueError(f"bench/results/aot.json has no row for {variant}")
    return found


def worst(rows: list[dict[str, Any]], figure: str, most: bool = True) -> str:
    """The worst value of a figure over rows, of the row itself or of its hot loop; - where none has it."""
    values = [{**r, **(r.get("loop") or {})}.get(figure) for r in rows]
    there = [v for v in values if v is not None]
    return f"{(max if most else min)(there):g}" if there else "-"


def aot_table(result: dict[str, Any], variants: tuple[Variant, ...] = VARIANTS) -> str:
    """What each kernel is on sm_90, the worst of what one line covers."""
    lines = [
        f"Llama-3-8B on sm_90, {tags(result['rows'])} with Triton {result['triton']} (`python -m bench.aot --record`):",
        "",
        "| launch | registers | CTAs per SM | tiles in flight | issue/mem | limit | issue/mma |",
        "|---|" + "---:|" * 6,
    ]
    for variant in variants:
        rows = rows_of(variant, result["rows"])
        bounds = [x.bound for x in LIMITS if x.figure == "issue_mem" and all(map(x.covers, rows))]
        figures = (
            ("regs", True),
            ("ctas", False),
            ("tiles", False),
            ("issue_mem", True),
            ("issue_mma", True),
        )
        cells = [worst(rows, *f) for f in figures]
        cells.insert(4, f"{min(bounds):.2f}" if bounds else "-")
        lines.append(f"| {variant.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gpu_table(result: dict[str, Any]) -> str:
    """Steps of whole models against their limit and transformers."""
    rows = [r for r in result["rows"] if r["bench"] == "whole-model" and "ms" in r]
    first = rows[0]
    lines = [
        f"{first['device']}, torch {first['torch']}, Triton {first['triton']}, {first['date']}, {tags(rows)} (`python -m bench.gpu`):",
        "",
        "| model | step | batch | context | weights | KV | by | ms | of the limit |",
        "|---|---|---:|---:|---|---|---|---:|---:|",
    ]
    for r in sorted(rows, key=lambda r: (r["model"], r["phase"], r["batch"], r["context"], r["ms"])):
        limit = f"{r['of_limit']:.0%}" if r["of_limit"] else "-"
        lines.append(
            f"| {r['model']} | {r['phase']} | {r['batch']} | {r['context']} | {r['weights']} | {r['kv']} | {r['arm']} "
            f"| {r['ms']:.2f} | {limit} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "offline": offline_table,
    "demo_accuracy": demo_table,
    "quality": quality_table,
    "aot": aot_table,
    "gpu": gpu_table,
    "slabs": slabs_table,
    "slab_paths": slab_paths_table,
    "placement": placement_table,
    "placement_kvpr": kvpr_table,
    "scheduling": scheduling_table,
    "headline": headline_table,
    "live": live_table,
    "fidelity": fidelity_table,
    "decisions": decisions_table,
}


def load(name: str) -> dict[str, Any] | None:
    """A bench's result, None where there is none; refuses rows without a tag."""
    if name == "gpu":
        files = sorted(GPU.glob("*.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        result: dict[str, Any] | None = {"rows": rows} if rows else None
    else:
        file = RESULTS / f"{name}.json"
        result = json.loads(file.read_text()) if file.exists() else None
    if result is not None:
        checked(result["rows"], name)
    return result


def filled(text: str) -> str:
    """`text` with every table between its markers drawn anew."""
    for name, draw in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        result = load(name) if block.search(text) else None
        if result is not None:
            table = draw(result)
            text = block.sub(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="change README.md and the pages of docs")
    if parser.parse_args().write:
        for document in DOCUMENTS:
            if document.exists():
                document.write_text(filled(document.read_text()))
        return
    for name, draw in TABLES.items():
        result = load(name)
        if result is not None:
            print(draw(result), end="\n\n")


if __name__ == "__main__":
    main()
