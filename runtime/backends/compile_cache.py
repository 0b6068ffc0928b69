"""Compiled networks that are kept between processes, and trusted only as far as their digests.

An engine library loads what lies in its cache without looking: with one bit flipped it draws another picture. So a file is
named by its sha256 and checked each time it is used; one that does not match is removed, and made anew.

    <root>/<library>-<version>/<key>-<name>.<sha256>.blob     name: the library's own

The library never sees that folder. It is given a folder of its own with a link to the checked file; what it leaves there
gets its name here in one atomic step. So processes need no lock, and one that is killed leaves no half of a file to another.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stepforge.runtime.bundle import sha256

log = logging.getLogger(__name__)

MOST_BYTES = 32 << 30  # all libraries and bundles together; those used longest ago are removed
FORGOTTEN = 24 * 3600  # seconds after which the folder of a killed process is removed
BLOB = re.compile(r"([0-9a-f]{16})-(.+)\.([0-9a-f]{64})\.blob")
PRIVATE = "private-"


def root() -> Path | None:
    """$STEPFORGE_CACHE, else stepforge in the user's cache folder; None where the variable is empty, which turns it off."""
    stated = os.environ.get("STEPFORGE_CACHE")
    if stated is not None:
        return Path(stated) if stated else None
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "stepforge"
    except RuntimeError:  # a user without a home
        log.warning("no compile cache: this user has no home folder; set STEPFORGE_CACHE to a folder, or to nothing")
        return None


class CompileCache:
    """The cache of one library. Where its folder cannot be made or written, a warning says so and nothing is kept."""

    def __init__(self, library: str, *, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        base = root()
        self.path = None if base is None else base / library  # None: nothing is kept
        if self.path is not None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                Path(tempfile.mkdtemp(dir=self.path, prefix=PRIVATE)).rmdir()
            except OSError as error:
                log.warning(
                    "no compile cache: %s cannot be written (%s); set STEPFORGE_CACHE to a folder, or to nothing",
                    self.path, error.strerror,
                )  # fmt: skip
                self.path = None

    @contextmanager
    def folder(self, *key: object) -> Iterator[Path | None]:
        """A private folder for one compilation: it holds what an earlier one of this key left, if that is undamaged.

        None where there is no cache. Failing to keep a result is a warning.
        """
        if self.path is None:
            yield None
            return
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        try:
            private = Path(tempfile.mkdtemp(dir=self.path, prefix=PRIVATE))
        except OSError as error:
            log.warning("compile cache: %s cannot be written (%s)", self.path, error.strerror)
            yield None
            return
        try:
            given = self._give(digest, private)
            yield private
            self._take(digest, private, given)
        finally:
            shutil.rmtree(private, ignore_errors=True)

    def _give(self, digest: str, private: Path) -> set[str]:
        """Link the undamaged files of a key; their names."""
        assert self.path is not None
        given: set[str] = set()
        for file in self.path.glob(f"{digest}-*.blob"):
            with suppress(OSError):  # removed by another process meanwhile
                if (match := BLOB.fullmatch(file.name)) is None or f"{match[2]}.blob" in given:
                    continue
                if sha256(file) != match[3]:
                    log.warning("compile cache: %s is damaged; compiling anew", file)
                    file.unlink()
                    continue
                os.utime(file)  # used now
                link = private / f"{match[2]}.blob"
                try:
                    link.hardlink_to(file)
                except OSError:  # a file system without hard links
                    link.symlink_to(file)
                given.add(link.name)
        return given

    def _take(self, digest: str, private: Path, given: set[str]) -> None:
        """Keep what the library has written beside, or in place of, what it was given."""
        assert self.path is not None
        try:
            for file in private.glob("*.blob"):
                if file.name not in given:
                    file.replace(self.path / f"{digest}-{file.stem}.{sha256(file)}.blob")
            self._prune()
        except OSError as error:
            log.warning("compile cache: %s cannot be written (%s)", self.path, error.strerror)

    def _prune(self) -> None:
        """Bring the cache under its limit, oldest use first, and remove folders that killed processes have left."""
        assert self.path is not None
        files: list[tuple[float, int, Path]] = []
        for file in self.path.parent.glob("*/*"):
            with suppress(OSError):
                status = file.stat()
                if BLOB.fullmatch(file.name):
                    files.append((status.st_mtime, status.st_size, file))
                elif file.name.startswith(PRIVATE) and time.time() - status.st_mtime > FORGOTTEN:
                    shutil.rmtree(file, ignore_errors=True)
        held = sum(size for _, size, _ in files)
        for _, size, file in sorted(files)[:-1]:  # the newest stays, whatever its size
            if held <= self._most_bytes:
                break
            file.unlink(missing_ok=True)
            held -= size
