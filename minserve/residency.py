"""One model's place on its device at run time: loaded, unloaded, put to sleep and woken, without a word to the others.

    unloaded  no process, no slab, no reserve       load:   claim the reserve, wait until it is there, start the worker
    asleep    a worker without a slab, no reserve   wake:   the same, but the worker is there and has the weights
    ready     serving                               unload, sleep: refuse what is new, let end what runs, then end it

What is begun goes on though nobody waits for it.  A worker that dies on the way down leaves the model unloaded; one that
dies on the way up is started again, as after any death.  What it held is back before anything else begins.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from minserve.host import Host, WakeRefused, WorkerLost
from minserve.pool_segments import DeviceRoom
from minserve.slab_table import OwnershipError, SlabTable

log = logging.getLogger("minserve")

LOOK_S = 0.02
# the others give way within a second where they can; a model with long answers under way may take longer
ROOM_TIMEOUT_S = 60.0
# what each asks for, and from which states it begins
GOALS = {"load": "ready", "unload": "unloaded", "sleep": "asleep", "wake": "ready"}
FROM = {
    "load": ("unloaded", "failed", "loading"),
    "unload": ("ready", "asleep", "failed", "loading"),
    "sleep": ("ready",),
    "wake": ("asleep", "loading"),
}
# what to do in a state from which one cannot begin
ADVICE = {
    "asleep": "wake it first",
    "unloaded": "load it first",
    "failed": "load tries it again",
    "loading": "wait until it is ready, or unload it",
    "draining": "wait until it has ended its requests",
}
T = TypeVar("T")


class StateError(ValueError):
    """The model's state forbids it; the message says what to do."""


class ResidencyError(RuntimeError):
    """It was begun and did not end well; the message says why and where the model is now."""


class Residency:
    """All methods belong to the event loop's thread."""

    def __init__(
        self,
        host: Host,
        table: SlabTable,
        room_timeout_s: float = ROOM_TIMEOUT_S,
        device: DeviceRoom | None = None,
    ) -> None:
        """`device`: None where memory for weights need not be made."""
        self.host, self._table, self._room_timeout_s = host, table, room_timeout_s
        self._device = device
        self.doing: str | None = None
        self._owner = table.owner_of(host.name)
        self._task: asyncio.Task[None] | None = None
        self._life: asyncio.Task[None] | None = None
        self._abandoned = False

    @property
    def held_sets(self) -> int:
        return self._table.held(self._owner) // self._table.plan.models[self.host.name].layers

    @property
    def reserve_sets(self) -> int:
        here = self._table.takes_part(self._owner)
        return self._table.plan.models[self.host.name].reserve_sets if here else 0

    def start(self) -> None:
        """The worker, of a model that has its reserve."""
        self._life = asyncio.create_task(self._live(), name=f"life of {self.host.name}")

    def begin(self, verb: str, *, drain_s: float = 10.0, level: int = 1) -> "asyncio.Task[None] | None":
        """The task that ends when it is done, with ResidencyError if it is not; None where it was so already.

        StateError where it cannot begin.  `drain_s`: seconds that running requests get to end.  `level`: of sleep.
        """
        name, state, busy = self.host.name, self.host.state, self.doing
        if busy == verb:
            return self._task
        if busy is not None and not (verb == "unload" and GOALS[busy] == "ready"):
            raise StateError(f"{verb} of {name}: its {busy} is under way, wait until it has ended")
        if busy is None and state == GOALS[verb]:
            return None
        if busy is None and state not in FROM[verb]:
            raise StateError(f"{verb} of {name}: it is {state}, {ADVICE.get(state, 'it is ready')}")
        steps = {
            "load": self._load,
            "unload": lambda: self._unload(drain_s),
            "sleep": lambda: self._sleep(level, drain_s),
            "wake": self._wake,
        }
        self._abandoned, self.doing = busy is not None, verb
        self._task = asyncio.create_task(self._carry_out(verb, steps[verb], self._task if busy else None))
        self._task.add_done_callback(forgive)
        return self._task

    async def stop(self) -> None:
        """Ends everything; afterwards there is no worker."""
        if self._task is not None:
            self._abandoned = True
            await asyncio.wait([self._task])
        if self._life is not None:
            await self.host.stop(self._life)

    async def _carry_out(
        self, verb: str, step: Callable[[], Coroutine[Any, Any, None]], before: "asyncio.Task[None] | None"
    ) -> None:
        try:
            if before is not None:
                await asyncio.wait([before])  # it gives up
                self._abandoned = False
            began = time.monotonic()
            await step()
            log.info("[%s] %s took %.2f s", self.host.name, verb, time.monotonic() - began)
        except ResidencyError as error:
            log.error("[%s] %s: %s", self.host.name, verb, error)
            raise
        except Exception:
            log.exception("[%s] %s went wrong", self.host.name, verb)
            raise
        finally:
            if asyncio.current_task() is self._task:
                self.doing = None

    async def _live(self) -> None:
        await self.host.run()
        # it is dead and what it held has been taken back: nobody is to be kept out of its reserve
        await self._leave()

    # ---- up

    async def _load(self) -> None:
        if self.host.state != "loading":
            if self._life is not None:
                await asyncio.wait([self._life])
            await self._make_room()
            self.host.begin()
            self.start()
        await self._loaded()

    async def _wake(self) -> None:
        if self.host.state == "asleep":
            await self._make_room()
            if self.host.state != "asleep":  # it died meanwhile, and may have left before it had come in
                await self._buried()
                raise ResidencyError(f"{self.host.name} is {self.host.state}: {self.host.reason}")
            try:
                await self._answer(self.host.wake())
            except WakeRefused as error:
                await self._leave()
                raise ResidencyError(
                    f"{self.host.name} could not wake and is still asleep: {error}"
                ) from None
            except WorkerLost as error:
                log.warning("[%s] %s while it woke: it is loaded anew", self.host.name, error)
        await self._loaded()

    async def _loaded(self) -> None:
        while self.host.state == "loading":
            await self._pause()
        if self.host.state != "ready":
            raise ResidencyError(f"{self.host.name} is {self.host.state}: {self.host.reason}")

    async def _make_room(self) -> None:
        """Claims the reserve until it is there; where it does not come, all is as before."""
        state, end = self.host.state, time.monotonic() + self._room_timeout_s
        try:
            while not await self._locked(self._table.enter):
                if self.host.state != state or time.monotonic() > end:
                    sets = self._table.plan.models[self.host.name].reserve_sets
                    raise ResidencyError(
                        f"{self.host.name} stays {self.host.state}: its reserve of {sets} sets did not come free within "
                        f"{self._room_timeout_s:.0f} s; unload another model or let running requests end"
                    )
                await self._pause()
            await self._make_memory()
        except ResidencyError:
            await self._leave()
            raise

    async def _make_memory(self) -> None:
        if self._device is not None:
            try:
                await self._device.make(self.host.name)
            except RuntimeError as error:
                log.warning("[%s] its GPU was not asked for memory: %s", self.host.name, error)

    # ---- down

    async def _unload(self, drain_s: float) -> None:
        await self._drain(drain_s)
        if self._life is not None:
            await self.host.stop(self._life)
        self.host.park()
        await self._give_to_pool()

    async def _give_to_pool(self) -> None:
        if self._device is not None:
            try:
                await self._device.reclaim()
            except RuntimeError as error:
                log.warning("[%s] what it held of its GPU is not the pool's yet: %s", self.host.name, error)

    async def _sleep(self, level: int, drain_s: float) -> None:
        await self._drain(drain_s)
        try:
            if self.host.state != "draining":
                raise WorkerLost(self.host.reason)
            await self._answer(self.host.sleep(level))
            await self._leave()
            await self._give_to_pool()
        except OwnershipError as error:
            log.error("[%s] says that it sleeps, but %s: killing it", self.host.name, error)
            self.host.kill()
            await self._buried()
            raise ResidencyError(f"{self.host.name} is unloaded: {error}") from None
        except WorkerLost as error:
            await self._buried()
            raise ResidencyError(f"{self.host.name} is {self.host.state}: {error}") from None

    async def _drain(self, drain_s: float) -> None:
        if self.host.state != "ready":
            return
        self.host.state = "draining"
        end = time.monotonic() + drain_s
        while self.host.num_requests and time.monotonic() < end and not self._abandoned:
            await asyncio.sleep(LOOK_S)
        self.host.drop(f"The model {self.host.name} is taken out of service.")

    # ---- the pool

    async def _leave(self) -> None:
        await self._locked(self._table.leave)

    async def _buried(self) -> None:
        """Its worker is dead, and all that was its own is free."""
        if self._life is not None:
            await asyncio.wait([self._life])
        await self._leave()

    async def _locked(self, change: Callable[[int], T]) -> T:
        """A change of the table, however long it takes to get the lock."""
        while True:
            try:
                return await asyncio.to_thread(change, self._owner)
            except TimeoutError:
                log.warning("waiting for the slab table: a stopped worker holds its lock")

    # ---- waiting

    async def _answer(self, asked: "asyncio.Future[str]") -> None:
        """What the worker says; it may take as long as it takes to move the weights."""
        while not asked.done():
            await self._pause()
        asked.result()

    async def _pause(self) -> None:
        if self._abandoned:
            raise ResidencyError(f"{self.host.name}: given up for what was asked for after it")
        await asyncio.sleep(LOOK_S)


def forgive(done: "asyncio.Future[Any]") -> None:
    """Its error has been logged, or is another's to raise: that nobody waits for it is no fault."""
    if not done.cancelled():
        done.exception()
