"""Values from outside, checked: each check gives the value as a plain Python one, or raises RequestError in one line."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from stepforge.runtime.errors import RequestError

MAX_NAME = 128  # characters


def text(what: str, value: object, most: int) -> str:
    """Unicode text of at most `most` characters."""
    if not isinstance(value, str):
        raise RequestError(f"{what} must be text, not {type(value).__name__}")
    if len(value) > most:
        raise RequestError(f"{what} has {len(value)} characters; at most {most} are allowed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{what} contains half of a surrogate pair; only valid Unicode is allowed") from None
    return str.__str__(value)


def choice(what: str, value: object, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise RequestError(f"{what} is {shown(value)}; choose one of {', '.join(choices)}")
    return str.__str__(value)


def flag(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{what} is {shown(value)}; give true or false")
    return value


def whole(what: str, value: object, low: int, high: int) -> int:
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or not low <= number <= high:
        raise RequestError(f"{what} is {shown(value)}; it must be a whole number from {low} to {high}")
    return number


def real(value: object) -> float | None:
    """A number, infinity included; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        found = float(value)
    except OverflowError:  # beyond the largest float
        return None
    return None if math.isnan(found) else found


def listed(what: str, value: object, most: int) -> tuple[Any, ...]:
    """Elements of a list, tuple or other sequence, or of an array of one dimension: at least one, at most `most`."""
    is_array = isinstance(value, np.ndarray) and value.ndim == 1
    if not (is_array or isinstance(value, Sequence)) or isinstance(value, str | bytes | bytearray | memoryview):
        raise RequestError(f"{what} is {shown(value)}; give a list")
    if not 1 <= len(value) <= most:  # type: ignore[arg-type]
        raise RequestError(f"{what} has {len(value)} elements; give 1 to {most}")  # type: ignore[arg-type]
    return tuple(value)  # type: ignore[arg-type]


def shown(value: object) -> str:
    """An echo of anything: one line of at most 80 characters."""
    if isinstance(value, bytes | bytearray):
        value = bytes(value[:100])
    try:
        echo = _ECHO.repr(value)
    except ValueError:  # whole numbers of more digits than Python prints; a __repr__ that fails is reprlib's own
        echo = f"of type {type(value).__name__}"
    return clipped(echo, 80)


def clipped(line: object, most: int = 300) -> str:
    """A text on one line, cut at its end."""
    one = " ".join(str(line).split()).encode(errors="backslashreplace").decode()  # halves of surrogate pairs
    return one if len(one) <= most else f"{one[: most - 3]}..."


_ECHO = reprlib.Repr()  # reads no more of long texts and lists than it shows
_ECHO.maxstring = _ECHO.maxother = _ECHO.maxlong = 100
_ECHO.maxtuple = _ECHO.maxlist = _ECHO.maxdict = _ECHO.maxset = 12
