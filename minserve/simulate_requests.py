"""What a simulation is asked, of a workload and a configuration, and what became of it: arrivals, routes, SLOs, records."""

from collections.abc import Mapping

from minserve.config import Config
from sched.metrics import Record, Slo
from sched.router import Router, Tiers, named
from sched.simulated_prompts import Prompts
from sched.simulated_replica import Arrival
from sched.simulated_routes import Routes
from sched.simulator import Simulation
from sched.workload import Workload

OPEN = "the workload ended before it did"


def arrivals_of(workload: Workload, slos: dict[str, Slo]) -> list[Arrival]:
    return [
        Arrival(
            r.arrival_s,
            r.rid,
            r.model,
            r.prompt_tokens,
            r.output_tokens,
            slos[r.model].first_s(r.prompt_tokens) if r.ttft_slo_s is None else r.ttft_slo_s,
            slos[r.model].tpot_s if r.tpot_slo_s is None else r.tpot_slo_s,
            r.priority,
        )
        for r in workload.requests
    ]


def records_of(simulation: Simulation, workload: Workload) -> list[Record]:
    records = []
    for r in workload.requests:
        done = simulation.records[r.rid]
        error = done.error or (OPEN if done.end_s is None else None)
        records.append(
            Record(
                r.rid, r.model, r.arrival_s, done.first_s, done.end_s, r.prompt_tokens,
                r.output_tokens if done.end_s is not None else 0, r.output_tokens, error, r.ttft_slo_s, r.tpot_slo_s,
                cached_tokens=done.cached_tokens or 0,
            )
        )  # fmt: skip
    return records


def routes_of(
    config: Config, router: str, slowdown: Mapping[tuple[str, str], float], prompts: Prompts
) -> tuple[Routes, dict[str, list[str]]]:
    """What routes requests as the front end would, groups by their policy, and the models of each group."""
    settings = {g.name: g for g in config.groups}

    def make(name: str) -> Router:
        if (g := settings.get(name)) is None:
            return named(router)
        return Tiers(g.policy, g.margin, g.hysteresis, named(router))

    groups = {name: [m.name for m in config.models if m.group == name] for name in settings}
    return Routes(make, {m.name: m.tier for m in config.models}, slowdown, prompts.marks), groups


def slos_of(config: Config) -> dict[str, Slo]:
    """By model, and of a group that of its best precision."""
    found = {}
    # the best is the last to be written
    for m in sorted(config.models, key=lambda m: -m.tier):
        slo = Slo(m.slo.ttft_ms / 1000, m.slo.tpot_ms / 1000)
        found[m.name] = slo
        if m.group is not None:
            found[m.group] = slo
    return found
