"""From a bundle's path to a running engine."""

from __future__ import annotations

from pathlib import Path

from stepforge.runtime.backends import check_names, check_threads, open_backend
from stepforge.runtime.bundle import Bundle, read
from stepforge.runtime.engine import MAX_PIXELS, MAX_ROWS, QUEUE_LIMIT, Engine
from stepforge.runtime.engine.pictures.networks import Tiling
from stepforge.runtime.errors import BackendError


def load(
    bundle: str | Path,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    max_rows: int = MAX_ROWS,
    max_pixels: int = MAX_PIXELS,
    queue_limit: int = QUEUE_LIMIT,
    tile_memory: int | None = None,
    tiling: str = "even",
) -> Engine:
    """Check a bundle, open its networks and start the engine.

    backend: "auto" or a name from backends.BACKENDS; precision: "auto", "fp32", "bf16", "fp16" or, of a quantised bundle,
    "int8", which "auto" never comes to; threads: processor threads, all that the process may use by default, at most four a
    core; max_rows, max_pixels, queue_limit: see `Engine`.
    tile_memory: bytes that the values inside a VAE or a feed-forward network may take in one call: larger pictures pass in
    tiles, None: in one piece; tiling: "even", or "diffusers" for VAEs as diffusers tiles them (docs/tiling.md).
    The bundle "fake" is a test model without files, which the fake backend alone runs.
    Raises BundleError, BackendError, or RequestError for settings that make no sense.
    """
    tiles = Tiling(tile_memory, tiling)
    check_names(backend, precision)
    check_threads(threads)
    opened = open_bundle(bundle)
    if str(bundle) == "fake":
        if backend not in ("auto", "fake"):
            raise BackendError(f"the test model has no graphs for backend {backend!r}; leave the backend out")
        backend = "fake"
    found = open_backend(backend, opened, precision=precision, threads=threads)
    return Engine(opened, found, max_rows=max_rows, max_pixels=max_pixels, queue_limit=queue_limit, tiling=tiles)


def open_bundle(path: str | Path, *, check: bool = True) -> Bundle:
    """Read a bundle's manifest and, unless told otherwise, check every file's hash. Raises BundleError."""
    if str(path) == "fake":
        from stepforge.runtime.backends.fake import fake_bundle

        return fake_bundle()
    return read(path, check=check)
