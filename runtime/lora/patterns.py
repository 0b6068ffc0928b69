"""PEFT's `alpha_pattern` and `rank_pattern`: names or regular expressions of modules, looked up in linear time.

PEFT takes the first pattern for which `re.match(rf"(.*\\.)?({pattern})$", path)` matches. Its file decides on the expression,
and Python's `re` can take for ever on one, so expressions become position automata (Glushkov 1961), which read each
character of a path once, and plain names, which are nearly all, keys of a dictionary. Lookahead, references and anchors
inside an expression are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

LONGEST = 256  # characters of a pattern
MOST = 4096  # patterns of a file
MOST_POSITIONS = 1024  # characters of all its expressions together, repeats written out
MOST_WORK = 200_000_000  # positions times characters of names; SDXL's 2166 layers have 170,000 characters
CACHED = 10_000  # steps of an automaton
DEEPEST = 32  # brackets

_PLAIN = re.compile(r"\^?[\w-]+(?:\\?\.[\w-]+)*")  # here a dot is a dot: no model has two paths that differ in one only
_CHARACTER = re.compile(r"\\[^A-Za-z0-9]|\\[dwsDWS]|\[\^?\]?(?:[^\]\\]|\\.)*\]|[^\\()|*+?^$\[]", re.DOTALL)
_COUNT = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}")


class Patterns:
    """Number of a module by its path: that of the first pattern that matches."""

    def __init__(self, values: Mapping[str, float]) -> None:
        """Raises ValueError for what is no expression of the kind above, or too much of it."""
        if len(values) > MOST:
            raise ValueError(f"it has {len(values)} patterns; at most {MOST} are allowed")
        self._plain: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, Expression, float]] = []
        for index, (text, value) in enumerate(values.items()):
            if len(text) > LONGEST:
                raise ValueError(f"a pattern has {len(text)} characters; at most {LONGEST} are allowed")
            if _PLAIN.fullmatch(text):
                self._plain.setdefault(text.replace("\\.", "."), (index, value))
                continue
            start = "" if text.startswith("^") else "(.*\\.)?"
            expression = Expression(f"{start}({text.removeprefix('^').removesuffix('$')})")
            self._expressions.append((index, expression, value))
            if self.positions > MOST_POSITIONS:
                raise ValueError(f"its expressions have more than {MOST_POSITIONS} characters; give names")

    @property
    def positions(self) -> int:
        return sum(expression.positions for _, expression, _ in self._expressions)

    def find(self, path: str) -> float | None:
        """None if no pattern matches."""
        names = [f"^{path}", path, *(path[i + 1 :] for i, letter in enumerate(path) if letter == ".")]
        found = [self._plain[name] for name in names if name in self._plain] if self._plain else []
        for index, expression, value in self._expressions:
            if expression.matches(path):
                found.append((index, value))
                break
        return min(found)[1] if found else None


@dataclass(frozen=True, slots=True)
class _Part:
    """Positions of a part of an expression as bits: those that it can start and end with."""

    empty: bool  # it matches nothing, too
    first: int
    last: int


class Expression:
    """A regular expression for whole texts: characters, classes, ., groups, |, *, +, ? and {m,n}."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for anything else."""
        self._text, self._at, self._depth = text, 0, 0
        self._characters: list[re.Pattern[str]] = []  # what stands at each position
        self._follow: list[int] = []  # positions that can come after it
        self._all = self._choice()
        if self._at != len(text):
            raise ValueError("its brackets do not match")
        self._masks: dict[str, int] = {}
        self._steps: dict[tuple[int, str], int] = {}

    @property
    def positions(self) -> int:
        return len(self._follow)

    def matches(self, text: str) -> bool:
        if not text:
            return self._all.empty
        states = self._all.first & self._mask(text[0])
        for letter in text[1:]:
            if not states:
                return False
            states = self._step(states, letter)
        return bool(states & self._all.last)

    def _step(self, states: int, letter: str) -> int:
        key = states, letter
        if (found := self._steps.get(key)) is None:
            following = 0
            for position in _bits(states):
                following |= self._follow[position]
            if len(self._steps) >= CACHED:
                self._steps.clear()
            self._steps[key] = found = following & self._mask(letter)
        return found

    def _mask(self, letter: str) -> int:
        """Positions at which a character can stand."""
        if (found := self._masks.get(letter)) is None:
            found = sum(1 << i for i, one in enumerate(self._characters) if one.fullmatch(letter))
            self._masks[letter] = found
        return found

    def _choice(self) -> _Part:
        part = self._sequence()
        while self._text.startswith("|", self._at):
            self._at += 1
            other = self._sequence()
            part = _Part(part.empty or other.empty, part.first | other.first, part.last | other.last)
        return part

    def _sequence(self) -> _Part:
        part = _Part(True, 0, 0)
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            part = self._joined(part, self._repeated())
        return part

    def _repeated(self) -> _Part:
        start = self._at
        part = self._atom()
        end = self._at
        mark, least, most = self._repeats()
        if not mark:
            return part
        after = self._at
        if self._text[after : after + 1] in ("*", "+", "?") or _counts(self._text, after):
            raise ValueError("it repeats a repeat")
        total = _Part(True, 0, 0)
        for copy in range(max(least, most or 1, 1)):
            if copy:
                self._at = start
                part = self._atom()
                assert self._at == end
            if most is None and copy == max(least, 1) - 1:
                self._connect(part.last, part.first)
            total = self._joined(total, part if copy < least else _Part(True, part.first, part.last))
        self._at = after
        return total if most != 0 else _Part(True, 0, 0)

    def _repeats(self) -> tuple[str, int, int | None]:
        """The mark of a repeat, and how often; most None: without a limit."""
        mark = self._text[self._at : self._at + 1]
        count = _counts(self._text, self._at)
        if mark and mark in "*+?":
            self._at += 1
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[mark]
        elif count is not None:
            self._at = count.end()
            digits = max(len(count[1]), len(count[3]))
            if digits > 3:
                raise ValueError("it repeats something too often")
            least = int(count[1] or 0)
            most = (int(count[3]) if count[3] else None) if count[2] else least
            if most is not None and most < least:
                raise ValueError("a count is larger than its limit")
            mark = count[0]
        else:
            return "", 1, 1
        if self._text.startswith("?", self._at):  # lazy: whole texts match all the same
            self._at += 1
        return mark, least, most

    def _atom(self) -> _Part:
        if self._text.startswith("(", self._at):
            self._at += 3 if self._text.startswith("(?:", self._at) else 1
            self._depth += 1
            if self._depth > DEEPEST:
                raise ValueError(f"it has more than {DEEPEST} brackets in each other")
            part = self._choice()
            self._depth -= 1
            if not self._text.startswith(")", self._at):
                raise ValueError("its brackets do not match")
            self._at += 1
            return part
        found = _CHARACTER.match(self._text, self._at)
        if found is None or _counts(self._text, self._at):
            raise ValueError(f"{self._text[self._at : self._at + 2]!r} is not understood here")
        try:
            self._characters.append(re.compile(found[0]))
        except re.error as error:
            raise ValueError(str(error)) from None
        self._at = found.end()
        self._follow.append(0)
        if len(self._follow) > MOST_POSITIONS:
            raise ValueError(f"it has more than {MOST_POSITIONS} characters, repeats written out")
        bit = 1 << (len(self._follow) - 1)
        return _Part(False, bit, bit)

    def _joined(self, one: _Part, other: _Part) -> _Part:
        self._connect(one.last, other.first)
        return _Part(
            one.empty and other.empty,
            one.first | (other.first if one.empty else 0),
            other.last | (one.last if other.empty else 0),
        )

    def _connect(self, last: int, first: int) -> None:
        for position in _bits(last):
            self._follow[position] |= first


def _counts(text: str, at: int) -> re.Match[str] | None:
    """{m}, {m,}, {,n} or {m,n}; other brackets are characters."""
    found = _COUNT.match(text, at)
    return found if found is not None and (found[1] or found[2]) else None


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
