"""Real workers of several models on one CPU pool, run by an agent in this process: no HTTP, every event as it came.

`Footprints` are what the pool's bytes were at a moment: bytes that nobody may have written since are found changed.
"""

import asyncio
import threading
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minserve import LLM
from minserve.agent import Agent
from minserve.config import parse_config
from minserve.engine import EngineRequest
from minserve.host import Host
from minserve.pool import SlabPool
from minserve.sampling import SamplingParams
from minserve.slab_words import FREE, owner_of, state_of
from minserve.wire import Submit, TokenEvent

PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=5)
# a machine ten times slower still ends in this time
PATIENCE_S = 120.0


@dataclass
class Heard:
    """A sink of one request: its tokens and the five most likely at each, bit by bit, and how it ended."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    cached: int = 0
    end: str | None = None

    def token(self, event: TokenEvent) -> None:
        self.tokens += event.token_ids
        self.logprobs += ((lp.logprob, lp.rank, tuple(map(tuple, lp.top))) for lp in event.logprobs or ())
        self.cached = max(self.cached, event.cached_tokens)
        self.end = event.finish_reason or self.end

    def refused(self, error: str) -> None:
        self.end = error

    def lost(self, error: str) -> None:
        self.end = error

    @property
    def said(self) -> tuple[list[int], list[Any]]:
        return self.tokens, self.logprobs


def alone(folder: Path, prompts: Iterable[list[int]], **keys: Any) -> list[Any]:
    """What each prompt is answered by a model that has an engine, a pool and the machine to itself."""
    heard = [Heard() for _ in prompts]
    with LLM(folder, device="cpu", pool_bytes=16 << 20, **keys) as llm:
        for rid, prompt in enumerate(prompts):
            llm.engine.add(EngineRequest(rid=rid, prompt=tuple(prompt), params=PARAMS))
        while llm.engine.has_work:
            for event in llm.engine.step():
                heard[event.rid].token(event)
    return [h.said for h in heard]


class Fleet:
    """An agent and its workers, on an event loop of their own thread.  `call` runs a story there."""

    def __init__(self, models: list[dict[str, Any]], pool_bytes: int) -> None:
        gpus = [{"device": "cpu", "pool_bytes": pool_bytes}]
        config = parse_config({"nodes": [{"name": "local", "gpus": gpus}], "models": models}, Path.cwd())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.agent = Agent(config, {})
        (pool,) = self.agent.pools
        # a view of its own: it can be looked at after the agent has closed its
        self.pool = SlabPool.attach(pool.table.fd, pool.fds[0])
        self.pool.fill()
        self.call(self._start())

    async def _start(self) -> None:
        self.agent.start()
        await self.agent.settled()

    def call(self, story: Coroutine[Any, Any, Any], timeout_s: float = PATIENCE_S) -> Any:
        """TimeoutError says where everything stood."""
        try:
            return asyncio.run_coroutine_threadsafe(story, self._loop).result(timeout_s)
        except TimeoutError as error:
            hosts = [
                (h.name, h.state, h.restarts, h.num_requests, h.stats) for h in self.agent.hosts.values()
            ]
            raise TimeoutError(f"{hosts}\n{self.pool.table.counts()}") from error

    def host(self, name: str) -> Host:
        return self.agent.hosts[name]

    def ask(self, name: str, prompt: list[int]) -> Heard:
        """Only in a story, of a model that is ready."""
        heard = Heard()
        self.host(name).submit(Submit(self.agent.next_rid(), tuple(prompt), PARAMS), heard)
        return heard

    async def answers(self, name: str, prompts: list[list[int]]) -> list[Heard]:
        heard = [self.ask(name, prompt) for prompt in prompts]
        await until(lambda: all(h.end for h in heard))
        return heard

    def close(self) -> None:
        """Ends the workers; afterwards no slab is anybody's."""
        self.call(self.agent.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self.pool.table.check()
        counts = self.pool.table.counts()
        self.pool.close()
        assert counts.free == counts.mapped, f"slabs were leaked: {counts}"


async def until(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.002)


async def meanwhile(story: Callable[[], Awaitable[Any]], work: Callable[[], Awaitable[Any]]) -> int:
    """Repeats `work` until `story` has ended; how often.  An error in either is raised."""
    task, times = asyncio.ensure_future(story()), 0
    try:
        while not task.done():
            await work()
            times += 1
    finally:
        if not task.done():
            task.cancel()
    await task
    return times


@dataclass(frozen=True)
class Footprints:
    """Of every slab the owner word and a checksum; `still`: nobody was at work on it."""

    words: np.ndarray
    sums: np.ndarray
    still: np.ndarray

    @classmethod
    def take(cls, pool: SlabPool, writers: Iterable[str]) -> "Footprints":
        """`writers` may be writing to what they hold; all else lies still, and what is leased meanwhile is left out."""
        words = pool.table._words.copy()
        sums = np.array([zlib.crc32(pool.slab(s).numpy()) for s in range(len(words))])
        busy = np.isin(owner_of(words), [pool.table.owner_of(name) for name in writers])
        still = (words == pool.table._words) & ((state_of(words) == FREE) | ~busy)
        return cls(words, sums, still)

    def comparable(self, later: "Footprints") -> np.ndarray:
        """Slabs that lay still at both moments and were not leased in between: a lease changes the word."""
        return np.flatnonzero(self.still & later.still & (self.words == later.words))

    def changed(self, later: "Footprints") -> list[int]:
        """Slabs whose bytes somebody has changed who had no business there."""
        same = self.comparable(later)
        return same[self.sums[same] != later.sums[same]].tolist()

    def held_by(self, owner: int) -> np.ndarray:
        return np.flatnonzero((owner_of(self.words) == owner) & (state_of(self.words) != FREE))
