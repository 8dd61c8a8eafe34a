"""README and docs/kernels.md hold no typed number in their tables: they are what bench.report draws from bench/results."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.report import DOCUMENTS, README, TABLES, VARIANTS, Variant, aot_table, checked, filled, load


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.exists()], ids=lambda d: d.name)
def test_tables_are_drawn_from_the_results(document: Path) -> None:
    text = document.read_text()
    assert filled(text) == text, "run `python -m bench.report --write`"


def test_documents_have_their_tables() -> None:
    assert f"<!-- {next(iter(TABLES))} -->" in README.read_text(), "README has lost its table"
    kernels = next(d for d in DOCUMENTS if d.name == "kernels.md").read_text()
    table = kernels.partition("<!-- aot -->\n")[2].partition("<!-- /aot -->")[0]
    recorded = load("aot")
    assert recorded is not None
    assert table == aot_table(recorded) + "\n"
    assert table.count("\n| ") == len(VARIANTS) + 1, "a line of the table for each variant, and its head"


@pytest.mark.parametrize("row", [{}, {"tag": None}, {"tag": "guessed"}])
def test_a_row_without_a_tag_is_refused(
    row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="measured, static, simulated"):
        checked([{"tag": "measured"}, row], "offline")
    (tmp_path / "offline.json").write_text(json.dumps({"rows": [row]}))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="tag"):
        filled("<!-- offline -->\n<!-- /offline -->\n")


def test_the_static_table_takes_the_worst_of_what_a_line_covers() -> None:
    group = ["T16-N6144-K4096-Q32-kindgroup-bfloat16"]
    row = {
        "op": "gemm_w4a8", "kernel": "_gemm_w4a8_kernel#2", "target": 90, "regs": 40, "ctas": 3, "served": group,
        "loop": {"tiles": 2.0, "issue_mem": 0.3}, "tag": "static",
    }  # fmt: skip
    loop = {"tiles": 3.0, "issue_mem": 0.1, "issue_mma": 2.0}
    rows = [row, {**row, "regs": 50, "loop": loop}, {**row, "target": 80, "regs": 99}]
    # of another model, and of a case that is asked to be left out
    for other in ("T16-N3072-K2048-Q16-kindgroup-bfloat16", group[0].replace("group", "group-zero")):
        rows.append({**row, "regs": 99, "served": [other]})
    variant = Variant("int4", "_gemm_w4a8_kernel", "T16 kindgroup", "zero")
    table = aot_table({"triton": "3.6.0", "rows": rows}, (variant,))
    assert table.endswith("| int4 | 50 | 3 | 2 | 0.3 | 0.50 | 2 |")
    with pytest.raises(ValueError, match="no row"):
        aot_table({"triton": "3.6.0", "rows": rows}, (variant._replace(words="T17"),))


def test_gpu_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {
        "bench": "whole-model", "model": "m", "phase": "decode", "batch": 1, "context": 8, "weights": "bf16", "kv": "int8",
        "arm": "minserve", "ms": 2.0, "of_limit": 0.5, "device": "d", "torch": "t", "triton": "3", "date": "x", "tag": "measured",
    }  # fmt: skip
    (tmp_path / "whole-model.jsonl").write_text(json.dumps(step) + "\n")
    monkeypatch.setattr(report, "GPU", tmp_path)
    assert "| minserve | 2.00 | 50% |" in filled("<!-- gpu -->\n<!-- /gpu -->\n")
