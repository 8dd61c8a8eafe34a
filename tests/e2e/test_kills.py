"""kill -9 and SIGSTOP of a real worker at random moments under load: the models beside it lose no byte and no bit.

Three float32 models on one pool: `victim` is killed; `busy` answers all the time; `still` has its reserve full of cached
blocks and does nothing, so its bytes must be what they were, and so must be all that nobody has leased in between.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minserve.shared_memory import SharedLock, reopen_memfd
from tests.e2e.fleet import Fleet, Footprints, alone, meanwhile, until
from tests.e2e.running import VOCAB
from tests.tiny import write_llama

LAYERS = {"victim": 5, "busy": 2, "still": 3}
# deterministic: the same bits whatever else is in the step
KEYS: dict[str, Any] = {"dtype": "fp32", "deterministic": True, "max_model_len": 160, "reserve_tokens": 160}
# its sets come and go, for it caches nothing; its prompts together want more than there is
OF = {"victim": {**KEYS, "enable_prefix_caching": False}, "busy": KEYS, "still": KEYS}
VICTIM = 32
STILL = 3  # prompts whose blocks stay cached: within its reserve, so nobody can claim them


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[list[int]]]:
    rng = np.random.default_rng(5)
    return {
        "victim": [rng.integers(5, VOCAB - 2, rng.integers(50, 136)).tolist() for _ in range(VICTIM)],
        "busy": rng.integers(5, VOCAB - 2, (4, 40)).tolist(),
        "still": rng.integers(5, VOCAB - 2, (STILL, 33)).tolist(),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    for seed, (name, layers) in enumerate(LAYERS.items()):
        write_llama(folder / name, seed=seed, vocab_size=VOCAB, num_hidden_layers=layers)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: dict[str, list[list[int]]]) -> dict[str, Any]:
    return {name: alone(folder / name, prompts[name], **OF[name]) for name in LAYERS}


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[Fleet]:
    models = [{"name": name, "path": str(folder / name), **OF[name]} for name in LAYERS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the workers, as `alone`
        fleet = Fleet(models, 4200 << 10)
        try:
            yield fleet
        finally:
            fleet.close()


class Beside:
    """What the others do while the victim dies, and what they must say."""

    def __init__(self, fleet: Fleet, prompts: dict[str, Any], expected: dict[str, Any]) -> None:
        self.fleet, self.prompts, self.expected = fleet, prompts, expected
        self.busy_rounds = 0

    async def work(self) -> None:
        """A round of `busy`, bit by bit what it says alone."""
        heard = await self.fleet.answers("busy", self.prompts["busy"])
        assert [h.said for h in heard] == self.expected["busy"], "busy says other than alone"
        self.busy_rounds += 1

    async def still_answers(self) -> list[int]:
        """How many tokens of each prompt were in its cache."""
        heard = await self.fleet.answers("still", self.prompts["still"])
        assert [h.said for h in heard] == self.expected["still"], "still says other than alone"
        return [h.cached for h in heard]

    async def victim_answers(self, count: int) -> None:
        heard = await self.fleet.answers("victim", self.prompts["victim"][:count])
        assert [h.said for h in heard] == self.expected["victim"][:count]

    def footprints(self) -> Footprints:
        return Footprints.take(self.fleet.pool, ("victim", "busy"))


@pytest.fixture
def beside(prompts: dict[str, Any], expected: dict[str, Any], fleet: Fleet) -> Beside:
    return Beside(fleet, prompts, expected)


async def one_kill(beside: Beside, rng: random.Random) -> int:
    """Kills the victim in the middle of its work; how many slabs it held then."""
    fleet = beside.fleet
    host, table = fleet.host("victim"), fleet.pool.table
    await until(lambda: host.state == "ready")
    await beside.victim_answers(2)
    before, pid, restarts = beside.footprints(), host.pid, host.restarts
    assert pid is not None
    load = [fleet.ask("victim", prompt) for prompt in beside.prompts["victim"]]
    moment = time.monotonic() + rng.random() * 0.2
    await until(lambda: time.monotonic() >= moment)
    os.kill(pid, signal.SIGKILL)
    held = table.held(table.owner_of("victim"))
    await until(lambda: all(h.end for h in load) and host.restarts > restarts)
    table.check()
    counts = table.counts().models["victim"]
    assert counts.live == counts.draining == 0, f"sets leaked: {counts}"
    after = beside.footprints()
    assert before.changed(after) == [], "foreign bytes changed"
    kept = np.isin(before.held_by(table.owner_of("still")), before.comparable(after))
    assert kept.sum() >= STILL * 2, "the blocks of `still` were not there to compare"
    assert len(before.comparable(after)) > len(kept), "nothing else was there to compare"
    rounds = beside.busy_rounds
    await until(lambda: beside.busy_rounds > rounds)
    return held


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_worker_changes_no_bit_of_the_others(beside: Beside, fleet: Fleet, kills: int) -> None:
    rng, held = random.Random(kills), []

    async def story() -> None:
        for _ in range(kills):
            held.append(await one_kill(beside, rng))
        await until(lambda: fleet.host("victim").state == "ready")
        await beside.victim_answers(VICTIM)

    async def run() -> int:
        await beside.still_answers()
        rounds = await meanwhile(story, beside.work)
        # 32 of 33 tokens are whole blocks, and have lain in the pool all the time
        assert await beside.still_answers() == [32] * STILL
        return rounds

    rounds = fleet.call(run(), 60.0 * (kills + 1))
    assert sum(h > 0 for h in held) > kills / 2, f"it held nothing when it was killed: {held}"
    print(
        f"{kills} kills at random moments, which left {min(held)} to {max(held)} slabs each, all of them reclaimed; "
        f"{rounds * 4} answers of the model beside it and {STILL} cached prompts of another bit-equal to a run alone"
    )
    assert fleet.pool.table.counts().refused > 0, "nobody was short of memory"
    assert fleet.host("busy").restarts == fleet.host("still").restarts == 0


def test_one_changed_byte_is_found_by_the_same_check(beside: Beside, fleet: Fleet) -> None:
    """In a slab of another model, and in one that came back."""

    async def found() -> None:
        await beside.still_answers()
        await beside.victim_answers(8)
        before = beside.footprints()
        assert before.changed(beside.footprints()) == []
        theirs = before.held_by(fleet.pool.table.owner_of("still"))
        free = np.setdiff1d(before.comparable(before), theirs)
        for n, slabs in enumerate((theirs, free), 1):
            slab = int(slabs[len(slabs) // 2])
            fleet.pool.slab(slab)[100 * n] ^= 1
            assert before.changed(beside.footprints()) == [slab]
            fleet.pool.slab(slab)[100 * n] ^= 1
        assert before.changed(beside.footprints()) == []

    fleet.call(found())


def lock_is_free(fleet: Fleet) -> bool:
    fd, _ = reopen_memfd(fleet.pool.table.fd, "slab table")
    try:
        with SharedLock(fd, 0.02):
            return True
    except TimeoutError:
        return False
    finally:
        os.close(fd)


async def stop_outside_the_lock(fleet: Fleet, pid: int) -> None:
    """A worker that is stopped inside the lock is killed by the agent: another test's subject."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        if lock_is_free(fleet):
            return
        os.kill(pid, signal.SIGCONT)


def test_a_stopped_worker_holds_up_nobody_and_goes_on(beside: Beside, fleet: Fleet) -> None:
    rng, host, table = random.Random(3), fleet.host("victim"), fleet.pool.table

    async def story() -> None:
        for _ in range(3):
            await until(lambda: host.state == "ready")
            before, pid = beside.footprints(), host.pid
            assert pid is not None
            load = [fleet.ask("victim", prompt) for prompt in beside.prompts["victim"]]
            moment = time.monotonic() + rng.random() * 0.1
            await until(lambda: time.monotonic() >= moment)  # noqa: B023
            await stop_outside_the_lock(fleet, pid)
            heard, held = [len(h.tokens) for h in load], table.held(table.owner_of("victim"))
            for _ in range(3):
                await beside.work()
            assert before.changed(beside.footprints()) == [], "foreign bytes changed"
            # what was on its way when it was stopped may still have come
            assert sum(len(h.tokens) for h in load) - sum(heard) <= 2 * len(load)
            assert table.held(table.owner_of("victim")) == held, "sets were taken from a process that lives"
            os.kill(pid, signal.SIGCONT)
            await until(lambda: all(h.end for h in load))  # noqa: B023
            assert [h.said for h in load] == beside.expected["victim"], "victim says other than alone"
            assert before.changed(beside.footprints()) == [], "foreign bytes changed"

    restarts = host.restarts
    fleet.call(story())
    assert host.restarts == restarts
