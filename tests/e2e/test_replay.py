"""A workload with sessions and prefixes, replayed against a real server and against the engines alone: every token comes,
and what prompts share is found in the cache."""

import json
from pathlib import Path
from typing import Any

import pytest

from minserve.replay import main
from minserve.workload import main as make
from minserve.workload_saved import load_workload
from tests.e2e.running import VOCAB, running
from tests.tiny import write_llama, write_tokenizer

NAMES = ("one", "two")
LAWS = [
    "--rate",
    "12",
    "--prompt-tokens",
    "30",
    "--output-tokens",
    "6",
    "--prefix-share",
    "0.6",
    "--prefix-tokens",
    "64",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    write_llama(folder / "m", vocab_size=VOCAB)
    write_tokenizer(folder / "m", VOCAB)
    slo = {
        "ttft_ms": 120_000,
        "tpot_ms": 60_000,
    }  # this machine may be busy; that they are kept is what is asked
    models = [{"name": n, "path": "m", "dtype": "fp32", "slo": slo, "reserve_tokens": 256} for n in NAMES]
    gpus = [{"device": "cpu", "pool_bytes": "16 MiB"}]
    (folder / "config.yaml").write_text(
        json.dumps({"nodes": [{"name": "n", "gpus": gpus}], "models": models})
    )
    flags = ["--config", str(folder / "config.yaml"), "--max-len", "256", "--turns", "2", "--think-s", "0.5"]
    out = ["--out", str(folder / "w.jsonl"), "--duration", "3"]
    assert make(["synthetic", *flags, *LAWS, *out]) == 0
    return folder


def check(folder: Path, said: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    workload = load_workload(folder / "w.jsonl")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(rows) == len(workload.requests) == found["completed"] > 15, said
    for request, row in zip(workload.requests, rows, strict=True):
        assert row["output_tokens"] == request.output_tokens
        assert row["arrival_s"] <= row["sent_s"] <= row["first_s"] <= row["end_s"]
    assert list(found["models"]) == list(NAMES)
    assert found["slo_attainment"] == 1.0
    assert found["slos"]["one"] == [120.0, 0.0, 60.0]
    # whoever begins like one that was answered before it came finds the blocks of the common prefix
    for i, late in enumerate(rows):
        r = workload.requests[i]
        known = [
            e for e, o in zip(rows, workload.requests, strict=True)
            if o.model == r.model and o.prefix == r.prefix >= 0 and e["end_s"] < late["sent_s"] - 0.05
        ]  # fmt: skip
        if known:
            assert late["cached_tokens"] >= 32, late
    assert found["cached_tokens"] > 100
    return found


@pytest.mark.parametrize("where", ["--url", pytest.param("--engine", marks=pytest.mark.slow)])
def test_every_token_comes_and_prefixes_are_found(
    where: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [str(folder / "w.jsonl"), "--log", str(folder / "log.jsonl"), "--drain-s", "200"]
    if where == "--engine":
        assert main([*ours, "--engine", str(folder / "config.yaml")]) == 0
    else:
        with running(folder / "config.yaml", module="minserve.serve") as server:
            assert main([*ours, "--url", server.url]) == 0
            server.assert_idle(within_s=20, spare_slabs=1000)  # the cache keeps some
    found = check(folder, capsys.readouterr().out)
    print(found["client"], found["request_throughput"], found["p99_ttft_ms"])


def test_engines_without_the_workloads_models_are_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        make(
            [
                "synthetic",
                "--models",
                "three",
                "--rate",
                "5",
                "--duration",
                "2",
                "--out",
                str(folder / "x.jsonl"),
            ]
        )
        == 0
    )
    assert main([str(folder / "x.jsonl"), "--engine", str(folder / "config.yaml")]) == 2
    assert "must have the workload's models, got one, two without 'three'" in capsys.readouterr().err
