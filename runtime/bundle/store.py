"""Writing a manifest: whole or not at all, and by one process at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stepforge.runtime.bundle.format import MANIFEST, Bundle, to_dict
from stepforge.runtime.bundle.read import PARTIAL, read
from stepforge.runtime.errors import BundleError
from stepforge.runtime.files import sync_folder, written

log = logging.getLogger(__name__)


def write_manifest(bundle: Bundle) -> None:
    """Write bundle.json: readers see the old one or the new one, and no failure changes the old one.

    The partial file lies in the bundle, on the same file system also where the bundle is a mount, under a name that
    readers pass over (`read.PARTIAL`); only a process that is killed leaves one, which the next `update` removes.
    Raises BundleError if it cannot be written.
    """
    text = json.dumps(to_dict(bundle), indent=1)
    try:
        with written(bundle.path / MANIFEST, overwrite=True) as file:
            file.write(text.encode())
        sync_folder(bundle.path)
    except OSError as error:
        raise BundleError(f"{bundle.path / MANIFEST} cannot be written: {error.strerror}") from error


def update(bundle: Bundle, change: Callable[[Bundle], Bundle]) -> Bundle:
    """Change a bundle's presets or verdict on disk, and return it as it is there then.

    change: gets the bundle as it is on disk now, and gives it back changed; what other processes have stored since `bundle`
    was read stays. Raises BundleError if the bundle was exported anew meanwhile, or cannot be written.
    """
    with locked(bundle.path):
        now = read(bundle.path, check=False)
        if now.digest != bundle.digest:
            raise BundleError(f"{bundle.path} has changed since it was read; nothing is stored in it")
        for file in bundle.path.iterdir():
            if PARTIAL.fullmatch(file.name):  # left by a killed process: a living one would hold the lock
                file.unlink(missing_ok=True)
        changed = change(now)
        assert changed.digest == now.digest, "only presets and verdict may change"
        write_manifest(changed)
    return changed


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a bundle's directory against other processes and threads that change it. Readers need no lock.

    The lock is the directory's own (flock): it leaves no file, and ends with the process. Where the file system has none,
    a warning says so. Raises BundleError if there is no such directory.
    """
    while True:
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise BundleError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX)
            except OSError as error:
                log.warning("%s cannot be locked (%s): do not change it from two processes", path, error.strerror)
            if _is_still(path, directory):
                yield
                return
        finally:
            os.close(directory)


def _is_still(path: Path, directory: int) -> bool:
    """Whether the path names the opened directory: an export may have put another in its place."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(directory))
    except OSError:
        return False
