"""Memory that clients' bodies and images take, all calls together: bounded, so that nobody can fill it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stepforge.runtime.serve.http.errors import BUSY, ApiError


class Held:
    """Bytes in use. Only the event loop touches it."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0

    def take(self, size: int) -> None:
        """Raises ApiError where it would be too many."""
        if self.bytes + size > self.most:
            raise ApiError(
                429, "the server holds as much for other clients as it has memory for; try again later", "busy",
                kind=BUSY, headers={"retry-after": "5"},
            )  # fmt: skip
        self.bytes += size

    def give(self, size: int) -> None:
        self.bytes -= size

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        self.take(size)
        try:
            yield
        finally:
            self.give(size)
