"""A worker's part in compaction: when other models are short of slabs, it moves its own blocks together.

The sets it empties go back to the pool, where those who want them lease them.  Nothing is asked of anybody: each worker
reads what the others want, and what it would cost them, from their rows of the table.  No torch.
"""

import time
from collections.abc import Callable

from minserve.slab_table import SlabTable
from sched.compaction import NO_OFFER, Compactor, Offer, sets_to_vacate

# an offer that is not renewed for so long, and for three steps, is that of a worker that has stopped
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
        self._layers = list(table.plan.models.values())[owner].layers
        self._offered = NO_OFFER

    def turn(self, excess: int) -> None:
        """`excess`: sets that this model is to give back, beyond those that hold no request."""
        missing = -(-self._table.quotas.missing(but=self._owner) // self._layers)
        self._offered = NO_OFFER
        if missing <= 0 and excess <= 0:
            return
        self._offered = self._offer()
        leaving = self._compactor.num_leaving
        wanted = sets_to_vacate(self._offered, self._others(), missing - leaving)
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

    def _others(self) -> list[Offer]:
        now = 1e9 * self._clock()
        offers = []
        for owner in range(len(self._table.names)):
            said = self._table.status(owner)
            fresh = now - said["heartbeat_ns"] <= FRESH_NS + 3000 * said["step_us"]
            if owner != self._owner and fresh:
                offers.append(Offer(said["vacatable"], said["vacate_milli"] / 1000))
        return offers
