"""The requests' part of /metrics: how many of each model and of each group kept their SLO, and what the router reckons with."""

from collections.abc import Iterable, Iterator

from minserve.pool_metrics import Metric
from minserve.served import Outcomes, Served, Target

# metric, without what it is counted by, and the field of Outcomes; see there
OUTCOMES = (
    ("slo_requests_total", "requests"),
    ("slo_attained_total", "attained"),
    ("slo_missed_ttft_total", "missed_ttft"),
    ("slo_missed_tpot_total", "missed_tpot"),
    ("requests_shed_total", "shed"),
    ("requests_failed_total", "failed"),
)
Labels = tuple[tuple[str, str], ...]


def request_metrics(models: Iterable[Served], groups: Iterable[Target], now: float) -> Iterator[Metric]:
    """By model, all that it answered; by group and model, what came by the group's name."""
    models, groups = list(models), list(groups)
    own: list[tuple[Labels, Outcomes]] = [((("model_name", s.entry.name),), s.outcomes) for s in models]
    of_groups: list[tuple[Labels, Outcomes]] = [
        (labels(g, name), outcomes) for g in groups for name, outcomes in g.outcomes.items()
    ]
    for name, field in OUTCOMES:
        yield Metric(name, "counter", [(ls, getattr(o, field)) for ls, o in own])
    states = [(((("model_name", s.entry.name),)), s.state(now, takes=True)) for s in models]
    # what a prediction is made of: see sched/router.py
    yield Metric("queued_prompt_tokens", "gauge", [(ls, s.queued_tokens) for ls, s in states])
    yield Metric("prompt_token_seconds", "gauge", [(ls, s.prompt_token_s) for ls, s in states])
    yield Metric("decode_step_seconds", "gauge", [(ls, s.step_s + s.decode_s * s.open) for ls, s in states])
    if groups:
        chosen = [(labels(g, name), float(n)) for g in groups for name, n in g.chosen.items()]
        yield Metric("group_chosen_total", "counter", chosen)
        for name, field in OUTCOMES:
            yield Metric(f"group_{name}", "counter", [(ls, getattr(o, field)) for ls, o in of_groups])


def labels(group: Target, model: str) -> Labels:
    return (("group", group.name), ("model_name", model))
