"""A server process of its own for a test: started, spoken to, signalled, and never left behind."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from minserve.host import ROOT
from tests.tiny import DEFAULTS, write_tokenizer

VOCAB = 400
START_S = 60.0
# what a request may take on a machine that is busy with other work; httpx's own 5 s are not enough there
REQUEST_S = 60.0


def write_model(folder: Path, **overrides: Any) -> Path:
    """A model folder without weights: all that the front end and an oracle need."""
    write_tokenizer(folder, VOCAB)
    ids = {"vocab_size": VOCAB, "bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **DEFAULTS, **ids, **overrides}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_config(folder: Path, models: list[dict[str, Any]], **server: Any) -> Path:
    """JSON is YAML; the pool has room for a thousand small sets."""
    gpus = [{"device": "cpu", "pool_bytes": "256 MiB", "slab_bytes": "64 KiB"}]
    file = {
        "server": {"shutdown_timeout_s": 5, **server},
        "nodes": [{"name": "local", "gpus": gpus}],
        "models": models,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(file))
    return path


class Server:
    """`lines` is what it has printed so far; `url` is known once it is listening."""

    def __init__(
        self, *args: str, module: str = "tests.e2e.oracle_server", port: int = 0, cwd: Path = ROOT
    ) -> None:
        command = [sys.executable, "-m", module, *args, "--port", str(port)]
        self.process = subprocess.Popen(
            command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def url(self) -> str:
        found = re.search(r"ready in .*?: (http\S+)", self.output)
        assert found, self.output
        return found[1]

    def wait_ready(self) -> "Server":
        wait_for(lambda: "ready in" in self.output or self.process.poll() is not None, START_S, self.describe)
        assert self.process.poll() is None, self.output
        return self

    def describe(self) -> str:
        return f"the server said:\n{self.output}"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 20.0) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=REQUEST_S).json()
        return found

    def workers(self) -> dict[str, int]:
        """Process ids of this server's workers by model."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"worker" in words and words[words.index(b"worker") + 3] == str(self.process.pid).encode():
                found[words[words.index(b"worker") + 1].decode()] = int(path.parent.name)
        return found

    def assert_idle(self, within_s: float = 30.0, spare_slabs: int = 0) -> None:
        """Nothing runs, waits or is leased (but the empty set that an engine may keep)."""

        def idle() -> bool:
            found = self.health()
            counts = [
                m[k]
                for m in found["models"].values()
                for k in ("requests", "running", "waiting", "queued_tokens")
            ]
            return not any(counts) and all(
                n is not None and n <= spare_slabs for n in found["leased_slabs"].values()
            )

        wait_for(idle, within_s, lambda: str(self.health()))


@contextmanager
def running(*args: Any, **kwargs: Any) -> Iterator[Server]:
    server = Server(*map(str, args), **kwargs)
    try:
        yield server.wait_ready()
    finally:
        server.kill()


def wait_for(condition: Callable[[], bool], within_s: float, say: Callable[[], str] = str) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"not within {within_s} s: {say()}"
        time.sleep(0.02)


def events(text: str) -> list[Any]:
    """The data of server-sent events; [DONE] is None."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [None if data == "[DONE]" else json.loads(data) for data in found]
