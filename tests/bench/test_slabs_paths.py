"""The bench of the paths: that each measurement does what it times, and that figures are judged and drawn as they are."""

import json
import time
from pathlib import Path

import pytest

from bench import slabs_messages as messages
from bench import slabs_paths as paths
from bench.report import checked
from bench.slabs import row as arm_row
from bench.slabs_arms import Split
from bench.slabs_contend import contend
from bench.slabs_load import REGIMES, mix
from bench.slabs_replay import Lane
from bench.slabs_tables import slab_paths_table, slabs_table
from minserve.slab_table import SlabTable


def test_blocks_leases_and_the_table_are_timed() -> None:
    assert all(0 < v < 1e6 for v in paths.time_blocks(128))
    for figures in (paths.time_leases(100), paths.time_table(100)):
        lease, lease_99, back, back_99 = figures
        assert 0 < lease <= lease_99
        assert 0 < back <= back_99
    assert paths.time_reclaim(3)[0] > 0
    assert paths.time_copy(4096, 1 << 20)[0] > 0
    assert 0 < paths.time_call(100)[0] < 1e5


def test_contention_leaves_the_table_whole() -> None:
    figures = paths.time_contention(0.3, 100)
    assert 0 < figures[0] <= figures[1]
    assert 0 < figures[2] <= figures[3]


def test_one_process_of_it_keeps_its_pace() -> None:
    table = SlabTable.create(paths.plan_of(4000))
    found = contend(table.fd, 2, 0.0, -1.0, 100.0)
    assert found == {"lease": [], "return": []}
    found = contend(table.fd, 2, time.monotonic(), 0.2, 50.0)
    assert 2 <= len(found["lease"]) == len(found["return"]) <= 12
    assert table.counts().free == table.plan.num_slabs
    table.close()


def test_a_manager_answers_and_keeps_count() -> None:
    free = list(range(100))
    taken, left = messages.answer(free, (0, "alloc", 32))
    assert (len(taken), left) == (32, 68)
    assert messages.answer(free, (0, "free", taken)) == ([], 100)
    assert sorted(free) == list(range(100))
    times = messages.time_pipe(20)
    assert len(times) == 20
    assert all(t > 0 for t in times)


def test_calls_are_counted_as_fineserve_makes_them() -> None:
    arm = messages.CountedCalls(Split(mix(), 1 << 35, [0.25] * 4))
    table = [Lane(m, model, arm) for m, model in enumerate(arm.models)]
    blocks = arm.allocate(0, 1) or []
    assert arm.calls == 1  # which brought 32
    for _ in range(31):
        blocks += arm.allocate(0, 1) or []
    assert arm.calls == 1
    blocks += arm.allocate(0, 100) or []
    assert (arm.calls, arm.blocks, arm.tokens) == (2, 132, 132 * 32)
    arm.release(0, blocks[:64])
    assert arm.calls == 2
    arm.release(0, blocks[64:65])
    assert arm.calls == 3
    arm.tick(table)  # nobody runs: nobody asks for the free count
    assert arm.calls == 3
    assert arm.allocate(1, 1 << 30) is None
    assert arm.calls == 3


def test_a_figure_is_judged_by_its_unit() -> None:
    assert paths.met(paths.row("a", 5, "us", 10)) is True
    assert paths.met(paths.row("a", 15, "us", 10)) is False
    assert paths.met(paths.row("a", 15, "x", 10)) is True
    assert paths.met(paths.row("a", 5, "x", 10)) is False
    assert paths.met(paths.row("a", None, "x", 10)) is None
    assert paths.met(paths.row("a", 5, "GB/s")) is None


def test_without_pyzmq_that_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "has_zmq", lambda: False)
    monkeypatch.setattr(paths, "time_pipe", lambda n: [30.0] * n)
    counts = {"tokens": 3200, "blocks": 100, "leases": 10, "calls": 50}
    monkeypatch.setattr(paths, "count_calls", lambda seconds: counts)
    rows = paths.message_rows(1, 100, 0.5, 20.0, 60.0)
    assert [r["value"] for r in rows] == [
        30.0,
        pytest.approx((0.5 + 20 * 10 / 100) / 32 * 1e3, rel=1e-3),
        None,
    ]
    assert rows[-1]["note"] == "pyzmq is not installed"
    monkeypatch.setattr(paths, "has_zmq", lambda: True)
    monkeypatch.setattr(paths, "time_zmq", lambda n: [100.0] * n)
    found = {r["path"]: r["value"] for r in paths.message_rows(1, 100, 0.5, 20.0, 60.0)}
    ours_ns = (0.5 + 2) / 32 * 1e3
    assert found["that, over a block allocated and released"] == 200
    calls = 1 + 16 / 32 / 32 + 16 / 32 / 16
    assert found["FineServe's calls over ours, a token, 16 decoding"] == pytest.approx(
        calls * 100 / 16 * 1e3 / ours_ns, rel=1e-3
    )
    assert found["FineServe's calls over ours, a token, prompts too"] == pytest.approx(
        50 * 100 / 3200 * 1e3 / ours_ns, rel=1e-3
    )


def test_the_report_is_a_table_and_one_object(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [paths.row("good", 1.0, "us", 10, "so it is"), paths.row("bad", 11.0, "us", 10)]
    monkeypatch.setattr(paths, "measure", lambda quick: rows)
    monkeypatch.setattr(paths, "RESULT", tmp_path / "result.json")
    assert paths.report(quick=True, record=True) == 1
    out = capsys.readouterr().out.splitlines()
    assert "met" in out[1]
    assert "MISSED" in out[2]
    result = json.loads(out[-1])
    assert result == json.loads((tmp_path / "result.json").read_text())
    checked(result["rows"], "slab_paths")
    table = slab_paths_table(result)
    assert "| good | 1 us | <= 10 | so it is |" in table
    rows.pop()
    assert paths.report(quick=True, record=False) == 0


def test_the_table_of_e1_shows_every_cell() -> None:
    figures = {
        "live": 0.98, "tokens": 0.97, "tail": 0.001, "partial": 0.01, "refused_steps": 0.1, "preempted": 3.0,
        "soon": 1.0, "tokens_s": 9000.0, "moved_gib": 0.0, "live_mean": 0.9,
    }  # fmt: skip
    none = figures | dict.fromkeys(("live", "tokens", "tail", "partial"), float("nan"))
    arms = ("slabs, compacted", "static split, equal", "head-wise, packed")
    rows = [arm_row(a, r, [none if r.name == "light" else figures]) for a in arms for r in REGIMES[:2]]
    comparisons = [
        {"regime": "light", "live": None, "best_peer": None, "x_best_peer": None, "packed": arms[2], "x_packed": None},
        {"regime": "deep", "live": 0.98, "best_peer": arms[1], "x_best_peer": [1.2, 1.1, 1.3], "packed": arms[2],
         "x_packed": [0.99, 0.98, 1.0]},
    ]  # fmt: skip
    result = {
        "pool_gib": 40, "seeds": 1, "seconds": 60.0, "trace": None, "rows": rows, "comparisons": comparisons,
    }  # fmt: skip
    checked(rows, "slabs")
    table = slabs_table(result)
    assert "| slabs, compacted | 98.0% | 97.0% | 0.1% | 1.0% | 10.0% | 9,000 | - | - | 9,000 |" in table
    assert (
        "- deep: compacted slabs hold 1.200 x static split, equal (95 % interval 1.100 to 1.300), and"
        in table
    )
    assert "- light: compacted slabs hold all there is: nothing was refused" in table
