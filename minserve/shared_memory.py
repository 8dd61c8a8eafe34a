"""Anonymous shared files (memfd) and a lock between processes that share one.  No torch.

Nothing has a name and nothing survives the last process: there is no stale file to clean up after a kill -9.  The
kernel frees `flock` when the open file description that took it is closed, so also when its holder is killed; but an
inherited descriptor is the same description and so the same lock.  Hence every process reopens the file it was
passed (`reopen_memfd`), descriptors are close-on-exec, and a forked child must attach again.
"""

import fcntl
import os
import threading
import time
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock


def create_memfd(name: str, num_bytes: int) -> int:
    """An anonymous file of zeros whose size is sealed: a truncation elsewhere cannot turn reads into SIGBUS."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def reopen_memfd(fd: int, what: str) -> tuple[int, int]:
    """(own descriptor, size) of a memfd of ours: a new open file description, which is what `flock` counts."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"{what} fd {fd} is not an open memfd of minserve: {error.strerror}") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        os.close(own)
        raise ValueError(f"{what} fd {fd} is not sealed against truncation, so not made by minserve")
    return own, os.fstat(own).st_size


class SharedLock:
    """Excludes the threads of this process, then the other processes.

    With `timeout_s` a holder that was stopped (SIGSTOP) inside raises TimeoutError here instead of a hang.
    """

    def __init__(self, fd: int, timeout_s: float | None) -> None:
        self._fd, self._timeout_s, self._pid = fd, timeout_s, os.getpid()
        self._thread = threading.Lock()

    def __enter__(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"shared table attached by process {self._pid} is used after a fork: attach again"
            )
        if self._timeout_s is None:
            self._thread.acquire()
        elif not self._thread.acquire(timeout=self._timeout_s):
            raise TimeoutError(f"another thread has held the shared table for {self._timeout_s} s")
        try:
            if self._timeout_s is None:
                flock(self._fd, LOCK_EX)
            else:
                self._poll(time.monotonic() + self._timeout_s)
        except BaseException:
            self._thread.release()
            raise

    def __exit__(self, *exc: object) -> None:
        flock(self._fd, LOCK_UN)
        self._thread.release()

    def _poll(self, deadline: float) -> None:
        while True:
            try:
                return flock(self._fd, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    message = f"another process has held the shared table for {self._timeout_s} s: stopped?"
                    raise TimeoutError(message) from None
                time.sleep(0.001)
