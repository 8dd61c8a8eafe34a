"""Groups of models behind one name, such as several precisions of one: the section `groups` of a configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minserve.schema import NAME, At, choice, claim, key, listing, number, refuse, section
from sched.router import TIER_POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """How requests for a group of models are routed: see sched.router.Tiers."""

    name: str = key(NAME)
    policy: str = key(choice(*TIER_POLICIES), "slo")
    margin: float = key(number(0.01, 1), 0.7)
    hysteresis: float = key(number(0, 0.99), 0.2)


def read_groups(
    value: Any, named: Sequence[str | None], taken: dict[str, str], at: At
) -> tuple[GroupConfig, ...]:
    """The groups of the file and, with the defaults, those that only models name.  `named`: the group of each model;
    `taken`: every other name to the key that has it."""
    groups = {}
    for i, group in enumerate(listing(section(GroupConfig), 64).read(at, [] if value is None else value)):
        claim(taken, group.name, at.item(i).sub("name"))
        groups[group.name] = group
    used = dict.fromkeys(name for name in named if name is not None)
    for i, name in enumerate(groups):
        if name not in used:
            says = f"one that models name as their group: {', '.join(used) or 'none of them has one'}"
            raise refuse(at.item(i).sub("name"), says, name)
    for i, name in enumerate(named):
        if name is not None and name not in groups:
            claim(taken, name, At("models", Path()).item(i).sub("group"))
            groups[name] = GroupConfig(name=name)
    return tuple(groups.values())
