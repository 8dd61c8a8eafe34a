"""`minserve.mps` against a control program that behaves as NVIDIA documents its own: tests/minserve/fake_mps.py."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minserve import mps
from minserve.mps import Daemon, MpsError, processes
from tests.minserve import fake_mps

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    monkeypatch.setattr(mps, "TRY_AGAIN_S", 0.01)
    runtime = tmp_path / "run"
    runtime.mkdir()
    folder = fake_mps.install(tmp_path / "bin")
    found = {"PATH": f"{folder}:/usr/bin:/bin", "XDG_RUNTIME_DIR": str(runtime)}
    yield found
    daemon = Daemon(found)
    for pid in processes(mps.CONTROL, daemon.pipe) + processes(mps.SERVER, daemon.pipe):
        os.kill(pid, signal.SIGKILL)


def attach(daemon: Daemon, *pids: int) -> None:
    (daemon.pipe / "clients").write_text(" ".join(map(str, pids)))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, "waited for 20 s"
        time.sleep(0.01)


def test_a_daemon_starts_once_is_seen_and_leaves_nothing(environ: dict[str, str]) -> None:
    daemon = Daemon(environ)
    assert daemon.status() is None
    assert daemon.start()
    for folder in (daemon.root, daemon.pipe, daemon.log):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    first = daemon.status()
    assert first is not None
    assert (first.static, first.servers) == (False, {})
    assert not daemon.start(), "it runs already"
    assert Daemon(environ).status() == first, "another process of the user finds the same"
    with pytest.raises(MpsError, match="runs already, without static partitioning: stop it first"):
        daemon.start(static=True)
    attach(daemon, 41, 42)
    assert list(daemon.status().servers.values()) == [(41, 42)]  # type: ignore[union-attr]
    with pytest.raises(MpsError, match=r"has the clients \[41, 42\]: end them first, or --force"):
        daemon.stop()
    assert daemon.status() is not None, "a refused stop stops nothing"
    attach(daemon)
    assert daemon.stop()
    assert not processes(mps.CONTROL, daemon.pipe) + processes(mps.SERVER, daemon.pipe)
    assert os.listdir(daemon.pipe) == []
    assert not daemon.stop(), "none ran"


def test_what_a_killed_daemon_left_is_cleared_and_its_pid_means_nothing(environ: dict[str, str]) -> None:
    daemon = Daemon(environ)
    daemon.start()
    pid = daemon.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: daemon.pid() is None)
    assert (daemon.pipe / "control").exists(), "its socket stays behind"
    # the pid of its file is given to somebody else: here, to this process
    (daemon.pipe / "nvidia-cuda-mps-control.pid").write_text(str(os.getpid()))
    assert daemon.status() is None
    assert daemon.start(), "the fake refuses to start beside a left socket"
    assert daemon.pid() not in (None, pid, os.getpid())


def test_servers_of_a_dead_daemon_are_named_and_ended_by_stop(environ: dict[str, str]) -> None:
    daemon = Daemon(environ)
    daemon.start()
    attach(daemon, 7)
    daemon.status()
    os.kill(daemon.pid() or 0, signal.SIGKILL)
    until(lambda: daemon.pid() is None)
    (server,) = processes(mps.SERVER, daemon.pipe)
    with pytest.raises(MpsError, match=f"server {server} of a dead daemon still runs"):
        daemon.start()
    with pytest.raises(MpsError, match=f"servers .{server}. do, perhaps with clients"):
        daemon.stop()
    assert not daemon.stop(force=True)
    assert processes(mps.SERVER, daemon.pipe) == []
    assert daemon.start()


def test_a_worker_beside_mps_is_an_error_that_names_it(environ: dict[str, str]) -> None:
    daemon = Daemon(environ)
    with pytest.raises(MpsError, match="no MPS daemon runs in"):
        daemon.assert_attached([5])
    daemon.start()
    attach(daemon, 5, 6)
    daemon.assert_attached([5, 6])
    with pytest.raises(MpsError, match=r"process 8 runs beside MPS: .* have the clients \[5, 6\]"):
        daemon.assert_attached([5, 8])


def test_questions_that_fail_at_times_are_asked_again(environ: dict[str, str]) -> None:
    daemon = Daemon(environ | {"FAKE_MPS": "flaky"})
    daemon.start()
    attach(daemon, 5)
    daemon.assert_attached([5])
    assert daemon.stop(force=True), "and a daemon that does not hear is ended"


@pytest.mark.parametrize(
    ("mood", "message"),
    [("refuses", "did not start: status 1 an instance of this"), ("mute", "did not start: .* with status 1")],
)
def test_a_daemon_that_does_not_start_says_why_and_is_gone(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, mood: str, message: str
) -> None:
    monkeypatch.setattr(mps, "START_S", 1.5)
    daemon = Daemon(environ | {"FAKE_MPS": mood})
    with pytest.raises(MpsError, match=message):
        daemon.start()
    assert daemon.pid() is None


def test_a_daemon_deaf_to_quit_is_killed(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mps, "STOP_S", 0.2)
    daemon = Daemon(environ | {"FAKE_MPS": "deaf"})
    daemon.start()
    assert daemon.stop()
    assert daemon.pid() is None


def test_directories_are_private_or_refused(environ: dict[str, str], tmp_path: Path) -> None:
    root = Daemon(environ).root
    root.mkdir(mode=0o755)
    root.chmod(0o755)
    with pytest.raises(MpsError, match=r"that nobody else may enter \(0700\), got mode 0755"):
        Daemon(environ).start()
    root.rmdir()
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MpsError, match="must be a folder of user"):
        Daemon(environ).start()
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    with pytest.raises(MpsError, match="is too long for a socket"):
        Daemon(environ | {"XDG_RUNTIME_DIR": str(deep)}).start()
    away = Daemon(environ | {"XDG_RUNTIME_DIR": str(tmp_path / "not-there")})
    assert away.root.name == f"minserve-mps-{os.getuid()}"


def test_the_daemon_of_somebody_else_is_used_and_left_alone(environ: dict[str, str]) -> None:
    ours = Daemon(environ)
    ours.start()
    other = Daemon(environ | {"CUDA_MPS_PIPE_DIRECTORY": str(ours.pipe), "XDG_RUNTIME_DIR": "/nowhere"})
    attach(ours, 9)
    other.assert_attached([9])
    with pytest.raises(MpsError, match="is not ours to stop"):
        other.stop()


def test_partitions_come_and_go(environ: dict[str, str]) -> None:
    daemon = Daemon(environ)
    daemon.start(static=True)
    assert daemon.status().static  # type: ignore[union-attr]
    gpu = daemon.partitions()["GPU-fake"]
    assert (gpu.chunks, gpu.chunk_sms, gpu.ids) == (16, 8, ())
    first, second = daemon.add_partition("GPU-fake", 10), daemon.add_partition("GPU-fake", 6)
    assert len({first, second}) == 2
    assert daemon.partitions()["GPU-fake"].free_chunks == 0
    with pytest.raises(MpsError, match="no partition of 1 chunks of GPU-fake: 'Failed to create"):
        daemon.add_partition("GPU-fake", 1)
    daemon.remove_partition(first)
    gpu = daemon.partitions()["GPU-fake"]
    assert (gpu.free_chunks, [f"GPU-fake/{own}" for own in gpu.ids]) == (10, [second])


def test_the_command(environ: dict[str, str]) -> None:
    def run(*arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "minserve.mps", *arguments],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "no MPS daemon in" in run("status", status=3)
    assert "no server: one starts with the first client" in run("start")
    assert "it runs already" in run("start")
    attach(Daemon(environ), 11)
    assert "1 clients 11" in run("status")
    assert "minserve: daemon" in run("stop", status=2)
    assert "stopped" in run("stop", "--force")
    environ["PATH"] = "/nowhere"
    assert "nvidia-cuda-mps-control is not on PATH" in run("start", status=2)
