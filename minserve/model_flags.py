"""Command line flags for the keys of a model: `--max-model-len` for max_model_len, read as the YAML file would be."""

import argparse
from typing import Any

from minserve.config import MAPPINGS, ModelEntry
from minserve.schema import kinds, plain_value

NO_FLAG = ("path", "aliases", "placement", "slo", "lengths", "group", "tier", *MAPPINGS)
# keys that say how, not what: with a file they are every model's
FOR_ALL = ("policy", "policy_options")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each plain key of a model; not given is None."""
    group = parser.add_argument_group(
        "model", "keys of the one model that --model names; examples/full.yaml explains them"
    )
    for name, kind in kinds(ModelEntry).items():
        if name not in NO_FLAG:
            says = kind.says.replace("%", "%%")
            group.add_argument(
                f"--{name.replace('_', '-')}",
                dest=f"model_{name}",
                metavar="X",
                help=f"{says}; with a CONFIG.yaml of all its models" if name in FOR_ALL else says,
            )


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The keys that the flags of `add_model_flags` gave, read as the YAML file would read them."""
    given = {
        name.removeprefix("model_"): v
        for name, v in vars(args).items()
        if name.startswith("model_") and v is not None
    }
    found = {name: plain_value(v) for name, v in given.items()}
    # options are of one policy: another one on the command line begins with its defaults
    return {"policy_options": ()} | found if "policy" in found else found
