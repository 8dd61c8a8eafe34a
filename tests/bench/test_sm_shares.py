"""The matrix of slow-downs without a GPU: which processes it runs in each mode, and what it makes of their rates."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import sharing, sm_shares
from minserve import probe as probe_module
from minserve.cuda_memory import Driver
from minserve.mps import CONTROL, SERVER, Daemon, processes
from minserve.probe import Gpu
from tests.minserve import fake_mps
from tests.minserve.fake_cuda import FakeCuda

Run = list[tuple[list[str], dict[str, str]]]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Run]]:
    """What would be run; a process alone does 400 steps, one beside another 100."""
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("PATH", f"{fake_mps.install(tmp_path / 'bin')}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(probe_module, "open_driver", lambda: Driver(FakeCuda()))
    monkeypatch.setattr(Gpu, "mps_uuid", property(lambda self: fake_mps.UUID))
    found: list[Run] = []

    def together(commands: Run, run_s: float) -> list[int]:
        found.append(commands)
        return [100] * 2 if len(commands) == 2 else [400]

    monkeypatch.setattr(sharing, "together", together)
    pipe = Daemon().pipe
    yield found
    left = processes(CONTROL, pipe) + processes(SERVER, pipe)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "a daemon was left running"


@pytest.mark.parametrize("mode", sm_shares.MODES)
def test_each_mode_puts_its_processes_where_it_should(mode: str, runs: list[Run]) -> None:
    rows = list(sm_shares.matrix_rows(mode, dry=False))
    assert not [r for r in rows if "unsupported" in r], rows
    assert [r["roles"] for r in rows] == [["decode"], ["prefill"], *map(list, sm_shares.PAIRS)]
    assert [r["slow_down"] for r in rows] == [[1.0]] * 2 + [[4.0, 4.0]] * 3
    pipe = str(Daemon().pipe)
    alone, pairs = runs[:2], [run for run in runs if len(run) == 2]
    assert all(env["CUDA_MPS_PIPE_DIRECTORY"] != pipe for run in alone for _, env in run)
    for (one, first), (two, second) in pairs:
        assert ("--mps" in one) == ("--mps" in two) == mode.startswith("mps")
        assert (first["CUDA_MPS_PIPE_DIRECTORY"] == pipe) == mode.startswith("mps")
        caps = [env.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE") for env in (first, second)]
        assert caps == (["50", "50"] if mode == "mps-capped" else [None, None])
        parts = {env.get("CUDA_MPS_SM_PARTITION") for env in (first, second)}
        assert len(parts) == (2 if mode == "mps-static" else 1)
        places = [command[command.index("--groups") + 1 :][:2] for command in (one, two)]
        assert places == ([["0", "8"], ["8", "8"]] if mode == "green" else [["0", "0"]] * 2)


def test_what_sharing_costs_one_model(runs: list[Run]) -> None:
    rows = list(sm_shares.cost_rows(dry=False))
    assert [(r["arm"], r["cost"]) for r in rows] == [
        ("none torch", 1.0), ("none exported", 1.0), ("mps exported", 1.0),
    ]  # fmt: skip
    assert len(runs) == 9


def test_a_machine_without_a_mode_says_so(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "open_driver", lambda: Driver(FakeCuda(driver=12020)))
    (row,) = sm_shares.matrix_rows("green", dry=False)
    assert "12.4 or later is needed" in row["unsupported"]
    monkeypatch.setenv("PATH", "/nowhere")
    rows: list[dict[str, Any]] = [*sm_shares.matrix_rows("mps", dry=False), *sm_shares.cost_rows(dry=True)]
    assert "is not on PATH" in rows[0]["unsupported"]
    assert [r["arm"] for r in rows[1:]] == ["mps exported", "none torch", "none exported"]
