"""A worker's part in compaction: when other models are short of slabs, it moves its own blocks together.

The sets it empties go back to the pool, where those who want them lease them.  Nothing is asked of anybody: each worker
reads what the others want, and what it would cost them, from their rows of the table.  No torch.
"""

import time
from collections.abc import Callable

from minserve.slab_table import SlabTable
from sched.compaction import NO_OFFER, Compactor, Offer, sets_to_vacate, watermark

# what is not said again for so long, and for three steps, is that of a worker that has stopped
FRESH_NS = 10**9


class KvMoves:
    """`offer()`: what the next step could empty; `ask(n)` has it done; `moved_bytes()`: what has been copied so far."""

    def __init__(
        self,
        table: SlabTable,
        owner: int,
        compactor: Compactor,
        offer: Callable[[], Offer],
        ask: Callable[[int], None],
        moved_bytes: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table, self._owner, self._compactor = table, owner, compactor
        self._offer, self._ask, self._moved_bytes, self._clock = offer, ask, moved_bytes, clock
        self._shapes = list(table.plan.models.values())
        self._offered = NO_OFFER

    def turn(self, excess: int) -> None:
        """`excess`: sets that this model is to give back, beyond those that hold no request."""
        self._compactor.ask(
            0, 0
        )  # what was asked for and has not been made is no longer wanted, or will be asked for again
        heard = self._heard()
        busy = [self._shapes[i] for i, said in heard.items() if said["used"] or said["waiting"]]
        least = watermark(busy, self._table.plan.num_slabs)
        missing = -(-self._table.quotas.missing(heard, least) // self._shapes[self._owner].layers)
        self._offered = NO_OFFER
        if missing <= 0 and excess <= 0:
            return
        if missing > 0:
            self._compactor.give_empty()
        self._offered = self._offer()
        others = [Offer(said["vacatable"], said["vacate_milli"] / 1000) for said in heard.values()]
        leaving = self._compactor.num_leaving
        wanted = sets_to_vacate(self._offered, others, missing - leaving)
        wanted = max(wanted, min(self._offered.sets, excess - leaving))
        if wanted > 0:
            self._ask(wanted)

    def words(self) -> dict[str, int]:
        """What is to be published."""
        return {
            "vacatable": self._offered.sets,
            "vacate_milli": int(1000 * self._offered.cost),
            "vacated": self._compactor.num_vacated,
            "moved_bytes": self._moved_bytes(),
        }

    def _heard(self) -> dict[int, dict[str, int]]:
        """What the other models have said of late."""
        now, heard = 1e9 * self._clock(), {}
        for owner in range(len(self._shapes)):
            said = self._table.status(owner)
            if owner != self._owner and now - said["heartbeat_ns"] <= FRESH_NS + 3000 * said["step_us"]:
                heard[owner] = said
        return heard
