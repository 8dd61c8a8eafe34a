"""Placing anew when rates have changed: what a change costs against what it gains.

A replica that comes to other GPUs is loaded there; one whose share of the multiprocessors changes is a worker that
restarts, since a share is fixed when a context is made, and loads its weights again.  Until it serves, its part of the
model's requests is lost.  A plan is worth what it attains over `horizon_s`, less the share of requests that the way there
loses; so where rates change little, things stay where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sched.placement import Plan, Problem, Replica
from sched.placement_estimate import Estimate, Estimator
from sched.placement_search import Score, Solution, solve


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """`start_s`: of a worker before it loads; `load_bytes_s`: of each rank; `horizon_s`: for how long the new rates hold."""

    start_s: float = 15.0
    load_bytes_s: float = 2e9
    horizon_s: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("load_bytes_s", "horizon_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if not self.start_s >= 0:
            raise ValueError(f"start_s must be seconds >= 0, got {self.start_s!r}")

    def seconds(self, problem: Problem, r: Replica) -> float:
        return self.start_s + problem.models[r.model].weight_bytes / r.tp / self.load_bytes_s


class Change(NamedTuple):
    """`what`: load, restart or remove.  `lost`: requests that come while it does not serve."""

    what: str
    replica: Replica
    seconds: float
    lost: float


def changes(
    problem: Problem, old: Sequence[Replica], new: Sequence[Replica], migration: Migration
) -> list[Change]:
    """What leads from one plan to the other.

    A model that keeps a replica loses nothing to those that are added; of those that change, each its part of the rate.
    """
    before, found = {(r.model, r.gpus): r for r in old}, []
    counts: dict[int, int] = {}
    had = {r.model for r in old}
    for r in new:
        counts[r.model] = counts.get(r.model, 0) + 1
    kept = {r.model for r in new if before.get((r.model, r.gpus)) == r}
    for r in new:
        was = before.pop((r.model, r.gpus), None)
        if was == r:
            continue
        seconds = migration.seconds(problem, r)
        part = problem.models[r.model].rate / counts[r.model]
        # requests of a model that is already served elsewhere go there until this one is ready
        lost = 0.0 if was is None and r.model in kept else part * seconds if r.model in had else 0.0
        found.append(Change("load" if was is None else "restart", r, seconds, lost))
    found += [Change("remove", r, 0.0, 0.0) for r in before.values()]
    return sorted(found, key=lambda c: (c.what, c.replica))


class Moving(Estimator):
    """An estimate less what the way from `old` costs, as a share of the requests of the horizon."""

    def __init__(self, problem: Problem, old: Plan, migration: Migration) -> None:
        super().__init__(problem)
        self.old, self.migration = old, migration
        self._asked = sum(m.rate for m in problem.models) * migration.horizon_s

    def cost(self, plan: Plan) -> float:
        lost = sum(c.lost for c in changes(self.problem, self.old, plan, self.migration))
        return lost / self._asked if self._asked > 0 else 0.0

    def __call__(self, plan: Plan) -> Estimate:
        e = super().__call__(plan)
        return Estimate(e.value - self.cost(plan), e.joint, e.worst, e.attained, e.headroom)


def replan(
    problem: Problem,
    old: Plan,
    migration: Migration | None = None,
    *,
    seed: int = 0,
    budget: int = 20_000,
    score: Score | None = None,
) -> tuple[Solution, list[Change]]:
    """The plan for the problem's rates that is worth the way from `old`, and the way.  Replicas of `old` that memory no
    longer holds, or that may not be beside others of their model, are dropped first."""
    migration = migration or Migration()
    estimator = Moving(problem, old, migration)
    start: Plan = ()
    for r in old:
        longer = tuple(sorted((*start, r)))
        if estimator.fits(longer) and problem.joins(r, start):
            start = longer
    judge = None if score is None else lambda plan: score(plan) - estimator.cost(plan)
    found = solve(problem, seed=seed, budget=budget, score=judge, starts=(start,), estimator=estimator)
    return found, changes(problem, old, found.plan, migration)
