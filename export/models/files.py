"""Files of a model at the door: regular files of bounded size only, and JSON without surprises."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import is_lfs_pointer, printable, strict_json

MOST_BYTES = 16 << 20  # bytes of a JSON or text file; far beyond a tokenizer or an index of shards
INDEX = "model_index.json"
FORGETS = "_use_default_values"  # key of a config in memory, which diffusers never writes
LONGEST_NAME = 255  # letters of a model's name
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the operating system inside the block become a CheckpointError of one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def check_file(path: Path) -> int:
    """Size of a regular file, in bytes.

    Raises CheckpointError for what would block or never end when opened (FIFOs, devices), and for Git LFS's notes.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise CheckpointError(f"{path} cannot be read: it is {kind}, a file was expected")
    if is_lfs_pointer(path):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    return status.st_size


def refuse_code(folder: Path) -> None:
    """Raises CheckpointError if a model's folder holds Python files."""
    if code := sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.py")):
        raise CheckpointError(f"{folder} contains code ({code[0]}); models with code of their own are refused")


def check_names(name: str | None, *paths: Iterable[str | Path]) -> None:
    """Raises CheckpointError for a model's name and names of files that no manifest holds."""
    if name and not (len(name) <= LONGEST_NAME and name.isprintable()):
        raise CheckpointError(
            f"the name {printable(repr(name), 80)} is not allowed; at most {LONGEST_NAME} printable letters"
        )
    for path in (path for group in paths for path in group):
        try:
            os.path.realpath(path).encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{printable(path)} has a name that is not UTF-8; rename it") from None


def read_small(path: Path) -> bytes:
    """A small file. Raises CheckpointError."""
    try:
        if (size := check_file(path)) > MOST_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {MOST_BYTES} are read")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError, also for a key that is given twice."""
    data = parse_json(read_small(path), str(path))
    if FORGETS in data and path.name.endswith((INDEX, "config.json")):
        raise CheckpointError(
            f"{path} has {FORGETS}, for which diffusers takes defaults in place of what the file says; remove it"
        )
    return data


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The object that a text holds; `what` names the text in errors."""
    try:
        data = strict_json(text, infinite=True)
    except ValueError as error:
        raise CheckpointError(f"{what} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{what} does not hold a JSON object")
    return data
