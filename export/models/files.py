"""Files of a model at the door: regular files of bounded size only, and JSON without surprises."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.files import is_lfs_pointer, printable

MOST_JSON = 16 << 20  # bytes; CLIP's tokenizer.json has 2.2 MB, an index of 2000 weights 0.2 MB
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


def read_text(path: Path) -> str:
    """A small text file. Raises CheckpointError."""
    try:
        if (size := check_file(path)) > MOST_JSON:
            raise CheckpointError(f"{path} has {size} bytes; at most {MOST_JSON} are read")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not readable JSON: it is not UTF-8 at byte {error.start}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError, also for a key that is given twice."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, what: str) -> dict[str, Any]:
    """The object that a text holds; `what` names the text in errors."""
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise CheckpointError(f"{what} is not readable JSON: it is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{what} is not readable JSON: {printable(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{what} does not hold a JSON object")
    return data


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1) if len(pairs) < 1000 else "a name"
        raise ValueError(f"{twice!r:.80} is given twice")
    return found
