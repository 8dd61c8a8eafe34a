"""The solver: greedy seeds, local search on the estimate, and the best few judged anew by a simulator that is handed in.

A step moves a replica, swaps two, adds or removes one, changes its degree of tensor parallelism or its share of the
multiprocessors, or makes room for a model that has none by moving another; the first that improves is taken.  Where
nothing does, the plan is kicked (a few steps at random) or ruined (one or two GPUs emptied and filled anew) and climbed
again; the walk goes on from optima that are a little worse, too.  The same seed gives the same plan: the budget counts
plans looked at, not seconds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf
from random import Random
from typing import Protocol

from sched.placement import Plan, Problem, Replica, residents
from sched.placement_estimate import Estimate, Estimator

BUDGET = 20_000
BETTER = 1e-9
KICK_STEPS = 3
WORSE = 0.03  # than where it is now: so far the walk from optimum to optimum goes down
ANEW = 5  # of so many kicks one after the other in vain, one begins elsewhere
PATIENCE, PATIENCE_EACH = (
    30,
    10,
)  # kicks in vain, and as many for each model, after which a small problem is done
KEEP = 6  # local optima that a simulator judges
TIE = 0.02  # of their scores
MISCOUNT = 1.0  # off the value for a replica more or less than a model is to have: above all that a plan may gain by it
GAIN = 0.005  # of the score, that makes a step worth taking when the simulator itself is climbed
ALL_GROUPS = 3  # up to so many GPUs of a node any of them may be ranks of a replica, else neighbours
Score = Callable[[Plan], float]


@dataclass(frozen=True, slots=True)
class Solution:
    """`missing`: models without a replica.  `best`: plans that were judged, with their scores, the best first; of those within
    TIE of the best score, the best by the estimate."""

    plan: Plan
    estimate: Estimate
    missing: tuple[int, ...]
    num_looked_at: int
    best: tuple[tuple[Plan, float], ...] = ()


def groups_of(problem: Problem, tp: int) -> list[tuple[int, ...]]:
    """GPUs of one node that `tp` ranks may be on."""
    found: list[tuple[int, ...]] = []
    for gpus in problem.nodes.values():
        if len(gpus) <= ALL_GROUPS or tp == 1:
            found += combinations(gpus, tp)
        else:
            found += (gpus[i : i + tp] for i in range(0, len(gpus) - tp + 1, tp))
    return found


def options(problem: Problem, model: int) -> list[Replica]:
    """Every replica that the model could have."""
    m, found = problem.models[model], []
    degrees = sorted({tp for gpu in problem.gpus for tp in m.degrees(gpu.kind)})
    numbers = {gpu.name: i for i, gpu in enumerate(problem.gpus)}
    pinned = {tuple(numbers[name] for name in place) for place in m.places}
    for tp in degrees:
        for gpus in sorted(pinned) if pinned else groups_of(problem, tp):
            if len(gpus) != tp:
                continue
            shares = [m.shares(problem.gpus[g].kind, tp) for g in gpus]
            found += [Replica(model, gpus, sm) for sm in shares[0] if all(sm in of for of in shares)]
    return found


class Judge(Protocol):
    """What a plan is worth, and whether memory holds those on a GPU."""

    def __call__(self, plan: Plan) -> Estimate: ...
    def fits(self, plan: Plan) -> bool: ...
    def fits_on(self, gpu: int, on: Sequence[Replica]) -> bool: ...


class Search:
    """One search, on one estimator, with one source of chance."""

    def __init__(self, problem: Problem, estimator: Judge, seed: int, budget: int) -> None:
        self.problem, self.estimator, self.budget = problem, estimator, budget
        self.rng = Random(seed)
        self.options = [options(problem, i) for i in range(len(problem.models))]
        self.allowed = [set(of) for of in self.options]
        self.counted = {i: m.counted for i, m in enumerate(problem.models) if m.counted is not None}
        self.num_looked_at = 0
        self.optima: dict[Plan, float] = {}

    # -- values

    def value(self, plan: Plan) -> float:
        self.num_looked_at += 1
        return self.worth(plan, self.estimator(plan))

    def worth(self, plan: Plan, estimate: Estimate) -> float:
        return estimate.value - MISCOUNT * self.miscount(plan)

    def miscount(self, plan: Plan) -> int:
        """Replicas too few and too many, of models that are to have a number of them."""
        return sum(abs(n - sum(r.model == i for r in plan)) for i, n in self.counted.items())

    def lacks(self, model: int, plan: Sequence[Replica]) -> int:
        """Replicas that it is to have and has not: one of a model whose number is free."""
        return max(0, self.counted.get(model, 1) - sum(r.model == model for r in plan))

    @property
    def spent(self) -> bool:
        return self.num_looked_at >= self.budget

    def add(self, plan: Plan, new: Replica, without: Replica | None = None) -> Plan | None:
        """The plan with a replica more (and one less), or None where memory does not hold it or its model is there."""
        rest = [r for r in plan if r is not without]
        if not self.problem.joins(new, rest):
            return None
        for g in new.gpus:
            on = sorted([*(r for r in rest if g in r.gpus), new])
            if sum(r.model == new.model for r in on) > 1 or not self.estimator.fits_on(g, on):
                return None
        return tuple(sorted([*rest, new]))

    # -- seeds

    def seeds(self) -> Iterator[Plan]:
        """Greedy plans: models by need, each where the estimate is best; and wherever memory is left, which is surer to fit."""
        models, n = self.problem.models, len(self.problem.models)
        size = [min(m.fixed_bytes(1), m.fixed_bytes(8)) + m.reserve_bytes(1) for m in models]
        work = [m.rate * (m.prompt_tokens + m.output_tokens) * m.weight_bytes for m in models]
        by_size = sorted(range(n), key=lambda i: (-size[i], i))
        by_work = sorted(range(n), key=lambda i: (-work[i], i))
        yield self.greedy(by_size, roomiest=True)
        yield self.greedy(by_work)
        yield self.greedy(by_size)
        if any(r.tp > 1 for of in self.options for r in of):
            yield self.greedy(by_work, lean=True)

    def greedy(
        self, order: Sequence[int], plan: Plan = (), *, roomiest: bool = False, lean: bool = False
    ) -> Plan:
        """The plan with what these models lack in it.  `lean`: with the fewest ranks for which there is memory."""
        for i in order:
            for _ in range(self.lacks(i, plan)):
                room = [(new, p) for new in self.options[i] if (p := self.add(plan, new)) is not None]
                least = min((new.tp for new, _ in room), default=1)
                fitting = [p for new, p in room if not lean or new.tp == least]
                if fitting:
                    plan = max(fitting, key=self.room if roomiest else self.value)
        return plan

    def room(self, plan: Plan) -> float:
        """Bytes that the fullest GPU has left."""
        used = [
            sum(
                m.fixed_bytes(r.tp) + m.reserve_bytes(r.tp)
                for r in on
                for m in [self.problem.models[r.model]]
            )
            for on in residents(self.problem, plan)
        ]
        return min(g.memory_bytes - u for g, u in zip(self.problem.gpus, used, strict=True))

    # -- steps

    def steps(self, plan: Plan, estimate: Estimate) -> Iterator[Plan]:
        """Neighbours, those first that change what is worst off."""
        for i in range(len(self.problem.models)):
            if self.lacks(i, plan):
                yield from self.entering(plan, i)
        jitter = [self.rng.random() * 0.05 for _ in plan]
        order = sorted(range(len(plan)), key=lambda k: estimate.attained[plan[k].model] + jitter[k])
        replicas = [plan[k] for k in order]
        for r in replicas:
            yield from self.changed(plan, r)
            yield from self.swapped(plan, r, replicas)
            yield from self.numbered(plan, r)
            if self.problem.alike:
                yield from self.reshaped(plan, r)

    def changed(self, plan: Plan, r: Replica) -> Iterator[Plan]:
        """Elsewhere, with another degree or share."""
        for new in self.shuffled(self.options[r.model]):
            if new != r and (found := self.add(plan, new, r)) is not None:
                yield found

    def swapped(self, plan: Plan, r: Replica, others: Sequence[Replica]) -> Iterator[Plan]:
        for o in others:
            if o.model <= r.model or o.gpus == r.gpus or set(o.gpus) & set(r.gpus):
                continue
            if r.tp == o.tp:
                pair = Replica(r.model, o.gpus, r.sm), Replica(o.model, r.gpus, o.sm)
                if (found := self.both(plan, (r, o), pair)) is not None:
                    yield found

    def both(self, plan: Plan, old: tuple[Replica, Replica], new: tuple[Replica, Replica]) -> Plan | None:
        if any(n not in self.allowed[n.model] for n in new):
            return None
        rest = [r for r in plan if r not in old]
        if not all(self.problem.joins(n, rest) for n in new):
            return None
        found = tuple(sorted([*rest, *new]))
        for g in {*new[0].gpus, *new[1].gpus}:
            on = [r for r in found if g in r.gpus]
            if len({r.model for r in on}) != len(on) or not self.estimator.fits_on(g, on):
                return None
        return found

    def numbered(self, plan: Plan, r: Replica) -> Iterator[Plan]:
        """One replica of the model more, or this one less."""
        count = sum(o.model == r.model for o in plan)
        if count > self.counted.get(r.model, 1):
            yield tuple(o for o in plan if o is not r)
        if r.model not in self.counted and count < self.problem.max_replicas:
            for new in self.shuffled(self.options[r.model]):
                if (found := self.add(plan, new)) is not None:
                    yield found

    def reshaped(self, plan: Plan, r: Replica) -> Iterator[Plan]:
        """All replicas of the model with another degree or share, as many as there were or are to be."""
        mine = [o for o in plan if o.model == r.model]
        # of one alone it is a change, and the first of several stands for all
        if len(mine) < 2 or r != mine[0]:
            return
        rest = tuple(o for o in plan if o.model != r.model)
        for tp, sm in sorted({(o.tp, o.sm) for o in self.options[r.model]} - {(r.tp, r.sm)}):
            found, wanted = rest, self.counted.get(r.model, len(mine))
            for new in self.shuffled([o for o in self.options[r.model] if (o.tp, o.sm) == (tp, sm)]):
                longer = self.add(found, new) if len(found) < len(rest) + wanted else None
                found = longer if longer is not None else found
            if len(found) > len(rest):
                yield found

    def entering(self, plan: Plan, model: int) -> Iterator[Plan]:
        """The model where there is room, or where there is once another has moved."""
        for new in self.shuffled(self.options[model]):
            if (found := self.add(plan, new)) is not None:
                yield found
                continue
            for r in plan:
                if set(r.gpus) & set(new.gpus):
                    for other in self.options[r.model]:
                        if set(other.gpus) & set(new.gpus):
                            continue
                        moved = self.add(plan, other, r)
                        if moved is not None and (found := self.add(moved, new)) is not None:
                            yield found

    def shuffled(self, of: Sequence[Replica]) -> list[Replica]:
        found = list(of)
        self.rng.shuffle(found)
        return found

    # -- search

    def climb(self, plan: Plan) -> tuple[Plan, float]:
        """To where no step improves, or the budget ends."""
        estimate = self.estimator(plan)
        value = self.worth(plan, estimate)
        while not self.spent:
            for candidate in self.steps(plan, estimate):
                found = self.value(candidate)
                if found > value + BETTER:
                    plan, value, estimate = candidate, found, self.estimator(candidate)
                    break
                if self.spent:
                    break
            else:
                break
        self.optima[plan] = value
        return plan, value

    def polish(self, plan: Plan, value: float, score: Score, runs: int) -> list[tuple[Plan, float]]:
        """Climbs on by `score` itself, at most `runs` times asked; the best first.  Neighbours in the order of their estimates:
        what the formulas take for good, though they are wrong about how good."""
        found, seen = [(plan, value)], {plan}
        while runs > 0:
            near = [p for p in self.steps(plan, self.estimator(plan)) if p not in seen]
            near = sorted(set(near), key=lambda p: (-self.estimator(p).joint, p))
            for candidate in near[:runs]:
                runs -= 1
                seen.add(candidate)
                if (scored := score(candidate)) > value + GAIN:
                    plan, value = candidate, scored
                    found.insert(0, (plan, value))
                    break
            else:
                break
        return found

    def kick(self, plan: Plan) -> Plan:
        for _ in range(KICK_STEPS):
            if not plan:
                break
            r = plan[self.rng.randrange(len(plan))]
            new = next(iter(self.changed(plan, r)), None)
            plan = new if new is not None else plan
        return plan

    def ruined(self, plan: Plan) -> Plan:
        """One or two GPUs are emptied, and who was there is placed anew, in an order by chance."""
        used = sorted({g for r in plan for g in r.gpus})
        if not used:
            return plan
        empty = set(self.rng.sample(used, min(len(used), self.rng.randint(1, 2))))
        rest = tuple(r for r in plan if not empty & set(r.gpus))
        gone = {r.model for r in plan} - {r.model for r in rest}
        short = sorted(gone | {i for i in self.counted if self.lacks(i, rest)})
        return self.greedy(self.rng.sample(short, len(short)), rest)

    def anew(self) -> Plan:
        """A greedy plan, the models in an order by chance."""
        n = len(self.problem.models)
        return self.greedy(self.rng.sample(range(n), n), lean=self.rng.random() < 0.5)

    def run(self, starts: Iterable[Plan]) -> None:
        best, value = None, -inf
        for start in starts:
            plan, found = self.climb(start)
            if found > value:
                best, value = plan, found
        vain, most = 0, PATIENCE + PATIENCE_EACH * len(self.problem.models)
        at, level = best, value
        while best and at and not self.spent and vain < most:
            turn = (vain + 1) % ANEW
            start = self.anew() if not turn else self.ruined(at) if turn % 2 else self.kick(at)
            plan, found = self.climb(start)
            if found > level - WORSE:
                at, level = plan, found
            vain = 0 if found > value + BETTER else vain + 1
            if found > value - BETTER:
                best, value = plan, found


def solve(
    problem: Problem,
    *,
    seed: int = 0,
    budget: int = BUDGET,
    score: Score | None = None,
    keep: int = KEEP,
    refine: int = 0,
    starts: Sequence[Plan] = (),
    estimator: Judge | None = None,
) -> Solution:
    """The best plan found.  `score` (more is better) judges the best `keep` of the search, and `refine` plans more on the way
    from the best of them by steps that `score` finds better; `starts`: plans to climb from, too; `estimator`: what is
    maximised, by default the attainment of `Estimator`.  A `budget` of 0 looks at greedy plans alone."""
    estimator = estimator or Estimator(problem)
    search = Search(problem, estimator, seed, budget)
    given = [*starts, *search.seeds()]
    search.run(given)
    for plan in given:
        if estimator.fits(plan):
            search.optima.setdefault(plan, search.worth(plan, estimator(plan)))
    ranked = sorted(search.optima.items(), key=lambda pair: (search.miscount(pair[0]), -pair[1], pair[0]))
    judged: tuple[tuple[Plan, float], ...] = ()
    if score is not None:
        # a simulator knows nothing of how many replicas there are to be
        least = search.miscount(ranked[0][0])
        few = [plan for plan, _ in ranked if search.miscount(plan) == least][:keep]
        judged = tuple(sorted(((plan, score(plan)) for plan in few), key=lambda pair: -pair[1]))
        better = search.polish(*judged[0], score, refine)[:-1] if judged else []
        # a run of some minutes tells no more than this apart; the estimate does
        equal = {plan for plan, value in judged if value >= judged[0][1] - TIE}
        tied = sorted(
            judged, key=lambda p: (p[0] not in equal, -search.optima[p[0]] if p[0] in equal else -p[1])
        )
        judged = (*better, *tied)
    plan = judged[0][0] if judged else ranked[0][0]
    missing = tuple(sorted(set(range(len(problem.models))) - {r.model for r in plan}))
    return Solution(plan, estimator(plan), missing, search.num_looked_at, judged)
