"""Acceptance: many streams over three models, a fifth of the clients leave; nobody else notices, nothing leaks."""

import asyncio
import collections
from pathlib import Path

import pytest

from minserve.host import ROOT
from minserve.listener import raise_open_files
from minserve.text import Tokenizer
from tests.e2e.load import Outcome, load
from tests.e2e.oracle import oracle_tokens
from tests.e2e.running import VOCAB, running, write_config, write_model

NAMES = ["one", "two", "three"]


def stayed(found: list[Outcome]) -> list[Outcome]:
    """Those who did not leave, all of them well served; enough did leave, in every phase."""
    phases = collections.Counter(o.left for o in found)
    assert len(phases) == 5, phases
    assert 0.1 < 1 - phases[None] / len(found) < 0.3, phases
    wrong = [f"{o.body['model']}: {w}" for o in found if o.left is None and (w := o.check())]
    assert not wrong, wrong[:5]
    return [o for o in found if o.left is None]


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_byte_of_those_who_stay_is_right(tmp_path: Path, count: int) -> None:
    tokenizer = Tokenizer.load(write_model(tmp_path / "m"))
    raise_open_files()
    config = write_config(tmp_path, [{"name": n, "path": "m"} for n in NAMES])
    with running(config) as server:
        pids = server.workers()
        for o in stayed(asyncio.run(load(server.url, NAMES, count))):
            prompt = tuple(tokenizer.encode(o.body["prompt"]))
            tokens = oracle_tokens(prompt, o.body["seed"], 0, o.body["max_tokens"], VOCAB)
            assert o.text() == tokenizer.decode(tokens), o.body
        server.assert_idle()
        assert server.workers() == pids
        assert "Traceback" not in server.output, server.output


@pytest.mark.slow
def test_a_thousand_streams_over_the_demo_models(tmp_path: Path) -> None:
    raise_open_files()
    names = ["demo-fp16", "demo-w8a8", "demo-w4a8"]
    with running(ROOT / "examples/demo.yaml", module="minserve.serve") as server:
        pids = server.workers()
        stayed(asyncio.run(load(server.url, names, 1000)))
        # an engine keeps one empty set of its six layers for the next request
        server.assert_idle(within_s=20, spare_slabs=6 * len(names))
        assert server.workers() == pids
