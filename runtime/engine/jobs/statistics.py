"""Counts of an engine's work since it was loaded, for monitoring."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from stepforge.runtime.errors import Cancelled, DeadlineExceeded
from stepforge.runtime.request import Result

# "cancelled": by their callers; "aborted": by `Engine.close`; "refused": the queue was full
OUTCOMES = ("done", "failed", "cancelled", "aborted", "deadline", "refused")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of `Engine.stats`. Counts go up from 0 since the engine was loaded; the first four are of this moment."""

    waiting: int  # requests in the queue
    queue_limit: int
    running: int  # images that make steps
    decoding: int  # images between denoiser and picture
    requests: Mapping[str, int]  # how they ended, of `OUTCOMES` -> requests
    failures: Mapping[str, int]  # class of the error, or of its cause in an engine library -> requests that failed
    images: int  # images of finished requests
    calls: int  # denoiser calls
    steps: int  # steps of single images
    rows: Mapping[str, int]  # network -> rows run
    seconds: Mapping[str, float]  # part of the work -> seconds, "queue" the waiting of those that were started
    previews: int


class Statistics:
    """The counters behind `EngineStats`. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = Counter(dict.fromkeys(OUTCOMES, 0))
        self._failures: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._numbers = Counter({"images": 0, "calls": 0, "steps": 0, "previews": 0})

    def add(self, **numbers: int) -> None:
        """Add to images, calls, steps or previews."""
        with self._lock:
            self._numbers.update(numbers)

    def count(self, network: str, rows: int) -> None:
        with self._lock:
            self._rows[network] += rows

    def spend(self, part: str, seconds: float) -> None:
        with self._lock:
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def refuse(self) -> None:
        """A request that found the queue full."""
        with self._lock:
            self._requests["refused"] += 1

    def end(self, future: Future[Result]) -> None:
        """A request whose future is done."""
        error = None if future.cancelled() else future.exception()
        if future.cancelled():
            outcome = "cancelled"
        elif error is None:
            outcome = "done"
        else:
            kinds = ((Cancelled, "aborted"), (DeadlineExceeded, "deadline"), (BaseException, "failed"))
            outcome = next(name for kind, name in kinds if isinstance(error, kind))
        with self._lock:
            self._requests[outcome] += 1
            if outcome == "done":
                self._numbers["images"] += len(future.result().images)
            elif outcome == "failed" and error is not None:
                self._failures[type(error.__cause__ or error).__name__] += 1

    def ended(self, outcome: str) -> int:
        with self._lock:
            return self._requests[outcome]

    def snapshot(self, *, waiting: int, queue_limit: int, running: int, decoding: int) -> EngineStats:
        with self._lock:
            return EngineStats(
                waiting, queue_limit, running, decoding, dict(self._requests), dict(self._failures),
                self._numbers["images"], self._numbers["calls"], self._numbers["steps"], dict(self._rows),
                dict(self._seconds), self._numbers["previews"],
            )  # fmt: skip
