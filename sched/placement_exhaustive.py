"""Every placement of a small problem with one replica a model, and the best of them.

GPUs of one kind, memory and node are the same until somebody is on them, so of those that are empty only the first are
tried: set partitions, not assignments.  `bounded` cuts what cannot become the best: a model that comes to a GPU makes
nobody on it better, so those not placed yet are taken to attain all (on the analytic estimate this holds up to the
iteration's error; the plain enumeration is there to compare with).
"""

from collections.abc import Iterator, Sequence

from sched.placement import Plan, Problem, Replica
from sched.placement_estimate import MOST_HEADROOM, Estimator, value_of
from sched.placement_search import ALL_GROUPS, Solution, options


def plans(problem: Problem, estimator: Estimator) -> Iterator[Plan]:
    """All of them, each once up to a renaming of GPUs that are the same; models that never fit are left out."""
    choices = [options(problem, i) for i in range(len(problem.models))]
    possible = [i for i, of in enumerate(choices) if any(_alone(estimator, r) for r in of)]
    yield from _extend(problem, estimator, choices, block_size(problem, choices), possible, ())


def _alone(estimator: Estimator, r: Replica) -> bool:
    return all(estimator.fits_on(g, [r]) for g in r.gpus)


def _extend(
    problem: Problem,
    estimator: Estimator,
    choices: Sequence[Sequence[Replica]],
    size: int,
    left: Sequence[int],
    plan: Plan,
) -> Iterator[Plan]:
    if not left:
        yield plan
        return
    for longer in _next(problem, estimator, choices[left[0]], size, plan):
        yield from _extend(problem, estimator, choices, size, left[1:], longer)


def _next(
    problem: Problem, estimator: Estimator, of: Sequence[Replica], size: int, plan: Plan
) -> Iterator[Plan]:
    used = {g for r in plan for g in r.gpus}
    for new in of:
        if first_of_their_kind(problem, new.gpus, used, size):
            longer = tuple(sorted((*plan, new)))
            if all(estimator.fits_on(g, [r for r in longer if g in r.gpus]) for g in new.gpus):
                yield longer


def first_of_their_kind(problem: Problem, gpus: Sequence[int], used: set[int], size: int) -> bool:
    """Of blocks of `size` GPUs where nobody is, `gpus` takes the first of their class, and of each of those the first GPUs."""
    blocks = [of[i : i + size] for of in problem.nodes.values() for i in range(0, len(of), size)]
    empty = [b for b in blocks if not used & set(b)]
    taken = [b for b in empty if set(b) & set(gpus)]
    for name in {tuple(problem.classes[g] for g in b) for b in taken}:
        alike = [b for b in empty if tuple(problem.classes[g] for g in b) == name]
        mine = [b for b in taken if b in alike]
        if mine != alike[: len(mine)]:
            return False
    return all(
        set(b[: len(set(b) & set(gpus))]) <= set(gpus)
        for b in taken
        if len({problem.classes[g] for g in b}) == 1
    )


def block_size(problem: Problem, choices: Sequence[Sequence[Replica]]) -> int:
    """GPUs that only together may be renamed: where ranks are on neighbours, as many as the largest replica has."""
    most = max((r.tp for of in choices for r in of), default=1)
    return most if any(len(of) > ALL_GROUPS for of in problem.nodes.values()) else 1


def exhaustive(problem: Problem, *, bounded: bool = False, keep: int = 1) -> Solution:
    """The best plan; `best` has the `keep` best with their values.  Models that fit nowhere are missing.

    ValueError where no placement holds all models that fit somewhere.
    """
    estimator = Estimator(problem)
    found: list[tuple[float, Plan]] = []
    seen = 0

    def offer(plan: Plan) -> None:
        found.append((-estimator(plan).value, plan))
        if len(found) > 4 * keep + 64:
            found.sort()
            del found[keep:]

    if bounded:
        seen = _branch(problem, estimator, found)
    else:
        for plan in plans(problem, estimator):
            seen += 1
            offer(plan)
    if not found:
        raise ValueError("no placement has all models: memory does not hold them, one replica each")
    found.sort()
    best = tuple((plan, -value) for value, plan in found[:keep])
    plan = best[0][0]
    missing = tuple(sorted(set(range(len(problem.models))) - {r.model for r in plan}))
    return Solution(plan, estimator(plan), missing, seen, best)


def _branch(problem: Problem, estimator: Estimator, found: list[tuple[float, Plan]]) -> int:
    """Depth first, the most demanding model first, the most promising place first."""
    choices = [options(problem, i) for i in range(len(problem.models))]
    n, rates = len(problem.models), [m.rate for m in problem.models]
    need = [m.rate * (m.prompt_tokens + m.output_tokens) * m.weight_bytes for m in problem.models]
    order = sorted(
        (i for i, of in enumerate(choices) if any(_alone(estimator, r) for r in of)),
        key=lambda i: (-need[i], i),
    )
    best, seen, size = -1.0, 0, block_size(problem, choices)

    def bound(plan: Plan) -> float:
        placed = {r.model for r in plan}
        e = estimator(plan)
        attained = [e.attained[i] if i in placed else 1.0 for i in range(n)]
        room = [e.headroom[i] if i in placed else MOST_HEADROOM for i in range(n)]
        return value_of(attained, room, rates)[0]

    def visit(depth: int, plan: Plan) -> None:
        nonlocal best, seen
        if depth == len(order):
            seen += 1
            value = estimator(plan).value
            if value > best:
                best = value
                found.append((-value, plan))
            return
        longer = [(-bound(p), p) for p in _next(problem, estimator, choices[order[depth]], size, plan)]
        for value, p in sorted(longer):
            if -value > best:
                visit(depth + 1, p)

    visit(0, ())
    return seen
