"""From YAML text to frozen dataclasses: every mistake is one ValueError naming the key, the value and the choices.

A dataclass field made with `key(kind, default)` is a key of the file; its Kind reads and checks the value.  The YAML
read here is small on purpose: no aliases, tags or duplicate keys, YAML 1.2 scalars (`yes` is text, `1e3` a number),
bounded size and depth.  No key of minserve is named here: those are in config.py.
"""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

MAX_FILE_BYTES = 256 * 1024
MAX_DEPTH = 16
BYTE_UNITS = {
    "b": 1,
    **{p + "b": 1000 ** (i + 1) for i, p in enumerate("kmgt")},
    **{p + "ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")},
}
# as vLLM reads them: 8k is 8,000 and 8K is 8,192
COUNT_UNITS = {"": 1, "k": 1000, "m": 1000**2, "K": 1024, "M": 1024**2}

T = TypeVar("T")


class At(NamedTuple):
    """Where a value stands: its dotted key, and the folder that relative paths start from."""

    key: str
    base: Path

    def sub(self, name: str) -> "At":
        return self._replace(key=f"{self.key}.{name}" if self.key else name)

    def item(self, index: int) -> "At":
        return self._replace(key=f"{self.key}[{index}]")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a key accepts.  `says` completes "must be ..."; `read(at, value)` returns the value to keep or raises.

    Every Kind accepts what it returns, so that `read_section(cls, dataclasses.asdict(x))` gives x back.
    """

    says: str
    read: Callable[[At, Any], Any]


def show(value: Any) -> str:
    """A value as the file spells it, at most 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def near(word: str, known: list[str]) -> str:
    """The nearest known word as a question, or nothing."""
    match = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    match = match or [name for name in known if len(word) > 2 and name.startswith(word.lower())]
    return f"; did you mean {match[0]!r}?" if match else ""


def refuse(at: At, says: str, value: Any, hint: str = "") -> ValueError:
    return ValueError(f"{at.key} must be {says}, got {show(value)}{hint}")


def claim(seen: dict[str, str], name: str, at: At) -> None:
    if name in seen:
        raise ValueError(f"{at.key} must be a name of its own, got {name!r}: {seen[name]} has it")
    seen[name] = at.key


def boolean() -> Kind:
    def read(at: At, value: Any) -> bool:
        if not isinstance(value, bool):
            raise refuse(at, says, value)
        return value

    says = "true or false"
    return Kind(says, read)


def _amount(value: Any, units: Mapping[str, int], fold: bool) -> int | None:
    """A whole number, plain or with a unit, or None where it is neither."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})", value)
    if match is None:
        return None
    unit = units.get(match[2].lower() if fold else match[2])
    if unit is None:
        return None
    amount = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    return int(amount) if amount == int(amount) else None


def integer(low: int, high: int) -> Kind:
    """A whole number; tokens and requests may be spelled 8k (8,000) or 8K (8,192)."""

    def read(at: At, value: Any) -> int:
        amount = _amount(value, COUNT_UNITS, fold=False)
        if amount is None or not low <= amount <= high:
            raise refuse(at, says, value)
        return amount

    says = f"an integer in [{low}, {high}]"
    return Kind(says, read)


def size(low: int, high: int, multiple: int = 1) -> Kind:
    """Bytes: a whole number, or text such as 2 MiB (2^20) or 2 MB (10^6)."""

    def read(at: At, value: Any) -> int:
        amount = _amount(value, BYTE_UNITS, fold=True)
        if amount is None or not low <= amount <= high or amount % multiple:
            raise refuse(at, says, value)
        return amount

    step = f", a multiple of {multiple}" if multiple > 1 else ""
    says = f"a size such as 64 MiB, in [{low}, {high}] bytes{step}"
    return Kind(says, read)


def number(low: float, high: float) -> Kind:
    def read(at: At, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise refuse(at, says, value)
        return float(value)

    says = f"a number in [{low:g}, {high:g}]"
    return Kind(says, read)


def choice(*names: str, **aliases: str) -> Kind:
    """One of `names`; `aliases` maps further spellings to them (an underscore in one stands for a hyphen)."""

    def read(at: At, value: Any) -> str:
        if isinstance(value, str) and value in known:
            return known[value]
        raise refuse(at, says, value, near(value, list(known)) if isinstance(value, str) else "")

    known = {n: n for n in names} | {a.replace("_", "-"): n for a, n in aliases.items()}
    says = "one of " + ", ".join(names)
    return Kind(says, read)


def text(pattern: str, says: str) -> Kind:
    def read(at: At, value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise refuse(at, says, value)
        return value

    return Kind(says, read)


NAME = text(
    r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}", "a name of letters, digits and . _ : / -, at most 128 of them"
)


def file_path() -> Kind:
    """A file or folder, relative to the YAML file; kept as an absolute path.  It need not exist yet."""

    def read(at: At, value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 4096:
            raise refuse(at, says, value)
        try:
            return str((at.base / Path(value).expanduser()).resolve())
        except (OSError, RuntimeError):  # a loop of links, or a ~user that nobody knows
            raise refuse(at, says, value) from None

    says = "the path of a file or folder"
    return Kind(says, read)


def maybe(kind: Kind, word: str | None = None) -> Kind:
    """`kind`, or null (spelled `word` too) for None."""

    def read(at: At, value: Any) -> Any:
        if value is None or (word is not None and value == word):
            return None
        try:
            return kind.read(at, value)
        except ValueError as error:
            raise ValueError(f"{error} (or {word or 'null'})") from None

    return Kind(f"{kind.says}, or {word or 'null'}", read)


def listing(kind: Kind, most: int, least: int = 0) -> Kind:
    def read(at: At, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            raise refuse(at, says, value)
        return tuple(kind.read(at.item(i), v) for i, v in enumerate(value))

    says = f"a list of {least} to {most} entries"
    return Kind(says, read)


def section(cls: type) -> Kind:
    def read(at: At, value: Any) -> Any:
        return value if isinstance(value, cls) else read_section(cls, value, at)

    return Kind("a mapping", read)


def key(kind: Kind, default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """A dataclass field that the file may set; without a default or a factory of one it must."""
    if factory is not MISSING:
        return field(default_factory=factory, metadata={"kind": kind})
    return field(default=default, metadata={"kind": kind})


def kinds(cls: type) -> dict[str, Kind]:
    """Key to Kind, in the order of the file's documentation."""
    return {f.name: f.metadata["kind"] for f in dataclasses.fields(cls)}


def check_keys(value: Any, known: list[str], at: At) -> dict[str, Any]:
    """The mapping itself, every key of it known.  An empty section (null) is an empty mapping."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refuse(
            at if at.key else at.sub("the file"), f"a mapping with keys among {', '.join(known)}", value
        )
    for name in value:
        if name not in known:
            hint = near(str(name), known) or f"; the keys are {', '.join(known)}"
            raise ValueError(f"unknown key {at.sub(str(name)).key:.120} (value {show(value[name])}){hint}")
    return value


def read_section(cls: type[T], value: Any, at: At) -> T:
    """A `cls` from a mapping; ValueError names the first key that is unknown, missing or wrong."""
    known = kinds(cls)
    given = check_keys(value, list(known), at)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{at.sub(f.name).key} is missing: it must be {known[f.name].says}")
    return cls(**{name: known[name].read(at.sub(name), v) for name, v in given.items()})


PLAIN: dict[str, Any] = {"": None, "~": None, "null": None, "true": True, "false": False}


def plain_value(value: str) -> Any:
    """What an unquoted word of the file means."""
    if value.lower() in PLAIN:
        return PLAIN[value.lower()]
    if re.fullmatch(r"[-+]?[0-9]{1,19}", value):
        return int(value)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", value):
        real = float(value)
        return real if math.isfinite(real) else value
    return value


def _line(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}"


def _build(event: yaml.Event, events: Iterator[yaml.Event], at: At, depth: int) -> Any:
    """The value that begins with `event`, as dict, list, str, int, float, bool or None."""
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        where = f"{_line(event)}: {at.key or 'the file'} uses the anchor or alias {event.anchor!r:.80}"
        raise ValueError(f"{where}; those are not read: share values through `defaults`")
    if getattr(event, "tag", None) is not None:
        raise ValueError(
            f"{_line(event)}: {at.key or 'the file'} has the tag {event.tag!r:.80}; tags are not read"
        )
    if depth > MAX_DEPTH:
        raise ValueError(f"{_line(event)}: {at.key:.80} must be nested at most {MAX_DEPTH} deep")
    if isinstance(event, yaml.ScalarEvent):
        return plain_value(event.value) if event.style is None else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        return _build_list(events, at, depth)
    return _build_dict(events, at, depth)


def _build_list(events: Iterator[yaml.Event], at: At, depth: int) -> list[Any]:
    out: list[Any] = []
    while True:
        event = next(events)
        if isinstance(event, yaml.SequenceEndEvent):
            return out
        out.append(_build(event, events, at.item(len(out)), depth + 1))


def _build_dict(events: Iterator[yaml.Event], at: At, depth: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    while True:
        event = next(events)
        if isinstance(event, yaml.MappingEndEvent):
            return out
        if not isinstance(event, yaml.ScalarEvent):
            raise ValueError(f"{_line(event)}: a key of {at.key or 'the file'} must be plain text")
        name = str(event.value)
        value = _build(next(events), events, at.sub(name), depth + 1)
        if name in out:
            raise ValueError(
                f"{_line(event)}: key {at.sub(name).key} is given twice, the second time {show(value)}"
            )
        out[name] = value


def read_yaml(path: Path) -> Any:
    """The plain values in a YAML file.  ValueError, without the file's name, says what is wrong and on which line."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"the file must be at most {MAX_FILE_BYTES} bytes, got more")
    try:
        return read_text(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the file must be UTF-8 text, got byte {data[error.start]:#04x} at {error.start}"
        ) from None


def read_text(data: str) -> Any:
    """The plain values in YAML text of one document."""
    try:
        events = yaml.parse(data, Loader=yaml.BaseLoader)
        next(events)  # the start of the stream
        first = next(events)
        if isinstance(first, yaml.StreamEndEvent):
            return None
        value = _build(next(events), events, At("", Path()), 0)
        next(events)  # the end of the document
        last = next(events)
        if not isinstance(last, yaml.StreamEndEvent):
            raise ValueError(f"{_line(last)}: the file must hold one YAML document, got a second")
        return value
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise ValueError(f"the file is not YAML: {' '.join(str(error).split())[:120]}") from None
