"""The keys `policy` and `policy_options` of a model: which rule of sched/policies.py its Batcher follows, and how."""

from collections.abc import Mapping, Sequence
from typing import Any

from minserve.schema import At, Kind, choice, near, plain_value, refuse
from sched.limits import Limits
from sched.policies import POLICIES, make_policy, options_of

Options = tuple[tuple[str, bool | int | float | str], ...]
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
POLICY = choice(*POLICIES)
SAYS = "a mapping of the policy's options, or text such as shed=hopeless"
# of no consequence: to see whether a policy takes its options
LIMITS = Limits(max_running=1, max_step_tokens=1, max_chunk_tokens=1, max_model_len=1, max_waiting=1)


def _read_options(at: At, value: Any) -> Options:
    """Sorted pairs, whichever way they are written."""
    given = value
    if isinstance(given, str):
        parts = [part.partition("=") for part in given.split(",") if part.strip()]
        if any(not sep for _, sep, _ in parts):
            raise refuse(at, SAYS, value)
        given = [(name.strip(), plain_value(text.strip())) for name, _, text in parts]
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, Sequence) or len(pairs) > 16:
        raise refuse(at, SAYS, value)
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise refuse(at, SAYS, value)
        if type(pair[1]) not in NAMES:
            raise refuse(at.sub(pair[0][:80]), "a number, text, or true or false", pair[1])
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise refuse(at, "options that are named once", value)
    return tuple(sorted((name, option) for name, option in pairs))


OPTIONS = Kind(SAYS, _read_options)


def check_policy(policy: str, options: Options, at: At) -> None:
    """ValueError for an option that the policy does not have, or a value that it does not take."""
    known, at = options_of(policy), at.sub("policy_options")
    for name, value in options:
        if name not in known:
            says = f"among the options of {policy}: {', '.join(known) or 'there are none'}"
            raise refuse(at, says, name, near(name, list(known)))
        kind = type(known[name])
        if type(value) is not kind and (kind is not float or type(value) is not int):
            raise refuse(at.sub(name), f"{NAMES[kind]}, by default {known[name]}", value)
    try:
        make_policy(policy, LIMITS, None, dict(options))
    except ValueError as error:
        raise ValueError(f"{at.key}: {error}") from None
