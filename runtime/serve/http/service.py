"""What the routes of one server share: models, limits, the pool of threads, who is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

from stepforge.runtime.request import Result
from stepforge.runtime.serve.http.errors import queue_full
from stepforge.runtime.serve.http.held import Held
from stepforge.runtime.serve.http.keys import Keys
from stepforge.runtime.serve.http.metrics import Metrics
from stepforge.runtime.serve.http.models import Models
from stepforge.runtime.serve.http.settings import Settings

P = ParamSpec("P")
R = TypeVar("R")

THREADS = 4  # for bodies and images; a decoded image takes up to 64 MiB


class Service:
    """keys: None lets everybody in."""

    def __init__(self, models: Models, settings: Settings, keys: Keys | None = None) -> None:
        self.models, self.settings, self.keys = models, settings, keys
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="stepforge-http")
        self.held = Held(settings.max_memory)
        self.metrics = Metrics(self)
        self.under_way = 0
        self._seconds = 1.0  # of recent requests, a moving mean
        # what the engines hold waiting, and as many again that are read, drawn and sent
        self._most = (2 * settings.queue_limit + 8) * len(models.models)

    async def run(self, function: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """Call a function that takes time on one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, partial(function, *args, **options))

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A request for images is under way. Raises ApiError before its body is read, if too many are."""
        if self.under_way >= self._most:
            raise queue_full(self.retry_after())
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1

    def finished(self, model: str, result: Result) -> None:
        """A request has been drawn."""
        self._seconds += 0.2 * (result.stats.seconds["total"] - self._seconds)
        self.metrics.drawn(model, result)

    def retry_after(self) -> int:
        """Seconds after which room can be hoped for: what a request takes at present, 1 to 60."""
        return max(1, min(60, round(self._seconds)))
