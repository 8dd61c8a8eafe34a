"""A worker's part in sharing a pool: it says in its row what it holds and wants, and gives way when others are short.

Called once a turn of the loop.  Nothing is asked of anybody: rows and quotas are words of the shared table.
"""

import time
from collections.abc import Callable
from typing import Protocol

from minserve.kv_moves import KvMoves
from sched.pressure import Demand
from sched.quota import urgency

# an idle worker that holds sets looks this often whether others want them
IDLE_LOOK_S = 0.02
# requests that end by themselves are cheaper than one that is computed again
PREEMPT_AFTER_S = 0.1
# what runs claims its memory so long before it needs it: an idle neighbour has looked by then, and given it
CLAIM_AHEAD_S = 0.5
MOST_AHEAD = 256  # steps
STEP_WEIGHT = 0.1


class Shared(Protocol):
    """Where the sets are from: minserve.pool.LeasedSets, or the GroupSets of a model on several GPUs."""

    @property
    def excess(self) -> int: ...
    @property
    def num_draining(self) -> int: ...
    def publish(self, **status: int) -> None: ...
    def poll(self) -> None: ...


class Holder(Protocol):
    """What holds the sets: sched.blocks.BlockPool."""

    slots: int

    @property
    def num_sets(self) -> int: ...
    @property
    def num_spare_sets(self) -> int:
        """Sets without a block of any request."""

    @property
    def num_live(self) -> int: ...
    @property
    def num_idle(self) -> int:
        """Cached blocks that no request refers to."""

    def give_up(self, n: int) -> int:
        """Gives back at most `n` sets that no request needs, and says how many."""


class KvShare:
    """`demand(steps)` says what is wanted within so many steps.  `preempt(n)` preempts requests so that `n` sets have none,
    and says how many; asked when the sets without requests were not enough for PREEMPT_AFTER_S, and not more often."""

    def __init__(
        self,
        sets: Shared,
        holder: Holder,
        demand: Callable[[int], Demand],
        preempt: Callable[[int], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        moves: KvMoves | None = None,
    ) -> None:
        self._sets, self._holder, self._demand = sets, holder, demand
        self._preempt, self._clock, self._moves = preempt, clock, moves
        self._step_us = 0.0
        self._since: float | None = None  # when the reclaim under way began
        self._preempted = 0.0
        self._given_up = self._reclaims = 0
        self._reclaim_us = self._reclaim_max_us = 0

    @property
    def idle_wait_s(self) -> float | None:
        """How long an idle worker may sleep before its next turn; None: it holds nothing that anybody could want."""
        return IDLE_LOOK_S if self._holder.num_sets or self._sets.num_draining else None

    @property
    def _ahead(self) -> int:
        """Steps in CLAIM_AHEAD_S."""
        return min(MOST_AHEAD, int(CLAIM_AHEAD_S * 1e6 / self._step_us)) if self._step_us else 0

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        us = seconds * 1e6
        self._step_us += (us - self._step_us) * (STEP_WEIGHT if self._step_us else 1.0)

    def turn(self) -> None:
        """Gives back what others have a claim to, moves blocks together where they are short, then publishes."""
        excess = self._give_way()
        if self._moves is not None:
            self._moves.turn(excess)
        demand, holder = self._demand(self._ahead), self._holder
        self._sets.publish(
            demand=-(-demand.blocks // holder.slots),
            used=holder.num_sets - holder.num_spare_sets,
            live_blocks=holder.num_live,
            cached_blocks=holder.num_idle,
            waiting=demand.waiting,
            heartbeat_ns=int(self._clock() * 1e9),
            slack_us=int(demand.slack_s * 1e6),
            step_us=int(self._step_us),
            sequence_tokens=int(demand.sequence_tokens),
            urgency_milli=int(1000 * urgency(demand.slack_s, demand.budget_s)) if demand.waiting else 1000,
            given_up=self._given_up,
            reclaims=self._reclaims,
            reclaim_us=self._reclaim_us,
            reclaim_max_us=self._reclaim_max_us,
            **({} if self._moves is None else self._moves.words()),
        )

    def _give_way(self) -> int:
        """Sets that are still to be given back."""
        wanted = self._sets.excess
        if not wanted:
            if self._since is not None:
                self._done()
            return 0
        now = self._clock()
        if self._since is None:
            self._since = self._preempted = now
        given = self._holder.give_up(wanted)
        if given < wanted and self._preempt is not None and now - self._preempted > PREEMPT_AFTER_S:
            self._preempted = now
            if self._preempt(wanted - given):
                # before the next plan: it would take the blocks back
                given += self._holder.give_up(wanted - given)
        self._given_up += given
        self._sets.poll()
        if given >= wanted:
            self._done()
        return max(0, wanted - given)

    def _done(self) -> None:
        assert self._since is not None, "no reclaim is under way"
        took = int(1e6 * (self._clock() - self._since))
        self._since = None
        self._reclaims += 1
        self._reclaim_us += took
        self._reclaim_max_us = max(self._reclaim_max_us, took)
