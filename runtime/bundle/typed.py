"""JSON values as the dataclasses of a format: what a field may be is its annotation, and everything else is refused.

    width: Annotated[int, Between(1, 65536)]
    name: Annotated[str, Between(1, 200)]               characters
    file: Annotated[str, Matches(FILE, "a plain relative path")]
    family: Annotated[str, OneOf(("sd1", "sd2", "sdxl"))]
    shape: Annotated[tuple[int, ...], Between(0, 8)]    elements; Mapping[key, value] likewise

Fields with a default may not be missing either: what writes the format writes all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from stepforge.runtime.checks import shown
from stepforge.runtime.errors import StepforgeError
from stepforge.runtime.files import printable

T = TypeVar("T")
Reader = Callable[[Any, str], Any]  # value and where it stands -> what it means; raises ValueError

MOST_TEXT = 1 << 16  # characters, where an annotation says nothing
MOST_ITEMS = 1 << 16  # elements of a list or an object
MOST = 2**53  # whole numbers that every JSON reader keeps


@dataclasses.dataclass(frozen=True, slots=True)
class Between:
    """Limits of a number, or of the length of a text, list or object."""

    low: float
    high: float

    def check(self, value: Any, where: str) -> None:
        if isinstance(value, int | float):
            if not self.low <= value <= self.high:
                raise ValueError(f"{where} is {shown(value)}; from {self.low} to {self.high} is possible")
        elif not self.low <= len(value) <= self.high:
            what = "characters" if isinstance(value, str) else "elements"
            raise ValueError(f"{where} has {len(value)} {what}; from {self.low} to {self.high} are possible")


@dataclasses.dataclass(frozen=True, slots=True)
class Matches:
    """A text's pattern, and what it is called."""

    pattern: re.Pattern[str]
    name: str

    def check(self, value: str, where: str) -> None:
        if not self.pattern.fullmatch(value):
            raise ValueError(f"{where} is {shown(value)}, which is not {self.name}")


@dataclasses.dataclass(frozen=True, slots=True)
class OneOf:
    """A text's choices."""

    choices: tuple[str, ...]

    def check(self, value: str, where: str) -> None:
        if value not in self.choices:
            raise ValueError(f"{where} is {shown(value)}; known: {', '.join(self.choices)}")


def parse(kind: type[T], value: Any, where: str = "") -> T:
    """A dataclass of a JSON object. Raises ValueError in one line that says where and what is possible."""
    asked: Any = kind
    found: T = _record(asked)(value, where)  # also of a class that reads itself: its from_dict may call this
    return found


@functools.cache
def reader(kind: Any) -> Reader:
    """What reads values of a type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _checked(reader(args[0]), args[1:])
    if origin in (Union, types.UnionType):
        return _union(kind, [reader(arg) for arg in args])
    if origin is Literal:
        return _literal(args)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _list(reader(args[0]))
    if origin is tuple:
        return _row([reader(arg) for arg in args])
    if origin is Mapping:
        return _mapping(reader(args[0]), reader(args[1]))
    if hasattr(kind, "from_dict"):
        return _own(kind)
    if kind in PLAIN:
        return PLAIN[kind]
    return _record(kind)


def _plain(name: str, *kinds: type) -> Reader:
    def read(value: Any, where: str) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{where} is {shown(value)}; it must be {name}")
        if isinstance(value, int) and abs(value) > MOST:
            raise ValueError(f"{where} is {shown(value)}; numbers up to 2^53 are possible")
        if isinstance(value, str | list | dict) and len(value) > MOST_TEXT:
            raise ValueError(f"{where} has {len(value)} characters; at most {MOST_TEXT} are possible")
        return value

    return read


PLAIN: dict[Any, Reader] = {
    bool: _plain("true or false", bool),
    int: _plain("a whole number", int),
    float: _plain("a number", int, float),
    str: _plain("text", str),
    type(None): _plain("null", type(None)),
    Any: lambda value, where: value,
}


def _checked(inner: Reader, checks: tuple[Any, ...]) -> Reader:
    def read(value: Any, where: str) -> Any:
        found = inner(value, where)
        for check in checks:
            check.check(found, where)
        return found

    return read


def _union(kind: Any, readers: list[Reader]) -> Reader:
    def read(value: Any, where: str) -> Any:
        reasons = []
        for one in readers:
            try:
                return one(value, where)
            except ValueError as error:
                reasons.append(str(error))
        if value is None or len(set(reasons)) == 1:
            raise ValueError(reasons[0])
        # the reason of the member of the value's own kind says more than "it must be null"
        raise ValueError(next((reason for reason in reasons if "it must be" not in reason), reasons[0]))

    return read


def _literal(choices: tuple[Any, ...]) -> Reader:
    def read(value: Any, where: str) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{where} is {shown(value)}; known: {', '.join(choices)}")
        return value

    return read


def _elements(value: Any, where: str, count: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (count is not None and len(value) != count):
        raise ValueError(f"{where} is {shown(value)}; it must be a list" + (f" of {count}" if count else ""))
    if len(value) > MOST_ITEMS:
        raise ValueError(f"{where} has {len(value)} elements; at most {MOST_ITEMS} are possible")
    return value


def _list(inner: Reader) -> Reader:
    def read(value: Any, where: str) -> Any:
        return tuple(inner(one, f"{where}[{index}]") for index, one in enumerate(_elements(value, where)))

    return read


def _row(readers: list[Reader]) -> Reader:
    def read(value: Any, where: str) -> Any:
        elements = _elements(value, where, len(readers))
        return tuple(
            one(element, f"{where}[{i}]") for i, (one, element) in enumerate(zip(readers, elements, strict=True))
        )

    return read


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {shown(value)}; it must be an object")
    if len(value) > MOST_ITEMS:
        raise ValueError(f"{where} has {len(value)} entries; at most {MOST_ITEMS} are possible")
    return value


def _mapping(keys: Reader, values: Reader) -> Reader:
    def read(value: Any, where: str) -> Any:
        found = {}
        for key, one in _object(value, where).items():
            keys(key, f"a name in {where}")
            found[key] = values(one, f"{where}.{printable(key, 60)}")
        return found

    return read


def _own(kind: Any) -> Reader:
    """Of a class that reads itself, such as the scheduler's card."""

    def read(value: Any, where: str) -> Any:
        given = _object(value, where)
        try:
            return kind.from_dict(given)
        except (StepforgeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: {printable(error)}") from error

    return read


@functools.cache
def _record(kind: Any) -> Reader:
    hints = get_type_hints(kind, include_extras=True)
    readers = {field.name: reader(hints[field.name]) for field in dataclasses.fields(kind) if field.init}

    def read(value: Any, where: str) -> Any:
        given = _object(value, where)
        dot = f"{where}." if where else ""
        for name in readers.keys() - given.keys():
            raise ValueError(f"{dot}{name} is missing")
        for name in given.keys() - readers.keys():
            raise ValueError(f"{dot}{printable(name, 60)} is unknown; {where or 'it'} has {', '.join(readers)}")
        return kind(**{name: one(given[name], dot + name) for name, one in readers.items()})

    return read
