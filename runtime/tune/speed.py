"""An engine's speed on this machine: one image at a time, and as many as its calls hold."""

from __future__ import annotations

import math
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stepforge.runtime.backends import available_threads
from stepforge.runtime.bundle import Bundle
from stepforge.runtime.engine import Engine
from stepforge.runtime.errors import BundleError
from stepforge.runtime.request import Request, Result

NETWORKS = ("prompt", "denoise", "decode", "upscale")  # parts of `Stats.seconds` in which networks run


@dataclass(frozen=True, slots=True)
class Line:
    """Requests that were given together, several times over. Seconds are of all of them, shares of their median."""

    name: str
    images: int
    rows: int  # of denoisers, in one run
    median: float
    low: float
    high: float
    networks: float  # share of the time in which the engine's thread ran denoisers
    outside: float  # share in which no network ran; of single images, whose parts do not overlap, otherwise nan

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.median


def check_verified(bundle: Bundle, backend: str, precision: str) -> None:
    """Raises BundleError unless `stepforge verify` has passed on this backend and precision: what draws wrong images may be
    as fast as it likes."""
    checks = (bundle.verdict or {}).get("checks")
    own = [
        check.get("passed")
        for check in (checks if isinstance(checks, Sequence) else ())
        if isinstance(check, dict) and (check.get("backend"), check.get("precision")) == (backend, precision)
    ]
    if not own or not all(passed is True for passed in own):
        what = "failed parity" if own else "was never verified"
        raise BundleError(
            f"{bundle.card.name} {what} on {backend} {precision}, and no speed is told without it; run `stepforge verify`, "
            "or give --unverified"
        )


def measure(
    engine: Engine, request: Request, *, images: int, runs: int, on_image: Callable[[int], None] | None = None
) -> list[Line]:
    """A request alone, and `images` of it with seeds of their own at once, `runs` times each in turn after a run of each
    that is not counted: networks are compiled and caches filled by then. on_image: told how many images have ended."""
    alone = replace(request, images=1)
    crowd = [replace(alone, seed=alone.seed + i) for i in range(images)]
    asked = {"one image": [alone], f"{images} images at once": crowd} if images > 1 else {"one image": [alone]}
    taken: dict[str, list[tuple[float, list[Result]]]] = {name: [] for name in asked}
    ended = 0
    for run in range(runs + 1):
        for name, requests in asked.items():
            started = time.perf_counter()
            results = []
            for outcome in engine.stream(requests):
                if outcome.error is not None:
                    raise outcome.error
                assert outcome.result is not None
                results.append(outcome.result)
                ended += 1
                if on_image is not None:
                    on_image(ended)
            if run:
                taken[name].append((time.perf_counter() - started, results))
    return [_line(name, found) for name, found in taken.items()]


def _line(name: str, found: Sequence[tuple[float, list[Result]]]) -> Line:
    seconds = [one for one, _ in found]
    results = found[-1][1]
    denoisers = [sum(_spent(result, "denoise") for result in each) / wall for wall, each in found]
    networks = [sum(_spent(result, *NETWORKS) for result in each) / wall for wall, each in found]
    outside = [1 - share for share in networks] if len(results) == 1 else [math.nan]
    rows = sum(
        count
        for result in results
        for network, count in result.stats.rows.items()
        if not network.rpartition("/")[2].startswith(("text_encoder", "vae", "upscaler"))
        and not network.startswith("control/")
    )
    return Line(
        name, len(results), rows, statistics.median(seconds), min(seconds), max(seconds), statistics.median(denoisers),
        statistics.median(outside),
    )  # fmt: skip


def _spent(result: Result, *parts: str) -> float:
    """Seconds of parts of the work, in all stages."""
    return sum(seconds for name, seconds in result.stats.seconds.items() if name.rpartition("/")[2] in parts)


def machine(engine: Engine) -> str:
    """Processor, threads, and versions of what ran, in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    versions = [f"{name} {version}" for name, version in engine.backend.versions.items()]
    said = [model, f"{available_threads()} threads usable", f"Python {platform.python_version()}", *versions]
    return ", ".join(said)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes, mapped files counted."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
