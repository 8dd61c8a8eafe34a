"""What a Batcher lacks, and what it can do without: its side of sharing a pool."""

from typing import NamedTuple

from sched.batching import Batcher
from sched.compaction import NO_OFFER, Offer
from sched.step import SLOT_BITS


class Demand(NamedTuple):
    """`blocks`: wanted beyond those that can be had without a lease.  `slack_s`: until the first of the new requests
    among the `waiting` must be begun; `budget_s`: what it had when it came.  `sequence_tokens`: mean of all, 0 of none.
    """

    blocks: int = 0
    waiting: int = 0
    slack_s: float = 0.0
    budget_s: float = 0.0
    sequence_tokens: float = 0.0


def demand(batcher: Batcher, now: float, ahead: int = 0) -> Demand:
    """Of memory: who waits only because no more may run at once wants none yet.

    `ahead`: steps for which those that run want theirs beforehand, so that others have given it when they need it.
    """
    queue, running, blocks = batcher._queue, batcher._running, batcher.blocks
    waiting, room = len(queue), batcher.limits.max_running - batcher.num_running
    admitted = min(waiting, max(0, room))
    tokens = queue.num_tokens * admitted / waiting if waiting else 0.0
    # each fills its last block in part, and who is paused lacks one block
    wanted = -int(-tokens // blocks.block_tokens) + admitted + len(batcher._paused)
    wanted += running.growth(batcher._step - 1, ahead)
    slack_s, budget_s = queue.policy.slack(now)
    known = len(running) + waiting
    mean = (running.context + queue.num_tokens) / known if known else 0.0
    return Demand(max(0, wanted - blocks.num_available), waiting, slack_s, budget_s, mean)


def preempt_for(batcher: Batcher, n: int) -> int:
    """Preempts the youngest, as many as it takes to have `n` sets without requests, and says how many; never the eldest.

    Nobody where not half of the blocks to be computed again would come back as sets, or while steps under way will free
    some anyway: a set pinned by a few blocks of many is for compaction.
    """
    active, pool = batcher._active, batcher.blocks
    if batcher._flights.pending or len(active) < 2:
        return 0
    left: dict[int, int] = {}  # blocks of requests in a set
    unshared: dict[int, int] = {}  # references to a block
    emptied = blocks = worth = 0
    victims = sorted(active.values(), key=lambda seq: -seq.order)[:-1]
    for count, seq in enumerate(victims, 1):
        blocks += len(seq.blocks)
        for block in seq.blocks:
            unshared[block] = unshared.get(block, 1 + pool._shared.get(block, 0)) - 1
            if unshared[block] == 0:
                set_id = block >> SLOT_BITS
                left[set_id] = left.get(set_id, pool.num_live_in(set_id)) - 1
                emptied += left[set_id] == 0
        if 2 * emptied * pool.slots >= blocks:
            worth = count
        if emptied >= n:
            break
    for seq in victims[:worth]:
        batcher._preempt(seq)
    return worth


def offer(batcher: Batcher) -> Offer:
    """Sets it could empty by moving blocks: none while no step decodes, as a step is what moves them."""
    return batcher.compactor.offer(len(batcher._active)) if len(batcher._running) else NO_OFFER
