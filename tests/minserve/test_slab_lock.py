"""The slab table's lock between threads and processes, and descriptors that are no table of ours."""

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from minserve import slab_words as sw
from minserve.lock_watch import LockWatch, holder_of, is_stopped
from minserve.shared_memory import create_memfd
from minserve.slab_table import SlabTable
from tests.minserve.small_table import PLAN, leased

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def table() -> Iterator[SlabTable]:
    table = SlabTable.create(PLAN)
    yield table
    table.close()


@pytest.mark.parametrize("views", [1, 2], ids=["one table", "two attaches"])
def test_two_threads_of_a_process_exclude_each_other(table: SlabTable, views: int):
    tables = [table, table if views == 1 else SlabTable.attach(table.fd)]
    entered = threading.Event()

    def second() -> None:
        tables[1].counts()
        entered.set()

    thread = threading.Thread(target=second)
    with tables[0]._lock:
        thread.start()
        assert not entered.wait(0.1), "both were inside"
    assert entered.wait(5)
    thread.join()


def test_threads_that_lease_and_return_at_once_keep_the_table_whole(table: SlabTable):
    faults: list[BaseException] = []

    def churn(view: SlabTable, owner: int) -> None:
        try:
            for _ in range(300):
                lease = view.lease(owner, 2)
                if lease is not None:
                    assert view.holds(owner, lease)
                    view.free(owner, lease)
        except BaseException as fault:
            faults.append(fault)

    attached = SlabTable.attach(table.fd)
    threads = [
        threading.Thread(target=churn, args=(v, o)) for v, o in ((table, 0), (table, 1), (attached, 2))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults
    table.check()
    assert table.counts().free == PLAN.num_slabs


STOPPED = """
import os, signal, sys
from minserve.slab_table import SlabTable
table = SlabTable.attach(int(sys.argv[1]))
assert "torch" not in sys.modules and "msgspec" not in sys.modules
with table._lock:
    table._head[8] = 1
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_stopped_holder_is_a_timeout_and_a_killed_one_is_repaired(table: SlabTable):
    patient = SlabTable.attach(table.fd, timeout_s=0.2)
    child = subprocess.Popen([sys.executable, "-c", STOPPED, str(table.fd)], pass_fds=(table.fd,), cwd=ROOT)
    try:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="another process has held"):
            patient.counts()
        assert time.monotonic() - began < 5
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert patient.counts().repairs == 1
    patient.check()


def test_a_holder_that_was_stopped_is_found_and_one_at_work_is_not(table: SlabTable):
    watch = LockWatch(table.fd, 0.1)
    assert watch.stopped_holder() is None
    child = subprocess.Popen([sys.executable, "-c", STOPPED, str(table.fd)], pass_fds=(table.fd,), cwd=ROOT)
    try:
        os.waitpid(child.pid, os.WUNTRACED)
        assert watch.stopped_holder() == child.pid
        child.send_signal(signal.SIGCONT)
        assert child.wait(10) == 0
        assert not is_stopped(child.pid)
        assert watch.stopped_holder() is None
    finally:
        child.kill()
        child.wait()
    with table._lock:
        assert holder_of(table.fd) == os.getpid()
        assert watch.stopped_holder() is None, "a holder that is at work was taken for a stopped one"
    assert holder_of(table.fd) is None
    watch.close()
    assert watch.stopped_holder() is None


def test_a_thread_that_waits_too_long_for_another_gets_a_timeout(table: SlabTable):
    patient = SlabTable.attach(table.fd, timeout_s=0.05)
    with patient._lock:
        caught: list[BaseException] = []

        def wait() -> None:
            with pytest.raises(TimeoutError, match="another thread") as error:
                patient.counts()
            caught.append(error.value)

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
    assert caught
    patient.check()


def test_a_forked_child_must_attach_again(table: SlabTable):
    real = os.getpid
    try:
        os.getpid = lambda: real() + 1
        with pytest.raises(RuntimeError, match="attach again"):
            table.lease(0, 1)
    finally:
        os.getpid = real
    leased(table, 0, 1)


# ---- descriptors


def closed_fd() -> int:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    return fd


def plain_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def pipe() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


def unsealed() -> int:
    fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    return fd


def memfd(change: Callable[[np.ndarray], None] | None = None, cut: int = 0) -> int:
    """A copy of a good table with a change to its header words or its last bytes cut off."""
    table = SlabTable.create(PLAN)
    data = np.frombuffer(bytearray(table._map[:].ljust(-(-len(table._map) // 8) * 8, b"\0")), np.int64)
    size = len(table._map) - cut
    if change is not None:
        change(data)
    fd = create_memfd("changed", size)
    os.pwrite(fd, data.tobytes()[:size], 0)
    table.close()
    return fd


FOREIGN = {
    "closed": (closed_fd, "not an open memfd"),
    "file": (plain_file, "not an open memfd"),
    "pipe": (pipe, "not an open memfd"),
    "unsealed": (unsealed, "not sealed"),
    "zeros": (lambda: create_memfd("zeros", 8192), "is not a minserve slab table"),
    "empty": (lambda: create_memfd("empty", 0), "is not a minserve slab table"),
    "version": (
        lambda: memfd(lambda d: d.__setitem__(sw.H_VERSION, 1)),
        f"version 1, this minserve reads {sw.VERSION}",
    ),
    "slabs": (lambda: memfd(lambda d: d.__setitem__(sw.H_SLABS, 2**40)), "damaged header"),
    "models": (lambda: memfd(lambda d: d.__setitem__(sw.H_MODELS, -(2**60))), "damaged header"),
    "plan": (lambda: memfd(lambda d: d.__setitem__(-2, 7)), "damaged header"),
    "checksum": (lambda: memfd(lambda d: d.__setitem__(sw.H_CRC, 7)), "damaged header"),
    "cut": (lambda: memfd(cut=100), "damaged header"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_descriptor_that_is_no_table_of_ours_is_a_clear_error(case: str):
    make, message = FOREIGN[case]
    fd = make()
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=message):
        SlabTable.attach(fd)
    assert len(os.listdir("/proc/self/fd")) == open_before, "a refused attach leaks a descriptor"
    if case != "closed":
        os.close(fd)


def test_the_unchanged_copy_attaches_and_cannot_be_resized():
    fd = memfd()
    table = SlabTable.attach(fd)
    table.check()
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 4096)
    assert fcntl.fcntl(table.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    table.close()
    os.close(fd)
