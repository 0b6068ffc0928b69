"""Stages beside denoising, each on a thread of its own, so that they overlap with it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Stage(Generic[Item]):
    """Runs `work` on one item after another, in the order they came. The thread starts with the first item.

    work: must not raise; it settles what it fails on.
    """

    def __init__(self, name: str, work: Callable[[Item], None]) -> None:
        self._name, self._work = name, work
        self._items: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    def submit(self, item: Item) -> None:
        """Raises RuntimeError if no thread can be started."""
        if self.thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self.thread = thread
        self._items.put(item)

    def close(self) -> None:
        """Finish what was submitted, then end. Nothing may be submitted afterwards."""
        if self.thread is not None:
            self._items.put(None)
            self.thread.join()

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            self._work(item)
            del item  # no longer than it is needed: the loop would hold it until the next one
