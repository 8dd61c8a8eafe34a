"""What /metrics says of the pools, and the terminal's view of it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from minserve import metrics, top
from minserve.slab_counts import PLACES
from minserve.slab_table import SlabTable
from sched.slabs import LayerGroup, PoolPlan, SetShape
from tests.minserve.small_table import leased

PLAN = PoolPlan(
    4096, 100,
    {
        "llama": SetShape(3, (LayerGroup(0, 3, 1300),), 3, 16, 2, 2, 0.05),
        "qwen": SetShape(2, (LayerGroup(0, 2, 2000),), 2, 32, 2, 2, 0.02),
    }, 5,
)  # fmt: skip


@pytest.fixture
def table() -> Iterator[SlabTable]:
    table = SlabTable.create(PLAN)
    table.quotas.write((20, 15))
    leased(table, 0, 30)
    table.drain(0, leased(table, 0, 3))
    leased(table, 1, 8)
    assert table.lease(1, 100) is None
    table.publish(
        0,
        live_blocks=11,
        cached_blocks=7,
        given_up=4,
        reclaims=2,
        reclaim_us=1_500_000,
        reclaim_max_us=900_000,
    )
    yield table
    table.close()


def text_of(table: SlabTable) -> str:
    return metrics.rendered([], {"gpu0": PLAN}, {"gpu0": table.counts()})


def test_every_byte_of_a_pool_is_counted_once(table: SlabTable) -> None:
    sample = top.Sample(text_of(table), 0.0)
    assert sample.pools == ["gpu0"]
    assert sample.models("gpu0") == ["llama", "qwen"]
    places = [sample.get(f"kv_{place}_bytes", "gpu0", m) for place in PLACES for m in ("llama", "qwen")]
    assert (
        sum(places) + sample.get("kv_free_bytes", "gpu0") == sample.get("kv_pool_bytes", "gpu0") == 100 * 4096
    )
    assert sample.get("kv_live_bytes", "gpu0", "llama") == 11 * 3 * 1300
    assert sample.get("kv_draining_bytes", "gpu0", "llama") == 3 * 4096
    said = {
        m: sample.get(f"kv_{m}", "gpu0", "llama")
        for m in ("sets", "quota_sets", "leases_total", "refused_total")
    }
    assert said == {"sets": 10, "quota_sets": 20, "leases_total": 2, "refused_total": 0}
    assert sample.get("kv_refused_total", "gpu0", "qwen") == 1
    assert sample.get("kv_reclaim_seconds_total", "gpu0", "llama") == 1.5
    assert sample.get("kv_reclaim_seconds_max", "gpu0", "llama") == 0.9


def test_a_pool_that_cannot_be_read_is_left_out(table: SlabTable) -> None:
    text = metrics.rendered([], {"gpu0": PLAN, "gpu1": PLAN}, {"gpu0": None, "gpu1": table.counts()})
    assert top.Sample(text, 0.0).pools == ["gpu1"]
    assert top.Sample(metrics.rendered([], {"gpu0": PLAN}, {"gpu0": None}), 0.0).pools == []


def shown(now: top.Sample, before: top.Sample | None = None) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(top.view(now, before, 200))
    return capture.get()


def test_the_view_shows_places_quotas_and_rates(table: SlabTable) -> None:
    before = top.Sample(text_of(table), 10.0)
    for _ in range(6):
        leased(table, 1, 2)
    off = 'minserve:step_time_error{model_name="llama"} 0.043\n'
    view = shown(top.Sample(text_of(table) + off, 12.0), before)
    lines = view.splitlines()
    assert lines[0].startswith("pool gpu0: 400.0 KiB")
    assert lines[1].count("█") + lines[1].count("·") == 120
    assert "live 41.9 KiB (10.5%)" in lines[2]
    llama, qwen = (next(line for line in lines if line.startswith(name)) for name in ("llama", "qwen"))
    assert llama.split()[1:8] == ["0", "0", "0.0", "10", "20", "2", "0"]
    assert "900.0" in llama
    assert (llama.split()[-1], qwen.split()[-1]) == ("4%", "0%"), "how wrong steps are predicted"
    assert "3.0" in qwen.split(), "6 leases in 2 seconds"
    # a restarted worker, or the first look
    assert " 0.0 " in shown(before, top.Sample(text_of(table), 9.0))
    assert " - " in shown(before)
    assert "no pool to show" in shown(top.Sample("", 0.0))


@pytest.fixture
def url(table: SlabTable) -> Iterator[str]:
    """A server that wants the key `sesame`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers["Authorization"] == "Bearer sesame" and self.path == "/metrics"
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(text_of(table).encode() if allowed else b"")

        def log_message(self, format: str, *args: object) -> None:
            """Not into the tests' output."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_once_prints_one_table(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("MINSERVE_API_KEY", "sesame")
    assert top.main([url + "/", "--once"]) == 0
    out = capsys.readouterr().out
    assert "pool gpu0" in out
    assert all(len(line) <= top.PIPE_WIDTH for line in out.splitlines())
    assert out.count("llama") == 1
    # the address and the key of a configuration
    monkeypatch.delenv("MINSERVE_API_KEY")
    (tmp_path / "keys").write_text("sesame\n")
    config = tmp_path / "c.yaml"
    port = url.rsplit(":", 1)[1]
    config.write_text(f"server: {{port: {port}, api_keys_file: keys}}\nmodels: [{{name: llama, path: m}}]\n")
    assert top.main([str(config), "--once"]) == 0


def test_what_is_wrong_is_one_line(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("MINSERVE_API_KEY", raising=False)
    cases = [
        ([url, "--once"], "answers 401: set MINSERVE_API_KEY"),
        (["http://127.0.0.1:1", "--once"], "does not answer"),
        ([str(tmp_path / "none.yaml"), "--once"], "none.yaml: cannot be read"),
        ([url, "--interval", "0"], "--interval must be in"),
    ]
    for arguments, says in cases:
        assert top.main(arguments) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
