"""`python -m quant convert SRC --out DST`; see quant/convert.py."""

import argparse
import sys
from collections.abc import Sequence

from quant import convert

COMMANDS = {"convert": convert}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2 for a caller's mistake, which is printed."""
    parser = argparse.ArgumentParser(prog="python -m quant", description="Tools for quantized checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=command.__doc__))
    args = parser.parse_args(argv)
    try:
        status: int = COMMANDS[args.command].run(args)
        return status
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
