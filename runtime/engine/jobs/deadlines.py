"""Deadlines of requests: a future that is not done in time fails, and the engine drops its work at the next step."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

from stepforge.runtime.checks import real, shown
from stepforge.runtime.engine.jobs.future import RequestFuture
from stepforge.runtime.errors import DeadlineExceeded, RequestError
from stepforge.runtime.request import Result

MAX_SECONDS = 30 * 86400  # longest deadline or timeout; platforms bound what a thread can wait


def check_seconds(what: str, seconds: object) -> float | None:
    """Raises RequestError unless it is None or a number of seconds."""
    if seconds is None:
        return None
    found = real(seconds)
    if found is None or not 0.0 <= found <= MAX_SECONDS:
        raise RequestError(f"{what} is {shown(seconds)}; give seconds, from 0 to {MAX_SECONDS}, or None")
    return found


class Deadlines:
    """Fails futures that are late. Safe from any thread; its own starts with the first deadline."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending: dict[Future[Result], tuple[float, float]] = {}  # future -> when, seconds given
        self._is_closed = False
        self.thread: threading.Thread | None = None

    def add(self, future: RequestFuture, seconds: float) -> None:
        """Give a future this many seconds from now. Raises RuntimeError if no thread can be started."""
        with self._changed:
            self._pending[future] = time.monotonic() + seconds, seconds
            if self.thread is None and not self._is_closed:
                thread = threading.Thread(target=self._run, name="stepforge-deadlines", daemon=True)
                thread.start()
                self.thread = thread
            self._changed.notify_all()
        future.add_done_callback(self._forget)

    def close(self) -> None:
        """End the thread. Nothing is late any more."""
        with self._changed:
            self._is_closed = True
            self._pending.clear()
            self._changed.notify_all()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()

    def _forget(self, future: Future[Result]) -> None:
        with self._changed:
            self._pending.pop(future, None)

    def _run(self) -> None:
        while not self._is_closed:
            for future, seconds in self._late():
                assert isinstance(future, RequestFuture)
                future.settle(DeadlineExceeded(f"the request was not finished by its deadline of {seconds:g} s"))
                del future  # no longer than it is needed

    def _late(self) -> list[tuple[Future[Result], float]]:
        """Wait for the next deadline, or for one that comes before it."""
        with self._changed:
            now = time.monotonic()
            late = [(future, seconds) for future, (when, seconds) in self._pending.items() if when <= now]
            if not late and not self._is_closed:
                following = min((when for when, _ in self._pending.values()), default=None)
                self._changed.wait(None if following is None else following - now)
            return late
