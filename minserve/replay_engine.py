"""A replay's way to the engines of a configuration without HTTP: workers as `serve` has them, spoken to over their sockets."""

import asyncio
import time
from typing import Any

import msgspec

from minserve.agent import Agent
from minserve.config import Config
from minserve.host import BOOT, Host
from minserve.replay_heard import Heard
from minserve.replay_http import Clock
from minserve.sampling import SamplingParams
from minserve.wire import Submit, TokenEvent
from sched.workload import Request


class Listener:
    """Hears what the worker says of one sequence."""

    def __init__(self, heard: Heard, clock: Clock) -> None:
        self._heard, self._clock = heard, clock

    def token(self, event: TokenEvent) -> None:
        now, heard = self._clock(), self._heard
        heard.cached = max(heard.cached, event.cached_tokens)
        heard.news(len(event.token_ids), now)
        if event.finish_reason is not None:
            heard.end(now, None if event.finish_reason in ("length", "stop") else event.finish_reason)

    def refused(self, error: str) -> None:
        self._heard.end(self._clock(), f"shed: {error}" if "shed" in error else error)

    def lost(self, error: str) -> None:
        self._heard.end(self._clock(), error)


class EngineTarget:
    """Starts the workers in `open` and ends them in `close`.  Tokenizers, the front end's queues and its router have no part in
    it: ValueError where a model has several replicas."""

    def __init__(self, config: Config, clock: Clock, boot: str = BOOT) -> None:
        """`boot`: what the workers' interpreter runs."""
        config.check_here()
        if several := [m for m in config.models if len(m.placement) > 1]:
            says = (
                f"placement must be one GPU for --engine, {several[0].name} has {len(several[0].placement)}"
            )
            raise ValueError(f"{says}: `serve` the file and replay with --url")
        self._slos = {m.name: m.slo for m in config.models}
        self._clock = clock
        self._agent = Agent(config, {}, boot)
        self._rids: dict[int, int] = {}

    @property
    def hosts(self) -> dict[str, Host]:
        return self._agent.hosts

    async def open(self) -> None:
        """ValueError where a model cannot be loaded."""
        self._agent.start()
        await self._agent.settled()
        failed = [f"{n}: {h.reason}" for n, h in self._agent.hosts.items() if h.state != "ready"]
        if failed:
            raise ValueError(f"every model must load, got {'; '.join(failed)}")

    def prepared(self, request: Request, ids: list[int]) -> Submit:
        slo = self._slos[request.model]
        ttft = slo.ttft_ms / 1e3 if request.ttft_slo_s is None else request.ttft_slo_s
        tpot = slo.tpot_ms / 1e3 if request.tpot_slo_s is None else request.tpot_slo_s
        params = SamplingParams(max_tokens=request.output_tokens, ignore_eos=True, seed=request.rid)
        return Submit(
            self._agent.next_rid(), tuple(ids), params, ttft_s=ttft, tpot_s=tpot, priority=request.priority
        )

    def send(self, submit: Submit, heard: Heard) -> None:
        host = self._agent.hosts[heard.request.model]
        if host.state != "ready":
            heard.end(self._clock(), f"the model is {host.state}")
            return
        self._rids[heard.request.rid] = submit.rid
        # as the front end does: a worker in the middle of a step reads it later
        arrived = msgspec.structs.replace(submit, arrival_s=time.monotonic())
        host.submit(arrived, Listener(heard, self._clock))
        heard.sent_s = self._clock()

    def cancel(self, heard: Heard) -> None:
        if heard.request.rid in self._rids:
            self._agent.hosts[heard.request.model].abort(self._rids[heard.request.rid])

    async def close(self) -> None:
        stop: Any = self._agent.stop()
        await asyncio.wait_for(stop, None)
