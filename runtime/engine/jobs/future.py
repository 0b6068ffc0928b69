"""The future of a request: `concurrent.futures.Future`, cancellable at any time before its result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future

from stepforge.runtime.errors import Cancelled
from stepforge.runtime.request import Result


class RequestFuture(Future[Result]):
    """Keeps every promise of `concurrent.futures`, and one more: a request that runs can be cancelled too.

    It then stops at its next step, and `wait` and `as_completed` see it at once. check_wait: raises where waiting would
    never end (inside a callback of the engine, in a forked child).
    """

    def __init__(self, check_wait: Callable[[], None]) -> None:
        super().__init__()
        self.check_wait = check_wait
        self._transition = threading.RLock()  # reentrant: done callbacks may cancel
        self._started = False

    def start(self) -> None:
        """The request leaves the queue."""
        self._started = True

    def running(self) -> bool:
        return self._started and not self.done()

    def cancel(self) -> bool:
        with self._transition:
            if self.done():
                return self.cancelled()
            if not super().cancel():  # its outcome is being delivered
                return False
            self.set_running_or_notify_cancel()  # to `wait` and `as_completed`
            return True

    def settle(self, outcome: Result | BaseException) -> bool:
        """Deliver the first outcome; False if there was one before, or the caller has cancelled."""
        with self._transition:
            if self.done() or super().running() or not self.set_running_or_notify_cancel():
                return False
        if isinstance(outcome, BaseException):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)
        return True

    def result(self, timeout: float | None = None) -> Result:
        """Raises Cancelled, GenerationError or the callback's own error; TimeoutError."""
        if not self.done():
            self.check_wait()
        try:
            return super().result(timeout)
        except Cancelled:
            raise
        except CancelledError:
            raise Cancelled("the request was cancelled by its caller") from None

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if not self.done():
            self.check_wait()
        try:
            return super().exception(timeout)
        except CancelledError:
            raise Cancelled("the request was cancelled by its caller") from None
