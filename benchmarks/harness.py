"""What every benchmark shares: the machine line, and timing with a spread."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("numpy", "onnxruntime", "openvino", "torch", "diffusers")


def machine() -> str:
    """Processor, threads and versions in one line."""
    from stepforge.runtime.backends import available_threads

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} -")
    return f"{model}, {available_threads()} threads, Python {platform.python_version()}, {', '.join(versions)}"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the counted runs."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} s ({self.low:.3f}..{self.high:.3f})"


def timed(function: Callable[[], object], *, runs: int, warmup: int = 1) -> Timing:
    """Median and extremes of `runs` calls after `warmup` uncounted ones."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return Timing(statistics.median(seconds), min(seconds), max(seconds))


def interleaved(functions: dict[str, Callable[[], object]], *, runs: int) -> dict[str, Timing]:
    """Time several functions in turn, A B C A B C ..., so that a drift of the machine's speed hits all alike."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}
