"""`python -m minserve.mps start|status|stop`: NVIDIA's MPS daemon of this user, without root.  No torch, no CUDA.

The daemon's pipes and logs lie in private directories of ours, so it is nobody else's and none of the machine's.  What
a dead daemon left is cleared away; a daemon is known by its process, never by a pid in a file, which may have been given
again.  A process that misses the pipe directory runs beside MPS and is told nothing: `assert_attached` finds it.
`sharing` in a pool's configuration (docs/sm-shares.md) says which workers are clients, and of which share of the GPU.
"""

import argparse
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

CONTROL, SERVER = "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"
ASK_S, START_S, STOP_S = 10.0, 20.0, 20.0
ASK_TRIES, TRY_AGAIN_S = 5, 0.2  # questions fail at times while clients come and go
MAX_SOCKET_PATH = 107  # of a Unix socket, less its final zero
LONGEST_SOCKET = "/control_privileged"
NOT_RUNNING = 3  # exit status of `status`


class MpsError(RuntimeError):
    """What the daemon, or its absence, does not allow; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Status:
    """A daemon that answers: its servers with the processes attached to each."""

    pid: int
    static: bool
    servers: dict[int, tuple[int, ...]]

    @property
    def clients(self) -> frozenset[int]:
        return frozenset(pid for pids in self.servers.values() for pid in pids)


@dataclass(frozen=True, slots=True)
class Partitions:
    """A GPU under static partitioning: chunks of so many multiprocessors, and the partitions made of them."""

    free_chunks: int
    used_chunks: int
    sms: int
    ids: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()  # those without a client

    @property
    def chunks(self) -> int:
        return self.free_chunks + self.used_chunks

    @property
    def chunk_sms(self) -> int:
        return self.sms // self.chunks if self.chunks else 0


def root_directory(environ: Mapping[str, str]) -> Path:
    """In XDG_RUNTIME_DIR where that is this user's, else in the folder for temporary files."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime and os.path.isdir(runtime) and os.stat(runtime).st_uid == os.getuid():
        return Path(runtime) / "minserve-mps"
    return Path(tempfile.gettempdir()) / f"minserve-mps-{os.getuid()}"


def private(path: Path) -> Path:
    """The folder, made where it is not there.  MpsError where another could have put something into it."""
    path.mkdir(mode=0o700, parents=False, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise MpsError(
            f"{path} must be a folder of user {os.getuid()} that nobody else may enter (0700), got mode "
            f"{stat.S_IMODE(found.st_mode):04o} of user {found.st_uid}"
        )
    return path


def processes(program: str, pipe: Path) -> list[int]:
    """Living processes of `program` whose environment names this pipe directory."""
    wanted = f"CUDA_MPS_PIPE_DIRECTORY={pipe}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            argv = (entry / "cmdline").read_bytes().split(b"\0")
            # a script's interpreter stands before its name
            named = any(os.path.basename(os.fsdecode(a)) == program for a in argv[:2])
            if named and wanted in (entry / "environ").read_bytes().split(b"\0") and not is_zombie(entry):
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended, or is another user's
    return sorted(found)


def is_zombie(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


def has_flag(pid: int, *flags: str) -> bool:
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(flag.encode() in argv for flag in flags)


class Daemon:
    """The daemon of one pipe directory, ours unless `environ` names another's."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = dict(os.environ if environ is None else environ)
        given = self._environ.get("CUDA_MPS_PIPE_DIRECTORY")
        self.root = root_directory(self._environ)
        self.ours = not given or Path(given) == self.root / "pipe"
        self.pipe = self.root / "pipe" if not given else Path(given)
        self.log = (
            self.root / "log" if self.ours else Path(self._environ.get("CUDA_MPS_LOG_DIRECTORY", given or ""))
        )

    @property
    def client_environ(self) -> dict[str, str]:
        """What makes a process a client, when it is there before the process opens CUDA."""
        return {"CUDA_MPS_PIPE_DIRECTORY": str(self.pipe), "CUDA_MPS_LOG_DIRECTORY": str(self.log)}

    @property
    def binary(self) -> str | None:
        return shutil.which(CONTROL, path=self._environ.get("PATH"))

    def pid(self) -> int | None:
        """Of the daemon, without asking it.  The program is also what asks: a daemon was started with -d or -f."""
        return next((pid for pid in processes(CONTROL, self.pipe) if has_flag(pid, "-d", "-f")), None)

    def ask(self, command: str) -> str:
        """One command of the control program, its answer.  MpsError where the daemon does not answer."""
        if self.binary is None:
            raise MpsError(f"{CONTROL} is not on PATH: it comes with NVIDIA's driver")
        environ = {**self._environ, **self.client_environ}
        try:
            done = subprocess.run(
                [self.binary],
                input=command + "\n",
                capture_output=True,
                text=True,
                timeout=ASK_S,
                env=environ,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise MpsError(f"{CONTROL} did not answer {command!r} within {ASK_S:.0f} s") from None
        except OSError as error:
            raise MpsError(f"{self.binary} cannot be run: {error}") from None
        if done.returncode != 0:
            said = " ".join((done.stderr + done.stdout).split())
            raise MpsError(f"{CONTROL} answered {command!r} with status {done.returncode}: {said[:300]}")
        return done.stdout

    def status(self) -> Status | None:
        """None where no daemon runs; MpsError where one runs and does not answer."""
        pid = self.pid() if self.ours else foreign_pid(self.pipe)
        if pid is None:
            return None
        servers = {s: self._pids(f"get_client_list {s}") for s in self._pids("get_server_list")}
        return Status(pid, has_flag(pid, "-S", "--static-partitioning"), servers)

    def _pids(self, command: str) -> tuple[int, ...]:
        """The answer to a question, which is asked again where it fails."""
        for left in reversed(range(ASK_TRIES)):
            try:
                words = self.ask(command).split()
            except MpsError:
                if not left:
                    raise
                time.sleep(TRY_AGAIN_S)
                continue
            if not all(word.isdigit() for word in words):
                raise MpsError(
                    f"{CONTROL} answered {command!r} with {' '.join(words)[:200]!r} in place of pids"
                )
            return tuple(map(int, words))
        raise AssertionError(f"{ASK_TRIES=}")

    def assert_attached(self, pids: Sequence[int]) -> None:
        """MpsError unless each process, which has opened CUDA, is a client of this daemon."""
        status = self.status()
        if status is None:
            raise MpsError(f"no MPS daemon runs in {self.pipe}: process {pids} runs beside MPS")
        beside = [pid for pid in pids if pid not in status.clients]
        if beside:
            raise MpsError(
                f"process {', '.join(map(str, beside))} runs beside MPS: the servers in {self.pipe} have the clients "
                f"{sorted(status.clients)}"
            )

    # ---- its life

    def start(self, *, static: bool = False) -> bool:
        """False where it runs already.  MpsError where it cannot, or runs in the other way."""
        self._own("start")
        with self._alone():
            running = self.pid()
            if running is not None:
                if has_flag(running, "-S", "--static-partitioning") != static:
                    how = "without" if static else "with"
                    raise MpsError(f"daemon {running} runs already, {how} static partitioning: stop it first")
                return False
            orphans = processes(SERVER, self.pipe)
            if orphans:
                raise MpsError(
                    f"server {', '.join(map(str, orphans))} of a dead daemon still runs: end its clients, then `stop --force`"
                )
            self._clear()
            self._spawn(static)
        return True

    def _spawn(self, static: bool) -> None:
        if self.binary is None:
            raise MpsError(f"{CONTROL} is not on PATH: it comes with NVIDIA's driver")
        command = [self.binary, "-d", *(["-S"] if static else [])]
        environ = {**self._environ, **self.client_environ}
        try:
            # not captured by a pipe: the daemon would hold it open
            with (self.log / "start").open("w+") as said:
                pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
                done = subprocess.run(command, **pipes, timeout=START_S, env=environ, check=False)
                said.seek(0)
                why = " ".join(said.read().split())[:300]
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MpsError(f"{CONTROL} -d failed: {error}") from None
        end, problem = time.monotonic() + START_S, f"status {done.returncode} {why}"
        while done.returncode == 0 and time.monotonic() < end:
            try:
                if self.status() is not None:
                    return
            except MpsError as error:
                problem = str(error)
            time.sleep(0.05)
        self._end(processes(CONTROL, self.pipe))
        raise MpsError(f"the MPS daemon did not start: {problem}; its log is in {self.log}")

    def stop(self, *, force: bool = False) -> bool:
        """False where none ran.  What is left of it is cleared away.  MpsError where it has clients, unless forced."""
        self._own("stop")
        with self._alone():
            running = self.pid()
            if running is not None:
                self._quit(running, force)
            elif (left := processes(SERVER, self.pipe)) and not force:
                raise MpsError(
                    f"no daemon runs, but its servers {left} do, perhaps with clients: end those, then --force"
                )
            self._end(processes(CONTROL, self.pipe) + processes(SERVER, self.pipe))
            self._clear()
            return running is not None

    def _quit(self, running: int, force: bool) -> None:
        try:
            status = self.status()
            if status is not None and status.clients and not force:
                raise MpsError(
                    f"daemon {running} has the clients {sorted(status.clients)}: end them first, or --force"
                )
            self.ask("quit")
        except MpsError:
            if not force:
                raise
        end = time.monotonic() + STOP_S
        while self.pid() is not None and time.monotonic() < end and not force:
            time.sleep(0.02)

    def _end(self, pids: Sequence[int]) -> None:
        """Of these processes none is left afterwards."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in pids:
                if alive(pid):
                    os.kill(pid, number)
            end = time.monotonic() + 2.0
            while any(map(alive, pids)) and time.monotonic() < end:
                time.sleep(0.02)

    def _clear(self) -> None:
        shutil.rmtree(private(self.pipe))
        private(self.pipe)
        private(self.log)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One start or stop at a time."""
        private(self.root)
        length = len(os.fsencode(self.pipe)) + len(LONGEST_SOCKET)
        if length > MAX_SOCKET_PATH:
            raise MpsError(
                f"{self.pipe} is too long for a socket: {length} bytes, at most {MAX_SOCKET_PATH}; "
                f"set XDG_RUNTIME_DIR or TMPDIR to a shorter folder"
            )
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _own(self, verb: str) -> None:
        if not self.ours:
            raise MpsError(
                f"CUDA_MPS_PIPE_DIRECTORY names {self.pipe}, whose daemon is not ours to {verb}: unset it"
            )

    # ---- static partitions

    def partitions(self) -> dict[str, Partitions]:
        """By GPU, as its UUID stands in the daemon's list."""
        found: dict[str, Partitions] = {}
        for line in self.ask("lspart").splitlines():
            words = line.split()
            if len(words) != 5 or not words[0].startswith("GPU-"):
                continue  # the head of the table
            gpu, numbers = words[0], words[1:]
            if words[4] in ("Yes", "No"):
                device = found[gpu]
                idle = (*device.idle, *([words[1]] if words[4] == "No" else []))
                found[gpu] = replace(device, ids=(*device.ids, words[1]), idle=idle)
            else:
                free, used, free_sms, used_sms = map(int, numbers)
                found[gpu] = Partitions(free, used, free_sms + used_sms)
        return found

    def add_partition(self, gpu: str, chunks: int) -> str:
        """The value of CUDA_MPS_SM_PARTITION for its clients."""
        said = " ".join(self.ask(f"sm_partition add {gpu} {chunks}").split())
        if not (said.startswith("Partition ") and said.endswith(" created")):
            raise MpsError(f"no partition of {chunks} chunks of {gpu}: {said[:200]!r}")
        return said.removeprefix("Partition ").removesuffix(" created")

    def remove_partition(self, partition: str) -> None:
        gpu, _, own = partition.partition("/")
        self.ask(f"sm_partition rm {gpu} {own}")


def foreign_pid(pipe: Path) -> int | None:
    """Of a daemon that somebody else has started: all there is to go by is its file."""
    try:
        pid = int((pipe / f"{CONTROL}.pid").read_text())
    except (OSError, ValueError):
        return None
    return pid if alive(pid) else None


def alive(pid: int) -> bool:
    try:
        return not is_zombie(Path(f"/proc/{pid}"))
    except OSError:
        return False


def describe(daemon: Daemon, status: Status) -> list[str]:
    lines = [f"MPS daemon {status.pid} in {daemon.pipe}{', static partitioning' if status.static else ''}"]
    for server, clients in status.servers.items():
        lines.append(f"  server {server}: {len(clients)} clients {' '.join(map(str, clients))}".rstrip())
    return [*lines, *([] if status.servers else ["  no server: one starts with the first client"])]


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; `status` has 3 where no daemon runs."""
    parser = argparse.ArgumentParser(prog="python -m minserve.mps", description=__doc__.split("\n\n")[0])
    parser.add_argument("verb", choices=("start", "status", "stop"))
    parser.add_argument("--static", action="store_true", help="start: with static partitioning of the SMs")
    parser.add_argument("--force", action="store_true", help="stop: end its clients with it")
    args = parser.parse_args(argv)
    daemon = Daemon()
    try:
        if args.verb == "stop":
            sys.stdout.write("stopped\n" if daemon.stop(force=args.force) else "no daemon ran\n")
            return 0
        if args.verb == "start" and not daemon.start(static=args.static):
            sys.stdout.write("it runs already\n")
        status = daemon.status()
    except (MpsError, OSError) as error:
        sys.stderr.write(f"minserve: {error}\n")
        return 2
    if status is None:
        sys.stdout.write(f"no MPS daemon in {daemon.pipe}\n")
        return NOT_RUNNING
    sys.stdout.write("\n".join(describe(daemon, status)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
