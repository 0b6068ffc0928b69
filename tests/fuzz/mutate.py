"""Mutations that generators share: of JSON values, of bytes, and of names of files."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "a", "0", "1", "true", "null", "fp32", "sd1", "\0", "\n", "\x1b[2J",
    "\u2028", "é", "😀", "\ud800", "../x", "/etc/passwd", "..", ".", "a/../b", "C:\\x", "a" * 300, "a" * 100_000, "NaN",
    [], [[]], [None], [0], [1, 2, 3], ["a"], [{}], {}, {"": None}, {"a": {}}, {"__class__": "os.system"}, [[[1]]], [True] * 50,
)  # fmt: skip
NAMES = (
    "", ".", "..", "../outside/secret", "/etc/hostname", "a/../../outside/secret", "a//b", "a\\b", "a\0b", "a\nb", "\x1b[31m",
    "a" * 4096, "con", "~", "$HOME", "%00", "-rf", "\u202egnp", "é", " ", "file:///etc/hostname", "./a", "a/.", "\ud800",
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    found, todo = [], [value]
    while todo:
        one = todo.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            todo.append(one[key])
    return found


def third(number: float) -> float:
    """Whole where a float cannot hold it."""
    return number // 3 if isinstance(number, int) and abs(number) >= 1 << 1000 else number / 3


def mutated(value: Any, rng: random.Random, strange: tuple[Any, ...] = STRANGE) -> Any:
    """A copy of a JSON value with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = places(value)
        if not found:
            return rng.choice(strange)
        container, key = rng.choice(found)
        match rng.randrange(9):
            case 0 | 1 | 2 | 3:
                container[key] = copy.deepcopy(rng.choice(strange))
            case 4:
                del container[key]
            case 5:
                other, name = rng.choice(found)
                if name in (other if isinstance(other, dict) else range(len(other))):
                    container[key] = copy.deepcopy(other[name])
            case 6 if isinstance(container[key], dict | list):
                inner = container[key]
                if isinstance(inner, dict):
                    inner[rng.choice((*NAMES, "extra"))] = copy.deepcopy(rng.choice(strange))
                else:
                    more = copy.deepcopy(inner or [rng.choice(strange)])
                    inner.extend(more * (rng.choice((1, 300)) if len(places(inner)) < 30 else 1))
            case 7 if isinstance(container[key], int | float) and not isinstance(container[key], bool):
                container[key] = rng.choice(
                    (-container[key], container[key] + 1, container[key] * 2**20, third(container[key]))
                )
            case 8 if isinstance(container[key], str):
                container[key] = rng.choice(
                    (*NAMES, container[key] + "\x1b]0;x\x07", container[key] * 200, container[key][1:])
                )
            case _:
                container[key] = [container[key]]
    return value


def nudged(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value in which one to three values became others of their kind, so that many of them are read."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        container, key = rng.choice(places(value))
        one = container[key]
        if isinstance(one, bool):
            container[key] = not one
        elif isinstance(one, int):
            container[key] = rng.choice((one - 1, one + 1, 2 * one, one // 2, 0, 1, 7, 1000, float(one)))
        elif isinstance(one, float):
            container[key] = one * rng.choice((0.5, 2.0, -1.0, 1e-3, 1e3, 1e-30, 0.0)) + rng.choice((0.0, 0.0, 1.0))
        elif isinstance(one, str):
            others = [other[name] for other, name in places(value) if isinstance(other[name], str)]
            container[key] = rng.choice(
                (*others, one.swapcase(), one + "x", "é😀", "karras", "euler", "v_prediction", "sample")
            )
        elif one is None:
            container[key] = rng.choice((True, False, 1, 0.5, "trailing", "leading", "a", [], {}, [0.1], [1.0, 2.0]))
        elif isinstance(one, list) and one:
            at = rng.randrange(len(one))
            one[at:at] = one[at : at + rng.choice((0, 1))]
            del one[rng.randrange(len(one))]
    return value


def json_text(value: Any, rng: random.Random) -> bytes:
    """A JSON file of a value; sometimes with a key twice, nesting without end, or damage as text."""
    text = json.dumps(value)
    kind = rng.randrange(24)
    if kind == 0:
        at = rng.choice([i for i, c in enumerate(text) if c == "{"] or [0])
        text = text[: at + 1] + '"name": 1, "name": 2, "format": 4, "format": 4, ' + text[at + 1 :]
    elif kind == 1:
        depth = rng.choice((50, 1000, 100_000))
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(("[", '{"a":')) * depth + text[at:]
    elif kind == 2:
        text = text.replace("1", rng.choice(("1" * 5000, "1e400", "-Infinity", "NaN", "01", "1_0")), 1)
    elif kind == 3:
        return flipped(text.encode(), rng)
    elif kind == 4:
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b" ", b"[" * 200_000)) + text.encode()
    elif kind == 5:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8")), "surrogatepass")
    return text.encode(errors="surrogatepass")


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, removed, doubled or cut."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not changed:
            break
        at = rng.randrange(len(changed))
        match rng.randrange(5):
            case 0 | 1:
                changed[at] ^= rng.randrange(1, 256)
            case 2:
                del changed[at : at + rng.choice((1, 4, 64))]
            case 3:
                changed[at:at] = changed[at : at + rng.choice((1, 4, 64))]
            case 4:
                changed[at : at + 4] = rng.choice(
                    (b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x80\x80\x80\x80")
                )
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.1 else changed)
