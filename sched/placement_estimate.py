"""What a placement would attain, by formulas: microseconds a GPU, where the simulator takes a second.

A replica with rate l, P prompt and O answer tokens, a decode that costs k, a prompt that costs s and a step of nothing b
(its curve over rows taken at the batch it has) has a batch of l O tpot (Little), so

    tpot = f (b + k) / (1 - f rho),   rho = l (O k + s),   f = 1 + what others on its GPUs take of its time.

f counts a neighbour by the share u of time in which it is busy, u = 1 - exp(-mean number in it); each depends on the
others, so they are found together, by iteration.  A batch is bounded by max_running, by the KV pool in proportion to
what each would fill of it, and by the TPOT that is owed; rates beyond what that batch serves are not attained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import erfc, exp, inf, log, sqrt

from sched.placement import Plan, Problem, Replica, fits, pool_bytes, residents, use_of

ROUNDS = 12  # of the iteration; the change is damped by half, so it is below a thousandth then
FULL = 0.98  # of what a batch serves: at all of it the queue has no end
# middles of five equal parts of a normal law: what a prompt's length does to its TTFT
NORMAL = (-1.2816, -0.5244, 0.0, 0.5244, 1.2816)
WORST_WEIGHT = 0.5
ROOM_WEIGHT = 0.02
MOST_HEADROOM = 4.0


@dataclass(frozen=True, slots=True)
class Predicted:
    """Of one replica.  `attained`: share of its requests that keep both SLOs; `headroom`: how many times its rate it could
    serve; `bound`: what ends that, one of compute, tpot, sequences, memory; `kv_bytes` in the mean, on each rank."""

    rate: float
    attained: float
    ttft_attained: float
    tpot_attained: float
    tpot_s: float
    ttft_s: float
    headroom: float
    bound: str
    running: float
    most_running: int
    busy: float
    kv_bytes: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """`value` is what the solver maximises, see `value_of`.  By model: attainment and headroom; None where it has no replica."""

    value: float
    joint: float
    worst: float
    attained: tuple[float, ...]
    headroom: tuple[float, ...]


def above(z: float) -> float:
    """The part of a normal law above z standard deviations."""
    return 0.5 * erfc(z / 1.4142135623730951)


class Load:
    """A replica's constants, and what the iteration changes."""

    __slots__ = ("base", "busy", "by_tpot", "capacity", "cost", "factor", "k", "kv", "kv_room", "model", "most", "n", "rate",
                 "replica", "s", "s2", "served", "step", "tpot", "use")  # fmt: skip

    def __init__(self, problem: Problem, r: Replica, rate: float) -> None:
        m, cost = problem.models[r.model], problem.cost(r)
        self.model, self.replica, self.rate, self.cost = m, r, rate, cost
        # of the GPU while it is busy: by far the most of that are decodes
        self.use = use_of(problem, r)[0]
        # a token of context is read by every decode behind it, so long answers count twice
        context = m.prompt_tokens + m.output_tokens * (1 + m.output_cv**2) / 2
        self.base = cost.base_s + cost.rows_s(1)
        self.k = cost.per_decode_s + cost.per_context_token_s * context
        tokens, spread = m.prompt_tokens, 1 + m.prompt_cv**2
        self.step = cost.per_prefill_token_s + cost.per_context_token_s
        self.s = self.step * tokens + cost.per_pair_s * tokens**2 * spread
        self.s2 = self.s**2 * spread
        # bytes that a running request holds in the mean, half a block of them unused
        self.kv = (context + m.block_tokens / 2) * m.kv_bytes(r.tp)
        self.factor, self.n, self.busy, self.tpot = 1.0, 0.0, 0.0, self.base + self.k
        self.most, self.served, self.capacity = float(m.max_running), rate, inf
        self.by_tpot = self.kv_room = inf

    def settle(self, factor: float, kv_room: float) -> None:
        """With others that slow its steps by `factor`, and room for the keys and values of `kv_room` requests."""
        m, f, out, k, s = self.model, factor, self.model.output_tokens, self.k, self.s
        self.factor, self.kv_room = f, kv_room
        # a batch of n makes a step every f (b + n k + n s / O): what a request's prompt costs, spread over its answer
        per_request = k + s / out
        full = self.steps_base(self.most)
        self.by_tpot = (m.tpot_s / f - full) / per_request if per_request > 0 else inf
        least = min(m.max_running, kv_room, self.by_tpot)
        self.most = most = max(1.0, least)
        self.capacity = most / (f * (out * (full + most * k) + most * s))
        # memory for less than one request serves some of the time; one that is too slow for its TPOT is served all the same
        self.capacity *= min(1.0, kv_room)
        self.served = served = min(self.rate, FULL * self.capacity)
        tpot = f * (self.base + k) / max(1 - f * served * (out * k + s), 1e-3)
        self.tpot = min(tpot, m.tpot_s * 10)
        self.n = min(served * out * tpot, most) + served * f * (s + self.base)
        # who cannot serve all that is asked is never without work
        self.busy = 1.0 if served < self.rate else 1 - exp(-self.n)
        self.base = (self.base + self.steps_base(self.n)) / 2

    def steps_base(self, n: float) -> float:
        """What a step takes whoever is in it, in the mean over steps of `n` decodes: some have a prompt, too."""
        cost, m = self.cost, self.model
        if not cost.rows:
            return cost.base_s
        with_prompt = min(1.0, n / m.output_tokens)
        rows = n + min(m.prompt_tokens, m.max_step_tokens)
        return cost.base_s + (1 - with_prompt) * cost.rows_s(n) + with_prompt * cost.rows_s(rows)

    @property
    def bound(self) -> str:
        """What keeps it from serving more."""
        f, out = self.factor, self.model.output_tokens
        limits = (
            ("memory", self.kv_room),
            ("tpot", self.by_tpot),
            ("sequences", float(self.model.max_running)),
        )
        name, least = min(limits, key=lambda pair: pair[1])
        return "compute" if least >= 1 and self.capacity * f * (out * self.k + self.s) > 0.9 else name


def settled(
    problem: Problem, gpus: Sequence[int], on: Sequence[Sequence[Replica]], rates: Mapping[Replica, float]
) -> list[Load]:
    """The replicas on GPUs that replicas link, found together.  `on`: by GPU of `gpus`."""
    loads = {r: Load(problem, r, rates[r]) for of in on for r in of}
    beside = [[loads[r] for r in of] for of in on]
    rooms = [max(0.0, pool_bytes(problem, g, of)) for g, of in zip(gpus, on, strict=True)]
    where = {r: [i for i, of in enumerate(on) if r in of] for r in loads}
    for _ in range(ROUNDS):
        busy = [sum(load.busy * load.use for load in of) for of in beside]
        wanted = [sum(load.n * load.kv for load in of) for of in beside]
        found = []
        for r, load in loads.items():
            # ranks wait for each other, so the fullest of its GPUs decides
            own = load.busy * load.use
            at, kv = where[r], load.n * load.kv
            factor = max(1.0, max(load.use + problem.beside * (busy[i] - own) for i in at))
            room = inf
            if load.kv > 0:
                # what the others leave, at least a part in proportion to what each would fill
                room = (
                    min(max(rooms[i] - wanted[i] + kv, rooms[i] * kv / wanted[i] if kv else 0.0) for i in at)
                    / load.kv
                )
            found.append((load, factor, room))
        for load, factor, room in found:
            load.settle((load.factor + factor) / 2, room)
    return list(loads.values())


def first_token(load: Load) -> tuple[float, float]:
    """(share of TTFTs in time, mean TTFT) of the requests that are served.

    The prompts before it: a queue with one server, whose wait is exponential beyond the chance that there is one.
    """
    m, f = load.model, load.factor
    decodes = min(load.n, load.most) * load.k
    # a prompt's step carries the decodes too; prompts that come together share steps
    together = max(1.0, m.max_step_tokens / (2 * m.prompt_tokens))
    overhead = load.cost.base_s + load.cost.rows_s(load.n + m.prompt_tokens) + decodes
    own = f * (load.s + overhead)
    service = f * (load.s + overhead / together)
    busy = min(load.served * service, 0.99)
    # variance of prompts, and of bursts, that a queue sees
    varies = (load.s2 * f * f - (f * load.s) ** 2) / service**2 if service > 0 else 0.0
    tail_s = service * (varies + m.burst**2) / 2 / (1 - busy)
    residue = f * (load.base + decodes) / 2 if load.n > 0.5 else 0.0
    # all places taken: a place comes free when somebody ends
    spare = load.capacity - load.served
    spread = sqrt(max(load.n, 1e-9)) * max(1.0, m.burst)
    taken = above((load.most - load.n) / spread) if load.most < 1e6 else 0.0
    sigma = sqrt(log(1 + m.prompt_cv**2))
    median = m.prompt_tokens / sqrt(1 + m.prompt_cv**2)
    good = 0.0
    for z in NORMAL:
        tokens = median * exp(sigma * z)
        chunks = -(-tokens // m.max_step_tokens)
        prompt = load.step * tokens + load.cost.per_pair_s * tokens**2
        left = m.due_s(tokens) - f * (prompt + chunks * overhead) - residue
        if left <= 0:
            continue
        late = min(1.0, busy * exp(-left / tail_s)) if tail_s > 0 else 0.0
        late += taken * exp(-left * spare) * (1 - late)
        good += 1 - late
    return good / len(NORMAL), own + residue + busy * tail_s + (taken / spare if spare > 0 else 0.0)


def next_tokens(load: Load) -> float:
    """The share of mean TPOTs in time: normal about the mean, by batch, neighbours and prompts that fall into an answer."""
    m, f = load.model, load.factor
    gain = 1 / max(1 - f * load.served * (m.output_tokens * load.k + load.s), 0.05)
    batch = (f * load.k * gain) ** 2 * min(load.n, load.most)
    neighbours = ((f - 1) * load.tpot / f) ** 2 * 0.5 / max(1.0, (f - 1) * 2)
    prompts = f * f * load.s2 * load.served * load.tpot / m.output_tokens
    sd = sqrt(batch + neighbours + prompts)
    return 1 - above((m.tpot_s - load.tpot) / sd) if sd > 0 else float(load.tpot <= m.tpot_s)


def predict(load: Load) -> Predicted:
    m = load.model
    if load.rate <= 0:
        return Predicted(
            0.0, 1.0, 1.0, 1.0, load.tpot, 0.0, MOST_HEADROOM, load.bound, 0.0, int(load.most), 0.0, 0.0
        )
    ttft, mean = first_token(load)
    tpot = next_tokens(load)
    admitted = load.served / load.rate
    # what is served and late is no room
    headroom = min(load.capacity * min(1.0, max(load.by_tpot, 0.0)) / load.rate, 1e3)
    return Predicted(
        load.rate, admitted * ttft * tpot, admitted * ttft, admitted * tpot, load.tpot, mean, headroom, load.bound,
        load.n, int(min(load.most, m.max_running)), load.busy, load.n * load.kv,
    )  # fmt: skip


def value_of(
    attained: Sequence[float], headroom: Sequence[float], rates: Sequence[float]
) -> tuple[float, float, float]:
    """(value, joint, worst).  joint: share of all requests that attain; worst: of the worst-off model.

    value = the mean of joint and worst, and a little for room.  Penalised, not lexicographic: with the worst model first,
    one that nothing can help would take all weight from the others; with the joint share alone, a model that is seldom
    asked would be let down for nothing.  Room (the mean of headrooms, each at most 4, by its logarithm's like h / (1 + h))
    tells placements apart that all attain, or in which nothing does.
    """
    total = sum(rates)
    joint = sum(a * r for a, r in zip(attained, rates, strict=True)) / total if total > 0 else 1.0
    worst = min(attained, default=1.0)
    room = sum(min(h, MOST_HEADROOM) / (1 + min(h, MOST_HEADROOM)) for h in headroom) / max(1, len(headroom))
    return (1 - WORST_WEIGHT) * joint + WORST_WEIGHT * worst + ROOM_WEIGHT * room, joint, worst


def rate_shares(problem: Problem, plan: Sequence[Replica]) -> dict[Replica, float]:
    """What of its model's rate each replica gets: even parts, or by what a full batch of each would serve alone."""
    of: dict[int, list[Replica]] = {}
    for r in plan:
        of.setdefault(r.model, []).append(r)
    found = {}
    for number, replicas in of.items():
        model = problem.models[number]
        loads = [Load(problem, r, 0.0) for r in replicas] if len(replicas) > 1 else []
        speeds = [1 / (model.output_tokens * (x.base / 32 + x.k) + x.s) for x in loads] or [1.0]
        for r, speed in zip(replicas, speeds, strict=True):
            found[r] = model.rate * speed / sum(speeds)
    return found


class Estimator:
    """Estimates plans of one problem; what is on a GPU is worked out once, however many plans have it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.num_worked_out = 0
        self._rates = [m.rate for m in problem.models]
        self._known: dict[object, list[tuple[int, float, Predicted]]] = {}
        self._fits: dict[object, bool] = {}

    def fits(self, plan: Plan) -> bool:
        """The memory of every GPU holds what is on it."""
        return all(self.fits_on(g, on) for g, on in enumerate(residents(self.problem, plan)))

    def fits_on(self, gpu: int, on: Sequence[Replica]) -> bool:
        key = (self.problem.classes[gpu], tuple((r.model, r.tp) for r in on))
        if key not in self._fits:
            self._fits[key] = fits(self.problem, gpu, on)
        return self._fits[key]

    def __call__(self, plan: Plan) -> Estimate:
        """A model without a replica attains nothing."""
        n = len(self.problem.models)
        attained, headroom = [0.0] * n, [inf] * n
        for parts in self._parts(plan):
            for model, share, p in parts:
                attained[model] += share * p.attained
                headroom[model] = min(headroom[model], p.headroom)
        headroom = [0.0 if h == inf else h for h in headroom]
        value, joint, worst = value_of(attained, headroom, self._rates)
        return Estimate(value, joint, worst, tuple(attained), tuple(headroom))

    def by_replica(self, plan: Plan) -> dict[Replica, Predicted]:
        rates = rate_shares(self.problem, plan)
        return {
            load.replica: predict(load)
            for gpus, on in self._groups(plan)
            for load in settled(self.problem, gpus, on, rates)
        }

    def _groups(self, plan: Plan) -> list[tuple[list[int], list[list[Replica]]]]:
        """GPUs that tensor parallel replicas link, and who is on them."""
        on = residents(self.problem, plan)
        root = list(range(len(on)))
        for r in plan:
            for g in r.gpus[1:]:
                a, b = _root(root, r.gpus[0]), _root(root, g)
                root[max(a, b)] = min(a, b)
        groups: dict[int, list[int]] = {}
        for g, of in enumerate(on):
            if of:
                groups.setdefault(_root(root, g), []).append(g)
        return [(gpus, [on[g] for g in gpus]) for gpus in groups.values()]

    def _parts(self, plan: Plan) -> list[list[tuple[int, float, Predicted]]]:
        """By group: (model, share of its rate, prediction) of each replica."""
        rates = rate_shares(self.problem, plan)
        found = []
        for gpus, on in self._groups(plan):
            place = {g: i for i, g in enumerate(gpus)}
            key = tuple(
                (
                    self.problem.classes[g],
                    tuple((r.model, r.sm, rates[r], tuple(place[x] for x in r.gpus)) for r in of),
                )
                for g, of in zip(gpus, on, strict=True)
            )
            parts = self._known.get(key)
            if parts is None:
                self.num_worked_out += 1
                parts = []
                for load in settled(self.problem, gpus, on, rates):
                    whole = load.model.rate
                    parts.append((load.replica.model, load.rate / whole if whole > 0 else 1.0, predict(load)))
                self._known[key] = parts
            found.append(parts)
        return found


def _root(root: list[int], i: int) -> int:
    while root[i] != i:
        i = root[i]
    return i
