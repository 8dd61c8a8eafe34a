"""README and docs/kernels.md hold no typed number in their tables: they are what bench.report draws from bench/results."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.report import DOCUMENTS, README, TABLES, checked, filled


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.exists()], ids=lambda d: d.name)
def test_tables_are_drawn_from_the_results(document: Path) -> None:
    text = document.read_text()
    assert filled(text) == text, "run `python -m bench.report --write`"


def test_readme_has_its_first_table() -> None:
    assert f"<!-- {next(iter(TABLES))} -->" in README.read_text(), "README has lost its table"


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


def test_gpu_and_static_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static = {
        "kernel": "_k#2",
        "target": 90,
        "regs": 40,
        "spill": 0,
        "ctas": 3,
        "loop": {"tiles": 2.0},
        "tag": "static",
    }
    table = TABLES["aot"]({"triton": "3.6.0", "rows": [static, {**static, "regs": 50}]})
    assert "| `_k` | 2 | 50 | 0 | 3 | - | 2 | - | - |" in table
    step = {
        "bench": "whole-model", "model": "m", "phase": "decode", "batch": 1, "context": 8, "weights": "bf16", "kv": "int8",
        "arm": "minserve", "ms": 2.0, "of_limit": 0.5, "device": "d", "torch": "t", "triton": "3", "date": "x", "tag": "measured",
    }  # fmt: skip
    (tmp_path / "whole-model.jsonl").write_text(json.dumps(step) + "\n")
    monkeypatch.setattr(report, "GPU", tmp_path)
    assert "| minserve | 2.00 | 50% |" in filled("<!-- gpu -->\n<!-- /gpu -->\n")
