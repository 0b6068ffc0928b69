"""Files in and out: their names in messages, JSON from strangers, Git LFS pointers, and writing in one atomic step."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def escaped(text: str) -> str:
    """A text whose lines and tabs are its only control characters: no escape sequences, no marks that turn the direction
    of writing, no line separators of Unicode's."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable(text: object, limit: int = 200) -> str:
    """One line that a terminal can bear: no control characters, and no middle where it is longer than `limit`."""
    letters = " ".join(str(text).split())
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in letters)
    if len(plain) <= limit:
        return plain
    tail = limit // 3
    return f"{plain[: limit - tail - 5]} ... {plain[-tail:]}"


def strict_json(data: bytes, *, depth: int = 32, infinite: bool = False) -> Any:
    """JSON that means one thing: UTF-8, no key twice, finite numbers, valid Unicode, nested at most `depth` deep.

    infinite: also what Python writes for floats that are not finite, as diffusers does in configs.
    Raises ValueError in one line for all else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {printable(repr(twice), 60)} is given twice")
        return found

    def refuse(name: str) -> None:
        raise ValueError(f"it contains {name}, which is no number")

    def whole(digits: str) -> int:
        if len(digits) > 64:
            raise ValueError(f"it contains a number of {len(digits)} digits")
        return int(digits)

    try:
        value = json.loads(
            data.decode(), object_pairs_hook=once, parse_constant=None if infinite else refuse, parse_int=whole
        )
    except RecursionError:
        raise ValueError(f"it nests deeper than {depth} levels") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {printable(error)}") from None
    todo = [(value, 0)]
    while todo:
        one, level = todo.pop()
        if isinstance(one, dict | list):
            if level >= depth:
                raise ValueError(f"it nests deeper than {depth} levels")
            inner = [*one.keys(), *one.values()] if isinstance(one, dict) else one
            todo += [(other, level + 1) for other in inner]
        elif isinstance(one, float) and not infinite and not math.isfinite(one):
            raise ValueError("it contains a number beyond the largest float")
        elif isinstance(one, str) and not one.isascii():
            try:
                one.encode()
            except UnicodeEncodeError:
                raise ValueError("it contains half of a surrogate pair; only valid Unicode is allowed") from None
    return value


def is_lfs_pointer(source: str | Path | bytes) -> bool:
    """Whether a file, or its bytes, is what Git checks out where Git LFS has not fetched the content."""
    try:
        if isinstance(source, bytes):
            return source.startswith(LFS_POINTER)
        with Path(source).open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return False


@contextmanager
def written(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file that gets its name when the block ends: whoever looks sees no file, the old one, or the whole new one.

    What leaves the block by an exception, KeyboardInterrupt and SystemExit included, leaves no file behind.
    Raises FileExistsError if the name is taken and overwrite is False, and other OSErrors.
    """
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            partial.replace(path)
        else:
            _publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(partial: Path, path: Path) -> None:
    """Give the file its name unless another process took it meanwhile."""
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: a check before the rename is all there is
        if path.exists():
            raise FileExistsError(f"{path} exists") from None
        partial.replace(path)
