"""`python -m minserve.workload SOURCE [FILE] --out FILE.jsonl`: requests for `replay` and `simulate`, the same for the same seed.

SOURCE: synthetic, azure, burstgpt, sharegpt, jsonl, fineserve, or saved (a file of this command, to change it).
Models and their rates come from a configuration (--config) or from --models, --rate and --alpha.  docs/workloads.md has
the file and the laws; what was drawn is printed, with a table by model.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minserve.config import load_config
from minserve.workload_saved import load_workload, read_fineserve, save_workload
from minserve.workload_tables import Count, quarter, read_azure, read_burst, read_jsonl, read_sharegpt
from sched.arrivals import MOST_TOKENS, POPULARITY, Rows
from sched.metrics import Slo
from sched.synthetic import Laws, Lengths, Model, power_law, replayed, synthetic
from sched.workload import MOST_S, Workload, cut, described, merged, only, rescaled

TABLES = ("azure", "burstgpt", "sharegpt", "jsonl")
SAVED = ("fineserve", "saved")
SOURCES = ("synthetic", *TABLES, *SAVED)


def read_rows(source: str, file: Path, tokenizer: str | None) -> tuple[Rows, str]:
    """The rows, and how their lengths were found."""
    if source == "azure":
        return read_azure(file), "tokens as the trace has them"
    if source == "burstgpt":
        return read_burst(file), "tokens as the trace has them, failures left out"
    count, how = counter(tokenizer)
    if source == "sharegpt":
        return read_sharegpt(file, count), f"first turns, {how}"
    return read_jsonl(file, count), f"tokens as the file has them, of texts {how}"


def counter(path: str | None) -> tuple[Count, str]:
    if path is None:
        return quarter, "characters / 4 (--tokenizer PATH counts them)"
    from minserve.text import Tokenizer  # needs jinja2 and tokenizers; nothing else here does

    tokenizer = Tokenizer.load(path)
    return lambda text: max(1, len(tokenizer.encode(text))), f"tokens of {path}"


def models_of(args: argparse.Namespace, rows: Rows | None) -> list[Model]:
    """From the configuration, or the names on the command line; rates and lengths given there go before."""
    lengths = Lengths(
        prompt_mean=args.prompt_tokens or 512.0,
        output_mean=args.output_tokens or 128.0,
        prompt_median=args.prompt_median,
        output_median=args.output_median,
        rows=rows,
        max_len=args.max_len,
    )
    if args.config is None:
        names = [n.strip() for n in (args.models or "").split(",") if n.strip()]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"--models must be names with commas in between, each once, got {args.models!r}")
        models = [Model(n, 0.0, lengths) for n in names]
    else:
        if args.models is not None:
            raise ValueError(f"--models goes without --config, which names them, got {args.models!r}")
        models = []
        for m in load_config(args.config).models:
            own = dataclasses.replace(
                lengths,
                prompt_mean=args.prompt_tokens or m.lengths.prompt_tokens,
                output_mean=args.output_tokens or m.lengths.output_tokens,
                max_len=min(args.max_len, m.max_model_len or args.max_len),
            )
            models.append(Model(m.name, m.rate or 0.0, own, Slo(m.slo.ttft_ms / 1e3, m.slo.tpot_ms / 1e3)))
    return _rated(args, models)


def _rated(args: argparse.Namespace, models: list[Model]) -> list[Model]:
    total, alpha = args.rate, args.alpha
    if alpha is not None and total is None:
        raise ValueError("--alpha divides a total: --rate must give it")
    if alpha is not None:
        rates = power_law([m.name for m in models], total, alpha, args.seed)
    elif total is None:
        rates = {m.name: m.rate for m in models}
    else:
        known = sum(m.rate for m in models)
        rates = {m.name: total * (m.rate / known if known else 1 / len(models)) for m in models}
    return [dataclasses.replace(m, rate=rates[m.name]) for m in models]


def make(args: argparse.Namespace) -> Workload:
    """What the command line says; ValueError names the flag that is wrong."""
    if (args.source == "synthetic") != (args.file is None):
        raise ValueError(
            f"{args.source} {'takes no file' if args.file else 'needs a file'}, got {args.file!r}"
        )
    if args.source in SAVED:
        file = Path(args.file)
        found = load_workload(file) if args.source == "saved" else read_fineserve(file, args.seed)
    else:
        found = _drawn(args)
    return changed(args, found)


def _drawn(args: argparse.Namespace) -> Workload:
    rows, how = None, ""
    if args.source != "synthetic":
        rows, how = read_rows(args.source, Path(args.file), args.tokenizer)
    arrivals = args.arrivals or ("trace" if rows is not None and rows.times_s is not None else "drawn")
    models = models_of(args, rows if arrivals == "drawn" else None)
    if arrivals == "trace":
        if rows is None or rows.times_s is None:
            raise ValueError(f"--arrivals trace needs a source with times, got {args.source}")
        found = replayed(rows, models, _names(args.map, rows, models), seed=args.seed)
        if args.rate is not None:
            own = len(found.requests) / found.duration_s
            found = rescaled(found, args.rate / own, f"--rate over the {own:g} a second of the trace")
    else:
        silent = [m.name for m in models if not m.rate > 0]
        if silent:
            raise ValueError(
                f"a rate must be given for {', '.join(silent)}: in the configuration, or --rate for all"
            )
        laws = Laws(
            cv=args.cv, groups=args.groups, on_s=args.on_s, quiet=args.quiet, prefix_share=args.prefix_share,
            prefixes=args.prefixes, prefix_tokens=args.prefix_tokens, turns=args.turns, think_s=args.think_s,
        )  # fmt: skip
        found = synthetic(models, laws, seconds=args.duration or 600.0, seed=args.seed)
    info: dict[str, Any] = {"source": args.source, **found.info}
    if rows is not None:
        info |= {"file": Path(args.file).name, "counted": how, "rows": len(rows)}
    if args.alpha is not None:
        info["laws"] = {"popularity": f"{POPULARITY}, alpha {args.alpha:g}"} | info["laws"]
    return dataclasses.replace(found, info=info)


def _names(given: str | None, rows: Rows, models: list[Model]) -> dict[str, str]:
    """The source's names to ours: as --map says, or the same names, or the most asked to the one with the highest rate."""
    theirs = sorted(set(rows.names), key=lambda n: (-rows.names.count(n), n))
    ours = [m.name for m in models]
    if given is not None:
        pairs = dict(p.partition("=")[::2] for p in given.split(","))
        wrong = sorted(set(pairs.values()) - set(ours)) or sorted(set(pairs) - set(theirs))
        if wrong:
            choices = f"THEIRS=OURS of {', '.join(theirs) or 'no names'} and {', '.join(ours)}"
            raise ValueError(f"--map must be {choices}, got {wrong[0]!r}")
        return pairs
    if set(theirs) <= set(ours):
        return {n: n for n in theirs}
    if len(theirs) > len(ours):
        raise ValueError(
            f"--map must say which of {', '.join(ours)} stands for each of {', '.join(theirs)}: there are more of these"
        )
    most = sorted(models, key=lambda m: -m.rate)
    return {n: m.name for n, m in zip(theirs, most, strict=False)}


def changed(args: argparse.Namespace, found: Workload) -> Workload:
    """Rescaled, cut, split, merged, in this order."""
    if args.rate_scale != 1:
        found = rescaled(found, args.rate_scale, "--rate-scale")
    if args.cut is not None:
        start, _, end = args.cut.partition(":")
        try:
            found = cut(found, float(start or 0), float(end) if end else found.duration_s)
        except ValueError as error:
            raise ValueError(f"--cut must be START:END in seconds, got {args.cut!r}: {error}") from None
    elif args.duration is not None and args.duration < found.duration_s:
        found = cut(found, 0.0, args.duration)
    if args.only is not None:
        found = only(found, args.only.split(","))
    if args.merge:
        found = merged([found, *(load_workload(Path(f)) for f in args.merge)])
    if found.duration_s > MOST_S:
        raise ValueError(
            f"a workload must last at most {MOST_S:g} s, got {found.duration_s:g}: --cut makes a part"
        )
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m minserve.workload", description=(__doc__ or "").split("\n\n")[0]
    )
    p.add_argument("source", choices=SOURCES)
    p.add_argument("file", nargs="?")
    p.add_argument(
        "--out", metavar="FILE.jsonl", help="where to write it; without, only the table is printed"
    )
    p.add_argument("--config", metavar="YAML", help="models, their rate, lengths, slo and max_model_len")
    p.add_argument("--models", metavar="A,B", help="names, where there is no configuration")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--duration", type=float, metavar="S", help="seconds; default 600, of a trace all of it")
    p.add_argument("--rate", type=float, help="requests a second of all models together")
    p.add_argument(
        "--alpha", type=float, help=f"--rate divided by {POPULARITY}; default: as their rates, or equally"
    )
    p.add_argument(
        "--rate-scale", type=float, default=1.0, metavar="X", help="X times as many a second, at the end"
    )
    draw = p.add_argument_group("arrivals")
    draw.add_argument(
        "--arrivals", choices=("trace", "drawn"), help="default: a source's own where it has times"
    )
    draw.add_argument("--cv", type=float, default=1.0, help="of Gamma gaps; 1 is Poisson's")
    draw.add_argument("--groups", type=int, default=1, help="bursts: sets of models that are active in turn")
    draw.add_argument("--on-s", type=float, default=30.0, help="how long a set is active")
    draw.add_argument("--quiet", type=float, default=0.1, help="rate of the others, as a part of that")
    draw.add_argument("--map", metavar="THEIRS=OURS,...", help="the source's models to ours")
    size = p.add_argument_group("lengths, in tokens")
    size.add_argument("--tokenizer", metavar="PATH", help="of a model folder, to count texts with")
    size.add_argument(
        "--prompt-tokens", type=float, metavar="MEAN", help="lognormal; default the configuration's"
    )
    size.add_argument("--output-tokens", type=float, metavar="MEAN")
    size.add_argument(
        "--prompt-median", type=float, help="default: mean over median as Azure's conversations"
    )
    size.add_argument("--output-median", type=float)
    size.add_argument(
        "--max-len", type=int, default=MOST_TOKENS, help="prompt plus answer, where the model has no less"
    )
    share = p.add_argument_group("what prompts share")
    share.add_argument(
        "--prefix-share", type=float, default=0.0, help="of sessions that begin with a common prefix"
    )
    share.add_argument("--prefixes", type=int, default=1, help="how many there are")
    share.add_argument("--prefix-tokens", type=int, default=256)
    share.add_argument("--turns", type=float, default=1.0, help="of a session, in the mean")
    share.add_argument("--think-s", type=float, default=10.0, help="between turns, in the mean")
    after = p.add_argument_group("afterwards")
    after.add_argument("--cut", metavar="START:END", help="seconds")
    after.add_argument("--only", metavar="A,B", help="these models alone")
    after.add_argument(
        "--merge", action="append", metavar="FILE.jsonl", help="with another; may be given again"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    args = parser().parse_args(argv)
    try:
        if not 0 <= args.seed < 1 << 63:
            raise ValueError(f"--seed must be an integer in [0, 2^63), got {args.seed}")
        if args.duration is not None and not 0 < args.duration <= MOST_S:
            raise ValueError(f"--duration must be seconds > 0 and at most {MOST_S:g}, got {args.duration}")
        for name in ("prompt_tokens", "output_tokens", "prompt_median", "output_median"):
            mean = getattr(args, name)
            if mean is not None and not 1 <= mean <= MOST_TOKENS:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be tokens in [1, {MOST_TOKENS}], got {mean:g}")
        if not 2 <= args.max_len <= MOST_TOKENS:
            raise ValueError(f"--max-len must be tokens in [2, {MOST_TOKENS}], got {args.max_len}")
        found = make(args)
        if not found.requests:
            raise ValueError("no request came of it: a longer --duration or a higher --rate gives some")
        if args.out is not None:
            save_workload(found, Path(args.out))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"minserve: {error}\n")
        return 2
    head = [f"{key}: {found.info[key]}" for key in ("source", "file", "counted") if key in found.info]
    sys.stdout.write("\n".join([*head, described(found)]) + "\n")
    if args.out is not None:
        sys.stdout.write(f"written to {args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
