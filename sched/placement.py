"""What is to be placed, on what, and what a placement is: frozen values that solver, baselines and benches share.

A model runs as replicas; a replica is on one GPU, or on `tp` GPUs of one node (tensor parallel: each rank holds 1 / tp of
the weights and the keys and values of its heads).  A GPU's memory holds the weights and the work space of all that are
on it; the rest is one pool of keys and values, of which each keeps a reserve.  Bytes, seconds, requests a second.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sched.latency import StepCost
from sched.step import Chunk

WHOLE = 100  # per cent of the multiprocessors
MAX_TP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a model needs and is asked for.

    `costs`: by kind of GPU, then by (tp, per cent of its multiprocessors).  `kv_token_bytes`: of all heads, in all layers;
    `work_bytes`: activations and graphs of a rank.  `prompt_cv`, `output_cv`: standard deviation over mean of the tokens;
    `burst`: coefficient of variation of the gaps between requests, 1 is Poisson's.  The first token is due within
    `ttft_s + ttft_per_token_s x prompt tokens`.  `policy`, `policy_options`: of its Batcher, a name of
    POLICIES of sched/policies.py.  `replicas` and `tp`: as many as that, None is free.  `places`: the GPUs of
    each replica, where they are not to be chosen.
    """

    name: str
    weight_bytes: float
    kv_token_bytes: float
    costs: Mapping[str, Mapping[tuple[int, int], StepCost]]
    rate: float
    prompt_tokens: float
    output_tokens: float
    ttft_s: float
    tpot_s: float
    ttft_per_token_s: float = 0.0
    prompt_cv: float = 0.53
    output_cv: float = 1.29
    burst: float = 1.0
    work_bytes: float = 0.0
    kv_heads: int = 8
    layers: int = 32
    reserve_tokens: int = 8192
    max_len: int = 8192
    max_running: int = 256
    max_step_tokens: int = 2048
    block_tokens: int = 32
    policy: str = "slack"
    policy_options: tuple[tuple[str, bool | int | float | str], ...] = ()
    replicas: int | None = None
    tp: int | None = None
    places: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("weight_bytes", 0), ("kv_token_bytes", 0), ("rate", 0), ("prompt_tokens", 1), ("output_tokens", 1)):  # fmt: skip
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"model {self.name!r}: {name} must be a number >= {least}, got {getattr(self, name)!r}"
                )
        for name in ("ttft_s", "tpot_s", "burst"):
            if not getattr(self, name) > 0:
                raise ValueError(f"model {self.name!r}: {name} must be above 0, got {getattr(self, name)!r}")
        if not any(self.costs.values()):
            raise ValueError(f"model {self.name!r} needs the costs of a step on at least one kind of GPU")

    @property
    def counted(self) -> int | None:
        """Replicas that it is to have, None where that is free: one at least."""
        return self.replicas or len(self.places) or None

    def kv_bytes(self, tp: int) -> float:
        """Of a token, on one of `tp` ranks: a rank keeps whole heads, at least one."""
        return self.kv_token_bytes / min(tp, self.kv_heads)

    def fixed_bytes(self, tp: int) -> float:
        """Weights and work space of a rank."""
        return self.weight_bytes / tp + self.work_bytes

    def reserve_bytes(self, tp: int) -> float:
        return min(self.reserve_tokens, self.max_len) * self.kv_bytes(tp)

    def degrees(self, kind: str) -> list[int]:
        """The degrees of tensor parallelism with known costs on a kind of GPU."""
        found = sorted({tp for tp, _ in self.costs.get(kind, {})})
        return [tp for tp in found if self.tp in (None, tp)]

    def shares(self, kind: str, tp: int) -> list[int]:
        """Per cents of the multiprocessors with known costs, the largest first."""
        return sorted((sm for t, sm in self.costs.get(kind, {}) if t == tp), reverse=True)

    def due_s(self, prompt_tokens: float) -> float:
        return self.ttft_s + self.ttft_per_token_s * prompt_tokens


@dataclass(frozen=True, slots=True)
class Gpu:
    """`memory_bytes`: what weights, work space and keys and values may take together; `apart`: what keys and values may take,
    weights lie elsewhere."""

    name: str
    memory_bytes: float
    kind: str = "h100"
    node: str = "local"
    apart: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Replica:
    """Model number `model` on the GPUs of these numbers (in order), a rank each, with `sm` per cent of each."""

    model: int
    gpus: tuple[int, ...]
    sm: int = WHOLE

    @property
    def tp(self) -> int:
        return len(self.gpus)


Plan = tuple[Replica, ...]  # sorted, so that equal plans are equal


@dataclass(frozen=True, slots=True)
class Problem:
    """`max_replicas` of a model; `target`: the attainment below which a model is reported as not fitting; `beside`: what a
    step takes longer beside a busy neighbour, as a part of itself: 1 where two have half of the time each; `alike`: replicas
    of a model must have one degree and one share, as a configuration file has no more."""

    models: tuple[Model, ...]
    gpus: tuple[Gpu, ...]
    max_replicas: int = 4
    target: float = 0.9
    beside: float = 1.0
    alike: bool = False
    classes: tuple[tuple[str, float, str, bool], ...] = field(init=False)

    def __post_init__(self) -> None:
        for what, names in (
            ("models", [m.name for m in self.models]),
            ("GPUs", [g.name for g in self.gpus]),
        ):
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{what} need different names, and one at least, got {names}")
        if self.max_replicas < 1:
            raise ValueError(f"max_replicas must be at least 1, got {self.max_replicas}")
        kinds = {g.kind for g in self.gpus}
        for m in self.models:
            if not any(m.degrees(kind) for kind in kinds):
                known = {kind: sorted(costs) for kind, costs in m.costs.items()}
                raise ValueError(
                    f"model {m.name!r} has no costs for tp={m.tp or 'any'} on {sorted(kinds)}, but {known}"
                )
        object.__setattr__(
            self, "classes", tuple((g.kind, g.memory_bytes, g.node, g.apart) for g in self.gpus)
        )

    @property
    def nodes(self) -> dict[str, tuple[int, ...]]:
        """Numbers of the GPUs of each node."""
        found: dict[str, list[int]] = {}
        for i, gpu in enumerate(self.gpus):
            found.setdefault(gpu.node, []).append(i)
        return {node: tuple(of) for node, of in found.items()}

    def with_rates(self, rates: Mapping[str, float]) -> "Problem":
        """The same with other rates; models that are not named keep theirs."""
        if unknown := rates.keys() - {m.name for m in self.models}:
            raise ValueError(f"rates name {sorted(unknown)}; the models are {[m.name for m in self.models]}")
        return replace(self, models=tuple(replace(m, rate=rates.get(m.name, m.rate)) for m in self.models))

    def joins(self, new: Replica, rest: Iterable[Replica]) -> bool:
        """Whether a replica may be beside those of its model."""
        return not self.alike or all((r.tp, r.sm) == (new.tp, new.sm) for r in rest if r.model == new.model)

    def cost(self, r: Replica) -> StepCost:
        """Of a step of the replica; on GPUs of several kinds that of the slowest."""
        model = self.models[r.model]
        found = [model.costs[kind][r.tp, r.sm] for kind in dict.fromkeys(self.gpus[g].kind for g in r.gpus)]
        return max(found, key=lambda c: c.decode_s(1, 0))


def use_of(problem: Problem, r: Replica) -> tuple[float, float]:
    """The part of its GPUs that a decode and a prompt of the replica keep busy: what each takes with all multiprocessors, over
    what it takes with its own.  Decodes reach the bandwidth with some of them, so they leave nothing; prompts do."""
    kinds = {problem.gpus[g].kind for g in r.gpus}
    known = all((r.tp, WHOLE) in problem.models[r.model].costs[kind] for kind in kinds)
    if r.sm == WHOLE or not known:
        return 1.0, 1.0
    whole, own = problem.cost(replace(r, sm=WHOLE)), problem.cost(r)
    decodes, context = 8, 8 * 512
    prompt = [Chunk(0, 0, 512, True)]
    decode = whole.decode_s(decodes, context) / own.decode_s(decodes, context)
    return min(1.0, decode), min(1.0, whole.step_s(0, 0, prompt) / own.step_s(0, 0, prompt))


def residents(problem: Problem, plan: Sequence[Replica]) -> list[list[Replica]]:
    """By GPU, who is on it."""
    found: list[list[Replica]] = [[] for _ in problem.gpus]
    for r in plan:
        for g in r.gpus:
            found[g].append(r)
    return found


def lacking(problem: Problem, plan: Sequence[Replica]) -> dict[int, tuple[int, int]]:
    """Models that are to have a number of replicas and have fewer: (how many they have, how many they are to have)."""
    found = {}
    for i, m in enumerate(problem.models):
        if m.counted is not None and (has := sum(r.model == i for r in plan)) < m.counted:
            found[i] = has, m.counted
    return found


def pool_bytes(problem: Problem, gpu: int, on: Sequence[Replica]) -> float:
    """What weights and work space of those on the GPU leave of its memory; may be negative."""
    if problem.gpus[gpu].apart:
        return problem.gpus[gpu].memory_bytes
    used = sum(problem.models[r.model].fixed_bytes(r.tp) for r in on)
    return problem.gpus[gpu].memory_bytes - used


def reserved_bytes(problem: Problem, on: Sequence[Replica]) -> float:
    """Reserves, and what one of them at a time may borrow to end its longest sequence."""
    models = [(problem.models[r.model], r.tp) for r in on]
    lent = max((m.max_len * m.kv_bytes(tp) - m.reserve_bytes(tp) for m, tp in models), default=0.0)
    return sum(m.reserve_bytes(tp) for m, tp in models) + max(lent, 0.0)


def fits(problem: Problem, gpu: int, on: Sequence[Replica]) -> bool:
    """Weights, work space and reserves of those on the GPU."""
    return pool_bytes(problem, gpu, on) >= reserved_bytes(problem, on)


def check(problem: Problem, plan: Sequence[Replica]) -> None:
    """ValueError where a plan is none: over a GPU's memory, ranks on two nodes, a model twice on a GPU, unknown costs."""
    for r in plan:
        m = problem.models[r.model]
        if len(set(r.gpus)) != len(r.gpus) or not r.gpus:
            raise ValueError(f"model {m.name!r}: the ranks of a replica need GPUs of their own, got {r.gpus}")
        if len({problem.gpus[g].node for g in r.gpus}) > 1:
            raise ValueError(
                f"model {m.name!r}: the ranks of a replica must be on one node, got {[problem.gpus[g].name for g in r.gpus]}"
            )
        if any((r.tp, r.sm) not in m.costs.get(problem.gpus[g].kind, {}) for g in r.gpus):
            raise ValueError(
                f"model {m.name!r}: no costs for tp={r.tp} and {r.sm} % of {[problem.gpus[g].kind for g in r.gpus]}"
            )
        if m.tp not in (None, r.tp):
            raise ValueError(f"model {m.name!r}: tp must be {m.tp}, got {r.tp}")
        if not problem.joins(r, plan):
            raise ValueError(
                f"model {m.name!r}: its replicas must have one tp and one share, got "
                f"{sorted({(o.tp, o.sm) for o in plan if o.model == r.model})}"
            )
    for g, on in enumerate(residents(problem, plan)):
        if len({r.model for r in on}) != len(on):
            names = [problem.models[r.model].name for r in on]
            raise ValueError(f"GPU {problem.gpus[g].name!r} has a model twice: {names}")
        if on and not fits(problem, g, on):
            room, kept = pool_bytes(problem, g, on), reserved_bytes(problem, on)
            raise ValueError(
                f"GPU {problem.gpus[g].name!r} has {room:.4g} bytes beside its models' weights, their reserves take {kept:.4g}"
            )
