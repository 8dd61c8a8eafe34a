"""The agent's part in sharing a pool: reads the rows of the workers, divides the pool, and writes the quotas.  No torch.

Nothing here waits for a worker or for the table's lock.  A worker that has fallen silent, stopped or deep in a step,
keeps what it holds and has no claim to more.
"""

import asyncio
import logging
import time
from collections.abc import Mapping

from minserve.slab_segments import num_away
from minserve.slab_table import SlabTable
from minserve.slab_words import OUT, liveness_of, planned_reserves
from sched.quota import POLICIES, Need

log = logging.getLogger("minserve")

TICK_S = 0.2
# a worker publishes every step: one that has not for this long, or for three of its steps, says nothing
SILENT_S, SILENT_STEPS = 2.0, 3.0


class QuotaWriter:
    """`rates`: requests a second as configured, for the policies that plan with them."""

    def __init__(self, table: SlabTable, policy: str, rates: Mapping[str, float]) -> None:
        self._table, self._plan = table, table.plan
        self._policy, self._rates = POLICIES[policy](), rates
        self.changes = 0
        self._last: tuple[int, ...] | None = None

    def needs(self, now_ns: int) -> list[Need]:
        """The models that take part or ask to, as their rows show them, in the table's order."""
        found = []
        for owner, (name, shape) in enumerate(self._plan.models.items()):
            if not self._counts(owner):
                continue
            said, held = self._table.status(owner), self._table.held(owner) // shape.layers
            silent_s = (now_ns - said["heartbeat_ns"]) / 1e9
            heard = silent_s < max(SILENT_S, SILENT_STEPS * said["step_us"] / 1e6)
            found.append(
                Need(
                    name=name,
                    set_slabs=shape.layers,
                    set_tokens=shape.set_tokens,
                    reserve_sets=shape.reserve_sets,
                    held_sets=held,
                    used_sets=min(held, max(0, said["used"])),
                    unmet_sets=min(self._plan.max_sets(name), max(0, said["demand"])) if heard else 0,
                    waiting=max(0, said["waiting"]) if heard else 0,
                    rate=self._rates.get(name, 1.0),
                    step_s=max(0, said["step_us"]) / 1e6,
                    sequence_tokens=max(0, said["sequence_tokens"]),
                    urgency=max(1, said["urgency_milli"]) / 1000 if heard and said["urgency_milli"] else 1.0,
                )
            )
        return found

    def _counts(self, owner: int) -> bool:
        """Whether a part of the pool is this model's: it has its reserve, or is about to."""
        return self._table.takes_part(owner) or self._table.quotas.wanted(owner) > 0

    def _room(self) -> int:
        """Slabs to divide, with the liveness reserve that there will be when those that ask take part."""
        planned = planned_reserves(self._plan)
        reserves = [r if self._counts(owner) else OUT for owner, r in enumerate(planned)]
        return self._plan.num_slabs - num_away(self._table) - liveness_of(self._plan, reserves)

    def tick(self, now_s: float) -> None:
        """One division.  `now_s` on the machine's monotonic clock."""
        needs = self.needs(int(now_s * 1e9))
        if not needs:
            return  # nobody to divide it among
        sets = self._policy.divide(needs, self._room(), now_s)
        if sets is not None:
            quotas = dict(zip((n.name for n in needs), sets, strict=True))
            written = [quotas.get(name, 0) for name in self._plan.models]
            self._table.quotas.write(written, strict=self._policy.strict)
        self.changes += sets != self._last
        self._last = sets

    async def run(self) -> None:
        """Until cancelled.  A division that fails ends nothing: the quotas written last hold, and serving goes on."""
        failed = ""
        while True:
            try:
                self.tick(time.monotonic())
                failed = ""
            except Exception as error:
                # five times a second: what stays wrong is said once
                if repr(error) != failed:
                    log.exception("the pool could not be divided anew: its quotas stay")
                failed = repr(error)
            await asyncio.sleep(TICK_S)
