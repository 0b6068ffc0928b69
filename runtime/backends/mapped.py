"""Pages of mapped weights, let go of as soon as an engine library has its own copy.

OpenVINO maps a network's weights, or its own cached network, packs them into its layouts, and leaves the mapping in place:
every page it has read stays resident, beside the copy (8.9 GB for 4.3 GB of weights, benchmarks/results/suite/quick.md).
A page of a shared read-only mapping can be dropped at any time: read again, it comes from the system's file cache.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MAPS = Path("/proc/self/maps")
SHARED = b"r--s"  # permissions of a mapping whose pages are the file's own: nothing in them can be lost
INTERVAL = 0.05  # seconds; a library reads some 100 MB meanwhile
MADV_DONTNEED = 4


@contextmanager
def released(folders: Sequence[Path]) -> Iterator[None]:
    """While the block runs and at its end, what it has read through mappings of files below `folders` is let go of."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(INTERVAL):
            release(folders)

    thread = threading.Thread(target=follow, name="stepforge-mapped", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        release(folders)


def release(folders: Sequence[Path]) -> int:
    """Drop the resident pages of shared read-only mappings of files below `folders`; bytes mapped. 0 without /proc."""
    if not MAPS.is_file():
        return 0
    wanted = tuple(os.fsencode(folder.resolve()) + b"/" for folder in folders)
    mapped = 0
    # by newlines alone, which the kernel escapes in names: other separators of lines may be part of any file's name
    for line in MAPS.read_bytes().split(b"\n")[:-1]:
        span, permissions, _, _, _, name = (line + b" ").split(b" ", 5)
        if permissions == SHARED and name.lstrip().startswith(wanted):
            first, last = (int(end, 16) for end in span.split(b"-"))
            if not _madvise(first, last - first, MADV_DONTNEED):
                mapped += last - first
    return mapped


def _madvise(address: int, length: int, advice: int) -> int:
    call = ctypes.CDLL(None).madvise
    call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return int(call(address, length, advice))
