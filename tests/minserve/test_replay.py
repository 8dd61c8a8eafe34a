"""The replay against servers of a few lines: when it sends, what it counts, and what it makes of bad answers."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from minserve.replay import RunClock, lateness, main, replay
from minserve.replay_alone import line
from minserve.replay_heard import Heard
from minserve.replay_http import HttpTarget
from minserve.workload_saved import save_workload
from sched.workload import Request, Workload, ordered, token_ids

OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def chunk(*events: Any) -> bytes:
    data = b"".join(
        b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events
    )
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(tokens: int, finish: str | None = None, **usage: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": "", "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": tokens, **usage}}


async def whole(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """All tokens, two at a time but for the first."""
    writer.write(OK + chunk(event(1, prompt_tokens_details={"cached_tokens": 2})))
    n = 1
    while n < body["max_tokens"]:
        await asyncio.sleep(0.005)
        n = min(n + 2, body["max_tokens"])
        writer.write(chunk(event(n, prompt_tokens_details={"cached_tokens": 2})))
    writer.write(
        chunk(event(n, "length", prompt_tokens_details={"cached_tokens": 2}), b"[DONE]") + b"0\r\n\r\n"
    )


class Fake:
    """Answers on a port of its own; `bodies` and the number of `connections` it has seen."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.connections = 0

    async def __aenter__(self) -> "Fake":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
                self.heads.append(head)
                self.bodies.append(json.loads(await reader.readexactly(length)))
                await self._answer(self.bodies[-1], writer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return
        finally:
            writer.close()


def workload(n: int, gap_s: float = 0.01, tokens: int = 6, **keys: Any) -> Workload:
    return Workload(
        ordered(Request(0, "m", i * gap_s, 8, tokens, **keys) for i in range(n)), n * gap_s, seed=3
    )


def replayed(
    answer: Answer, load: Workload, drain_s: float = 20.0, key: str | None = None
) -> tuple[list[Heard], Fake]:
    async def story() -> tuple[list[Heard], Fake]:
        async with Fake(answer) as server:
            clock = RunClock()
            target = HttpTarget(server.url, key, clock)
            await target.open()
            try:
                return await replay(load, target, clock, drain_s=drain_s, ids=(5, 250)), server
            finally:
                await target.close()

    return asyncio.run(story())


def test_what_is_sent_and_what_is_counted() -> None:
    load = workload(30, priority=-3, ttft_slo_s=0.25)
    heards, server = replayed(whole, load, key="secret")
    assert len(server.bodies) == 30
    by_seed = {b["seed"]: b for b in server.bodies}
    for h in heards:
        body = by_seed[h.request.rid]
        assert body["prompt"] == token_ids(h.request, 3, 5, 250).tolist()
        assert (body["model"], body["max_tokens"], body["ignore_eos"], body["priority"]) == ("m", 6, True, -3)
        assert body["slo"] == {"ttft_ms": 250.0}
        assert (h.tokens, h.cached, h.error) == (6, 2, None)
        assert h.sent_s is not None
        assert h.first_s is not None
        assert h.end_s is not None
        assert h.request.arrival_s <= h.sent_s <= h.first_s <= h.end_s
        assert len(h.itl_s) == 3, "three moments after the first"
        assert sum(h.itl_s) <= h.end_s - h.first_s
        assert h.record().completed
    assert all("authorization: Bearer secret" in head for head in server.heads)


def test_arrivals_wait_for_no_answer() -> None:
    """The server answers nothing until it has all requests: a closed loop would never get there."""
    load, held, everyone = workload(50, gap_s=0.002), 0, asyncio.Event()

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal held
        held += 1
        if held == 50:
            everyone.set()
        await everyone.wait()
        await whole(body, writer)

    heards, _ = replayed(answer, load)
    assert all(h.record().completed for h in heards)
    # 50 requests open at once need as many connections, and no request was lost for want of one
    found = lateness(heards)
    assert found["sent"] == 50
    assert 0 <= found["p50_ms"] <= found["p99_ms"] <= found["max_ms"]


def test_connections_are_kept() -> None:
    _, server = replayed(whole, workload(40, gap_s=0.02, tokens=1))
    assert server.connections < 30


async def refuse(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    data = json.dumps({"error": {"message": "no", "code": "queue_full"}}).encode()
    writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))


async def shed(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    data = json.dumps({"error": {"message": "hopeless", "code": "shed_by_policy"}}).encode()
    writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))


async def cut_off(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(OK + chunk(event(2)))
    writer.close()


async def fail_in_mid_stream(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(OK + chunk(event(2)) + chunk({"error": {"message": "lost", "code": "engine_died"}}))


async def end_early(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(OK + chunk(event(2, "stop")) + b"0\r\n\r\n")


async def talk_nonsense(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello\r\n\r\n")


async def break_json(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(OK + chunk(b'{"choices": ['))


async def say_nothing(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(OK)


async def no_finish(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(OK + chunk(event(6)) + b"0\r\n\r\n")


async def uncounted(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """As servers that count at the end alone."""
    texts = [{"choices": [{"text": "x", "finish_reason": None}]}] * 4
    last = [
        {"choices": [{"text": "x", "finish_reason": "length"}]},
        {"choices": [], "usage": {"completion_tokens": 6}},
    ]
    writer.write(OK + chunk(*texts) + chunk(*last) + b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("answer", "error", "tokens"),
    [
        (refuse, "503 queue_full", 0),
        (shed, "shed: shed_by_policy", 0),
        (cut_off, "connection lost", 2),
        (fail_in_mid_stream, "200 engine_died", 2),
        (end_early, None, 2),
        (talk_nonsense, "the answer cannot be read: HttpParserInvalidStatusError", 0),
        (break_json, "the answer cannot be read: JSONDecodeError", 0),
        (no_finish, "the stream has no finish reason", 6),
        (uncounted, None, 6),
    ],
)
def test_every_answer_becomes_a_record(answer: Answer, error: str | None, tokens: int) -> None:
    heards, _ = replayed(answer, workload(3))
    for h in heards:
        if answer is talk_nonsense:
            assert h.error is not None
            assert h.error.startswith("the answer cannot be read"), h.error
        else:
            assert h.error == error
        assert h.tokens == tokens
        assert h.over
        assert h.record().completed is (answer is uncounted)


def test_what_has_not_ended_is_unfinished() -> None:
    heards, _ = replayed(say_nothing, workload(3), drain_s=0.2)
    assert [(h.end_s, h.error, h.record().completed) for h in heards] == [(None, None, False)] * 3


def command(tmp_path: Path, answer: Answer, load: Workload, *flags: str) -> int:
    """The command in a thread of its own, the server here."""
    file = tmp_path / "w.jsonl"
    save_workload(load, file)

    async def story() -> int:
        async with Fake(answer) as server:
            return await asyncio.to_thread(main, [str(file), "--url", server.url, *flags])

    return asyncio.run(story())


def test_the_command_ends_in_one_json_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, alone = tmp_path / "log.jsonl", tmp_path / "alone.json"
    alone.write_text(json.dumps({"m": {"ttft_s": 30.0, "tpot_s": 1e-7, "ttft_per_token_s": 0.1}}))
    flags = ["--log", str(log), "--itl", "--warmup-s", "0.05", "--rate-scale", "0.5"]
    assert command(tmp_path, whole, workload(20), *flags, "--slo", "m=60000:60000") == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert (found["completed"], found["slo_attainment"], found["cached_tokens"]) == (17, 1.0, 34)
    assert found["client"]["sent"] == 20
    assert ("VOID" in out) is found["client"]["void"]
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 20
    assert all(r["attained"] and r["output_tokens"] == 6 and len(r["itl_s"]) == 3 for r in rows)
    assert rows[1]["arrival_s"] == 0.02
    # now against a request alone: the time of a token is out of reach, that of the first is not
    assert command(tmp_path, whole, workload(20), "--alone", str(alone), "--slo-scale", "2:10") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["slo_attainment"], found["ttft_attainment"], found["tpot_attainment"]) == (0.0, 1.0, 0.0)
    assert found["slos"] == {"m": [60.0, 0.2, 1e-6]}


def test_alone_is_measured_and_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_now, most = 0, 0

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0.03 + 0.001 * len(body["prompt"]))
        await slow(body, writer)
        open_now -= 1

    async def slow(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        for n in range(1, body["max_tokens"] + 1):
            writer.write(
                (OK if n == 1 else b"") + chunk(event(n, "length" if n == body["max_tokens"] else None))
            )
            await asyncio.sleep(0.002)
        writer.write(b"0\r\n\r\n")

    load = Workload(ordered(Request(0, "m", i * 0.01, 10 + i, 3) for i in range(100)), 1.0)
    file = tmp_path / "alone.json"
    assert command(tmp_path, answer, load, "--measure-alone", str(file)) == 0
    found = json.loads(file.read_text())["m"]
    assert json.loads(capsys.readouterr().out) == {"m": found}
    assert most == 1
    # a busy machine adds to both; it never takes from them
    assert found["ttft_s"] + 60 * found["ttft_per_token_s"] >= 0.085
    assert found["tpot_s"] >= 0.002
    assert command(tmp_path, refuse, load, "--measure-alone", str(file)) == 2
    assert "must end well, got 503 queue_full of m" in capsys.readouterr().err


def test_a_second_replay_finds_nothing_of_the_first(tmp_path: Path) -> None:
    salts = []

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        salts.append(body.get("cache_salt"))
        await whole(body, writer)

    for flags in ((), (), ("--salt", "s"), ("--salt", "s"), ("--salt", "")):
        assert command(tmp_path, answer, workload(2), *flags) == 0
    first, second = set(salts[:2]), set(salts[2:4])
    assert len(first) == len(second) == 1
    assert None not in first | second
    assert first != second
    assert salts[4:] == ["s"] * 4 + [None] * 2


def test_the_server_is_told_the_slo_that_a_request_is_judged_by(tmp_path: Path) -> None:
    said = []

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        said.append(body.get("slo"))
        await whole(body, writer)

    own = [Request(0, "m", 0.0, 8, 6), Request(1, "m", 0.0, 8, 6, ttft_slo_s=0.3)]
    assert command(tmp_path, answer, Workload(ordered(own), 1.0), "--slo", "m=500:50", "--send-slo") == 0
    assert said == [{"ttft_ms": 500.0, "tpot_ms": 50.0}, {"ttft_ms": 300.0, "tpot_ms": 50.0}]


def test_the_line_through_times_alone() -> None:
    assert line([10, 20, 30], [0.02, 0.03, 0.04]) == {"ttft_s": 0.01, "ttft_per_token_s": 0.001}
    assert line([10, 20], [0.04, 0.02]) == {"ttft_s": 0.03, "ttft_per_token_s": 0.0}
    assert line([10], [0.04]) == {"ttft_s": 0.04, "ttft_per_token_s": 0.0}
    assert line([10, 20], [0.01, 0.03]) == {"ttft_s": 0.0, "ttft_per_token_s": 0.0014}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--slo", "x=1:2"], "--slo must name one of m, got 'x'"),
        (["--slo", "m=1"], "--slo must be MODEL=TTFT_MS:TPOT_MS, got 'm=1'"),
        (["--slo-scale", "5"], "go together"),
        (["--slo-scale", "5", "--alone", "/nowhere"], "--alone must have"),
        (["--token-ids", "9:9"], "--token-ids must be LOW:HIGH"),
        (["--warmup-s", "5"], "--warmup-s must be in [0, 0.03), got 5"),
        (["--rate-scale", "0"], "--rate-scale must be > 0 and turn the"),
    ],
)
def test_wrong_flags_are_said(
    flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path, whole, workload(3), *flags) == 2
    assert says in capsys.readouterr().err


def test_wrong_addresses_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.jsonl"
    save_workload(workload(1), file)
    assert main([str(file), "--url", "127.0.0.1:8000"]) == 2
    assert "--url must be http://HOST:PORT" in capsys.readouterr().err
    assert main([str(file), "--url", "http://127.0.0.1:1"]) == 2
    assert "127.0.0.1" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--url", "http://127.0.0.1:1"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_lateness_is_from_when_a_request_was_due() -> None:
    heards = [Heard(r, sent_s=r.arrival_s + 0.001) for r in workload(99).requests]
    found = lateness(heards)
    assert (found["p50_ms"], found["p99_ms"], found["void"]) == (1.0, 1.0, False)
    late = [*heards[:90], *(Heard(h.request, sent_s=h.request.arrival_s + 0.003) for h in heards[:9])]
    assert lateness(late)["void"] is True
    assert lateness([Heard(heards[0].request)])["sent"] == 0
