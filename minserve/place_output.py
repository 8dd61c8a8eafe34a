"""A placement for people, as JSON, and as the configuration that simulate and serve take."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from minserve.config import Config, load_config
from minserve.place_problem import plan_of
from minserve.schema import kinds
from sched.metrics import aligned
from sched.placement import WHOLE, Plan, Problem, Replica, pool_bytes, reserved_bytes, residents
from sched.placement_estimate import Estimator, Predicted
from sched.placement_moves import Change
from sched.placement_simulate import Scored
from sched.placement_why import Shortfall, doubted

GB = 1e9
SLAB = 2 << 20  # pools are whole numbers of it
BATCH_ROOM, BATCH_STEP = 2.0, 8  # a batch limit: so many times what the estimate has, rounded up
FOLDERS = ("path", "tokenizer", "chat_template", "profile")
FILES = ("api_keys_file", "admin_keys_file")


def max_num_seqs(given: int, predicted: Sequence[Predicted]) -> int:
    """What a batch may be: well above what its TPOT and memory are predicted to allow, and no more than configured."""
    most = max((p.most_running for p in predicted), default=given)
    room = int(BATCH_ROOM * most)
    return min(given, max(BATCH_STEP, -(-room // BATCH_STEP) * BATCH_STEP))


def placed(
    raw: Mapping[str, Any], base: Path, config: Config, problem: Problem, plan: Plan
) -> dict[str, Any]:
    """The plain values of the file `raw`, with the placement; paths are absolute, so that it may lie anywhere."""
    found = copy.deepcopy(dict(raw))
    found["nodes"] = _nodes(config, problem, plan)
    predicted = Estimator(problem).by_replica(plan)
    defaults = found.get("defaults") or {}
    models = []
    for number, (entry, own) in enumerate(zip(config.models, found["models"], strict=True)):
        mine = [r for r in plan if r.model == number]
        new = dict(own) | {
            "placement": [problem.gpus[g].name for r in mine for g in r.gpus],
            "max_num_seqs": max_num_seqs(entry.max_num_seqs, [predicted[r] for r in mine]),
            "reserve_tokens": min(entry.reserve_tokens, problem.models[number].max_len),
        }
        if mine[0].tp > 1 or entry.tp is not None:
            new["tp"] = mine[0].tp
        if mine[0].sm != WHOLE:
            new["sm_share"] = mine[0].sm
        models.append(_absolute(new, FOLDERS, base))
    found["models"] = models
    if defaults:
        found["defaults"] = _absolute(defaults, FOLDERS, base)
    if found.get("server"):
        found["server"] = _absolute(found["server"], FILES, base)
    return found


def _absolute(values: Mapping[str, Any], names: Sequence[str], base: Path) -> dict[str, Any]:
    return {
        k: str((base / Path(v).expanduser()).resolve()) if k in names and isinstance(v, str) else v
        for k, v in values.items()
    }


def _nodes(config: Config, problem: Problem, plan: Plan) -> list[dict[str, Any]]:
    """Every key of theirs that is not at its default, and the bytes that each pool is to have."""
    numbers = {gpu.name: i for i, gpu in enumerate(problem.gpus)}
    on = residents(problem, plan)
    nodes = []
    for node in config.nodes:
        gpus = []
        for gpu in node.gpus:
            known = {name: getattr(gpu, name) for name in kinds(type(gpu))}
            said = {k: v for k, v in known.items() if v is not None}
            number = numbers[gpu.name or ""]
            if gpu.pool_bytes is None and on[number]:
                said["pool_bytes"] = int(pool_bytes(problem, number, on[number])) // SLAB * SLAB
            gpus.append(said)
        nodes.append({"name": node.name, "gpus": gpus})
    return nodes


def write(path: str | Path, values: Mapping[str, Any], problem: Problem, plan: Plan) -> None:
    """ValueError, and no file, where what would be read back is not the plan."""
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    path = Path(path)
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text)
        read = plan_of(load_config(new), problem)
        if read != plan:
            wrong = sorted({problem.models[r.model].name for r in set(read) ^ set(plan)})
            raise ValueError(
                f"{path} is not written: it would say {_said(problem, read, wrong)} of {', '.join(wrong)}, "
                f"and what was judged is {_said(problem, plan, wrong)}"
            )
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _said(problem: Problem, plan: Plan, models: Sequence[str]) -> str:
    mine = [r for r in plan if problem.models[r.model].name in models]
    return (
        ", ".join(f"{'+'.join(problem.gpus[g].name for g in r.gpus)} with {r.sm}%" for r in mine) or "nothing"
    )


# ---- for people


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def describe(problem: Problem, plan: Plan, scored: Scored | None) -> list[str]:
    """Tables of the models and of the GPUs."""
    estimator = Estimator(problem)
    estimate, predicted = estimator(plan), estimator.by_replica(plan)
    rows = [
        [
            "model",
            "req/s",
            "replicas",
            "tp",
            "SMs",
            "attained",
            "simulated",
            "TTFT ms",
            "TPOT ms",
            "headroom",
            "bound by",
        ]
    ]
    for i, m in enumerate(problem.models):
        mine = [r for r in plan if r.model == i]
        if not mine:
            rows.append([m.name, f"{m.rate:.3g}", "none", *["-"] * 8])
            continue
        of = [predicted[r] for r in mine]
        worst = min(of, key=lambda p: p.headroom)
        rows.append([
            m.name, f"{m.rate:.3g}", " ".join("+".join(problem.gpus[g].name for g in r.gpus) for r in mine), str(mine[0].tp),
            f"{mine[0].sm}%", percent(estimate.attained[i]), percent(scored.attained[i]) if scored else "-",
            f"{1000 * worst.ttft_s:.0f}", f"{1000 * worst.tpot_s:.1f}", f"x {estimate.headroom[i]:.2f}", worst.bound,
        ])  # fmt: skip
    lines = aligned(rows).splitlines()
    simulated = f", simulated {scored.joint:.1%} and {scored.worst:.1%}" if scored else ""
    lines.append(
        f"all: {estimate.joint:.1%} of requests attain their SLOs, {estimate.worst:.1%} of the worst model's{simulated}"
    )
    return [*lines, *_gpu_lines(problem, plan, predicted)]


def _gpu_lines(problem: Problem, plan: Plan, predicted: Mapping[Replica, Predicted]) -> list[str]:
    rows = [["GPU", "node", "models", "weights GB", "pool GB", "reserved", "filled"]]
    for g, on in enumerate(residents(problem, plan)):
        room = pool_bytes(problem, g, on)
        filled = sum(predicted[r].kv_bytes for r in on)
        weights = sum(problem.models[r.model].weight_bytes / r.tp for r in on)
        cells = [percent(x / room) if room > 0 and on else "-" for x in (reserved_bytes(problem, on), filled)]
        gpu = problem.gpus[g]
        rows.append([gpu.name, gpu.node, str(len(on)), f"{weights / GB:.2f}", f"{room / GB:.2f}", *cells])
    return aligned(rows).splitlines()


def describe_short(problem: Problem, found: Sequence[Shortfall]) -> list[str]:
    lines = []
    for s in found:
        who = s.model
        if s.replicas is not None:
            who = f"{s.replicas[0]} of {s.replicas[1]} replicas of {s.model} have a place"
        figures = f"{s.attained:.1%} attained"
        if s.simulated is not None:
            figures = f"{s.simulated:.1%} simulated, {s.attained:.1%} by the estimate"
        lines.append(f"does not fit: {who}, {figures}, {problem.target:.0%} wanted: {s.reason}")
        for k, change in enumerate(s.changes or ()):
            lines.append(f"  {'smallest change' if k == 0 else 'or'}: {change.words}")
        if s.unseen:
            lines.append(
                "  changes were not looked for: they are judged by the estimate, for which it fits as it is"
            )
        elif s.changes is None:
            lines.append("  changes were not looked for: --explain says for how many models they are")
        elif not s.changes:
            lines.append("  no single change that was tried makes it fit")
    return lines


def describe_doubted(problem: Problem, plan: Plan, scored: Scored) -> list[str]:
    estimate = Estimator(problem)(plan).attained
    return [
        f"{problem.models[i].name} fits, {percent(scored.attained[i])} simulated, though the estimate says {estimate[i]:.1%}"
        for i in doubted(problem, plan, scored.attained)
    ]


def describe_moves(problem: Problem, moves: Sequence[Change]) -> list[str]:
    if not moves:
        return ["no replica moves: what a change would gain is not worth the way"]
    lines = [f"{len(moves)} changes, {sum(m.lost for m in moves):.0f} requests lost on the way:"]
    for m in moves:
        where = "+".join(problem.gpus[g].name for g in m.replica.gpus)
        share = f" with {m.replica.sm}% of its SMs" if m.replica.sm != WHOLE else ""
        cost = f": {m.seconds:.0f} s, {m.lost:.0f} requests lost" if m.what != "remove" else ""
        lines.append(f"  {m.what} {problem.models[m.replica.model].name} on {where}{share}{cost}")
    return lines


def as_json(
    problem: Problem, plan: Plan, scored: Scored | None, found: Sequence[Shortfall]
) -> dict[str, Any]:
    estimator = Estimator(problem)
    estimate, predicted = estimator(plan), estimator.by_replica(plan)
    models = []
    for i, m in enumerate(problem.models):
        replicas = [
            {
                "gpus": [problem.gpus[g].name for g in r.gpus],
                "tp": r.tp,
                "sm_share": r.sm,
                "rate": round(predicted[r].rate, 6),
                "ttft_ms": round(1000 * predicted[r].ttft_s, 3),
                "tpot_ms": round(1000 * predicted[r].tpot_s, 3),
                "bound": predicted[r].bound,
            }
            for r in plan
            if r.model == i
        ]
        models.append({
            "name": m.name, "rate": m.rate, "attained": round(estimate.attained[i], 5),
            "simulated": scored.attained[i] if scored else None, "headroom": round(estimate.headroom[i], 4), "replicas": replicas,
        })  # fmt: skip
    short = [
        {"model": s.model, "reason": s.reason, "replicas": s.replicas, "estimated": round(s.attained, 5), "simulated": s.simulated,
         "changes": [{"what": c.what, "size": round(c.size, 4), "words": c.words} for c in s.changes or ()]}
        for s in found
    ]  # fmt: skip
    return {
        "joint": round(estimate.joint, 5), "worst": round(estimate.worst, 5),
        "simulated": None if scored is None else {"joint": scored.joint, "worst": scored.worst, "tokens": scored.tokens},
        "models": models, "does_not_fit": short,
    }  # fmt: skip
