"""bench.gpu without a GPU: the rehearsal runs, and what is done, wrong or out of time is kept apart."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, stages
from bench.stages import STAGES, Item, Workshop, items_of
from bench.whole_model import CELLS
from tests.close import ordered
from tests.source import ROOT


def rehearsal(out: Path, *options: str) -> list[dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for file in out.glob("*.jsonl") for line in file.read_text().splitlines()]


def test_a_model_is_rehearsed(tmp_path: Path) -> None:
    rows = rehearsal(tmp_path, "--stage", "whole-model", "--item", "llama-3-8b w8a8-int8 kv int8")
    assert [r["phase"] for r in rows] == ["decode", "decode", "prefill"]
    assert all(r["tag"] == "static" and r["dry"] and "torch" in r for r in rows), rows


@pytest.mark.slow
def test_everything_is_rehearsed(tmp_path: Path) -> None:
    begin = time.time()
    rows = rehearsal(tmp_path)
    assert {r["stage"] for r in rows} == set(STAGES)
    assert time.time() - begin < 300


@pytest.mark.parametrize("stage", STAGES)
def test_items_have_names_of_their_own(stage: str) -> None:
    names = [item.name for item in items_of(stage, dry=False)]
    assert names
    assert len(names) == len(set(names))
    assert len(items_of(stage, dry=True)) <= len(names)


def test_eight_cells_come_first_and_files_are_few() -> None:
    assert len(set(CELLS)) == 8
    assert len(STAGES) <= 8
    names = [item.name for item in items_of("whole-model", dry=False)]
    assert all(any(f"{c.weights} kv {c.kv}" in n for n in names[:10]) for c in CELLS)


def works(shop: Workshop, deadline: float) -> list[dict[str, Any]]:
    return [{"n": 1, "tag": "measured"}, {"n": 2, "tag": "measured"}]


def fails(shop: Workshop, deadline: float) -> list[dict[str, Any]]:
    raise ValueError("no such thing")


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [Item("s", name, run, name) for name, run in (("good", works), ("bad", fails), ("late", works))]
    monkeypatch.setitem(stages.STAGES, "s", lambda: items)
    args = argparse.Namespace(out=tmp_path, retry=False, dry_run=True, item="")
    assert not gpu.run_stage("s", args, time.time() - 1)
    assert [i.name for i in gpu.left("s", args)] == ["good", "bad", "late"]
    assert gpu.run_stage("s", args, time.time() + 60)
    rows = gpu.read(tmp_path / "s.jsonl")
    assert [r["item"] for r in rows] == ["good", "good", "bad", "late", "late"]
    assert "no such thing" in rows[2]["error"]
    assert not gpu.left("s", args)
    args.retry = True
    assert [i.name for i in gpu.left("s", args)] == ["bad"]
    # a row that was cut off in the middle of its item does not count
    (tmp_path / "s.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert len(gpu.left("s", args)) == 3


def test_neighbouring_codes_are_one_apart() -> None:
    codes = torch.tensor([-0.0, 0.0, 2.0**-9, -(2.0**-9)]).to(torch.float8_e4m3fn)
    assert ordered(codes).tolist() == [0, 0, 1, -1]
    assert ordered(torch.tensor([-3, 4], dtype=torch.int8)).tolist() == [-3, 4]
