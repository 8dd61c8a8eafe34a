"""Traces of other people's services to rows of lengths: Azure's and BurstGPT's CSV, ShareGPT's JSON, plain JSONL.

Each reader takes a path and gives `Rows`; a file that is not what it is said to be is a ValueError that begins with its
path and names the row, the value and what should stand there.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sched.arrivals import MOST_TOKENS, Rows

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURST = ("Timestamp", "Model", "Request tokens", "Response tokens")
MOST_BYTES = 4 << 30
# of ShareGPT, as others filter it: shorter ones are no conversation, longer ones no window of that time holds
LEAST, MOST_PROMPT, MOST_TOTAL = 4, 2048, 4096
Count = Callable[[str], int]


def quarter(text: str) -> int:
    """Tokens of a text by its characters, where there is no tokenizer."""
    return max(1, round(len(text) / 4))


def file_text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{str(path)!r} must have at most {MOST_BYTES} bytes, got {path.stat().st_size}")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def _rows(path: Path, columns: Sequence[str], least: int) -> list[dict[str, str]]:
    try:
        rows = list(csv.DictReader(file_text(path).splitlines()))
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if len(rows) < least or any(name not in rows[0] for name in columns):
        found = ", ".join(str(name) for name in rows[0])[:200] if rows else "nothing"
        said = f"must have columns {', '.join(columns)} and {least} rows, got {found}"
        raise ValueError(f"{str(path)!r} {said}")
    return rows


def _each(path: Path, rows: Sequence[Any], read: Callable[[Any], Any]) -> Iterator[Any]:
    """ValueError of `read` with the file and the row, counted from 1 behind the head."""
    for i, row in enumerate(rows, 1):
        try:
            yield read(row)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{str(path)!r} has a row that cannot be read: row {i}: {error}") from error


def tokens(value: Any, name: str, least: int = 0) -> int:
    """A count as a file has it.  A CSV's are text."""
    if isinstance(value, str):
        number = int(value) if value.strip().isdecimal() else None
    else:
        number = value if type(value) is int else None
    if number is None or not least <= number <= MOST_TOKENS:
        raise ValueError(f"{name} must be an integer in [{least}, {MOST_TOKENS}], got {str(value)[:60]!r}")
    return number


def seconds(value: Any, name: str) -> float:
    try:
        found = (
            float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
        )
    except ValueError:
        found = math.nan
    if not 0 <= found < 1e12:
        raise ValueError(f"{name} must be seconds >= 0, got {str(value)[:60]!r}")
    return found


def _sorted(
    times_s: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int],
    names: Sequence[str] = (),
    sessions: Sequence[str] = (),
) -> Rows:
    """By time, from 0 on; rows of the same time stay in their order."""
    t = np.asarray(times_s, float)
    order = np.argsort(t, kind="stable")
    return Rows(
        np.maximum(np.asarray(prompts)[order], 1),
        np.maximum(np.asarray(outputs)[order], 1),
        t[order] - t.min(),
        tuple(names[i] for i in order) if names else (),
        tuple(sessions[i] for i in order) if sessions else (),
    )


def read_azure(path: Path) -> Rows:
    """Azure's LLM trace of 2023.  Counts of 0 become 1."""

    def read(row: dict[str, str]) -> tuple[float, int, int]:
        # seven digits of a second's fraction are one more than fromisoformat takes
        at = datetime.fromisoformat(row["TIMESTAMP"][:26])
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        return at.timestamp(), tokens(row[AZURE[1]], AZURE[1]), tokens(row[AZURE[2]], AZURE[2])

    times, prompts, outputs = zip(*_each(path, _rows(path, AZURE, 2), read), strict=True)
    return _sorted(times, prompts, outputs)


def read_burst(path: Path) -> Rows:
    """BurstGPT, with its two models and, in its later releases, its sessions; failures (no response token) left out."""

    def read(row: dict[str, str]) -> tuple[float, int, int, str, str]:
        counts = tokens(row[BURST[2]], BURST[2]), tokens(row[BURST[3]], BURST[3])
        name = row["Model"]
        if not name:
            raise ValueError(f"Model must be a name, got {name!r}")
        return seconds(row["Timestamp"], "Timestamp"), *counts, name, row.get("Session ID") or ""

    kept = [r for r in _each(path, _rows(path, BURST, 1), read) if r[2] > 0]
    if not kept:
        raise ValueError(f"{str(path)!r} must have a row with Response tokens > 0, got failures alone")
    return _sorted(*zip(*kept, strict=True))


def read_sharegpt(path: Path, count: Count = quarter) -> Rows:
    """First turn of a human and first answer of each conversation, of the lengths that others keep of it."""
    try:
        found = json.loads(file_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{str(path)!r} must be a list of conversations, got {type(found).__name__}")
    pairs = [p for p in _each(path, found, _first_turns) if p is not None]
    lengths = [(count(prompt), count(answer)) for prompt, answer in pairs]
    kept = [(p, o) for p, o in lengths if LEAST <= p <= MOST_PROMPT and o >= LEAST and p + o <= MOST_TOTAL]
    if not kept:
        raise ValueError(
            f"{str(path)!r} must have a conversation with a prompt of {LEAST} to {MOST_PROMPT} tokens and at least "
            f"{LEAST} of answer, at most {MOST_TOTAL} together, got none of {len(found)}"
        )
    prompts, outputs = zip(*kept, strict=True)
    return Rows(np.asarray(prompts), np.asarray(outputs))


def _first_turns(conversation: Any) -> tuple[str, str] | None:
    turns = conversation.get("conversations") if isinstance(conversation, dict) else None
    if not isinstance(turns, list):
        raise ValueError(f"a conversation must have a list `conversations`, got {str(conversation)[:60]!r}")
    said: list[tuple[str, str]] = []
    for turn in turns:
        who, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(who, str) or not isinstance(value, str):
            raise ValueError(f"a turn must have the texts `from` and `value`, got {str(turn)[:60]!r}")
        said.append((who, value))
    start = next((i for i, (who, _) in enumerate(said) if who in ("human", "user")), len(said))
    if start + 1 >= len(said) or said[start + 1][0] not in ("gpt", "chatgpt", "assistant", "bard", "bing"):
        return None
    return said[start][1], said[start + 1][1]


JSONL_KEYS = ("prompt_tokens", "output_tokens", "prompt", "output", "arrival_s", "model", "session")


def read_jsonl(path: Path, count: Count = quarter) -> Rows:
    """A request a line: prompt_tokens and output_tokens, or the texts prompt and output; arrival_s, model, session."""

    def length(row: dict[str, Any], name: str) -> int:
        if f"{name}_tokens" in row or not isinstance(row.get(name), str):
            return tokens(row.get(f"{name}_tokens"), f"{name}_tokens", 1)
        return count(row[name])

    def read(line: str) -> tuple[float, int, int, str, str]:
        row = json.loads(line)
        if not isinstance(row, dict) or set(row) - set(JSONL_KEYS):
            raise ValueError(
                f"a line must be an object with keys of {', '.join(JSONL_KEYS)}, got {line[:60]!r}"
            )
        at = seconds(row["arrival_s"], "arrival_s") if "arrival_s" in row else -1.0
        name, session = row.get("model", ""), row.get("session", "")
        if not isinstance(name, str) or not isinstance(session, str | int):
            raise ValueError(f"model and session must be names, got {name!r} and {session!r}")
        return at, length(row, "prompt"), length(row, "output"), name, str(session)

    lines = [line for line in file_text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{str(path)!r} must have a line for each request, got none")
    times, prompts, outputs, names, sessions = zip(*_each(path, lines, read), strict=True)
    for what, given in (("arrival_s", [t >= 0 for t in times]), ("model", [n != "" for n in names])):
        if any(given) and not all(given):
            raise ValueError(
                f"{str(path)!r} must give {what} in every line or in none, got none in row {given.index(False) + 1}"
            )
    found = _sorted(times, prompts, outputs, names if names[0] else (), sessions if any(sessions) else ())
    return found if times[0] >= 0 else Rows(found.prompts, found.outputs, None, found.names, found.sessions)
