"""From a configuration to the problem that sched/placement_search.py solves: bytes, costs of steps, rates and SLOs.

Reads config.json of the models and the sizes of their weights where those are there; no GPU is asked: a pool's memory is
`pool_bytes`, or `memory_fraction` of `memory_bytes`, which by default is what its `kind` has.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from minserve.config import Config, GpuConfig, ModelEntry
from minserve.memory import weight_bytes, workspace
from minserve.place_memory import rank_of
from minserve.resolve import ResolvedModel, resolve_model
from minserve.simulate import WEIGHT_BITS, cost_of
from minserve.step_profile import Profile
from sched.latency import StepCost
from sched.placement import MAX_TP, WHOLE, Gpu, Model, Plan, Problem, Replica
from sched.slowdown import complete
from sched.step_time import Fitted

MEMORY = {"a100": 80 * 10**9, "h100": 80 * 10**9, "h200": 141 * 10**9}
DEGREES = (1, 2, 4, 8)
SHARED = ("mps", "mps-static")  # where models run at once, each on a share

Costs = dict[tuple[int, int], StepCost]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`kind`: of GPUs that say none; `profile`: models of step time by key, `use`: the key or its first half by model; `own`:
    what was measured of these models;
    `max_tp`, `max_replicas`: no more than that; `free`: placements of the file do not bind."""

    kind: str
    profile: Mapping[str, Fitted] = dataclasses.field(default_factory=dict)
    use: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own: Profile | None = None
    max_tp: int = MAX_TP
    max_replicas: int = 4
    target: float = 0.9
    burst: float = 1.0
    free: bool = False


def problem_of(config: Config, options: Options) -> Problem:
    """ValueError for models that cannot be resolved, placements that are none, or keys that the profile lacks."""
    gpus = tuple(gpu_of(gpu, node.name, options.kind) for node in config.nodes for gpu in node.gpus)
    shared = all(gpu.sharing in SHARED for gpu in config.gpus)
    most = min(options.max_tp, max(len(node.gpus) for node in config.nodes))
    kinds = sorted({gpu.kind for gpu in gpus})
    models = []
    for entry in config.models:
        resolved = resolve_model(entry, "cpu" if _on_cpu(config) else "cuda")
        degrees = [tp for tp in DEGREES if tp <= most and _divides(tp, resolved)]
        costs = {kind: _costs(resolved, kind, degrees, options, shared) for kind in kinds}
        models.append(model_of(entry, resolved, costs, options))
    own = options.own.slowdown if options.own is not None else {}
    beside = sum(complete(own).values()) / len(complete(own)) if own else 1.0
    return Problem(tuple(models), gpus, options.max_replicas, options.target, beside, alike=True)


def _on_cpu(config: Config) -> bool:
    return all(gpu.device == "cpu" for gpu in config.gpus)


def gpu_of(gpu: GpuConfig, node: str, kind: str) -> Gpu:
    name, kind = gpu.name or "gpu0", gpu.kind or kind
    if gpu.pool_bytes is not None and gpu.memory_bytes is None:
        return Gpu(name, gpu.pool_bytes, kind, node, apart=True)
    return Gpu(name, gpu.memory_fraction * (gpu.memory_bytes or MEMORY[kind]), kind, node)


def _divides(tp: int, model: ResolvedModel) -> bool:
    heads, c = model.layout.num_kv_heads, model.config
    whole = heads % tp == 0 or tp % heads == 0
    return whole and c.num_heads % tp == 0 and c.intermediate_size % tp == 0


def _costs(model: ResolvedModel, kind: str, degrees: Sequence[int], options: Options, shared: bool) -> Costs:
    """By degree and share; of shares below the whole only where the profile has them and the GPUs share so."""
    entry = model.entry
    if entry.name not in options.use and options.own is not None and entry.name in options.own.models:
        return {(1, WHOLE): options.own.models[entry.name].cost}
    if entry.name not in options.use:
        # a roofline knows nothing of shares
        return {(tp, WHOLE): cost_of(rank_of(model, tp), kind, tp) for tp in degrees}
    wanted = options.use[entry.name]
    found: Costs = {}
    for key, fitted in options.profile.items():
        # a name of a model may hold slashes, too
        name, degree, per_cent = key.rsplit("/", 2)
        tp, share = int(degree), int(per_cent)
        if wanted in (key, name) and tp in degrees and (share == WHOLE or shared):
            found[tp, share] = fitted.cost
    if entry.sm_share is not None:
        found = {(tp, sm): cost for (tp, sm), cost in found.items() if sm == entry.sm_share}
    if not found:
        choices = ", ".join(sorted(options.profile)[:12]) or "none: give --costs"
        raise ValueError(
            f"--use {entry.name}={wanted!r} names no row for tp {', '.join(map(str, degrees))} and sm_share "
            f"{entry.sm_share or 'auto'}; there are {choices} ..."
        )
    return found


def bytes_of_weights(model: ResolvedModel) -> float:
    """Of the files; where they are not there, of the shape in its precision."""
    found = weight_bytes(model)
    if found:
        return found
    c = model.config
    products = c.num_layers * (
        c.hidden_size * (2 * c.q_size + 2 * c.kv_size) + 3 * c.hidden_size * c.intermediate_size
    )
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return products * WEIGHT_BITS.get(model.quantization, 16) / 8 + tables * 2


def model_of(entry: ModelEntry, model: ResolvedModel, costs: dict[str, Costs], options: Options) -> Model:
    layout, c = model.layout, model.config
    layers = sum(x.block_bytes for x in model.layouts) or layout.block_bytes * c.num_layers
    return Model(
        name=entry.name,
        weight_bytes=bytes_of_weights(model),
        kv_token_bytes=layers / layout.block_tokens,
        costs=costs,
        rate=entry.rate or 0.0,
        prompt_tokens=entry.lengths.prompt_tokens,
        output_tokens=entry.lengths.output_tokens,
        prompt_cv=entry.lengths.prompt_variation,
        output_cv=entry.lengths.output_variation,
        burst=options.burst,
        ttft_s=entry.slo.ttft_ms / 1000,
        tpot_s=entry.slo.tpot_ms / 1000,
        work_bytes=float(workspace(model).total),
        kv_heads=layout.num_kv_heads,
        layers=c.num_layers,
        reserve_tokens=entry.reserve_tokens,
        max_len=model.max_model_len,
        max_running=entry.max_num_seqs,
        max_step_tokens=entry.max_num_batched_tokens,
        block_tokens=layout.block_tokens,
        policy=entry.policy,
        policy_options=entry.policy_options,
        replicas=entry.replicas,
        tp=entry.tp,
        places=() if options.free else places_of(entry),
    )


def places_of(entry: ModelEntry) -> tuple[tuple[str, ...], ...]:
    """The GPUs of each replica that the file places."""
    tp = entry.tp or 1
    if len(entry.placement) % tp:
        raise ValueError(
            f"models[{entry.name}].placement must name {tp} GPUs for each replica, as tp says, got {len(entry.placement)}"
        )
    if entry.replicas is not None and entry.placement and entry.replicas * tp != len(entry.placement):
        raise ValueError(
            f"models[{entry.name}].replicas must be the {len(entry.placement) // tp} that its placement has, or auto, "
            f"got {entry.replicas}"
        )
    return tuple(entry.placement[i : i + tp] for i in range(0, len(entry.placement), tp))


def plan_of(config: Config, problem: Problem) -> Plan:
    """The replicas that a configuration places; a model without placement is on the first GPU.  Models that the problem does
    not have are left out, and so is what it has no costs for."""
    numbers = {gpu.name: i for i, gpu in enumerate(problem.gpus)}
    models = {m.name: i for i, m in enumerate(problem.models)}
    found = []
    for entry in config.models:
        for place in places_of(entry) or ((config.gpus[0].name or "",),):
            if entry.name in models and all(name in numbers for name in place):
                gpus = tuple(numbers[name] for name in place)
                number = models[entry.name]
                known = [problem.models[number].costs.get(problem.gpus[g].kind, {}) for g in gpus]
                shares = [
                    s for s in (entry.sm_share, WHOLE) if s and all((len(gpus), s) in of for of in known)
                ]
                if shares:
                    found.append(Replica(number, gpus, shares[0]))
    return tuple(sorted(found))
