"""What a slab table counts, as values to show: every slab of a pool is in exactly one of these places.  No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from minserve.slab_words import (
    R_DRAINING,
    R_LEASES,
    R_LIVE,
    R_REFUSED,
    R_RESERVE,
    R_RETURNS,
    R_STATUS,
    STATUS,
)
from sched.slabs import PoolPlan

# where the bytes of a model's slabs are
PLACES = ("live", "prefix", "partial", "tail", "draining")


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """Slabs a model holds now and is guaranteed, and how often it leased, returned and was refused.

    `quota`: slabs it may hold while others are short; None: there are no quotas.  `status`: what its worker said last.
    """

    live: int
    draining: int
    reserve: int
    leases: int
    returns: int
    refused: int
    quota: int | None
    status: dict[str, int]


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """A pool in slabs: mapped = leased + draining + free; those that are away have no memory.  `repairs` counts rebuilds after a holder died in a change."""

    mapped: int
    leased: int
    draining: int
    free: int
    leases: int
    refused: int
    repairs: int
    liveness_holder: str | None
    models: dict[str, ModelCounts]


def count_pool(
    plan: PoolPlan,
    rows: Sequence[Sequence[int]],
    quotas: Sequence[int | None],
    whole: tuple[int, int, str | None],
) -> PoolCounts:
    """From the rows of a table, read together; `whole`: free slabs, repairs, and who holds the liveness reserve."""
    free, repairs, holder = whole
    models = {
        name: ModelCounts(
            row[R_LIVE], row[R_DRAINING], max(0, row[R_RESERVE]), row[R_LEASES], row[R_RETURNS], row[R_REFUSED],
            quota, dict(zip(STATUS, row[R_STATUS:], strict=False)),
        )
        for name, row, quota in zip(plan.models, rows, quotas, strict=True)
    }  # fmt: skip
    leased, draining = (sum(getattr(m, what) for m in models.values()) for what in ("live", "draining"))
    leases, refused = (sum(getattr(m, what) for m in models.values()) for what in ("leases", "refused"))
    mapped = leased + draining + free
    return PoolCounts(mapped, leased, draining, free, leases, refused, repairs, holder, models)


def bytes_by_place(plan: PoolPlan, name: str, counts: ModelCounts) -> dict[str, int]:
    """Where the bytes of a model's slabs are, by PLACES; together they are all its slabs.

    live: blocks of requests; prefix: cached blocks that no request refers to; partial: free slots of its sets; tail:
    what no slot covers.  A worker publishes its blocks once a step, so in the middle of one they may be a step old.
    """
    shape = plan.models[name]
    block = sum(group.layers * group.block_bytes for group in shape.groups)
    slots = counts.live // shape.layers * shape.slots
    live = min(slots, max(0, counts.status["live_blocks"]))
    prefix = min(slots - live, max(0, counts.status["cached_blocks"]))
    return {
        "live": live * block,
        "prefix": prefix * block,
        "partial": (slots - live - prefix) * block,
        "tail": counts.live * plan.slab_bytes - slots * block,
        "draining": counts.draining * plan.slab_bytes,
    }
