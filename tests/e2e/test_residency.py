"""A model's place at run time, seen from inside the agent, with oracles for workers: every way up, down and off the road."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from minserve.agent import Agent
from minserve.config import parse_config
from minserve.host import Host
from minserve.residency import GOALS, Residency, ResidencyError, StateError
from minserve.sampling import SamplingParams
from minserve.slab_table import SlabTable
from minserve.wire import Submit
from tests.e2e.oracle import BOOT, SLOW
from tests.e2e.running import write_model
from tests.e2e.test_host import Ears, until

PATIENCE_S = 60.0


class Site:
    """An agent with a model under test and a bystander, which nothing may touch."""

    def __init__(self, agent: Agent, name: str) -> None:
        self.agent, self.name = agent, name
        self.residency: Residency = agent.residencies[name]
        self.host: Host = agent.hosts[name]
        self.table: SlabTable = agent.pools[0].table
        self.owner = self.table.owner_of(name)
        self._rid = 0

    async def do(self, verb: str, **keys: Any) -> None:
        task = self.residency.begin(verb, **keys)
        assert task is not None, f"{self.name} was {self.host.state} already"
        await task

    def ask(self, name: str, first: int = 1, tokens: int = 20) -> Ears:
        ears, self._rid = Ears(), self._rid + 1
        self.agent.hosts[name].submit(Submit(self._rid, (first, 2), SamplingParams(max_tokens=tokens)), ears)
        return ears

    def check(self, state: str) -> None:
        """Where it is, what is withheld for it, and that nobody lost a slab."""
        self.table.check()
        here = state in ("ready", "loading")
        assert (self.host.state, self.table.takes_part(self.owner)) == (state, here), self.host.reason
        assert here or not self.table.held(self.owner)
        assert (self.host.pid is None) == (state in ("unloaded", "failed"))
        assert (self.residency.reserve_sets > 0) == here
        assert self.table.quotas.wanted(self.owner) == 0


Story = Callable[[Site], Awaitable[None]]


def tell(folder: Path, name: str, story: Story, within_s: float = PATIENCE_S) -> None:
    write_model(folder / "m")
    gpus = [{"device": "cpu", "pool_bytes": "16 MiB", "slab_bytes": "16 KiB"}]
    models = [{"name": name, "path": "m"}, {"name": "bystander", "path": "m"}]
    config = parse_config({"nodes": [{"name": "local", "gpus": gpus}], "models": models}, folder)

    async def run() -> None:
        agent = Agent(config, {}, BOOT)
        agent.start()
        async with asyncio.timeout(within_s):
            await agent.settled()
            site, other = Site(agent, name), agent.hosts["bystander"].pid
            try:
                await story(site)
                ears = site.ask("bystander")
                await until(lambda: ears.end == "length")
                assert agent.hosts["bystander"].pid == other
                site.table.check()
            finally:
                await agent.stop()

    asyncio.run(run())


def test_up_and_down_and_what_is_so_already(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        for verb in ("sleep", "wake", "unload", "load", "sleep", "unload", "load"):
            before = site.host.pid
            await site.do(verb)
            site.check(GOALS[verb])
            assert site.residency.begin(verb) is None
            assert (site.host.pid == before) == (verb in ("sleep", "wake"))
            if verb in ("load", "wake"):
                ears = site.ask(site.name)
                await until(lambda ears=ears: ears.end == "length")
        assert site.host.restarts == 0

    tell(tmp_path, "a", story)


def test_what_a_state_forbids_says_what_to_do(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        await site.do("sleep")
        with pytest.raises(StateError, match="load of a: it is asleep, wake it first"):
            site.residency.begin("load")
        await site.do("unload")
        for verb in ("sleep", "wake"):
            with pytest.raises(StateError, match=f"{verb} of a: it is unloaded, load it first"):
                site.residency.begin(verb)
        task = site.residency.begin("load")
        assert site.residency.begin("load") is task, "asked twice, begun once"
        with pytest.raises(StateError, match="sleep of a: its load is under way"):
            site.residency.begin("sleep")
        assert task is not None
        await task
        site.check("ready")

    tell(tmp_path, "a", story)


def test_requests_that_take_too_long_are_ended_and_told(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        ears, other = site.ask("a", SLOW, 250), site.ask("bystander", SLOW, 8)
        await until(lambda: ears.tokens > 0)
        await site.do("sleep", drain_s=0.1)
        assert ears.end == "The model a is taken out of service."
        site.check("asleep")
        await until(lambda: other.end == "length")

    tell(tmp_path, "a", story)


def test_a_worker_that_dies_while_it_falls_asleep(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        with pytest.raises(
            ResidencyError, match=r"collapses is unloaded: the worker of collapses ended .*SIGKILL"
        ):
            await site.do("sleep")
        site.check("unloaded")
        await site.do("load")
        site.check("ready")

    tell(tmp_path, "collapses", story)


@pytest.mark.slow
def test_a_worker_that_dies_while_it_drains(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        ears = site.ask("a", SLOW, 250)
        task = site.residency.begin("sleep", drain_s=PATIENCE_S)
        await until(lambda: ears.tokens > 0)
        assert site.host.pid is not None
        os.kill(site.host.pid, signal.SIGKILL)
        assert task is not None
        with pytest.raises(ResidencyError, match="a is unloaded"):
            await task
        assert "SIGKILL" in str(ears.end)
        site.check("unloaded")

    tell(tmp_path, "a", story)


def test_a_worker_that_dies_in_its_sleep(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        await site.do("sleep")
        assert site.host.pid is not None
        os.kill(site.host.pid, signal.SIGKILL)
        await until(lambda: site.host.state == "unloaded")
        assert site.host.reason == "its worker ended (signal SIGKILL) while it was asleep"
        await site.do("load")
        site.check("ready")

    tell(tmp_path, "a", story)


def test_a_worker_that_says_it_sleeps_and_holds_sets_is_ended(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        with pytest.raises(ResidencyError, match="hoards is unloaded: hoards still holds 2 slabs"):
            await site.do("sleep")
        site.check("unloaded")

    tell(tmp_path, "hoards", story)


def test_a_worker_that_cannot_wake_sleeps_on(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        await site.do("sleep")
        pid = site.host.pid
        with pytest.raises(ResidencyError, match="dreams could not wake and is still asleep: out of memory"):
            await site.do("wake")
        site.check("asleep")
        await site.do("wake")
        site.check("ready")
        assert site.host.pid == pid

    tell(tmp_path, "dreams", story)


def test_a_worker_that_dies_while_it_wakes_is_loaded_anew(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        await site.do("sleep")
        await site.do("wake")
        site.check("ready")
        assert site.host.restarts == 1

    tell(tmp_path, "faints", story)


def test_a_wake_that_takes_too_long_can_be_given_up(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        await site.do("sleep")
        waking = site.residency.begin("wake")
        await until(lambda: site.host.state == "loading")
        site.check("loading")
        assert waking is not None
        began = time.monotonic()
        await site.do("unload")
        assert time.monotonic() - began < PATIENCE_S / 2
        with pytest.raises(ResidencyError, match="given up"):
            await waking
        site.check("unloaded")

    tell(tmp_path, "snores", story)


def test_an_agent_that_stops_while_a_model_wakes_ends_it(tmp_path: Path) -> None:
    pids: list[int] = []

    async def story(site: Site) -> None:
        await site.do("sleep")
        site.residency.begin("wake")
        await until(lambda: site.host.state == "loading")
        assert site.host.pid is not None
        pids.append(site.host.pid)

    tell(tmp_path, "snores", story)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize("way", ["load", pytest.param("wake", marks=pytest.mark.slow)])
def test_without_room_for_its_reserve_it_stays_where_it_was(tmp_path: Path, way: str) -> None:
    async def story(site: Site) -> None:
        await site.do("sleep" if way == "wake" else "unload")
        where, other = site.host.state, site.table.owner_of("bystander")
        # of a worker that gives nothing back
        leases = []
        while (lease := site.table.lease(other, 2, urgent=True)) is not None:
            leases.append(lease)
        site.residency._room_timeout_s = 0.3
        with pytest.raises(ResidencyError, match=f"a stays {where}: its reserve of .* did not come free"):
            await site.do(way)
        site.check(where)
        # it is asked for, and given up again
        site.residency._room_timeout_s = PATIENCE_S
        asking = site.residency.begin(way)
        await until(lambda: site.table.quotas.wanted(site.owner) > 0)
        if way == "load":
            await site.do("unload")
            assert asking is not None
            with pytest.raises(ResidencyError, match="given up"):
                await asking
            site.check("unloaded")
            asking = site.residency.begin(way)
            await until(lambda: site.table.quotas.wanted(site.owner) > 0)
        for lease in leases:
            site.table.free(other, lease)
        assert asking is not None
        await asking
        site.check("ready")

    tell(tmp_path, "a", story)


def test_a_model_that_failed_withholds_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        await until(lambda: not site.table.takes_part(site.owner))
        site.check("failed")
        with pytest.raises(ResidencyError, match=r"refuses is failed: tensor model\.norm\.weight is missing"):
            await site.do("load")
        await until(lambda: not site.table.takes_part(site.owner))
        site.check("failed")
        await site.do("unload")
        site.check("unloaded")

    tell(tmp_path, "refuses", story)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_orders_kills_and_changes_of_mind(tmp_path: Path, seed: int) -> None:
    """Whatever comes together: at rest a model has its reserve exactly where it serves, and holds nothing elsewhere."""
    rng = random.Random(seed)
    ends = Counter[str]()

    async def step(site: Site) -> None:
        tasks, ears = [], []
        for _ in range(rng.choice((1, 1, 2, 3))):
            if site.host.state == "ready":
                ears.append(site.ask("a", rng.choice((1, SLOW)), rng.choice((5, 30))))
            verb = rng.choice((*GOALS, "sleep"))
            try:
                task = site.residency.begin(
                    verb, drain_s=rng.choice((0.0, 0.05, 5.0)), level=rng.choice((1, 2))
                )
                tasks += [task] if task is not None else []
            except StateError:
                ends["forbidden"] += 1
            await asyncio.sleep(rng.choice((0.0, 0.01, 0.1, 0.4)) * rng.random())
            if rng.random() < 0.3 and site.host.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(site.host.pid, signal.SIGKILL)
                    ends["killed"] += 1
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            assert found is None or isinstance(found, ResidencyError), found
            ends["done" if found is None else "not done"] += 1
        await until(lambda: site.host.state in ("ready", "asleep", "unloaded", "failed"))
        await until(lambda: all(e.end is not None for e in ears) or site.host.state == "ready")
        # a dead worker is buried in its own time
        await until(lambda: (site.host.pid is None) == (site.host.state in ("unloaded", "failed")))
        await until(lambda: site.table.takes_part(site.owner) == (site.host.state in ("ready", "loading")))
        if site.host.state == "ready":
            await until(lambda: all(e.end is not None for e in ears))
        assert site.residency.doing is None
        if site.host.state != "loading":
            site.check(site.host.state)
        ends[site.host.state] += 1

    async def story(site: Site) -> None:
        for _ in range(60):
            await step(site)

    tell(tmp_path, "a", story, 10 * PATIENCE_S)
    print(dict(ends))
    assert all(ends[s] for s in ("ready", "asleep", "unloaded", "killed", "done", "forbidden")), ends


def test_memory_is_made_before_a_model_comes_and_given_to_the_pool_when_it_has_gone(tmp_path: Path) -> None:
    async def story(site: Site) -> None:
        seen: list[tuple[str, str, bool]] = []

        class Device:
            async def make(self, name: str) -> None:
                seen.append(("make", site.host.state, site.table.takes_part(site.owner)))
                if len(seen) > 4:
                    raise RuntimeError("the GPU does not answer")

            async def reclaim(self) -> None:
                seen.append(("reclaim", site.host.state, site.table.takes_part(site.owner)))

        site.residency._device = Device()  # type: ignore[assignment]
        for verb in ("sleep", "wake", "unload", "load"):
            await site.do(verb)
        assert seen == [
            ("reclaim", "asleep", False),
            ("make", "asleep", True),
            ("reclaim", "unloaded", False),
            ("make", "unloaded", True),
        ]
        await site.do("unload")
        await site.do("load")
        site.check("ready")

    tell(tmp_path, "m", story)
