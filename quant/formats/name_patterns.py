"""Regular expressions over module names, matched in bounded time whoever wrote them.

Python's matcher goes back and tries again, so that `(.|.)*!` in a config.json can keep it busy for ever.  This one reads a
name once, left to right, with all places of the pattern that the beginning may have led to (Thompson, CACM 11(6), 1968);
sets of places it has met are kept.  The syntax is that of `re` without flags, back references and lookbehind.
"""

import re
import warnings
from collections.abc import Callable
from typing import NamedTuple, NoReturn

MAX_LENGTH = 1000  # characters of a pattern; real ones have tens
MAX_DEPTH = 20
MAX_CONDITIONS = 16  # anchors and lookaheads of a pattern
MAX_WORK = 500_000  # places visited, of all patterns of a checkpoint: half a second of Python
ACCEPT = 0
REPEAT = re.compile(r"\{(\d{1,4}|)(?:(,)(\d{1,4}|))?\}")
LETTERS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
SETS = "dwsDWS"


class Node(NamedTuple):
    """One place: goes on to `after` on a character that `takes` has, or, without one, at once where `when` holds."""

    takes: re.Pattern[str] | None
    after: tuple[int, ...]
    when: int | None = None  # index of a condition


class Budget:
    """The work that the patterns of one checkpoint may be."""

    def __init__(self, work: int = MAX_WORK) -> None:
        self.left = work

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise ValueError("matching takes too long: fewer or simpler patterns are needed")


class NamePattern:
    """A pattern ready to match.  ValueError, of the constructor or of `matches`, where it is none or costs too much."""

    def __init__(self, text: str, budget: Budget, *, nested: bool = False) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"{len(text)} characters are more than {MAX_LENGTH}")
        self._budget, self._nested = budget, nested
        self._nodes = [Node(None, ())]
        self._conditions: list[Callable[[str, int], bool]] = []
        self._text, self._at = text, 0
        tree = self._alternatives(0)
        if self._at < len(text):
            self._fail("an unmatched )")
        start = tree(ACCEPT)
        self._sets: dict[frozenset[int], int] = {}
        self._members: list[frozenset[int]] = []
        self._steps: dict[tuple[int, str, int], int] = {}
        self._first: dict[int, int] = {}
        self._start = start

    def matches(self, name: str, at: int = 0) -> bool:
        """Whether some beginning of name[at:] is what the pattern says, as `re.match` has it."""
        if self._nested:
            self._budget.spend(len(name) - at)
        holds = self._holding(name, at)
        if holds not in self._first:
            self._first[holds] = self._numbered(self._reached((self._start,), holds))
        state = self._first[holds]
        while True:
            members = self._members[state]
            if ACCEPT in members:
                return True
            if not members or at == len(name):
                return False
            char, at = name[at], at + 1
            holds = self._holding(name, at)
            key = (state, char, holds)
            if key not in self._steps:
                self._budget.spend(len(members))
                taken = [n for i in members for n in self._taken(i, char)]
                self._steps[key] = self._numbered(self._reached(taken, holds))
            state = self._steps[key]

    def _taken(self, i: int, char: str) -> tuple[int, ...]:
        takes = self._nodes[i].takes
        return self._nodes[i].after if takes is not None and takes.fullmatch(char) else ()

    def _holding(self, name: str, at: int) -> int:
        """The conditions that hold before character `at`, a bit each."""
        return sum(1 << i for i, holds in enumerate(self._conditions) if holds(name, at))

    def _numbered(self, members: frozenset[int]) -> int:
        if members not in self._sets:
            self._sets[members] = len(self._members)
            self._members.append(members)
        return self._sets[members]

    def _reached(self, start: tuple[int, ...] | list[int], holds: int) -> frozenset[int]:
        """What takes a character, or accepts, on every way from `start` on which no character is taken."""
        seen, waiting, out = set(start), list(start), set()
        while waiting:
            i = waiting.pop()
            node = self._nodes[i]
            if i == ACCEPT or node.takes is not None:
                out.add(i)
            elif node.when is None or holds >> node.when & 1:
                new = [n for n in node.after if n not in seen]
                seen.update(new)
                waiting += new
        self._budget.spend(len(seen))
        return frozenset(out)

    # the parser: each method returns what, given the place to go on to, adds places and returns the first of them

    def _alternatives(self, depth: int) -> Callable[[int], int]:
        if depth > MAX_DEPTH:
            self._fail(f"groups nested deeper than {MAX_DEPTH}")
        branches = [self._sequence(depth)]
        while self._eat("|"):
            branches.append(self._sequence(depth))
        if len(branches) == 1:
            return branches[0]
        return lambda after: self._add(Node(None, tuple(b(after) for b in branches)))

    def _sequence(self, depth: int) -> Callable[[int], int]:
        parts: list[Callable[[int], int]] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._atom(depth)))

        def build(after: int) -> int:
            for part in reversed(parts):
                after = part(after)
            return after

        return build

    def _repeated(self, part: Callable[[int], int]) -> Callable[[int], int]:
        least: int
        most: int | None
        if found := self._counts():
            least = int(found[1] or 0)
            most = least if not found[2] else int(found[3]) if found[3] else None
            self._at = found.end()
            if most is not None and most < least:
                self._fail("a repetition of more than its most")
        elif self._at < len(self._text) and self._text[self._at] in "*+?":
            mark = self._text[self._at]
            least, most = int(mark == "+"), 1 if mark == "?" else None
            self._at += 1
        else:
            return part
        self._eat("?")  # lazy: which match is found does not matter, only whether there is one
        if self._counts() or self._text[self._at : self._at + 1] in ("*", "+", "?"):
            self._fail("a repetition of a repetition")
        return lambda after: self._times(part, least, most, after)

    def _counts(self) -> re.Match[str] | None:
        """{2}, {2,}, {,3} or {2,3} here; braces around anything else are characters."""
        found = REPEAT.match(self._text, self._at)
        return found if found and (found[1] or found[2]) else None

    def _times(self, part: Callable[[int], int], least: int, most: int | None, after: int) -> int:
        if most is None:
            loop = self._add(Node(None, ()))
            self._nodes[loop] = Node(None, (part(loop), after))
            first = loop
        else:
            first = after
            for _ in range(most - least):
                first = self._add(Node(None, (part(first), after)))
        for _ in range(least):
            self._budget.spend(1)
            first = part(first)
        return first

    def _atom(self, depth: int) -> Callable[[int], int]:
        start, char = self._at, self._text[self._at]
        if char in "*+?" or self._counts():
            self._fail("a repetition of nothing")
        self._at += 1
        match char:
            case "(":
                return self._group(depth)
            case "[":
                end = self._text.find("]", start + (3 if self._text[start + 1 : start + 2] == "^" else 2))
                while end > 0 and self._escaped(end):
                    end = self._text.find("]", end + 1)
                if end < 0:
                    self._fail("an unmatched [")
                self._at = end + 1
                return self._one(self._text[start : self._at])
            case "\\":
                return self._escape()
            case "^":
                return self._condition(lambda name, at: at == 0)
            case "$":
                return self._condition(lambda name, at: at == len(name))
        return self._one(char if char == "." else re.escape(char))

    def _escaped(self, at: int) -> bool:
        before = self._text[:at]
        return (len(before) - len(before.rstrip("\\"))) % 2 == 1

    def _group(self, depth: int) -> Callable[[int], int]:
        ahead = None
        if self._eat("?"):
            named = re.match(r"P<[A-Za-z_]\w*>", self._text[self._at :])
            if named:
                self._at += named.end()
            elif self._eat("=") or self._eat("!"):
                ahead = self._text[self._at - 1]
            elif not self._eat(":"):
                self._fail("a group other than (...), (?:...), (?=...) and (?!...)")
        start, known = self._at, len(self._conditions)
        inner = self._alternatives(depth + 1)
        end = self._at
        if not self._eat(")"):
            self._fail("an unmatched (")
        if ahead is None:
            return inner
        if self._nested:
            self._fail("lookahead within lookahead")
        del self._conditions[known:]
        follows = NamePattern(self._text[start:end], self._budget, nested=True)
        return self._condition(lambda name, at: follows.matches(name, at) == (ahead == "="))

    def _escape(self) -> Callable[[int], int]:
        if self._at == len(self._text):
            self._fail(r"a \ at its end")
        char = self._text[self._at]
        self._at += 1
        if char in SETS:
            return self._one("\\" + char)
        if char == "A":
            return self._condition(lambda name, at: at == 0)
        if char == "Z":
            return self._condition(lambda name, at: at == len(name))
        if char in "bB":
            edge = re.compile("\\" + char)
            return self._condition(lambda name, at: edge.match(name, at) is not None)
        if char in LETTERS:
            return self._one(re.escape(LETTERS[char]))
        if char.isalnum():
            self._fail(f"\\{char}")
        return self._one(re.escape(char))

    def _one(self, text: str) -> Callable[[int], int]:
        """A character that is in `text`, itself an expression of one character."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                takes = re.compile(text)
            except re.error as error:
                self._fail(f"{text!r:.40}: {error}")
        return lambda after: self._add(Node(takes, (after,)))

    def _condition(self, holds: Callable[[str, int], bool]) -> Callable[[int], int]:
        self._conditions.append(holds)
        if len(self._conditions) > MAX_CONDITIONS:
            self._fail(f"more than {MAX_CONDITIONS} anchors")
        index = len(self._conditions) - 1
        return lambda after: self._add(Node(None, (after,), index))

    def _add(self, node: Node) -> int:
        self._budget.spend(1)
        self._nodes.append(node)
        return len(self._nodes) - 1

    def _eat(self, char: str) -> bool:
        found = self._text.startswith(char, self._at)
        self._at += found
        return found

    def _fail(self, what: str) -> NoReturn:
        raise ValueError(f"{what} at character {self._at} is not understood")
