"""What /metrics says, in Prometheus' text format: per model what its worker last reported, per pool where its bytes are.

Counters of a worker begin again at 0 when it is restarted, as Prometheus expects of counters.  Names of models and
pools are checked where they are configured: none needs an escape here.
"""

from collections.abc import Iterable, Mapping

from minserve.host import Host
from minserve.pool_metrics import Metric, pool_metrics
from minserve.slab_counts import PoolCounts
from sched.slabs import PoolPlan

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# metric, its kind, and the field of Stats
MODEL_METRICS = (
    ("requests_running", "gauge", "running"),
    ("requests_waiting", "gauge", "waiting"),
    ("steps_total", "counter", "steps"),
    ("prompt_tokens_total", "counter", "prompt_tokens"),
    ("generation_tokens_total", "counter", "output_tokens"),
    # tokens of prompts that were looked up in the prefix cache, and that were found
    ("prefix_cache_queries_total", "counter", "prefix_queries"),
    ("prefix_cache_hits_total", "counter", "prefix_hits"),
    ("prefix_cache_blocks", "gauge", "cached_blocks"),
    # requests that lost their blocks to more urgent ones, or to another model, and are computed again
    ("preemptions_total", "counter", "preemptions"),
    # mean of |predicted / measured - 1| over the last hundred steps or so
    ("step_time_error", "gauge", "step_error"),
    # above 0, a request has waited for a compiler: warm-up has missed a kernel
    ("late_compiles_total", "counter", "late_compiles"),
)


def rendered(
    hosts: Iterable[Host],
    plans: Mapping[str, PoolPlan],
    pools: Mapping[str, PoolCounts | None],
    requests: Iterable[Metric] = (),
) -> str:
    """`pools` without counts (a stopped worker sits on the lock) are left out."""
    hosts, lines = list(hosts), []
    for name, kind, field in MODEL_METRICS:
        lines += _metric(name, kind, [((("model_name", h.name),), getattr(h.stats, field)) for h in hosts])
    ready = [((("model_name", h.name),), h.state == "ready") for h in hosts]
    lines += _metric("model_ready", "gauge", ready)
    restarts = [((("model_name", h.name),), h.restarts) for h in hosts]
    lines += _metric("worker_restarts_total", "counter", restarts)
    for metric in (*requests, *pool_metrics(plans, pools)):
        lines += _metric(metric.name, metric.kind, metric.rows)
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, rows: Iterable[tuple[tuple[tuple[str, str], ...], float]]) -> list[str]:
    return [f"# TYPE minserve:{name} {kind}", *(_row(name, labels, value) for labels, value in rows)]


def _row(name: str, labels: tuple[tuple[str, str], ...], value: float) -> str:
    shown = ",".join(f'{label}="{of}"' for label, of in labels)
    return f"minserve:{name}{{{shown}}} {int(value) if value == int(value) else f'{value:.6f}'}"
