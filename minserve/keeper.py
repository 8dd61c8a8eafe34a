"""The keeper of a GPU: a process that allocates the slab pool, hands its export to the agent, and sleeps.  No torch.

The agent has no CUDA context and a worker may die, so neither may own the pool.  `Keeper` is the agent's side, `main`
the process.  One message comes back over the inherited socket: a PoolHandle as JSON with the descriptors beside it, or
an error.  The keeper ends when the agent closes the socket or dies.  A pool in host memory is a memfd and needs none.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minserve.cuda_memory import (
    GONE,
    CudaError,
    Driver,
    PoolHandle,
    export_memory,
    export_segment,
    open_driver,
)

ROOT = Path(__file__).resolve().parent.parent
BOOT = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import minserve; sys.path.pop(0); "
    "from minserve.keeper import main; main()"
)
MAX_FDS = 250  # Linux passes 253 in one message: 250 GiB of pool on one GPU
MAX_MESSAGE = 1 << 16


class Keeper:
    """Starts the process and waits for its pool; RuntimeError says why there is none."""

    def __init__(
        self,
        device: int,
        num_bytes: int,
        *,
        kind: str | None = None,
        timeout_s: float = 120.0,
        boot: str = BOOT,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = ["--fd", str(theirs.fileno()), "--device", str(device), "--bytes", str(num_bytes)]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", boot, "keeper", *arguments, *(["--kind", kind] if kind else [])],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=None if environ is None else dict(environ),
                start_new_session=True,  # Ctrl-C is the agent's to handle
            )
        self._asked = 0
        try:
            self.handle, self.fds = self._receive(timeout_s)
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._socket.close()
            raise

    def segment(self, num_bytes: int, timeout_s: float = 30.0) -> int:
        """A descriptor of so much memory more, the caller's.  RuntimeError where the GPU has none, or the keeper died."""
        self._asked += 1
        try:
            self._socket.send(json.dumps({"bytes": num_bytes, "number": self._asked}).encode())
        except OSError as error:
            raise RuntimeError(f"the keeper is gone: {error}") from None
        reply, fds = self._answer(timeout_s)
        while reply["number"] != self._asked:  # of a question that was given up
            for fd in fds:
                os.close(fd)
            reply, fds = self._answer(timeout_s)
        if "error" in reply:
            raise RuntimeError(f"no segment of {num_bytes} bytes: {reply['error']}")
        if len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise RuntimeError(f"the keeper sent {len(fds)} descriptors in place of one: ulimit -n?")
        return fds[0]

    def _receive(self, timeout_s: float) -> tuple[PoolHandle, tuple[int, ...]]:
        reply, fds = self._answer(timeout_s)
        if "error" in reply:
            raise RuntimeError(f"the keeper has no pool: {reply['error']}")
        handle = PoolHandle.from_json(reply["handle"])
        if len(fds) != handle.num_fds:
            for fd in fds:
                os.close(fd)
            raise RuntimeError(
                f"the keeper promised {handle.num_fds} descriptors, {len(fds)} came: ulimit -n?"
            )
        return handle, tuple(fds)

    def _answer(self, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
        self._socket.settimeout(timeout_s)
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE, MAX_FDS)
        except TimeoutError:
            raise RuntimeError(f"the keeper did not allocate memory within {timeout_s} s") from None
        for fd in fds:
            os.set_inheritable(fd, False)  # recv_fds takes flags and ignores them
        if not data:
            raise RuntimeError(f"the keeper ended with exit code {self._process.wait()} and no pool")
        return json.loads(data), fds

    @property
    def pid(self) -> int:
        return self._process.pid

    def needed(self) -> bool:
        """Whether the pool is lost when the keeper dies: legacy handles point into its context."""
        return self.handle.kind == "ipc"

    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self, timeout_s: float = 10.0) -> None:
        """Gives the memory back once no worker maps it any more."""
        for fd in self.fds:
            if fd != GONE:
                os.close(fd)
        self._socket.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def keep(link: socket.socket, driver: Driver, device: int, num_bytes: int, kind: str | None) -> None:
    """Allocates, sends, and sleeps until the agent is gone."""
    exported = export_memory(driver, device, num_bytes, kind)
    if len(exported.fds) > MAX_FDS:
        raise CudaError(
            f"a pool of {num_bytes} bytes has {len(exported.fds)} segments, at most {MAX_FDS} can be passed"
        )
    reply = json.dumps({"handle": exported.handle.to_json()}).encode()
    socket.send_fds(link, [reply], list(exported.fds))
    for fd in exported.fds:
        os.close(fd)  # the agent has its own now
    # until the agent has closed its end it may ask for memory in place of what was given back
    with contextlib.suppress(ConnectionResetError):  # it closed, and had not read an answer
        while asked := link.recv(MAX_MESSAGE):
            _allocate(link, driver, device, json.loads(asked))
    exported.release()


def _allocate(link: socket.socket, driver: Driver, device: int, asked: dict[str, int]) -> None:
    number = {"number": asked["number"]}
    try:
        fd = export_segment(driver, device, asked["bytes"])
    except CudaError as error:
        link.send(json.dumps({**number, "error": str(error)}).encode())
        return
    try:
        socket.send_fds(link, [json.dumps(number).encode()], [fd])
    finally:
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(prog="minserve keeper")
    parser.add_argument("role", choices=["keeper"])
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--kind")
    args = parser.parse_args()
    with socket.socket(fileno=args.fd) as link:
        try:
            keep(link, open_driver(), args.device, args.bytes, args.kind)
        except (CudaError, ValueError) as error:
            link.send(json.dumps({"error": str(error)}).encode())
