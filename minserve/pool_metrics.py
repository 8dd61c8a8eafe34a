"""The pools' part of /metrics: where every byte is, who may hold how much, and how fast memory changes hands.

Of a pool the bytes of all its models and the free ones are the pool: nothing is counted twice and nothing is left out.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from minserve.slab_counts import PLACES, ModelCounts, PoolCounts, bytes_by_place
from sched.slabs import PoolPlan

# metric, and what it is of a model's counts and layers
GAUGES: tuple[tuple[str, Callable[[ModelCounts, int], float]], ...] = (
    ("kv_sets", lambda m, layers: m.live // layers),
    ("kv_reserve_sets", lambda m, layers: m.reserve // layers),
    ("kv_demand_sets", lambda m, layers: m.status["demand"]),
)
COUNTERS: tuple[tuple[str, Callable[[ModelCounts], float]], ...] = (
    ("kv_leases_total", lambda m: m.leases),
    ("kv_returns_total", lambda m: m.returns),
    ("kv_refused_total", lambda m: m.refused),
    # sets given back because others were short, and how long each time took from the first sign to the last set
    ("kv_given_up_sets_total", lambda m: m.status["given_up"]),
    # sets emptied by moving their blocks together, for others, and the bytes that were moved
    ("kv_vacated_sets_total", lambda m: m.status["vacated"]),
    ("kv_moved_bytes_total", lambda m: m.status["moved_bytes"]),
    ("kv_reclaims_total", lambda m: m.status["reclaims"]),
    ("kv_reclaim_seconds_total", lambda m: m.status["reclaim_us"] / 1e6),
    # how often and how long prompts waited for the prefill token, and how often it was taken from a holder gone silent
    ("prefill_token_waits_total", lambda m: m.status["prefill_waits"]),
    ("prefill_token_wait_seconds_total", lambda m: m.status["prefill_wait_us"] / 1e6),
    ("prefill_token_takeovers_total", lambda m: m.status["prefill_takeovers"]),
)


class Metric(NamedTuple):
    """`rows`: labels, as (name, value) pairs, and the number."""

    name: str
    kind: str
    rows: list[tuple[tuple[tuple[str, str], ...], float]]


def pool_metrics(plans: Mapping[str, PoolPlan], pools: Mapping[str, PoolCounts | None]) -> Iterator[Metric]:
    """Pools without counts (a stopped worker sits on the lock) are left out."""
    known = {name: (plans[name], counts) for name, counts in pools.items() if counts is not None}
    for state in ("leased", "draining", "free"):
        yield Metric(f"slabs_{state}", "gauge", [(pool(n), getattr(c, state)) for n, (_, c) in known.items()])
    size = [(pool(n), float(c.mapped * p.slab_bytes)) for n, (p, c) in known.items()]
    yield Metric("kv_pool_bytes", "gauge", size)
    yield Metric("kv_free_bytes", "gauge", [(pool(n), c.free * p.slab_bytes) for n, (p, c) in known.items()])
    yield Metric("kv_table_rebuilds_total", "counter", [(pool(n), c.repairs) for n, (_, c) in known.items()])
    models = [
        ((*pool(n), ("model_name", m)), p, m, counts)
        for n, (p, c) in known.items()
        for m, counts in c.models.items()
    ]
    for place in PLACES:
        rows = [(labels, float(bytes_by_place(p, m, c)[place])) for labels, p, m, c in models]
        yield Metric(f"kv_{place}_bytes", "gauge", rows)
    for name, of in GAUGES:
        yield Metric(name, "gauge", [(labels, of(c, p.models[m].layers)) for labels, p, m, c in models])
    quotas = [(labels, p.models[m].layers, c.quota) for labels, p, m, c in models]
    yield Metric("kv_quota_sets", "gauge", [(ls, q // layers) for ls, layers, q in quotas if q is not None])
    for name, count in COUNTERS:
        yield Metric(name, "counter", [(labels, count(c)) for labels, _, _, c in models])
    yield Metric("kv_reclaim_seconds_max", "gauge", [(labels, longest(c)) for labels, _, _, c in models])


def pool(name: str) -> tuple[tuple[str, str], ...]:
    return (("pool", name),)


def longest(counts: ModelCounts) -> float:
    return counts.status["reclaim_max_us"] / 1e6
