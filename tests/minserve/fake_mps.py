"""A `nvidia-cuda-mps-control` for machines without one: install it in a folder of PATH under that name.

With -d a daemon: it puts its pid and a socket into the pipe directory and answers until `quit`.  Without, the control
program: one command a line on stdin.  A line in the file `clients` of the pipe directory is a client's pid, the server
runs while there is one.  FAKE_MPS makes it misbehave: `mute`, `deaf`, `refuses`, `flaky`.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

UUID, CHUNKS, CHUNK_SMS = "GPU-fake", 16, 8


def install(folder: Path) -> Path:
    """The folder to put on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvidia-cuda-mps-control"
    program.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
    program.chmod(0o755)
    return folder


class Daemon:
    def __init__(self, pipe: Path, static: bool) -> None:
        self.pipe, self.static = pipe, static
        self.server: subprocess.Popen[bytes] | None = None
        self.partitions: dict[str, int] = {}
        self.asked = 0

    def clients(self) -> list[int]:
        file = self.pipe / "clients"
        return [int(w) for w in file.read_text().split()] if file.exists() else []

    def servers(self) -> list[int]:
        """The first client brings one up; it has its own name, as the real one."""
        if self.server is None and self.clients():
            own = self.pipe / "nvidia-cuda-mps-server"
            own.symlink_to("/bin/sleep")
            self.server = subprocess.Popen([str(own), "600"])
        return [] if self.server is None else [self.server.pid]

    def answer(self, line: str) -> tuple[int, str]:
        self.asked += 1
        mood = os.environ.get("FAKE_MPS", "")
        if mood == "mute":
            return 1, ""
        if mood == "flaky" and self.asked % 4:
            return 1, "Failed to receive reply"
        match line.split():
            case ["get_server_list"]:
                return 0, "".join(f"{pid}\n" for pid in self.servers())
            case ["get_client_list", pid] if int(pid) in self.servers():
                return 0, "".join(f"{pid}\n" for pid in self.clients())
            case ["lspart"] if self.static:
                return 0, self.table()
            case ["sm_partition", "add", gpu, n] if self.static and gpu == UUID:
                if sum(self.partitions.values()) + int(n) > CHUNKS:
                    return 0, "Failed to create partition: not enough chunks"
                # an id may hold slashes
                self.partitions[f"D{len(self.partitions)}/x{n}"] = int(n)
                return 0, f"Partition {UUID}/{list(self.partitions)[-1]} created"
            case ["sm_partition", "rm", gpu, own] if self.static and gpu == UUID:
                del self.partitions[own]
                return 0, ""
            case ["quit"]:
                return 0, "bye"
        return 1, f"unknown command {line!r}"

    def table(self) -> str:
        used = sum(self.partitions.values())
        lines = ["GPU Partition free used free used clients", "chunks chunks SM SM", ""]
        lines.append(f"{UUID} {CHUNKS - used} {used} {CHUNK_SMS * (CHUNKS - used)} {CHUNK_SMS * used}")
        lines += [f"{UUID} {own} {n} {CHUNK_SMS * n} No" for own, n in self.partitions.items()]
        return "\n".join(lines) + "\n"

    def run(self) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.pipe / "control"))
            listener.listen()
            (self.pipe / "nvidia-cuda-mps-control.pid").write_text(f"{os.getpid()}\n")
            while True:
                link, _ = listener.accept()
                with link:
                    line = link.recv(4096).decode().strip()
                    status, said = self.answer(line)
                    link.sendall(f"{status}\n{said}".encode())
                if line == "quit" and os.environ.get("FAKE_MPS") != "deaf":
                    break
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait()


def control(pipe: Path) -> int:
    for line in sys.stdin:
        with socket.socket(socket.AF_UNIX) as link:
            try:
                link.connect(str(pipe / "control"))
            except OSError:
                sys.stdout.write("Cannot find MPS control daemon process\n")
                return 1
            link.sendall(line.encode())
            said = b""
            while data := link.recv(4096):
                said += data
        status, _, text = said.decode().partition("\n")
        sys.stdout.write(text)
        if int(status or 1):
            return int(status or 1)
    return 0


def main() -> None:
    pipe = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
    if "-d" not in sys.argv:
        sys.exit(control(pipe))
    if os.environ.get("FAKE_MPS") == "refuses":
        sys.exit("an instance of this daemon is already running")
    if (pipe / "control").exists():
        sys.exit("the pipe directory is in use")
    if os.fork():
        # the real one returns before it listens
        sys.exit(0)
    os.setsid()
    time.sleep(0.05)
    Daemon(pipe, "-S" in sys.argv).run()


if __name__ == "__main__":
    main()
