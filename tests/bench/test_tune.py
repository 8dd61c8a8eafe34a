"""The tuner without a GPU: what it asks, what it drops, what it writes and that ops find it again."""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import tune
from bench.aot import Job
from bench.shapes import MODELS
from bench.tune import Probe, Question, Table, best_of, candidates, judged, pruned, questions
from kernels import silu_mul, table
from kernels.catalog import SPECS
from kernels.launch import ASSUMED
from tests.source import ROOT

H200 = ASSUMED[90]
MEASURED = {"us": 1.0, "by": "made up", "date": "2000-01-01", "torch": "0", "triton": "0", "driver": "0"}
TUNED = [s.name for s in SPECS if s.config is not None]


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(table, "TABLES", tmp_path)
    yield tmp_path
    table._nearest.cache_clear()
    table._entries.cache_clear()


@pytest.mark.parametrize("op", TUNED)
def test_every_op_finds_what_was_written_for_it(op: str, tables: Path) -> None:
    """So its config is flat, and its pick asks the table for the dims that the tuner wrote."""
    out = Table(tables / "H200.json", H200)
    asked = questions([op], list(MODELS), H200)
    chosen = {}
    for q in asked:
        chosen[q.name] = candidates(q, H200)[-1]
        out.put(q, chosen[q.name], MEASURED)
    for q in asked:
        assert {q.spec.config(c, H200) for c in q.cases} == {chosen[q.name]}


@pytest.mark.parametrize("op", TUNED)
def test_candidates_begin_with_the_rule_and_repeat_nothing(op: str) -> None:
    for q in questions([op], list(MODELS), H200)[:5]:
        found = candidates(q, H200)
        assert found[0] == q.spec.config(q.cases[0], H200)
        assert len(found) == len(set(found))


def row(spill: int = 0, ctas: int = 2, issue_mem: float | None = None) -> dict[str, Any]:
    loop = {"instructions": 9} | ({} if issue_mem is None else {"issue_mem": issue_mem})
    return {"spill": spill, "ctas": ctas, "loop": loop}


def test_the_static_probe_drops_what_cannot_win() -> None:
    results = [
        {"rows": [row(issue_mem=0.5)], "unsupported": None},
        {"rows": [row(issue_mem=0.59), row()], "unsupported": None},
        {"rows": [row(issue_mem=0.61)], "unsupported": None},
        {"rows": [row(issue_mem=0.1, spill=8)], "unsupported": None},
        {"rows": [row(issue_mem=0.1, ctas=0)], "unsupported": None},
        {"rows": [{**row(), "loop": None}], "unsupported": None},
        {"refused": "OutOfResources"},
        {"rows": [], "unsupported": "sm_80 has no fp8"},
    ]
    probes = pruned([judged(i, r) for i, r in enumerate(results)])
    assert [p.config for p in probes if p.why is None] == [0, 1, 5]
    assert [p.why for p in probes[2:5]] == [
        "issue/mem 0.61, 0.5 is possible", "spills 8 bytes", "does not fit an SM",
    ]  # fmt: skip


def test_every_candidate_is_compiled_at_a_small_size() -> None:
    class Submitted(Executor):
        jobs: list[Job] = []  # noqa: RUF012

        def submit(self, call: Any, job: Job, source: str) -> Any:
            self.jobs.append(job)
            future: Future[Any] = Future()
            future.set_result({"rows": [row(issue_mem=0.5)], "unsupported": None})
            return future

    (q,) = questions(["silu_mul"], ["llama-3-8b"], H200)
    pool = Submitted()
    probes = tune.probed(q, H200, pool, "")
    assert [j.config for j in pool.jobs] == [p.config for p in probes] == candidates(q, H200)
    assert all(j.case == q.spec.small(q.cases[0]) for j in pool.jobs)
    assert len({j.key for j in pool.jobs}) == len(probes) > 1
    assert not any(p.why for p in probes)


class Watch:
    """Calls once what it times; the n-th candidate of a round takes n microseconds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls = 0

    def time(self, call: Any, *, graph: bool) -> Any:
        call()
        self.calls += 1
        return SimpleNamespace(us=float(1 + (self.calls - 1) % 2))


def small_question() -> Question:
    (q,) = questions(["silu_mul"], ["llama-3.2-1b"], H200)
    return q._replace(cases=[q.spec.small(q.cases[0])])


def test_what_is_timed_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "Stopwatch", Watch)
    q = small_question()
    two = candidates(q, H200)[:2]
    assert tune.timed(q, two, torch.device("cpu")) == pytest.approx([1.0, 2.0])

    def off(*args: Any, **options: Any) -> Any:
        return silu_mul.SPEC.ref(*args)[0] + 1

    wrong = q._replace(spec=replace(q.spec, runs={"triton": off}))
    with pytest.raises(AssertionError, match="error"):
        tune.timed(wrong, two, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("op", ["silu_mul", "gemm_w4a8"])
def test_a_dry_run_does_all_but_the_timing(op: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "bench.tune",
        "--dry-run",
        "--op",
        op,
        "--shape",
        "llama-3.2-1b",
        "--budget-s",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["tag"], last["done"]) == ("static", 1)


def test_another_candidate_must_be_clearly_faster() -> None:
    assert best_of([10.0, 9.9, 9.81]) == 0
    assert best_of([10.0, 9.7, 9.6]) == 2
    assert best_of([10.0, 9.0, 9.0]) == 1
    assert best_of([math.inf, 5.0]) == 1


def test_a_run_goes_on_where_the_last_one_stopped(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times: list[str] = []

    def timed(q: Question, configs: list[Any], device: torch.device) -> list[float]:
        times.append(q.name)
        return [float(len(configs) - i) for i in range(len(configs))]

    def probed(q: Question, *rest: Any) -> list[Probe]:
        return [Probe(c) for c in candidates(q, H200)]

    monkeypatch.setattr(tune, "timed", timed)
    monkeypatch.setattr(tune, "probed", probed)
    monkeypatch.setattr(tune, "gpu_facts", lambda device: H200)
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        tune, "machine", lambda device: dict.fromkeys(("commit", "date", "torch", "triton", "driver"))
    )
    command = ["tune", "--op", "silu_mul", "--shape"]
    monkeypatch.setattr("sys.argv", [*command, "llama-3-8b"])
    tune.main()
    assert len(times) == 1
    monkeypatch.setattr("sys.argv", [*command, "llama-3-8b", "llama-3.2-1b"])
    tune.main()
    assert len(times) == len(set(times)) == 2
    tune.main()
    assert len(times) == 2
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["done"], last["left"]) == (0, 0)
    _, entries = table.read_table(tables / "H200.json")
    assert len(entries) == 2
    assert all(e.measured["own_rule_us"] > e.measured["us"] for e in entries)
