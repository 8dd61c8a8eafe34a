"""The admin routes and their command, over oracle workers: who may use them, what they say, and what others see of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from minserve import admin
from minserve.residency import GOALS
from tests.e2e.oracle import SLOW
from tests.e2e.running import Server, running, wait_for, write_config, write_model
from tests.e2e.test_faults import Reader, complete

WITHIN_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("admin")
    write_model(folder / "m")
    models = [
        {"name": "a/b", "path": "m", "aliases": ["alias"]},
        {"name": "late", "path": "m", "load_at_start": False},
        {"name": "other", "path": "m"},
        {"name": "lost", "path": "nowhere"},
    ]
    (folder / "nowhere").mkdir()
    with running(write_config(folder, models)) as server:
        yield server


def state(server: Server, name: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/admin/models/{name}").json()
    return found


def post(server: Server, path: str, **query: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/admin/models/{path}", params=query, timeout=WITHIN_S)


def error(answer: httpx.Response) -> tuple[int, str, str]:
    found = answer.json()["error"]
    return answer.status_code, found["code"], found["message"]


def shown(server: Server, name: str) -> str:
    data = httpx.get(f"{server.url}/v1/models").json()["data"]
    value: str = next(m["status"]["value"] for m in data if m["id"] == name)
    return value


def test_a_model_goes_and_comes_and_everybody_is_told(server: Server) -> None:
    pids = {name: state(server, name)["pid"] for name in ("a/b", "other")}
    for verb, value in (
        ("sleep", "sleeping"),
        ("wake", "loaded"),
        ("unload", "unloaded"),
        ("load", "loaded"),
    ):
        answer = post(server, f"a/b/{verb}")
        found = answer.json()
        assert (answer.status_code, found["state"], found["sets"]) == (200, GOALS[verb], 0)
        assert (found["reserve_sets"] > 0, found["doing"]) == (verb in ("wake", "load"), None)
        again = post(server, f"alias/{verb}").json()
        assert {k: v for k, v in again.items() if k != "reason"} == {
            k: v for k, v in found.items() if k != "reason"
        }
        assert shown(server, "a/b") == value
        assert server.health()["models"]["a/b"]["state"] == GOALS[verb]
        up = httpx.get(f"{server.url}/ready", params={"model": "a/b"}).status_code == 200
        assert up == (value == "loaded")
        assert f'minserve:model_ready{{model_name="a/b"}} {int(up)}\n' in metrics(server)
        answered = complete(server, "a/b", max_tokens=3)
        assert complete(server, "other", max_tokens=3).status_code == 200
        if value == "loaded":
            assert answered.status_code == 200
        else:
            says = f"The model a/b is {GOALS[verb]}: POST /admin/models/a/b/{'wake' if verb == 'sleep' else 'load'}"
            assert error(answered) == (503, f"model_{GOALS[verb]}", f"{says} brings it back.")
            assert answered.headers["retry-after"] == "10"
    assert state(server, "other")["pid"] == pids["other"]
    assert state(server, "a/b")["pid"] != pids["a/b"]
    assert state(server, "a/b")["restarts"] == 0


def metrics(server: Server) -> str:
    return httpx.get(f"{server.url}/metrics").text


def test_what_is_refused_says_why(server: Server) -> None:
    assert state(server, "late")["state"] == "unloaded"
    assert "not loaded: late; python -m minserve.admin" in server.output
    for path, query, want, says in (
        ("nobody/load", {}, (404, "model_not_found"), "Served are: a/b, late, other, lost, alias"),
        ("late/fly", {}, (404, "not_found"), "one of load, unload, sleep, wake, got 'fly'"),
        ("late/sleep", {}, (409, "wrong_state"), "sleep of late: it is unloaded, load it first"),
        ("lost/load", {}, (409, "wrong_state"), "has no place in a pool"),
        ("other/sleep", {"level": "3"}, (400, "invalid_value"), "level must be 1 or 2, got '3'"),
        ("other/sleep", {"drain_s": "-1"}, (400, "invalid_value"), "drain_s must be in [0, 3600] seconds"),
        ("other/sleep", {"drain_s": "nan"}, (400, "invalid_value"), "drain_s must be in [0, 3600] seconds"),
        ("other/unload", {"wait": "maybe"}, (400, "invalid_value"), "wait must be true or false"),
        ("other/load", {"level": "1"}, (400, "invalid_value"), "load takes wait, got 'level'"),
    ):
        status, code, message = error(post(server, path, **query))
        assert (status, code) == want, message
        assert says in message
    for name in ("nobody", "a"):
        assert httpx.get(f"{server.url}/admin/models/{name}").status_code == 404
    assert httpx.get(f"{server.url}/admin/models/other/sleep").status_code == 404, "a model of that name"
    assert httpx.post(f"{server.url}/admin/models/other").status_code in (404, 405)
    assert state(server, "other")["state"] == "ready"


def test_who_does_not_wait_can_look(server: Server) -> None:
    reader = Reader(server, "a/b", [SLOW, 1], max_tokens=40)
    assert reader.begun.wait(WITHIN_S)
    answer = post(server, "a/b/sleep", wait="false", drain_s=WITHIN_S)
    assert (answer.status_code, answer.json()["doing"]) == (202, "sleep")
    wait_for(lambda: state(server, "a/b")["state"] == "draining", WITHIN_S)
    assert error(complete(server, "a/b"))[:2] == (503, "model_draining")
    assert error(post(server, "a/b/wake"))[:2] == (409, "wrong_state")
    # the one under way ends as it would have
    assert reader.events[-1] is None
    wait_for(lambda: state(server, "a/b")["state"] == "asleep", WITHIN_S)
    assert post(server, "a/b/wake").status_code == 200


def test_a_stream_that_is_cut_off_is_told_so(server: Server) -> None:
    reader = Reader(server, "a/b", [SLOW, 1], max_tokens=250)
    assert reader.begun.wait(WITHIN_S)
    began = time.monotonic()
    assert post(server, "a/b/unload", drain_s=0).json()["state"] == "unloaded"
    assert time.monotonic() - began < 10, "it was to end at once"
    last = [e for e in reader.events if e][-1]["error"]
    assert (last["code"], last["message"]) == ("model_unloaded", "The model a/b is taken out of service.")
    assert reader.cut, "an end that looks like success"
    assert post(server, "a/b/load").status_code == 200


def test_the_command_does_the_same(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert admin.main([server.url, "load", "late"]) == 0
    assert admin.main([server.url, "sleep", "late", "--drain-s", "1", "--level", "2"]) == 0
    assert admin.main([server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-5:]] == [
        ["id", "state"], ["a/b", "ready"], ["late", "asleep"], ["other", "ready"], ["lost", "failed"],
    ]  # fmt: skip
    assert admin.main([server.url, "load", "late"]) == 2
    assert capsys.readouterr().err == "minserve: load of late: it is asleep, wake it first\n"
    assert admin.main([server.url, "unload", "late", "--no-wait"]) == 0
    wait_for(lambda: state(server, "late")["state"] == "unloaded", WITHIN_S)
    assert admin.main(["http://127.0.0.1:9", "load", "late"]) == 2
    with pytest.raises(SystemExit):
        admin.main([server.url, "load"])


def test_a_page_in_a_browser_cannot_use_it(server: Server) -> None:
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}):
        answer = httpx.post(f"{server.url}/admin/models/other/unload", headers=headers)
        assert error(answer)[:2] == (403, "admin_off")
    assert state(server, "other")["state"] == "ready"


ROUTES = (
    ("GET", "/admin/models"),
    ("GET", "/admin/models/a"),
    ("POST", "/admin/models/a/sleep"),
    ("GET", "/admin"),
)


def statuses(url: str, key: str) -> set[int]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return {httpx.request(method, url + path, headers=headers).status_code for method, path in ROUTES}


def test_an_admin_key_opens_it_and_an_api_key_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "keys").write_text("plain\n")
    (tmp_path / "admins").write_text("boss-key\n")
    one = [{"name": "a", "path": "m", "load_at_start": False}]
    with running(write_config(tmp_path, one, api_keys_file="keys", admin_keys_file="admins")) as server:
        assert "serves no model yet" in server.output
        assert [statuses(server.url, key) for key in ("", "boss-ke", "plain")] == [{401}, {401}, {403}]
        assert statuses(server.url, "boss-key") == {200, 404, 409}
        both = {"authorization": "Bearer boss-key"}
        assert httpx.get(f"{server.url}/v1/models", headers=both).status_code == 401, (
            "an admin key is no API key"
        )
        monkeypatch.setenv("MINSERVE_ADMIN_KEY", "boss-key")
        assert admin.main([server.url, "load", "a"]) == 0
        assert "ready" in capsys.readouterr().out
        assert "boss-key" not in server.output
    monkeypatch.delenv("MINSERVE_ADMIN_KEY")
    with running(write_config(tmp_path, one, api_keys_file="keys")) as server:
        assert [statuses(server.url, key) for key in ("", "plain")] == [{403}, {403}]
        answer = httpx.post(f"{server.url}/admin/models/a/load", headers={"authorization": "Bearer plain"})
        assert error(answer)[1] == "admin_off"
