"""What a command will write: checked, and its folders made, before anything is computed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import printable


@contextmanager
def claimed(targets: Mapping[str, Sequence[Path]], *, overwrite: bool) -> Iterator[None]:
    """Make the folders of .png files that the block will write; those that are still empty at its end go again.

    targets: files by the option that names them. Each folder is written to once, with a name as long as its longest
    file's, so that a full disk or a name too long shows here. Raises RequestError.
    """
    folders: dict[Path, int] = {}  # -> longest name in it, in bytes
    named: dict[Path, str] = {}
    made: list[Path] = []
    try:
        for option, paths in targets.items():
            for path in paths:
                if (other := named.setdefault(path.absolute(), option)) != option:
                    raise RequestError(f"{option} and {other} name the same file: {printable(path)}")
                _check_file(path, option, overwrite)
                folders[path.parent] = max(folders.get(path.parent, 0), len(os.fsencode(path.name)))
        for folder, longest in folders.items():
            _make(folder, made)
            _try_to_write(folder, longest)
        yield
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _check_file(path: Path, option: str, overwrite: bool) -> None:
    if path.suffix.lower() != ".png":
        raise RequestError(f"{option} {printable(path)} does not end in .png; only PNG is written")
    try:
        if path.is_dir():
            raise RequestError(f"{printable(path)} is a folder; name a file with {option}")
        if os.path.lexists(path):
            if not path.is_file():
                raise RequestError(f"{printable(path)} is not a plain file; choose another {option}")
            if not overwrite:
                raise RequestError(f"{printable(path)} exists; choose another {option} or give --overwrite")
    except OSError as error:
        raise RequestError(f"cannot write {printable(path)}: {error.strerror}") from error


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it that are missing."""
    try:
        for missing in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
            missing.mkdir()
            made.append(missing)
        if not folder.is_dir():
            raise NotADirectoryError
    except (FileExistsError, NotADirectoryError) as error:
        raise RequestError(f"{printable(folder)} is not a folder; a file has its name, or part of it") from error
    except OSError as error:
        raise RequestError(f"cannot make the folder {printable(folder)}: {error.strerror}") from error


def _try_to_write(folder: Path, longest: int) -> None:
    trial = folder / f".{secrets.token_hex(8)}.tmp".ljust(longest, "_")
    try:
        with trial.open("xb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RequestError(f"cannot write into {printable(folder)}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            trial.unlink()
