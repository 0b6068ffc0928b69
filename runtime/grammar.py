"""The mini-language that guidance, guiders, reuse and preprocessors share: name(argument, key=argument), joined by marks.

Errors here are ValueError; each user of the language adds its own grammar to them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from stepforge.runtime.checks import shown

MAX_TEXT = 20_000  # characters: a weight for each of 2000 evaluations, and bounded work for what is quadratic here
FLOAT = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
NUMBER = re.compile(FLOAT)
NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)\s*=\s*(.*)", re.DOTALL)
_CALL = re.compile(r"([a-z_]+)\s*\((.*)\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """name(argument, key=argument), arguments as text."""

    name: str
    positional: tuple[str, ...]
    named: tuple[tuple[str, str], ...]

    def bind(self, names: tuple[str, ...], keys: tuple[str, ...] = (), *, needed: bool = True) -> dict[str, str]:
        """Arguments by name: `names` in their order or by key, `keys` by key only. Raises ValueError.

        needed: every one of `names` must be given.
        """
        takes = f"{self.name} takes {', '.join((*names, *keys)) or 'no arguments'}"
        if len(self.positional) > len(names):
            raise ValueError(takes)
        given = dict(zip(names, self.positional, strict=False))
        for key, value in self.named:
            if key not in names + keys or key in given:
                raise ValueError(f"{takes}, {'once' if key in given else f'not {key}'}")
            given[key] = value
        if needed and not given.keys() >= set(names):
            raise ValueError(takes)
        return given


def read_call(text: str) -> Call | None:
    """None where the text is not a call. Raises ValueError."""
    match = _CALL.fullmatch(text)
    if match is None:
        return None
    positional: list[str] = []
    named: list[tuple[str, str]] = []
    for part in split(match[2], ",") if match[2].strip() else []:
        pair = NAMED.fullmatch(part)
        if pair is not None:
            named.append((pair[1], pair[2]))
        elif named:
            raise ValueError(f"{shown(part)} stands after a named argument")
        else:
            positional.append(part)
    return Call(match[1], tuple(positional), tuple(named))


def split(text: str, mark: str) -> list[str]:
    """Parts between the marks that stand outside of brackets, stripped. Raises ValueError for unmatched brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == mark and not depth:
            parts.append(text[start:place])
            start = place + 1
    if depth:
        raise ValueError("brackets do not match")
    return [part.strip() for part in (*parts, text[start:])]


def text_of(value: object) -> str:
    """A text of bearable length. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError("it is not text")
    if len(value) > MAX_TEXT:
        raise ValueError(f"it has {len(value)} characters, more than {MAX_TEXT}")
    return value


def number(text: str) -> float:
    """Raises ValueError; no words such as inf or nan."""
    if not NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{shown(text)} is not a number")
    return float(text)


def plain(value: float) -> str:
    """The shortest text that `number` reads as this value."""
    return repr(float(value)).removesuffix(".0")
