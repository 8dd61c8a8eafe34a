"""What the prefill token is worth: a model that decodes beside two that compute prompts all the time, with it and without.

    python -m bench.prefill_token [--seconds 12] [--runs 3] [--tpot-ms 60]

Three workers of the demo model share a pool of host memory; on a GPU machine `--device cuda:0` shares that.  Arms take
turns.  Beside them: what the token costs a model that never has to wait for it.  A table, then one JSON object.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minserve.agent import Agent
from minserve.config import parse_config
from minserve.prefill_token import PrefillToken
from minserve.sampling import SamplingParams
from minserve.slab_table import SlabTable
from minserve.wire import Submit, TokenEvent
from sched.slabs import LayerGroup, PoolPlan, SetShape

DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo"
STREAMS, PROMPT, DEPTH = 4, 960, 2
PROMPT_IDS = tuple(range(1, 251))


@dataclass
class Stream:
    """Who waits for the tokens of one request, and when they came."""

    done: asyncio.Event = field(default_factory=asyncio.Event)
    times: list[float] = field(default_factory=list)
    error: str = ""

    def token(self, event: TokenEvent) -> None:
        self.times.append(time.monotonic())
        if event.finish_reason is not None:
            self.error = event.error or ""
            self.done.set()

    def refused(self, error: str) -> None:
        self.error = error
        self.done.set()

    lost = refused


def config_of(device: str, token: bool) -> Any:
    entries = [
        {"name": name, "path": str(DEMO), "max_model_len": 1024, "reserve_tokens": 1024} for name in "abc"
    ]
    gpu = {"device": device, "pool_bytes": "192 MiB", "prefill_token": token}
    nodes = [{"name": "local", "gpus": [gpu]}]
    caching = {"enable_prefix_caching": False}
    return parse_config({"nodes": nodes, "defaults": caching, "models": entries}, Path.cwd())


class Load:
    """Streams of `a` that decode one after the other, and prompts of `b` and `c`, DEPTH at a time."""

    def __init__(self, agent: Agent, tpot_s: float) -> None:
        self._agent, self._tpot_s, self.decoding, self.prompts = agent, tpot_s, list[Stream](), 0
        self.waits_s = list[float]()

    async def ask(self, name: str, prompt: tuple[int, ...], new: int) -> Stream:
        stream = Stream()
        params = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0)
        begin = time.monotonic()
        self._agent.hosts[name].submit(
            Submit(self._agent.next_rid(), prompt, params, arrival_s=begin, tpot_s=self._tpot_s), stream
        )
        await stream.done.wait()
        if stream.error:
            raise RuntimeError(f"{name}: {stream.error}")
        return stream

    async def decode(self, until: float) -> None:
        while time.monotonic() < until:
            self.decoding.append(await self.ask("a", PROMPT_IDS[:8], 100))

    async def flood(self, name: str, until: float) -> None:
        for i in itertools.count():
            if time.monotonic() >= until:
                return
            begin = time.monotonic()
            await self.ask(name, tuple(PROMPT_IDS[(i + j) % 250] for j in range(PROMPT)), 1)
            self.prompts += 1
            self.waits_s.append(time.monotonic() - begin)


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


async def run(device: str, token: bool, seconds: float, tpot_s: float) -> dict[str, float]:
    agent = Agent(config_of(device, token), {})
    agent.start()
    try:
        await agent.settled()
        failed = {n: h.reason for n, h in agent.hosts.items() if h.state != "ready"}
        if failed:
            raise RuntimeError(f"not loaded: {failed}")
        load, until = Load(agent, tpot_s), time.monotonic() + seconds
        floods = [load.flood(name, until) for name in "bc" for _ in range(DEPTH)]
        await asyncio.gather(*(load.decode(until) for _ in range(STREAMS)), *floods)
        counts = (await agent.counts())["gpu0"]
        assert counts is not None, "nobody sits on the lock"
        waits = sum(m.status["prefill_waits"] for m in counts.models.values())
    finally:
        await agent.stop()
    gaps = [b - a for s in load.decoding for a, b in itertools.pairwise(s.times)]
    tpots = [(s.times[-1] - s.times[0]) / (len(s.times) - 1) for s in load.decoding]
    return {
        "itl_p50_ms": 1e3 * statistics.median(gaps),
        "itl_p99_ms": 1e3 * quantile(gaps, 0.99),
        "tpot_p99_ms": 1e3 * quantile(tpots, 0.99),
        "prompts_s": load.prompts / seconds,
        "prompt_p50_ms": 1e3 * statistics.median(load.waits_s),
        "waits": waits,
    }


def alone_us(prompts: bool, rounds: int = 20_000) -> float:
    """Microseconds a step of the three calls, of a model that computes prompts or decodes all the time, undisturbed."""
    shape = SetShape(1, (LayerGroup(0, 1, 4096),), 1, 16, 1, 1, 0.0)
    table = SlabTable.create(PoolPlan(4096, 24, {"a": shape, "b": shape, "c": shape}, 1))
    token = PrefillToken(table, 0, lambda: prompts, lambda: float("inf") if prompts else 1e9)
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(rounds // 5):
            token.cap()
            token.planned(512 * prompts, True)
            token.landed()
        found.append(1e6 * (time.perf_counter() - begin) / (rounds // 5))
    table.close()
    return min(found)


def table_of(arms: dict[str, dict[str, float]]) -> Iterator[str]:
    columns = list(next(iter(arms.values())))
    yield f"{'':<10}" + "".join(f"{c:>16}" for c in columns)
    for arm, row in arms.items():
        yield f"{arm:<10}" + "".join(f"{row[c]:>16.1f}" for c in columns)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tpot-ms", type=float, default=60.0, help="the SLO of every request")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for i in range(args.runs):
        for token in (False, True) if i % 2 else (True, False):
            found[token].append(asyncio.run(run(args.device, token, args.seconds, args.tpot_ms / 1e3)))
    arms = {
        "with it" if token else "without": {k: statistics.median(r[k] for r in rows) for k in rows[0]}
        for token, rows in found.items()
    }
    sys.stdout.write("\n".join(table_of(arms)) + "\n")
    us = {what: alone_us(what == "prompts") for what in ("prompts", "decodes")}
    calls = ", ".join(f"{value:.1f} us with {what}" for what, value in us.items())
    sys.stdout.write(f"calls of a step that never waits: {calls}\n")
    result = {"bench": "prefill_token", "arms": arms, "alone_us": us, "tag": "measured", **vars(args)}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
