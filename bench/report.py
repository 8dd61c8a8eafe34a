"""README's tables from the results in bench/results, so that no number in it is typed.

    python -m bench.report            # prints the tables
    python -m bench.report --write    # puts them between their markers in README.md

A result is the last line of a bench's output, one JSON object, saved as bench/results/<bench>.json.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


def offline_table(result: dict[str, Any]) -> str:
    """Decode speed of a 150M Llama, by batch."""
    batches = sorted({r["batch"] for r in result["rows"]})
    cells = {(r["arm"], r["batch"]): r for r in result["rows"]}
    lines = [
        f"150M bf16 Llama, {result['threads']} threads of {result['device']}, {result['prompt']} + {result['new']} tokens, "
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
        "heart), mean over the kinds (`python -m bench.demo_accuracy`):",
        "",
        "| weights | " + " | ".join(f"KV {kv}" for kv in formats) + " |",
        "|---|" + "---:|" * len(formats),
    ]
    lines += [f"| {w} | " + " | ".join(f"{shares[w, kv]:.1%}" for kv in formats) + " |" for w in weights]
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"offline": offline_table, "demo_accuracy": demo_table}


def render(name: str) -> str:
    return TABLES[name](json.loads((RESULTS / f"{name}.json").read_text()))


def filled(text: str) -> str:
    """`text` with every table between its markers drawn anew."""
    for name in TABLES:
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if block.search(text):
            table = render(name)
            text = block.sub(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="change README.md")
    if parser.parse_args().write:
        README.write_text(filled(README.read_text()))
    else:
        for name in TABLES:
            if (RESULTS / f"{name}.json").exists():
                print(render(name), end="\n\n")


if __name__ == "__main__":
    main()
