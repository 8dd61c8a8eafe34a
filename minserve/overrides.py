"""Which layers of a plain checkpoint are quantized to what: `quantization`, its group size, and exceptions by name.

A pattern is compressed-tensors' (a module's full name, or `re:` and a regular expression that its beginning matches) or
a glob (`model.layers.0.*`).  The first that matches a layer decides.  Needs no torch: config.py checks with it too.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from minserve.schema import At, Kind, refuse

SCHEMES = {
    "w8a8-int8": "w8a8-int8",
    "w8a8": "w8a8-int8",
    "w8a8-fp8": "w8a8-fp8",
    "w4a8-int8": "w4a8-int8",
    "w4a8": "w4a8-int8",
    "w4a8-fp8": "w4a8-fp8",
}
GROUPS = (16, 32, 64, 128)
CHANNEL = "channel"
SAYS_SCHEME = (
    "none, w8a8-int8, w8a8-fp8, w4a8-int8 or w4a8-fp8, the last two with -g16, -g32, -g64, -g128 or -channel"
)


@dataclass(frozen=True, slots=True)
class OnlineScheme:
    """`name` is none or a key of ONLINE in quant/scheme.py; `group` its columns a scale, or channel; None: the default."""

    name: str
    group: int | str | None = None

    @classmethod
    def parse(cls, text: str) -> "OnlineScheme":
        """ValueError for anything but SAYS_SCHEME."""
        match = re.fullmatch(r"([a-z0-9]+(?:-int8|-fp8)?)(?:-(?:g([0-9]{2,3})|(channel)))?", text)
        name = "none" if text == "none" else SCHEMES.get(match[1]) if match else None
        group: int | str | None = None
        if match and name is not None:
            group = int(match[2]) if match[2] else match[3]
        grouped = group is None or (
            name is not None and name.startswith("w4") and group in (*GROUPS, CHANNEL)
        )
        if name is None or not grouped:
            raise ValueError(f"must be {SAYS_SCHEME}, got {text!r}")
        return cls(name, group)


def check_pattern(pattern: str) -> str:
    """ValueError where it is empty or no regular expression."""
    if not pattern or len(pattern) > 400 or not pattern.isprintable():
        raise ValueError(
            f"must be a name, a glob or re: and a regular expression, at most 400 characters, got {pattern!r:.80}"
        )
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"must be a regular expression after re:, got {pattern!r:.80} ({error})"
            ) from None
    return pattern


def matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module or fnmatchcase(module, pattern)


@dataclass(slots=True)
class Overrides:
    """What a model's keys say beside `quantization`: `group` of 4-bit layers, and the exceptions in `rules`.

    `unused`: patterns that no layer has met yet.
    """

    rules: tuple[tuple[str, str], ...] = ()
    group: int | str | None = None
    unused: dict[str, None] = field(init=False)

    def __post_init__(self) -> None:
        for pattern, text in self.rules:
            check_pattern(pattern)
            OnlineScheme.parse(text)
        self.unused = dict.fromkeys(pattern for pattern, _ in self.rules)

    def find(self, module: str) -> OnlineScheme | None:
        """What the first matching pattern says of `module`; None where none matches."""
        found = None
        for pattern, text in self.rules:
            if matches(pattern, module):
                # one behind another that matched is not idle, though it decides nothing
                self.unused.pop(pattern, None)
                found = found or OnlineScheme.parse(text)
        return found

    def check_used(self) -> None:
        """ValueError naming the patterns that matched no layer."""
        if self.unused:
            raise ValueError(
                f"quantization_overrides must match linear layers (lm_head has a key of its own), got "
                f"{', '.join(map(repr, self.unused))}, which match none"
            )


MAX_OVERRIDES = 1024


def _group_size() -> Kind:
    def read(at: At, value: Any) -> int | str:
        if isinstance(value, bool) or value not in (*GROUPS, CHANNEL, -1):
            raise refuse(at, says, value)
        # -1 as llm-compressor has it
        return CHANNEL if value == -1 else value

    says = f"{', '.join(map(str, GROUPS))} columns, or {CHANNEL}"
    return Kind(says, read)


def by_layer(values: str, parse: Callable[[str], object]) -> Kind:
    """A mapping of layers to `values`, in its order; kept as pairs.  `parse` raises ValueError for what is none of them."""

    def read(at: At, value: Any) -> tuple[tuple[str, str], ...]:
        pairs = list(value.items()) if isinstance(value, dict) else value
        good = isinstance(pairs, list | tuple) and len(pairs) <= MAX_OVERRIDES
        if not good or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            raise refuse(at, says, value)
        for pattern, own in pairs:
            for check, part, where in (
                (check_pattern, pattern, at),
                (parse, own, at.sub(str(pattern))),
            ):
                if not isinstance(part, str):
                    raise refuse(where, "text", part)
                try:
                    check(part)
                except ValueError as error:
                    raise ValueError(f"{where.key:.200} {str(error).strip()}") from None
        return tuple((pattern, own) for pattern, own in pairs)

    says = f"a mapping of at most {MAX_OVERRIDES} layers (names, globs, re: expressions) to {values}"
    return Kind(says, read)


GROUP_SIZE, OVERRIDES = _group_size(), by_layer("schemes", OnlineScheme.parse)
