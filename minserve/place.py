"""`python -m minserve.place CONFIG.yaml --out placed.yaml`: which models go on which GPUs, and what that would attain.

Replicas, tensor parallelism, GPUs, shares of the multiprocessors and batch limits for the rates, lengths and SLOs of the
file, by a search on an estimate whose best plans the simulator judges (docs/scheduling.md).  What does not fit is said with
the reason and the smallest change that would make it fit; exit status 1 then.  --replan OLD.yaml says what to change of a
placement that runs; --memory how the KV pools are cut.  Tables for people, last one JSON object.  No weights are needed.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minserve.config import Config, ModelEntry, TiB, load_config
from minserve.place_memory import describe, plan_memory, pool_json
from minserve.place_output import as_json, describe_doubted, describe_moves, describe_short, placed, write
from minserve.place_output import describe as describe_plan
from minserve.place_problem import Options, plan_of, problem_of
from minserve.schema import At, number, read_yaml, size
from minserve.simulate import read_use
from minserve.step_profile import read_costs, read_profile
from sched.placement import Model, Plan, Problem, check, lacking
from sched.placement_arms import BASELINES, baseline
from sched.placement_moves import Change, Migration, replan
from sched.placement_search import BUDGET, solve
from sched.placement_simulate import Scorer, requests
from sched.placement_why import shortfalls
from sched.step_time import DEVICES

SIMULATED_S = 30.0
REFINE = 24  # simulations more, on the way from the best plan


def options_of(args: argparse.Namespace, config: Config) -> Options:
    return Options(
        kind=args.gpu,
        profile=read_costs(args.costs) if args.costs else {},
        use=read_use(args.use, [m.name for m in config.models]),
        own=read_profile(args.profile) if args.profile else None,
        max_tp=args.max_tp,
        max_replicas=args.max_replicas,
        target=args.target,
        burst=args.burst,
        free=bool(args.replan or args.baseline),
    )


def plan(
    args: argparse.Namespace, problem: Problem, scorer: Scorer | None, old: Plan | None
) -> tuple[Plan, list[Change]]:
    """The plan, and the way to it from an old one."""
    score = None if scorer is None else lambda p: scorer(p).value
    if args.baseline:
        simulate = None if scorer is None else lambda p: scorer(p).attained
        return baseline(args.baseline, problem, seed=args.seed, simulate=simulate), []
    if old is not None:
        migration = Migration(start_s=args.start_s, load_bytes_s=args.load_bytes_s, horizon_s=args.horizon_s)
        found, moves = replan(problem, old, migration, seed=args.seed, budget=args.budget, score=score)
        return found.plan, moves
    return solve(problem, seed=args.seed, budget=args.budget, score=score, refine=REFINE).plan, []


def place(args: argparse.Namespace) -> int:
    config = load_config(args.config)
    problem = problem_of(config, options_of(args, config))
    asked = sum(m.rate for m in problem.models) > 0
    scorer = Scorer(problem, requests(problem, args.simulate, args.seed)) if args.simulate and asked else None
    old = plan_of(load_config(args.replan), problem) if args.replan else None
    found, moves = plan(args, problem, scorer, old)
    check(problem, found)
    scored = scorer(found) if scorer is not None else None
    simulated = scored.attained if scored is not None else None
    short = shortfalls(problem, found, seed=args.seed, most=args.explain, simulated=simulated)
    lines = describe_plan(problem, found, scored)
    if quiet := [m.name for m in problem.models if not m.rate]:
        lines.append(f"without a rate, so planned for memory alone: {', '.join(quiet)}")
    if whole := [e.name for e, m in zip(config.models, problem.models, strict=True) if without_share(e, m)]:
        lines.append(
            f"sm_share of {', '.join(whole)} is not planned with: --costs and --use name no rows of it"
        )
    if args.replan:
        lines += describe_moves(problem, moves)
    lines += describe_short(problem, short)
    if scored is not None:
        lines += describe_doubted(problem, found, scored)
    fewer = lacking(problem, found)
    said_of = {i: f" ({has} of {wanted} replicas)" for i, (has, wanted) in fewer.items()}
    nowhere = sorted(
        m.name + said_of.get(i, "")
        for i, m in enumerate(problem.models)
        if i in fewer or all(r.model != i for r in found)
    )
    written = None
    if args.out and nowhere:
        lines.append(f"{args.out} is not written: there is no place for {', '.join(nowhere)}")
    elif args.out:
        raw = read_yaml(Path(args.config))
        write(
            args.out, placed(raw, Path(args.config).resolve().parent, config, problem, found), problem, found
        )
        written = args.out
        lines.append(f"{args.out} is written")
    sys.stdout.write("\n".join(lines) + "\n")
    said: dict[str, Any] = {
        "config": args.config,
        "out": written,
        "by": args.baseline or "search",
        "seed": args.seed,
    }
    said |= as_json(problem, found, scored, short)
    if args.replan:
        said["moves"] = [
            {"what": m.what, "model": problem.models[m.replica.model].name, "gpus": [problem.gpus[g].name for g in m.replica.gpus],
             "seconds": round(m.seconds, 3), "lost": round(m.lost, 3)}
            for m in moves
        ]  # fmt: skip
    sys.stdout.write(json.dumps(said) + "\n")
    return 1 if short or nowhere else 0


def without_share(entry: ModelEntry, model: Model) -> bool:
    """A roofline, and a profile of one's own, know nothing of shares: on such a kind of GPU it is planned as if it had all."""
    known = [{sm for _, sm in costs} for costs in model.costs.values()]
    return entry.sm_share is not None and any(entry.sm_share not in shares for shares in known)


def show_memory(args: argparse.Namespace) -> int:
    given = args.pool_bytes and size(64 << 10, TiB).read(At("--pool-bytes", Path()), args.pool_bytes)
    tp = 1 if args.tp is None else args.tp
    pools = [pool_json(p) for p in plan_memory(load_config(args.config), tp=tp, given=given)]
    for pool in pools:
        sys.stdout.write("\n".join(describe(pool)) + "\n")
    sys.stdout.write(json.dumps({"config": args.config, "tp": tp, "pools": pools}) + "\n")
    return 0


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minserve.place", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", metavar="CONFIG.yaml", help="see examples/full.yaml")
    parser.add_argument("--out", metavar="FILE", help="write the configuration with the placement")
    parser.add_argument(
        "--replan", metavar="OLD.yaml", help="from this placement, as far as it is worth the way"
    )
    parser.add_argument("--baseline", choices=list(BASELINES), help="by this rule in place of the search")
    parser.add_argument(
        "--gpu", choices=sorted(DEVICES), default="h200", help="the kind of GPUs that say none"
    )
    parser.add_argument("--costs", metavar="CSV", help="a profile in FineServe's form")
    says = "of python -m bench.profile_steps: step times, and how models on one device slow each other down"
    parser.add_argument("--profile", metavar="JSON", help=says)
    parser.add_argument("--use", metavar="NAME=KEY", action="append", default=[],
                        help="model/qformat of the profile, all tp and shares of it, or model/qformat/tp/mps; others have a roofline")  # fmt: skip
    for flag, default, says in (
        ("--max-tp", 8, "no more ranks than that"),
        ("--max-replicas", 4, "of a model"),
        ("--seed", 0, "of the search and of the simulated requests"),
        ("--budget", BUDGET, "plans to look at"),
        ("--explain", 8, "models that do not fit for which changes are looked for"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{says}; default {default}")
    for flag, value, says in (
        ("--simulate", SIMULATED_S, "seconds of requests that the best plans are judged by, 0: not"),
        ("--target", 0.9, "attainment below which a model does not fit"),
        ("--burst", 1.0, "coefficient of variation of the gaps between requests"),
        ("--start-s", 15.0, "seconds of a worker's start before it loads, for --replan"),
        ("--load-bytes-s", 2e9, "bytes of weights a second, for --replan"),
        ("--horizon-s", 1800.0, "seconds that the new rates hold, for --replan"),
    ):
        parser.add_argument(flag, type=float, default=value, metavar="X", help=f"{says}; default {value:g}")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--memory", action="store_true", help="only plan the KV pool of each GPU")
    memory.add_argument("--tp", type=int, metavar="N", help="plan one of N ranks of each model; default 1")
    memory.add_argument("--pool-bytes", metavar="SIZE", help="of pools that name none, such as 40GiB")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """ValueError naming the flag, the value and what it must be."""
    for name, low, high in (
        ("max_tp", 1, 8), ("max_replicas", 1, 64), ("seed", 0, 1 << 31), ("budget", 1, 10**8), ("explain", 0, 64),
        ("simulate", 0, 3600), ("target", 0, 1), ("burst", 0.01, 100), ("start_s", 0, 1e5), ("load_bytes_s", 1, 1e15),
        ("horizon_s", 1, 1e9),
    ):  # fmt: skip
        number(low, high).read(At(f"--{name.replace('_', '-')}", Path()), getattr(args, name))
    if args.baseline and args.replan:
        raise ValueError("--replan goes with the search, not with --baseline")
    others = [flag for flag in ("out", "replan", "baseline") if getattr(args, flag)]
    if args.memory and others:
        raise ValueError(f"--memory plans pools alone, without --{others[0]}")
    for flag, value in (("--tp", args.tp), ("--pool-bytes", args.pool_bytes)):
        if value is not None and not args.memory:
            raise ValueError(f"{flag} goes with --memory, and has no effect on a placement, got {value}")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 1 where something does not fit, 2 for a mistake of the user's."""
    args = read_arguments(argv)
    try:
        check_arguments(args)
        return show_memory(args) if args.memory else place(args)
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"minserve: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
