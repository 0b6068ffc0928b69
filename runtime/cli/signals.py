"""SIGINT, SIGTERM and SIGHUP end a command in order: what is half written goes, what is finished stays."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "the terminal has gone"}


class Stopped(SystemExit):
    """A signal ended the command; its code is 128 + the signal's number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.text = WORDS[signal.Signals(number)]


def leave(number: int) -> None:
    """Unwind the main thread: `finally` and `with` clean up on the way."""
    raise Stopped(number)


@contextmanager
def on_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the number of the first such signal within the block; a second one is the surrounding block's.

    Without a surrounding block, the second one ends the process at once. Signals that the process was told to ignore (nohup)
    stay ignored; outside of the main thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in WORDS}
    caught = False

    def handle(number: int, frame: Any) -> None:
        nonlocal caught
        outer = before[signal.Signals(number)]
        if not caught:
            caught = True
            act(number)
        elif callable(outer) and outer is not signal.default_int_handler:
            outer(number, frame)
        else:
            os._exit(128 + number)

    kept = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in kept:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
