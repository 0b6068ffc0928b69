"""Publishing a directory in one step: complete or absent, nothing replaced unasked, no trace of what was stopped."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from stepforge.runtime.bundle import MANIFEST, locked
from stepforge.runtime.errors import BundleError

NOREPLACE, EXCHANGE = 1, 2  # flags of renameat2 (linux/fs.h)
AT_FDCWD = -100
UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # flags that a file system (NFS, FUSE) or a kernel lacks
STOPS = (signal.SIGTERM, signal.SIGHUP)  # end a process that does not handle them, without `finally`


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse to replace anything but a bundle, and that only when asked. Raises BundleError."""
    with writing(out):
        if not _exists(out):
            return
    if not overwrite:
        raise BundleError(f"{out} exists; choose another place or pass --overwrite")
    if not _is_bundle(out):
        raise BundleError(f"{out} exists and is not a bundle; only a bundle is overwritten")


@contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A directory beside `out` that takes its place when the block ends well, and is removed when it does not.

    Errors, Ctrl-C, SIGTERM and SIGHUP remove it; only SIGKILL and a power cut leave it, as `.NAME.xxxxxxxx`.
    Raises BundleError where the system refuses to write, or where `out` may not be replaced.
    """
    folder = out.parent / f".{out.name[:40]}.{secrets.token_hex(4)}"
    with stopping():
        try:
            with writing(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir(mode=0o700)
                yield folder
                for path in (*folder.rglob("*"), folder):
                    path.chmod(0o755 if path.is_dir() else 0o644)
                    _sync(path)
                publish(folder, out, overwrite=overwrite)
        finally:  # also a bundle that was exchanged
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Errors of the operating system inside the block become a BundleError of one line."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{out} cannot be written: {error.strerror or error}") from error


@contextmanager
def stopping() -> Iterator[None]:
    """Inside the block, signals that nobody handles raise SystemExit, with a shell's exit code; in the main thread only."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one does not interrupt the clean-up
        sys.exit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    taken = [number for number in STOPS if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def publish(folder: Path, out: Path, *, overwrite: bool) -> None:
    """Move a complete directory to `out`; a bundle that it replaces is left at `folder`.

    Linux exchanges the two names in one step, so that `out` is a bundle at every moment. Where a file system cannot, the old
    bundle is moved aside first: between two renames `out` is absent. Raises BundleError, and then `out` is as it was.
    """
    check_out(out, overwrite)
    if _exists(out):
        with locked(out):  # else who is about to store a preset or a verdict would write it into the new bundle
            _exchange(folder, out)
            if not _is_bundle(folder):  # something else took its place after the check
                _exchange(folder, out)
                raise BundleError(f"{out} was replaced by something that is not a bundle, which is left alone")
    else:
        _take(folder, out)
    _sync(out.parent)


def _take(folder: Path, out: Path) -> None:
    """Rename without replacing. Where a file system cannot, mkdir takes the name, and rename replaces it while it is empty."""
    try:
        try:
            _rename(folder, out, NOREPLACE)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            out.mkdir()
            folder.rename(out)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise BundleError(f"{out} appeared during the export and is left alone; choose another place") from error


def _exchange(folder: Path, out: Path) -> None:
    try:
        _rename(folder, out, EXCHANGE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _swap(folder, out)


def _swap(folder: Path, out: Path) -> None:
    """Exchange in three renames."""
    aside = folder.with_name(f"{folder.name}.old")
    out.rename(aside)
    try:
        folder.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    aside.rename(folder)


def _rename(source: Path, target: Path, flags: int) -> None:
    """renameat2(2). Raises OSError; ENOSYS where the C library lacks it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as error:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    if call(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _is_bundle(path: Path) -> bool:
    return not path.is_symlink() and (path / MANIFEST).is_file()


def _exists(path: Path) -> bool:
    """Also a dangling link. Raises OSError where a name is too long or a parent may not be searched."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
