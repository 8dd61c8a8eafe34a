"""What does not fit, why, and the smallest change that would make it fit: each found by solving the changed problem.

A model does not fit where it has no replica, or fewer than it is to have, or where less than the target of its requests
would attain: in the simulator where there is one, else by the estimate.  Changes, which the estimate judges, that
are tried: fewer requests of it, more memory on every GPU, more GPUs, keys and values of 8 or 4 bits, and a looser SLO.
A change counts if the model then reaches the target and no other falls below it that had reached it.  The smallest is
the one that changes its quantity by the smallest part: requests of its rate, bytes of all bytes, GPUs of all GPUs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from sched.placement import Gpu, Model, Plan, Problem, Replica, lacking
from sched.placement_estimate import Estimator
from sched.placement_search import Search, options, solve

BUDGET = 1500  # of each solve, which begins at the plan that is there
STEPS = 6  # of a bisection
MOST_GPUS = 4
MOST_MEMORY = 4.0  # times what there is
LOOSER = 8.0
GB = 1e9
UNSEEN = "the estimate, which is coarse in bursts and knows no policy, sees no reason"
Shares = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Change:
    """`size`: the part by which its quantity changes; `words`: for people."""

    what: str
    size: float
    words: str


@dataclass(frozen=True, slots=True)
class Shortfall:
    """`attained` by the plan, `reason` in words, and the `changes` that help, the smallest first; None where none was tried.
    `replicas`: how many it has and is to have, where it has fewer.  `attained` is by the estimate, `simulated` what the
    simulator says, None without one; `unseen`: it alone finds the model short, so there is no change that could be judged."""

    model: str
    attained: float
    reason: str
    changes: tuple[Change, ...] | None
    replicas: tuple[int, int] | None = None
    simulated: float | None = None
    unseen: bool = False


def said(problem: Problem, plan: Plan, simulated: Shares | None) -> list[float]:
    """By model what it attains: simulated, or by the estimate where it was not asked in the simulator."""
    estimated = Estimator(problem)(plan).attained
    return [
        e if s is None else s for e, s in zip(estimated, simulated or [None] * len(estimated), strict=True)
    ]


def doubted(problem: Problem, plan: Plan, simulated: Shares) -> list[int]:
    """Models that the estimate alone calls short."""
    return sorted(set(short(problem, plan)) - set(short(problem, plan, simulated)))


def short(problem: Problem, plan: Plan, simulated: Shares | None = None) -> list[int]:
    """Models below the target or with too few replicas, the worst first."""
    attained, fewer = said(problem, plan, simulated), lacking(problem, plan)
    found = [
        i
        for i, m in enumerate(problem.models)
        if i in fewer or (attained[i] < problem.target and (m.rate > 0 or not attained[i]))
    ]
    return sorted(found, key=lambda i: (attained[i], i))


def shortfalls(
    problem: Problem, plan: Plan, *, seed: int = 0, most: int = 8, simulated: Shares | None = None
) -> list[Shortfall]:
    """Of the worst `most` models with changes, of the others with the reason alone."""
    attained, fewer = Estimator(problem)(plan).attained, lacking(problem, plan)
    by_estimate = short(problem, plan)
    found = []
    for i in short(problem, plan, simulated):
        name, figure = problem.models[i].name, simulated[i] if simulated is not None else None
        if i not in by_estimate:
            found.append(Shortfall(name, attained[i], UNSEEN, None, simulated=figure, unseen=True))
            continue
        tried = None
        if most > 0:
            tried, most = tuple(sorted(_changes(problem, plan, i, seed), key=lambda c: c.size)), most - 1
        found.append(Shortfall(name, attained[i], reason(problem, plan, i), tried, fewer.get(i), figure))
    return found


def alone(problem: Problem, model: int) -> tuple[Replica | None, float]:
    """The best single replica with all GPUs to itself and hardly asked, and what it attains; None where none fits."""
    quiet = replace(problem, models=tuple(replace(m, rate=1e-6) for m in problem.models))
    estimator = Estimator(quiet)
    fitting = [r for r in options(quiet, model) if estimator.fits((r,))]
    best = max(fitting, key=lambda r: estimator((r,)).attained[model], default=None)
    return best, estimator((best,)).attained[model] if best else 0.0


def reason(problem: Problem, plan: Plan, model: int) -> str:
    m = problem.models[model]
    best, attained = alone(problem, model)
    mine = [r for r in plan if r.model == model]
    if mine and model in lacking(problem, plan):
        return _too_few(problem, mine)
    if best is None:
        tps = sorted({r.tp for r in options(problem, model)}) or [1]
        need = min(m.fixed_bytes(tp) + m.max_len * m.kv_bytes(tp) for tp in tps)
        return (
            f"no GPU holds it: {need / GB:.1f} GB a GPU for weights, work space and its longest sequence with tp "
            f"{' or '.join(map(str, tps))}, the largest has {max(g.memory_bytes for g in problem.gpus) / GB:.1f} GB"
        )
    if attained < problem.target:
        return (
            f"its SLO is too tight: alone on {_names(problem, best)} {attained:.0%} of its requests attain it"
        )
    if not mine:
        return "memory: beside the others no GPU holds its weights and reserve"
    predicted = Estimator(problem).by_replica(plan)
    worst = min((predicted[r] for r in mine), key=lambda p: p.attained)
    if worst.headroom < 1:
        words = {
            "memory": "keys and values of its requests fill what the pool leaves it",
            "tpot": "a batch that its rate needs is too slow for its TPOT",
            "sequences": "max_running bounds its batch below what its rate needs",
            "compute": "its share of the time is too small for its rate",
        }
        return f"{worst.bound}: {words[worst.bound]}; {worst.headroom:.0%} of the rate could be served"
    if worst.ttft_attained < worst.tpot_attained:
        return f"TTFT: prompts wait for others, {worst.ttft_attained:.0%} of first tokens come in time"
    return f"TPOT: steps beside its neighbours are slow, {worst.tpot_attained:.0%} of answers keep it"


def _too_few(problem: Problem, mine: Sequence[Replica]) -> str:
    number = mine[0].model
    m, taken = problem.models[number], [tuple(problem.gpus[g].name for g in r.gpus) for r in mine]
    most = len(Search(problem, Estimator(problem), 0, 0).greedy((number,), lean=True))
    if most < (m.counted or 1):
        return f"even alone it has room for no more than {most}: no two replicas of a model are on one GPU"
    where = [" + ".join(place) for place in m.places if place not in taken] or ["any other GPU"]
    return f"memory: beside the others there is no room on {', '.join(where)}"


def _names(problem: Problem, r: Replica) -> str:
    return "+".join(problem.gpus[g].name for g in r.gpus)


def _changes(problem: Problem, plan: Plan, model: int, seed: int) -> Iterator[Change]:
    before = Estimator(problem)(plan).attained
    good = [i for i, a in enumerate(before) if a >= problem.target]
    fewer = lacking(problem, plan).keys() - {model}
    m, total = problem.models[model], sum(g.memory_bytes for g in problem.gpus)

    def helps(changed: Problem) -> bool:
        estimator = Estimator(changed)
        start = tuple(r for r in plan if r.model < len(changed.models))
        starts = (start,) if estimator.fits(start) else ()
        found = solve(changed, seed=seed, budget=BUDGET, starts=starts)
        attained = found.estimate.attained
        return (
            all(attained[i] >= problem.target for i in (*good, model))
            and lacking(changed, found.plan).keys() <= fewer
        )

    def with_model(**given: float) -> Problem:
        models = [replace(o, **given) if i == model else o for i, o in enumerate(problem.models)]  # type: ignore[arg-type]
        return replace(problem, models=tuple(models))

    part = _least(lambda x: helps(with_model(rate=m.rate * (1 - x))), 0.99) if m.rate > 0 else None
    if part is not None:
        yield Change("rate", part, f"{m.rate * (1 - part):.3g} requests/s in place of {m.rate:.3g}")
    more = _least(lambda x: helps(_larger(problem, x)), MOST_MEMORY - 1)
    if more is not None:
        each = more * total / len(problem.gpus)
        yield Change("memory", more, f"{each / GB:.1f} GB more on each GPU")
    for n in range(1, MOST_GPUS + 1):
        if helps(_wider(problem, n)):
            yield Change(
                "gpus",
                n / len(problem.gpus),
                f"{n} more GPU{'s' if n > 1 else ''} like {problem.gpus[-1].name}",
            )
            break
    for part, words in ((0.5, "half"), (0.25, "a quarter of")):
        if helps(with_model(kv_token_bytes=m.kv_token_bytes * part)):
            yield Change("kv", 1 - part, f"keys and values in {words} the bits they have now")
            break
    slower = _least(lambda x: helps(with_model(**_loose(m, 1 + x))), LOOSER - 1)
    if slower is not None:
        yield Change("slo", slower, f"an SLO {1 + slower:.2g} times as long")


def _least(works: Callable[[float], bool], most: float) -> float | None:
    """The least x in (0, most] that works, to a few per cent; None where `most` does not."""
    if not works(most):
        return None
    low, high = 0.0, most
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def _larger(problem: Problem, part: float) -> Problem:
    extra = part * sum(g.memory_bytes for g in problem.gpus) / len(problem.gpus)
    return replace(problem, gpus=tuple(replace(g, memory_bytes=g.memory_bytes + extra) for g in problem.gpus))


def _wider(problem: Problem, n: int) -> Problem:
    last = problem.gpus[-1]
    names = {g.name for g in problem.gpus}
    new = [f"{last.name}+{k}" for k in range(1, n + 1)]
    assert not names & set(new)
    return replace(
        problem, gpus=(*problem.gpus, *(Gpu(name, last.memory_bytes, last.kind, last.node) for name in new))
    )


def _loose(m: Model, factor: float) -> dict[str, float]:
    return {
        "ttft_s": m.ttft_s * factor,
        "ttft_per_token_s": m.ttft_per_token_s * factor,
        "tpot_s": m.tpot_s * factor,
    }
