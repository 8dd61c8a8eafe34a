"""Exported GPU memory: every call in its order against a libcuda made of memfds; the same on a real GPU where there is one."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minserve import cuda_memory
from minserve.cuda_memory import (
    GONE,
    CudaError,
    Driver,
    PoolHandle,
    export_memory,
    export_segment,
    import_memory,
)
from minserve.keeper import Keeper
from minserve.pool import SlabPool
from minserve.shared_memory import create_memfd
from minserve.slab_table import SlabTable
from sched.slabs import ModelShape, solve
from tests.minserve.fake_cuda import LIMIT, FakeCuda

ROOT = Path(__file__).resolve().parents[2]
FAKE_BOOT = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.minserve.fake_cuda import main; main()"
)
MB = 1 << 20


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_memory, "SEGMENT_BYTES", 4 * MB)


def fds_open() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_fd_leak():
    before = fds_open()
    yield
    assert fds_open() == before, "descriptors leaked"


def test_structures_have_the_sizes_of_cuda_h():
    assert ctypes.sizeof(cuda_memory.AllocationProp) == 32
    assert cuda_memory.AllocationProp.location.offset == 8
    assert cuda_memory.AllocationProp.flags.offset == 24
    assert ctypes.sizeof(cuda_memory.AccessDesc) == 12
    assert ctypes.sizeof(cuda_memory.IpcHandle) == 64


@pytest.mark.usefixtures("small_segments", "no_fd_leak")
def test_two_importers_see_the_same_bytes_across_segments_and_nothing_stays():
    exporter, importers = FakeCuda(), [FakeCuda(), FakeCuda()]
    exported = export_memory(Driver(exporter), 0, 9 * MB + 5)
    assert exported.handle.num_bytes == 10 * MB
    assert len(exported.fds) == exported.handle.num_fds == 3
    assert not any(os.get_inheritable(fd) for fd in exported.fds)
    assert exporter.left_over() == [], "only the descriptors hold the memory"
    handle = PoolHandle.from_json(exported.handle.to_json())
    maps = [import_memory(Driver(fake), 0, handle, exported.fds) for fake in importers]
    for fd in exported.fds:
        os.close(fd)
    for position in (0, 4 * MB - 1, 4 * MB, 10 * MB - 1):
        ctypes.memset(maps[0].pointer + position, 0xA5, 1)
        assert ctypes.string_at(maps[1].pointer + position, 1) == b"\xa5"
    for memory, fake in zip(maps, importers, strict=True):
        memory.release()
        assert fake.left_over() == []


@pytest.mark.usefixtures("small_segments", "no_fd_leak")
def test_a_failed_allocation_gives_back_the_segments_it_had():
    fake = FakeCuda()
    with pytest.raises(ValueError, match="kind of exported GPU memory must be one of vmm, ipc, got 'mps'"):
        export_memory(Driver(fake), 0, MB, "mps")
    fake.created = LIMIT - 10 * MB
    with pytest.raises(CudaError, match=r"cuMemCreate failed: out of memory \(2\)"):
        export_memory(Driver(fake), 0, 20 * MB)
    assert fake.left_over() == []


@pytest.mark.usefixtures("small_segments", "no_fd_leak")
def test_what_does_not_belong_to_the_handle_is_refused_and_nothing_stays_mapped():
    exported = export_memory(Driver(FakeCuda()), 0, 6 * MB)
    foreign = create_memfd("foreign", 4 * MB)
    fake = FakeCuda()
    with pytest.raises(CudaError, match="cuMemImportFromShareableHandle failed: invalid argument"):
        import_memory(Driver(fake), 0, exported.handle, (exported.fds[0], foreign))
    with pytest.raises(CudaError, match="cuMemMap failed"):
        import_memory(Driver(fake), 0, exported.handle, exported.fds[::-1])
    with pytest.raises(ValueError, match="has 2 segments, 1 descriptors"):
        import_memory(Driver(fake), 0, exported.handle, exported.fds[:1])
    with pytest.raises(ValueError, match="the pool is on GPU"):
        import_memory(Driver(FakeCuda(uuid=b"another-gpu-here")), 0, exported.handle, exported.fds)
    with pytest.raises(CudaError, match=r"cuDeviceGet failed: unknown error \(101\)"):
        import_memory(Driver(fake), 5, exported.handle, exported.fds)
    assert fake.left_over() == []
    for fd in (*exported.fds, foreign):
        os.close(fd)


@pytest.mark.usefixtures("no_fd_leak")
def test_the_legacy_handle_is_used_where_descriptors_are_not_supported():
    exporter, importer = FakeCuda(vmm=False), FakeCuda()
    exported = export_memory(Driver(exporter), 0, 3 * MB)
    assert exported.handle.kind == "ipc"
    assert exported.fds == ()
    memory = import_memory(Driver(importer), 0, PoolHandle.from_json(exported.handle.to_json()), ())
    ctypes.memset(memory.pointer + 3 * MB - 1, 7, 1)
    memory.release()
    exported.release()
    assert exporter.left_over() == importer.left_over() == []
    with pytest.raises(CudaError, match="cuIpcOpenMemHandle_v2 failed"):
        import_memory(Driver(importer), 0, exported.handle, ())
    assert importer.left_over() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a handle"),
        ("[]", "not a handle"),
        ('{"version": 1}', "not a handle"),
        ('{"version": 2, "kind": "vmm"}', "version 2, this minserve reads 1"),
        (
            '{"version": 1, "kind": "tcp", "device": 0, "uuid": "", "num_bytes": 1}',
            "one of vmm, ipc, got 'tcp'",
        ),
    ],
)
def test_a_handle_of_another_make_is_a_clear_error(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        PoolHandle.from_json(text)


@pytest.mark.usefixtures("small_segments", "no_fd_leak")
def test_a_segment_goes_and_another_takes_its_place_at_the_same_address():
    exporter, fakes = FakeCuda(), [FakeCuda(), FakeCuda()]
    exported = export_memory(Driver(exporter), 0, 9 * MB)
    maps = [import_memory(Driver(fake), 0, exported.handle, exported.fds) for fake in fakes]
    ctypes.memset(maps[0].pointer, 0x11, 10 * MB)
    for memory in maps:
        memory.segments.unmap(1)
    os.close(exported.fds[1])
    for position in (0, 4 * MB - 1, 8 * MB, 10 * MB - 1):
        assert ctypes.string_at(maps[1].pointer + position, 1) == b"\x11", "the others stay where they are"
    # a worker that starts now maps what is there
    late = FakeCuda()
    third = import_memory(Driver(late), 0, exported.handle, (exported.fds[0], GONE, exported.fds[2]))
    fd = export_segment(Driver(exporter), 0, 4 * MB)
    for memory in (*maps, third):
        memory.segments.map(1, fd)
    ctypes.memset(maps[0].pointer + 4 * MB, 0x22, 4 * MB)
    assert ctypes.string_at(third.pointer + 8 * MB - 1, 2) == b"\x22\x11"
    for held in (exported.fds[0], fd, exported.fds[2]):
        os.close(held)
    maps[0].segments.unmap(2)
    for memory, fake in zip((*maps, third), (*fakes, late), strict=True):
        memory.release()
        assert fake.left_over() == []
    assert exporter.left_over() == []


@pytest.mark.usefixtures("small_segments", "no_fd_leak")
def test_what_is_wrong_with_a_segment_changes_nothing():
    exported = export_memory(Driver(FakeCuda()), 0, 10 * MB)
    fake = FakeCuda()
    memory = import_memory(Driver(fake), 0, exported.handle, exported.fds)
    with pytest.raises(ValueError, match="segment 0 is mapped already"):
        memory.segments.map(0, exported.fds[0])
    with pytest.raises(ValueError, match=r"segment must be in \[0, 3\), got 3"):
        memory.segments.unmap(3)
    memory.segments.unmap(2)
    with pytest.raises(ValueError, match="segment 2 is not mapped"):
        memory.segments.unmap(2)
    with pytest.raises(CudaError, match="cuMemMap failed"):
        memory.segments.map(2, exported.fds[0])  # of another size
    fake.cuMemSetAccess = lambda *args: 1
    with pytest.raises(CudaError, match="cuMemSetAccess failed"):
        memory.segments.map(2, exported.fds[2])
    del fake.cuMemSetAccess
    memory.segments.map(2, exported.fds[2])
    ctypes.memset(memory.pointer, 3, 10 * MB)
    memory.release()
    assert fake.left_over() == []
    for fd in exported.fds:
        os.close(fd)


def test_memory_by_a_legacy_handle_comes_and_goes_as_a_whole():
    exported = export_memory(Driver(FakeCuda()), 0, 3 * MB, "ipc")
    memory = import_memory(Driver(FakeCuda()), 0, exported.handle, ())
    assert memory.segments is None
    memory.release()
    exported.release()


# ---- the process


@pytest.mark.usefixtures("no_fd_leak")
def test_the_keeper_gives_memory_in_place_of_what_went_or_says_why_not():
    keeper = Keeper(0, 9 * MB, boot=FAKE_BOOT, timeout_s=30)
    memory = import_memory(Driver(FakeCuda()), 0, keeper.handle, keeper.fds)
    memory.segments.unmap(0)
    os.close(keeper.fds[0])
    keeper.fds = (GONE, *keeper.fds[1:])
    with pytest.raises(
        RuntimeError, match=f"no segment of {2 * LIMIT} bytes: cuMemCreate failed: out of memory"
    ):
        keeper.segment(2 * LIMIT)
    os.kill(keeper.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match=r"within 0\.05 s"):
        keeper.segment(4 * MB, timeout_s=0.05)
    os.kill(keeper.pid, signal.SIGCONT)
    fd = keeper.segment(4 * MB)
    memory.segments.map(0, fd)
    keeper.fds = (fd, *keeper.fds[1:])
    memory.release()
    os.kill(keeper.pid, signal.SIGKILL)
    keeper._process.wait()
    with pytest.raises(RuntimeError, match="the keeper"):
        keeper.segment(4 * MB)
    keeper.close()


@pytest.mark.usefixtures("no_fd_leak")
def test_the_keeper_hands_over_its_pool_and_may_then_die():
    keeper = Keeper(0, 9 * MB, boot=FAKE_BOOT, timeout_s=30)
    assert keeper.handle.num_bytes == 10 * MB
    assert len(keeper.fds) == 3
    assert not any(os.get_inheritable(fd) for fd in keeper.fds)
    assert not keeper.needed()
    assert keeper.alive()
    os.kill(keeper.pid, signal.SIGKILL)
    memory = import_memory(Driver(FakeCuda()), 0, keeper.handle, keeper.fds)
    ctypes.memset(memory.pointer, 1, 10 * MB)
    memory.release()
    keeper.close()
    assert not keeper.alive()


@pytest.mark.usefixtures("no_fd_leak")
def test_the_keeper_of_a_legacy_pool_is_needed_and_ends_when_it_is_closed():
    keeper = Keeper(0, 4 * MB, kind="ipc", boot=FAKE_BOOT, timeout_s=30)
    assert keeper.needed()
    memory = import_memory(Driver(FakeCuda()), 0, keeper.handle, ())
    memory.release()
    keeper.close()
    assert keeper._process.returncode == 0


@pytest.mark.usefixtures("no_fd_leak")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_bytes": 2 * LIMIT}, "out of memory"),
        ({"num_bytes": MB, "device": 7}, "cuDeviceGet failed"),
        ({"num_bytes": MB, "kind": "mps"}, "one of vmm, ipc"),
        ({"num_bytes": MB, "boot": "import sys; sys.exit(3)"}, "ended with exit code 3"),
        ({"num_bytes": MB, "boot": "import time; time.sleep(60)", "timeout_s": 0.2}, "within 0.2 s"),
    ],
)
def test_a_keeper_without_a_pool_says_why(arguments: dict, message: str):
    with pytest.raises(RuntimeError, match=message):
        Keeper(**{"device": 0, "boot": FAKE_BOOT, "timeout_s": 30, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
@pytest.mark.usefixtures("no_fd_leak")
def test_without_a_driver_the_real_keeper_says_so():
    with pytest.raises(RuntimeError, match="no NVIDIA driver on this machine"):
        Keeper(0, MB, timeout_s=30)


# ---- the real thing


PLAN = solve(
    [ModelShape(name="m", layers=4, block_bytes=4096, block_tokens=16, max_model_len=256)],
    64 * MB,
    min_sets=8,
)
WRITER = """
import sys
from minserve.cuda_memory import PoolHandle
from minserve.pool import LeasedSets, SlabPool
handle = PoolHandle.from_json(sys.argv[2])
pool = SlabPool.attach_device(int(sys.argv[1]), handle, tuple(map(int, sys.argv[3:])), "cuda:0")
sets = LeasedSets(pool, "m")
set_id = sets.lease()
pool.bytes[int(sets.slab_table_SL[set_id, 3])] = 42
import torch
torch.cuda.synchronize()
sys.stdout.write(str(int(sets.slab_table_SL[set_id, 3])))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["vmm", "ipc"])
def test_workers_share_a_pool_on_the_gpu(kind: str):
    table = SlabTable.create(PLAN)
    keeper = Keeper(0, PLAN.pool_bytes, kind=kind)
    pool = SlabPool.attach_device(table.fd, keeper.handle, keeper.fds, "cuda:0")
    pool.fill()
    torch.cuda.synchronize()
    command = [sys.executable, "-c", WRITER, str(table.fd), keeper.handle.to_json(), *map(str, keeper.fds)]
    done = subprocess.run(
        command, pass_fds=(table.fd, *keeper.fds), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(pool.bytes[int(done.stdout)]) == 42
    assert table.reclaim(0) == 4
    table.check()
    if kind == "vmm":
        os.kill(keeper.pid, signal.SIGKILL)
        keeper._process.wait()
        assert int(pool.bytes[int(done.stdout)]) == 42, "the memory went with its keeper"
    pool.close()
    keeper.close()
    table.close()


@pytest.mark.gpu
def test_a_cuda_fence_passes_only_after_the_work_before_it():
    from minserve.pool import cuda_fence

    a = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(50):
        a = a @ a
    passed = cuda_fence()
    assert not passed()
    torch.cuda.synchronize()
    assert passed()
