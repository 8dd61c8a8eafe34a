"""kill -9 of pool workers: at random instants and at every instruction.  The table stays whole and nothing leaks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minserve.shared_memory import create_memfd
from minserve.slab_table import SlabTable
from sched.slabs import LayerGroup, PoolPlan, SetShape

ROOT = Path(__file__).resolve().parents[2]


def shape(layers: int, reserve_sets: int) -> SetShape:
    return SetShape(layers, (LayerGroup(0, layers, 4096),), 1, 16, reserve_sets, reserve_sets, 0.0)


PLAN = PoolPlan(4096, 1000, {"a": shape(8, 3), "b": shape(16, 2), "c": shape(5, 4)}, 40)
FOUR = PoolPlan(4096, 1000, {**PLAN.models, "d": shape(12, 1)}, 40)


def nursery(*args: str, plan: PoolPlan = PLAN) -> tuple[dict[str, float], SlabTable]:
    """The nursery's report and the table it worked on, seen from this process."""
    table, pool_fd = SlabTable.create(plan, timeout_s=10), create_memfd("test-pool", plan.pool_bytes)
    fds = ("--table-fd", str(table.fd), "--pool-fd", str(pool_fd))
    command = [sys.executable, "-m", "tests.minserve.pool_nursery", *args, *fds]
    # numpy's own threads would make the fork unsafe
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, pass_fds=(table.fd, pool_fd), capture_output=True, text=True, timeout=300
    )
    os.close(pool_fd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), table


@pytest.mark.parametrize("kills", [1000, pytest.param(3000, marks=pytest.mark.slow)])
def test_random_kills_leave_the_table_whole_and_leak_nothing(kills: int):
    report, table = nursery("random", "--kills", str(kills), "--seed", "1")
    assert "fault" not in report, report
    assert report["kills"] >= kills
    assert report["leaked"] == 0, report
    assert report["repairs"] > 0, f"no kill hit a change of the table, so this proves nothing: {report}"
    assert report["reclaimed"] > 0, f"no kill hit a worker that held slabs: {report}"
    table.check()
    assert table.counts().free == PLAN.num_slabs
    print(report)


@pytest.mark.parametrize("kills", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_kills_while_blocks_are_moved_leak_nothing_and_hurt_nobody(kills: int):
    """Whoever lives reads of every block what was written there, in every layer."""
    report, table = nursery("compaction", "--kills", str(kills), "--seed", "3")
    assert "fault" not in report, report
    assert report["leaked"] == 0, report
    assert report["killed_in_moves"] > kills / 20, f"no kill hit a move: {report}"
    assert report["moved"] > kills, report
    table.check()
    print(report)


def test_random_kills_without_repair_are_caught_by_the_same_check():
    report, _ = nursery("random", "--kills", "5000", "--seed", "1", "--forget-to-repair")
    assert "fault" in report, f"a table that nobody repairs went through {report['kills']} kills unnoticed"


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_before_every_instruction_of_every_operation(stride: int):
    report, _ = nursery("instructions", "--stride", str(stride))
    assert "fault" not in report, report
    assert all(kills * stride > 100 for name, kills in report.items() if name != "repairs"), report
    assert report["repairs"] > 50, report
    print(report)


def test_a_kill_at_some_instruction_without_repair_is_caught_by_the_same_check():
    report, _ = nursery("instructions", "--stride", "1", "--forget-to-repair")
    assert "fault" in report, f"a table that nobody repairs went unnoticed: {report}"


@pytest.mark.parametrize("count", [40_000, pytest.param(10**6, marks=pytest.mark.slow)])
def test_random_operations_by_four_processes_keep_every_rule(count: int):
    report, table = nursery("operations", "--operations", str(count), "--seed", "2", plan=FOUR)
    assert "fault" not in report, report
    assert report["operations"] == count
    assert report["leaked"] == report["repairs"] == 0, report
    assert report["leases"] > count / 4, report
    assert report["refused"] > count / 100, f"nobody was ever short: {report}"
    table.check()
    print(report)


def test_an_overwritten_slot_is_found():
    report, _ = nursery("operations", "--operations", "40000", "--seed", "2", "--corrupt", plan=FOUR)
    assert "overwritten" in str(report.get("fault")), report
