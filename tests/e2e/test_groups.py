"""Groups and replicas of a real server over oracle workers: two pools, five processes, one name for all of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.oracle import SLOW
from tests.e2e.running import Server, running, wait_for, write_model

STRICT = {"slo": {"tpot_ms": 25}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("groups")
    write_model(folder / "m")
    gpu = {"device": "cpu", "pool_bytes": "64 MiB", "slab_bytes": "64 KiB"}
    models = [
        {"name": "fp16", "path": "m", "group": "any", "tier": 0},
        {"name": "w8", "path": "m", "group": "any", "tier": 1},
        {"name": "twice", "path": "m", "placement": ["gpu0", "gpu1"]},
        {"name": "absent", "path": "m", "group": "any", "tier": 2, "load_at_start": False},
    ]
    file = {"nodes": [{"name": "n", "gpus": [gpu, gpu]}], "models": models, "groups": [{"name": "any"}]}
    path = folder / "config.yaml"
    path.write_text(json.dumps(file))
    with running(path) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def by(client: openai.OpenAI, model: str, prompt: Any = "hi", **more: Any) -> str:
    """Who answered; the body and the header agree."""
    raw = client.completions.with_raw_response.create(model=model, prompt=prompt, max_tokens=4, **more)
    name = raw.headers["x-minserve-model"]
    assert raw.parse().model == name.partition("@")[0]
    return name


def test_a_slow_precision_hands_strict_requests_to_the_next(server: Server, client: openai.OpenAI) -> None:
    assert by(client, "any") == "fp16"
    stream = client.completions.create(
        model="any", prompt=[SLOW, 1], max_tokens=120, stream=True, extra_body={"priority": 1}
    )
    parts = iter(stream)
    assert {next(parts).model for _ in range(8)} == {"fp16"}
    # steps take 50 ms there now, as its tokens have shown
    assert by(client, "any", extra_body=STRICT) == "w8"
    assert by(client, "any") == "fp16", "who is not in a hurry keeps the best one"
    assert by(client, "fp16", extra_body=STRICT) == "fp16", "and who names one gets it"
    stream.close()
    text = httpx.get(f"{server.url}/metrics").text
    assert 'minserve:group_chosen_total{group="any",model_name="w8"} 1\n' in text
    assert 'minserve:slo_missed_tpot_total{model_name="fp16"} 1\n' in text
    server.assert_idle()


def test_replicas_have_a_pool_each(server: Server, client: openai.OpenAI) -> None:
    assert {f"twice@gpu{i}" for i in range(2)} < set(server.workers())
    body = {"model": "twice", "prompt": [SLOW, 1], "max_tokens": 100, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as slow:
        parts = slow.iter_raw()
        next(parts)
        first = slow.headers["x-minserve-model"]
        assert by(client, "twice") != first
        leased = server.health()["leased_slabs"]
        assert sum(n > 0 for n in leased.values()) >= 1
    assert by(client, "twice@gpu1") == "twice@gpu1"
    server.assert_idle()


def test_what_is_served_and_what_rests(server: Server, client: openai.OpenAI) -> None:
    listed = {m.id: m.model_dump() for m in client.models.list()}
    assert list(listed) == ["fp16", "w8", "twice", "absent", "any"]
    assert listed["any"]["members"] == ["fp16", "w8", "absent"]
    assert listed["absent"]["status"]["value"] == "unloaded"
    assert httpx.get(f"{server.url}/ready?model=any").status_code == 200
    with httpx.Client(base_url=server.url, timeout=20) as http:
        for name in ("fp16", "w8"):
            assert http.post(f"/admin/models/{name}/sleep").status_code == 200
        refused = http.post("/v1/completions", json={"model": "any", "prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_asleep")
        assert http.get("/ready?model=any").status_code == 503
        assert http.post("/admin/models/absent/load").status_code == 200
        wait_for(lambda: http.get("/ready?model=any").status_code == 200, 60)
        assert by(client, "any") == "absent"
        for name in ("fp16", "w8"):
            assert http.post(f"/admin/models/{name}/wake").status_code == 200
        assert by(client, "any") == "fp16"


def test_a_group_whose_models_read_text_differently_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    write_model(tmp_path / "o")
    settings = tmp_path / "o" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "{{ messages }}"}))
    models = [{"name": n, "path": n, "group": "g"} for n in ("m", "o")]
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"models": models}))
    server = Server(str(path), "--check")
    assert server.wait() == 2
    assert "group g must have the same tokenizer and chat template, got others for m and o" in server.output
