"""What benches of schedulers do around a run: arguments that all have, the table, a plot, the kept result, the line of JSON."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


def parser_of(name: str, doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Of `python -m bench.NAME`, with the flags of all; `quick`: what --quick leaves."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=(doc or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first run")
    parser.add_argument("--record", action="store_true", help=f"keep the result in bench/results/{name}.json")
    parser.add_argument("--recorded", action="store_true", help="run nothing, show the result that was kept")
    parser.add_argument("--plots", metavar="DIR", type=Path, help="draw the result there")
    return parser


def add_sources(parser: argparse.ArgumentParser, *kinds: str) -> None:
    """Where step times and lengths come from."""
    parser.add_argument("--costs", metavar="CSV", help="step times in FineServe's form; default rooflines")
    for kind in kinds:
        parser.add_argument(f"--{kind}", metavar="CSV", help=f"Azure's trace {kind!r}: its lengths")


def show(
    name: str,
    args: argparse.Namespace,
    run: Callable[[], Result],
    table: Callable[[Result], str],
    draw: Callable[[Result, Path], str] | None = None,
) -> int:
    """The exit status: 2 for a mistake in what was given."""
    path = RESULTS / f"{name}.json"
    try:
        result = json.loads(path.read_text()) if args.recorded else run()
        sys.stdout.write(table(result) + "\n")
        if args.plots and draw:
            sys.stdout.write(draw(result, args.plots / f"{name}.png") + "\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"bench.{name}: {error}\n")
        return 2
    if args.record and not args.recorded:
        path.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0
