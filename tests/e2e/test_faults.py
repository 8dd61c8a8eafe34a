"""What goes wrong: clients that leave, workers that die or hang, signals, ports, files.  Oracle workers."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from minserve import serve
from tests.e2e.oracle import DIE, FREEZE, SLOW
from tests.e2e.running import ROOT, Server, events, running, wait_for, write_config, write_model


def two_models(folder: Path, **server: Any) -> Path:
    write_model(folder / "m")
    return write_config(folder, [{"name": "a", "path": "m"}, {"name": "b", "path": "m"}], **server)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(two_models(tmp_path_factory.mktemp("faults"))) as server:
        yield server


class Reader(threading.Thread):
    """Reads a stream to its end in the background."""

    def __init__(self, server: Server, model: str, prompt: Any, max_tokens: int = 200) -> None:
        super().__init__(daemon=True)
        self.body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "seed": 1, "stream": True}
        self.url, self.data, self.cut = f"{server.url}/v1/completions", b"", False
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=self.body, timeout=30) as answer:
                for part in answer.iter_raw():
                    self.data += part
                    self.begun.set()
        except httpx.RemoteProtocolError:
            self.cut = True
        self.begun.set()

    @property
    def events(self) -> list[Any]:
        self.join(30)
        return events(self.data.decode())

    @property
    def text(self) -> str:
        return "".join(c["text"] for e in self.events if e for c in e.get("choices", ()))


def complete(server: Server, model: str, **body: Any) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/completions", json={"model": model, "prompt": "x", **body}, timeout=30
    )


def test_a_client_that_leaves_frees_everything(server: Server) -> None:
    body = {"model": "a", "prompt": [SLOW, 5], "max_tokens": 200, "n": 4}
    for stream, patience in ((True, None), (False, 0.3)):
        if patience is None:
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json={**body, "stream": stream}
            ) as answer:
                parts = answer.iter_raw()
                next(parts)
                assert server.health()["models"]["a"]["requests"] == 4
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/completions", json={**body, "stream": stream}, timeout=patience)
        server.assert_idle()
    # gone before the body was there, and in the middle of it
    for sent in (b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\n"
                 b"host: x\r\ncontent-length: 500\r\n\r\n{"):  # fmt: skip
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as peer:
            peer.sendall(sent)
    assert complete(server, "a").status_code == 200
    server.assert_idle()


def test_a_killed_worker_takes_only_its_own_streams(server: Server) -> None:
    golden = complete(server, "b", prompt="golden", max_tokens=30, seed=1).json()["choices"]
    victims = [Reader(server, "a", [SLOW, i]) for i in range(3)]
    others = [Reader(server, "b", [SLOW, i], 40) for i in range(3)]
    for reader in (*victims, *others):
        reader.begun.wait(20)
    restarts = server.health()["models"]["a"]["restarts"]
    os.kill(server.workers()["a"], signal.SIGKILL)
    began = time.monotonic()
    for victim in victims:
        assert victim.events[-1]["error"]["code"] == "worker_died"
        assert victim.cut
    assert time.monotonic() - began < 5
    refused = complete(server, "a")
    assert refused.status_code in (200, 503)
    if refused.status_code == 503:
        assert refused.headers["retry-after"]
    for other in others:
        assert other.events[-1] is None
        assert not other.cut
    wait_for(lambda: complete(server, "a").status_code == 200, 20, server.describe)
    assert complete(server, "b", prompt="golden", max_tokens=30, seed=1).json()["choices"] == golden
    assert server.health()["models"]["a"]["restarts"] == restarts + 1
    assert "SIGKILL" in server.output
    server.assert_idle()


def test_a_request_that_kills_its_worker_is_told_so(server: Server) -> None:
    wait_for(lambda: complete(server, "b").status_code == 200, 20, server.describe)
    answer = complete(server, "b", prompt=[DIE])
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "worker_died"
    wait_for(lambda: complete(server, "b").status_code == 200, 20, server.describe)
    server.assert_idle()


def test_a_worker_stopped_inside_the_lock_is_killed_and_the_others_go_on(server: Server) -> None:
    wait_for(lambda: complete(server, "b").status_code == 200, 20, server.describe)
    golden = complete(server, "a", prompt="golden", max_tokens=30, seed=1).json()["choices"]
    began = time.monotonic()
    frozen = Reader(server, "b", [FREEZE])
    # each of these needs the lock
    for _ in range(20):
        assert complete(server, "a", prompt="golden", max_tokens=30, seed=1).json()["choices"] == golden
    frozen.join(30)
    assert b"worker_died" in frozen.data
    took = time.monotonic() - began
    assert took < 5, f"{took:.1f} s until the lock was free and 20 requests answered"
    assert "stopped inside the slab table's lock" in server.output
    wait_for(lambda: complete(server, "b").status_code == 200, 20, server.describe)
    server.assert_idle()


def test_sigterm_drains_and_a_second_one_does_not_wait(tmp_path: Path) -> None:
    config = two_models(tmp_path, shutdown_timeout_s=30)
    with running(config) as server:
        readers = [Reader(server, m, [SLOW, i], 30) for i, m in enumerate("abab")]
        for reader in readers:
            reader.begun.wait(20)
        server.signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503, 20)
        refused = complete(server, "a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert [r.events[-1] for r in readers] == [None] * 4, "lost in the drain"
        assert server.wait() == 0
        assert server.workers() == {}
    with running(config) as server:
        reader = Reader(server, "a", [SLOW], 200)
        reader.begun.wait(20)
        server.signal(signal.SIGINT)
        time.sleep(0.2)
        server.signal(signal.SIGINT)
        began = time.monotonic()
        assert server.wait() == 0
        assert time.monotonic() - began < 5
        assert reader.events[-1]["error"]["code"] == "shutting_down"
        assert reader.cut


def test_a_server_may_be_stopped_while_its_workers_begin(tmp_path: Path) -> None:
    server = Server(str(two_models(tmp_path)))
    wait_for(lambda: bool(server.workers()), 20, server.describe)
    server.signal(signal.SIGINT)
    assert server.wait() == 0
    assert "Traceback" not in server.output
    assert "stopped" in server.output


def test_ctrl_c_before_anything_runs_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "load_tokenizers", interrupted)
    assert serve.main([str(two_models(tmp_path))]) == 130
    assert capsys.readouterr().err == ""


def test_a_drain_ends_when_its_time_is_up(tmp_path: Path) -> None:
    with running(two_models(tmp_path, shutdown_timeout_s=0.3)) as server:
        reader = Reader(server, "a", [SLOW], 200)
        reader.begun.wait(20)
        server.signal(signal.SIGTERM)
        assert server.wait(6) == 0
        assert reader.cut


def test_workers_end_with_their_server(tmp_path: Path) -> None:
    with running(two_models(tmp_path)) as server:
        pids = server.workers()
        assert set(pids) == {"a", "b"}
        server.signal(signal.SIGKILL)
        server.wait()
        wait_for(lambda: not server.workers(), 5, lambda: str(server.workers()))


def test_a_model_that_fails_does_not_hold_up_the_others(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    write_model(tmp_path / "broken")
    (tmp_path / "broken/config.json").write_text('{"architectures": ["GPT"]}')
    write_model(tmp_path / "mute")
    (tmp_path / "mute/tokenizer.json").unlink()
    models = [{"name": n, "path": p} for n, p in
              (("good", "m"), ("refuses", "m"), ("broken", "broken"), ("mute", "mute"))]  # fmt: skip
    with running(write_config(tmp_path, models)) as server:
        states = {name: m["state"] for name, m in server.health()["models"].items()}
        assert states == {"good": "ready", "refuses": "failed", "broken": "failed", "mute": "failed"}
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert httpx.get(f"{server.url}/ready?model=mute").status_code == 503
        answer = complete(server, "refuses")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_failed")
        assert complete(server, "good").status_code == 200
        assert "model refuses failed: tensor model.norm.weight is missing" in server.output
        assert "architectures" in server.output
        assert "has no tokenizer.json" in server.output
        assert "Traceback" not in server.output


def test_mistakes_at_the_start_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = two_models(tmp_path)
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    (tmp_path / "bad.yaml").write_text("models: [{name: a, path: m, max_model_length: 5}]")
    (tmp_path / "broken.yaml").write_text("models: [")
    (tmp_path / "away.yaml").write_text("models: [{name: a, path: nowhere}]")
    small = json.loads(config.read_text())
    small["nodes"][0]["gpus"][0] = {"device": "cpu", "pool_bytes": "64 KiB"}
    (tmp_path / "small.yaml").write_text(json.dumps(small))
    for args, says in (
        ([str(config), "--port", port], f"cannot listen on 127.0.0.1 port {port}"),
        ([str(config), "--host", "no-such-host.invalid"], "cannot listen on no-such-host.invalid"),
        ([str(tmp_path / "bad.yaml")], "max_model_len"),
        ([str(tmp_path / "broken.yaml")], "broken.yaml"),
        ([str(tmp_path / "away.yaml")], "nowhere"),
        ([str(tmp_path / "none.yaml")], "none.yaml"),
        ([str(tmp_path / "small.yaml"), "--port", "0"], "pool_bytes=65536 is too small"),
        ([str(config), "--dtype", "bf16"], "goes with --model"),
        (["--model", str(tmp_path / "gone")], "gone"),
        ([], "CONFIG.yaml"),
    ):
        assert serve.main(args) == 2, args
        said = capsys.readouterr().err
        assert says in said, (args, said)
        assert len(said.splitlines()) == 1, (args, said)
        assert said.count(port) < 2, said
        assert said.startswith("minserve: ")
    command = [sys.executable, "-m", "minserve.serve", str(config), "--port", port]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, len(found.stderr.splitlines())) == (2, 1), found
    taken.close()


def test_a_plan_can_be_looked_at_first_even_where_the_port_is_taken(tmp_path: Path) -> None:
    config = two_models(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "minserve.serve", str(config), "--port", port, "--check"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found
    assert "slabs of 64 KiB" in found.stdout


def test_the_front_end_imports_no_torch() -> None:
    code = "import sys, minserve.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
