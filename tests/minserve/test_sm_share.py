"""Modes of sharing a GPU: what a machine is found to allow, what is chosen of it, and what each worker is given."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minserve import keeper, probe, sm_share
from minserve.config import GpuConfig
from minserve.cuda_memory import CudaError, Driver
from minserve.green import create_green
from minserve.mps import CONTROL, SERVER, Daemon, MpsError, processes
from minserve.probe import Found, Gpu, Mps, choose, exports, judge, look_at_gpu
from minserve.sm_share import green_groups, open_sharing
from tests.minserve import fake_mps
from tests.minserve.fake_cuda import FakeCuda

ROOT = Path(__file__).resolve().parents[2]
BOOT = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.minserve import fake_cuda; fake_cuda."
GiB = 1 << 30


def gpu(**facts: int) -> Gpu:
    return look_at_gpu(Driver(FakeCuda(**facts)), 0)


def running(static: bool = False) -> Mps:
    return Mps(7, static)


ABSENT = Mps(None, False, "no daemon in /x: python -m minserve.mps start")


def models(**shares: int | None) -> list[Any]:
    """Of 16, 8, 8, ... GiB."""
    sizes = [16, 8, 8, 8]
    return [
        SimpleNamespace(entry=SimpleNamespace(name=name, sm_share=share), size=sizes[i] * GiB)
        for i, (name, share) in enumerate(shares.items())
    ]


@pytest.fixture(autouse=True)
def weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sm_share, "weight_bytes", lambda m: m.size)


@pytest.fixture
def environ(tmp_path: Path) -> Iterator[dict[str, str]]:
    folder = fake_mps.install(tmp_path / "bin")
    (tmp_path / "run").mkdir()
    found = {"PATH": f"{folder}:/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    yield found
    pipe = Daemon(found).pipe
    for pid in processes(CONTROL, pipe) + processes(SERVER, pipe):
        os.kill(pid, signal.SIGKILL)


# ---- what a machine allows


def test_a_gpu_is_described_without_opening_a_context() -> None:
    fake = FakeCuda(mps=1)
    found = look_at_gpu(Driver(fake), 0)
    assert (found.capability, found.sms, found.driver, found.compute_mode) == (90, 132, 13010, "default")
    assert (found.vmm, found.posix_fd, found.in_mps) == (True, True, True)
    assert found.green_sms == (8,) * 16
    assert fake.left_over() == []
    assert found.mps_uuid == "GPU-6770752d-6f66-2d74-6865-2d7465737473"
    assert not gpu(mps=-1).in_mps, "a driver that does not know the attribute"
    old = gpu(driver=12030)
    assert (old.green_sms, old.green_why) == ((), "the driver is of CUDA 12.3, 12.4 or later is needed")


@pytest.mark.parametrize(
    ("facts", "mps", "able"),
    [
        ({}, ABSENT, {"none", "green"}),
        ({}, running(), {"none", "mps", "green"}),
        ({}, running(static=True), {"none", "mps-static", "green"}),
        ({"driver": 12080}, running(static=True), {"none", "green"}),
        ({"major": 7, "minor": 5}, running(static=True), {"none", "green"}),
        ({"driver": 12030}, running(), {"none", "mps"}),
        ({"compute_mode": 3}, running(), {"mps"}),
        ({"compute_mode": 3}, ABSENT, set()),
        ({"compute_mode": 2}, running(), set()),
    ],
)
def test_modes_are_judged(facts: dict[str, int], mps: Mps, able: set[str]) -> None:
    modes = judge(gpu(**facts), mps)
    assert {mode for mode, why in modes.items() if not why} == able
    assert list(modes) == ["none", "mps", "mps-static", "green"]


def test_what_is_chosen_can_be_had_and_says_why() -> None:
    assert choose("auto", judge(gpu(), running()), "cuda:0")[0] == "mps"
    assert choose("auto", judge(gpu(), running(static=True)), "cuda:0")[0] == "mps-static"
    assert choose("auto", judge(gpu(), ABSENT), "cuda:0") == ("none", f"auto: {ABSENT.why}")
    assert choose("green", judge(gpu(), running()), "cuda:0") == ("green", "as configured")
    with pytest.raises(ValueError, match=r"one of auto, none, green on cuda:0, got 'mps': no daemon in /x"):
        choose("mps", judge(gpu(), ABSENT), "cuda:0")
    with pytest.raises(
        ValueError, match=r"one of auto, mps on cuda:0, got 'none': the compute mode is exclusive"
    ):
        choose("none", judge(gpu(compute_mode=3), running()), "cuda:0")
    with pytest.raises(ValueError, match="cannot be auto on cuda:0: the compute mode is exclusive-process"):
        choose("auto", judge(gpu(compute_mode=3), ABSENT), "cuda:0")


def test_the_probe_of_a_machine_without_a_driver_says_so() -> None:
    if os.path.exists("/dev/nvidia0"):
        return
    done = subprocess.run([sys.executable, "-m", "minserve.probe"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no NVIDIA driver on this machine" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["modes"] == ["none"]


def test_the_probe_prints_for_people_and_for_the_agent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environ: dict[str, str]
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(probe, "open_driver", lambda: Driver(FakeCuda()))
    Daemon(environ).start()
    assert probe.main([]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert "  sharing mps: yes" in shown
    assert any(line.startswith("  sharing mps-static: no, the daemon has no static") for line in shown)
    found = probe.probe(0)
    said = subprocess.CompletedProcess([], 0, stdout=last + "\n", stderr="")
    monkeypatch.setattr(sm_share.subprocess, "run", lambda *a, **k: said)
    assert sm_share.ask_probe(0) == found, "the agent reads what was found"


def test_memory_is_handed_from_process_to_process() -> None:
    boots = (BOOT + "main()", BOOT + "touch()")
    assert exports(0, os.environ, boots) == {"vmm": "", "ipc": ""}
    broken = (boots[0], "import sys; sys.exit('no such call')")
    assert exports(0, os.environ, broken)["vmm"] == "write: no such call"
    assert "ended with exit code 3" in exports(0, os.environ, ("import sys; sys.exit(3)", boots[1]))["ipc"]


# ---- what each worker is given


def opened(
    mode: str, shares: dict[str, int | None], environ: dict[str, str], **facts: int
) -> sm_share.SmSharing:
    def ask(ordinal: int) -> Found:
        g = replace(gpu(**facts), uuid="fake")
        mps = probe.look_at_mps(Daemon(environ))
        return Found(g, mps, judge(g, mps))

    return open_sharing(GpuConfig(sharing=mode), "cuda:1", models(**shares), ask=ask, environ=environ)


def test_on_a_cpu_there_is_nothing_to_share() -> None:
    for wanted in ("auto", "none"):
        assert open_sharing(GpuConfig(sharing=wanted), "cpu", models(a=None)).environ("a") == {}
    with pytest.raises(ValueError, match="sharing must be auto or none on cpu, got 'mps': it is a GPU's"):
        open_sharing(GpuConfig(sharing="mps"), "cpu", models(a=None))


def test_without_mps_no_worker_finds_a_daemon(environ: dict[str, str]) -> None:
    sharing = opened("none", {"a": None, "b": 30}, environ)
    (pipe,) = sharing.environ("a", GiB).values()
    assert not Path(pipe).exists(), "one of the machine's would take it without a word"
    assert sharing.environ("b") == sharing.keeper_environ == {"CUDA_MPS_PIPE_DIRECTORY": pipe}


def test_under_mps_each_has_its_cap_and_its_limit(environ: dict[str, str]) -> None:
    daemon = Daemon(environ)
    daemon.start()
    sharing = opened("auto", {"a": None, "b": None, "c": 40}, environ)
    assert sharing.describe().startswith("sharing mps (auto: an MPS daemon answers): a 80 %, b 40 %, c 40 %")
    given = sharing.environ("b", 3 * GiB + 1)
    assert given == daemon.client_environ | {
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "40",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "1=3073M",
    }
    assert sharing.keeper_environ == daemon.client_environ, "who only allocates has no cap"


def test_static_partitions_are_made_and_given_back(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gpu, "mps_uuid", property(lambda self: fake_mps.UUID))
    daemon = Daemon(environ)
    daemon.start(static=True)
    left = daemon.add_partition(fake_mps.UUID, 16)
    sharing = opened("mps-static", {"a": None, "b": 25}, environ)
    assert left not in sharing.partitions.values(), "one without a client is of a server that was killed"
    assert sharing.environ("b")["CUDA_MPS_SM_PARTITION"] == sharing.partitions["b"]
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in sharing.environ("b")
    assert sharing.keeper_environ["CUDA_MPS_SM_PARTITION"] == sharing.partitions["a"]
    assert daemon.partitions()[fake_mps.UUID].used_chunks == 16
    with pytest.raises(ValueError, match="together at most 100"):
        opened("mps-static", {"a": 60, "b": 50}, environ)
    sharing.close()
    assert daemon.partitions()[fake_mps.UUID].ids == ()
    sharing.close()


def test_a_partition_that_is_refused_takes_the_others_with_it(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gpu, "mps_uuid", property(lambda self: fake_mps.UUID))
    daemon = Daemon(environ)
    daemon.start(static=True)
    add: Callable[..., str] = Daemon.add_partition

    def second_fails(self: Daemon, uuid: str, chunks: int) -> str:
        if daemon.partitions()[fake_mps.UUID].ids:
            raise MpsError("refused")
        return add(self, uuid, chunks)

    monkeypatch.setattr(Daemon, "add_partition", second_fails)
    with pytest.raises(MpsError, match="refused"):
        opened("mps-static", {"a": None, "b": None}, environ)
    assert daemon.partitions()[fake_mps.UUID].ids == ()


def test_green_groups_are_neighbours_and_nobodys_twice(environ: dict[str, str]) -> None:
    sharing = opened("green", {"a": None, "b": None, "c": 25}, environ)
    assert sharing.groups == {"a": (0, 8), "b": (8, 4), "c": (12, 4)}
    assert not Path(sharing.environ("a")["CUDA_MPS_PIPE_DIRECTORY"]).exists()
    with pytest.raises(ValueError, match="for 2 models on a GPU with 1 chunks"):
        green_groups({"a": 50, "b": 50}, gpu(groups=1))


# ---- a green context


def test_a_green_context_has_the_groups_it_asks_for_and_leaves_nothing() -> None:
    fake = FakeCuda()
    context = create_green(Driver(fake), 0, 4, 3)
    assert (fake.asked, context.sms) == ([4, 5, 6], 24)
    assert context.stream in fake.streams
    assert fake.retained == 1, "torch's context stays while this one does"
    context.release()
    assert fake.left_over() == []


def test_an_older_driver_gives_one_group_as_large() -> None:
    fake = FakeCuda(driver=12040)
    context = create_green(Driver(fake), 0, 8, 4)
    assert (fake.asked, context.sms) == ([2], 32), "the third of four times the least size"
    context.release()
    with pytest.raises(CudaError, match="cuDevResourceGenerateDesc failed"):
        create_green(Driver(fake), 0, 2, 4)
    assert fake.left_over() == []


@pytest.mark.parametrize(("first", "count"), [(0, 17), (14, 3), (-1, 1), (3, 0)])
def test_groups_that_are_not_there_are_refused(first: int, count: int) -> None:
    fake = FakeCuda()
    with pytest.raises(ValueError, match=f"among the 16 of device 0, got {count} from {first} on"):
        create_green(Driver(fake), 0, first, count)
    assert fake.left_over() == []


def test_a_context_without_its_stream_is_no_context() -> None:
    fake = FakeCuda(broken_streams=1)
    with pytest.raises(CudaError, match="cuGreenCtxStreamCreate failed"):
        create_green(Driver(fake), 0, 0, 4)
    assert fake.left_over() == []


def test_a_probe_is_a_value() -> None:
    found = Found(gpu(), running(), judge(gpu(), running()))
    assert json.loads(json.dumps(asdict(found)))["modes"]["mps"] == ""
    assert keeper.ROOT == ROOT
