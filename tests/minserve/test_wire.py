"""Framing and messages: every cut of the bytes, every broken frame, and the engine's own types."""

import random
import socket
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from minserve import engine, sampler, worker
from minserve.sampling import SamplingParams
from minserve.wire import (
    HEAD,
    Abort,
    Channel,
    Frames,
    FromWorker,
    Ping,
    Pong,
    Refused,
    Stats,
    Stop,
    Submit,
    TokenEvent,
    TokenLogprobs,
    Tokens,
    ToWorker,
    WireError,
    encode,
)  # fmt: skip

PARAMS = SamplingParams(
    max_tokens=5, stop=["a", "ü"], logit_bias={3: -1.5}, seed=-(2**63), stop_token_ids=[7]
)
REQUESTS = [Submit(1, (1, 2, 3), PARAMS, 2, 0.5, 1.0, 2.0, -4, "t"), Abort(2**63), Ping(0), Stop()]
LOGPROBS = TokenLogprobs(-0.25, 1, ((5, -0.25), (6, -9999.0)))
ANSWERS = [
    Tokens([TokenEvent(1, (5,), (LOGPROBS,), "stop", 5, None, (None, LOGPROBS)), TokenEvent(2, (1, 2))]),
    Refused(3, "no"),
    Pong(9, Stats(running=1, waiting=2)),
]


@pytest.mark.parametrize(("kinds", "messages"), [(ToWorker, REQUESTS), (FromWorker, ANSWERS)])
def test_messages_survive_every_cut(kinds: object, messages: list[object]) -> None:
    data = b"".join(encode(m) for m in messages)
    rng = random.Random(0)
    for _ in range(100):
        frames: Frames[object] = Frames(kinds)
        got, at = [], 0
        while at < len(data):
            size = rng.choice([1, 3, 50, 1000])
            got += frames.feed(data[at : at + size])
            at += size
        assert got == messages


def test_the_engines_events_need_no_translation() -> None:
    assert engine.TokenEvent._fields == TokenEvent.__struct_fields__
    assert sampler.TokenLogprobs._fields == TokenLogprobs.__struct_fields__
    lp = sampler.TokenLogprobs(-0.25, 1, ((5, -0.25), (6, -9999.0)))
    theirs = Tokens(
        [engine.TokenEvent(1, (5,), (lp,), "stop", 5, None, (None, lp)), engine.TokenEvent(2, (1, 2))]
    )
    assert list(Frames(FromWorker).feed(encode(theirs))) == [ANSWERS[0]]


def test_ten_thousand_broken_frames_raise_nothing_but_wire_errors() -> None:
    rng = random.Random(3)
    good = encode(REQUESTS[0])
    errors = 0
    for i in range(10_000):
        data = bytearray(good)
        if i % 3 == 0:
            data = bytearray(rng.randbytes(rng.randrange(1, 60)))
        elif i % 3 == 1:
            data[rng.randrange(4, len(data))] = rng.randrange(256)
        else:
            data = bytearray(HEAD.pack(rng.randrange(len(good))) + good[4:])
        try:
            list(Frames(ToWorker).feed(bytes(data)))
        except WireError:
            errors += 1
    assert errors > 5000, errors


def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="over the 100 allowed"):
        list(Frames(ToWorker, max_bytes=100).feed(HEAD.pack(101)))
    with pytest.raises(WireError, match="no known message"):
        list(Frames(ToWorker).feed(HEAD.pack(3000) + b"\x91" * 3000))
    with pytest.raises(WireError, match="no known message"):
        list(Frames(ToWorker).feed(encode(ANSWERS[1])))  # an answer is no request


def test_bad_sampling_values_do_not_pass() -> None:
    body = msgspec.msgpack.encode({"type": "Submit", "rid": 1, "prompt": [1], "params": {"temperature": -1}})
    with pytest.raises(WireError, match="temperature"):
        list(Frames(ToWorker).feed(HEAD.pack(len(body)) + body))


def test_a_channel_waits_and_sees_the_end() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    assert channel.receive(wait_s=0) == []
    ours.sendall(encode(Ping(1)) + encode(Ping(2))[:3])
    assert channel.receive(wait_s=None) == [Ping(1)]
    ours.sendall(encode(Ping(2))[3:])
    assert channel.receive(wait_s=None) == [Ping(2)]
    channel.send(Pong(2, Stats()))
    assert list(Frames(FromWorker).feed(ours.recv(1000))) == [Pong(2, Stats())]
    ours.close()
    with pytest.raises(EOFError):
        channel.receive(wait_s=None)


def test_a_worker_reports_late_compiles_and_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "compile_monitor", lambda: SimpleNamespace(late=3))
    blocks = SimpleNamespace(num_cached=5)
    counters = engine.Counters(prefix_queries=70, prefix_hits=64)
    own: Any = SimpleNamespace(
        batcher=SimpleNamespace(num_running=1, num_waiting=2, num_preemptions=4, blocks=blocks),
        counters=counters,
        watch=SimpleNamespace(error=0.25),
    )
    served: Any = object.__new__(worker.EngineServed)
    served._active = SimpleNamespace(engine=own)
    prefix = {"prefix_queries": 70, "prefix_hits": 64, "cached_blocks": 5}
    assert served.stats() == Stats(
        running=1, waiting=2, preemptions=4, late_compiles=3, step_error=0.25, **prefix
    )
