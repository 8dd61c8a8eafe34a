"""What a Batcher lacks, and what it can do without: its side of sharing a pool.  Each costs no more than a step does."""

from typing import NamedTuple

from sched.batching import Batcher


class Demand(NamedTuple):
    """`blocks`: wanted beyond those that can be had without a lease.  `slack_s`: until the first of the new requests
    among the `waiting` must be begun; `budget_s`: what it had when it came.  `sequence_tokens`: mean of all, 0 of none.
    """

    blocks: int = 0
    waiting: int = 0
    slack_s: float = 0.0
    budget_s: float = 0.0
    sequence_tokens: float = 0.0


def demand(batcher: Batcher, now: float) -> Demand:
    """Of memory: who waits only because no more may run at once wants none yet."""
    queue, running, blocks = batcher._queue, batcher._running, batcher.blocks
    waiting, room = len(queue), batcher.limits.max_running - batcher.num_running
    admitted = min(waiting, max(0, room))
    tokens = queue.num_tokens * admitted / waiting if waiting else 0.0
    # each fills its last block in part, and who is paused lacks one block
    wanted = -int(-tokens // blocks.block_tokens) + admitted + len(batcher._paused)
    slack_s, budget_s = queue.slack(now)
    known = len(running) + waiting
    mean = (running.context + queue.num_tokens) / known if known else 0.0
    return Demand(max(0, wanted - blocks.num_available), waiting, slack_s, budget_s, mean)


def preempt_one(batcher: Batcher) -> bool:
    """Takes the blocks of the youngest, which is to be computed again; False where that would leave nobody, or while
    steps under way will free some anyway."""
    if batcher._flights.pending or len(batcher._active) < 2:
        return False
    batcher._preempt(max(batcher._active.values(), key=lambda seq: seq.order))
    return True
