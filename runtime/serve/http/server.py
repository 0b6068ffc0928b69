"""uvicorn, with an end of its own: SIGTERM and SIGINT drain, a second one cuts."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from stepforge.runtime.serve.http.app import create_app
from stepforge.runtime.serve.http.service import Service

log = logging.getLogger(__name__)

POLL = 0.05  # seconds between two looks at what is under way
CUT = 5.0  # seconds for answers to leave, once their requests have been cut


def patient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes connections on which no whole head of a request has arrived for so long.

    uvicorn itself waits for ever. h11, not httptools, which uvicorn prefers where it is installed: it bounds a head, to 64 KiB.
    """

    class Patient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._expect_head()

        def on_response_complete(self) -> None:
            self._expect_head()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _expect_head(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(seconds, self._late, self.cycle)

        def _late(self, before: object) -> None:
            if self.cycle is before and not self.transport.is_closing():
                self.transport.close()

    return Patient


class Server(uvicorn.Server):
    """One service on one address. uvicorn closes its sockets first and waits then, so that nobody would hear of the end:
    here a signal turns readiness to 503 and refuses new work so, while what is under way is finished."""

    def __init__(self, service: Service, **options: Any) -> None:
        config = uvicorn.Config(
            create_app(service, on_start=self._start), access_log=False, log_config=None, server_header=False,
            timeout_graceful_shutdown=int(CUT), lifespan="on", ws="none", http=patient(service.settings.stall_seconds),
            **options,
        )  # fmt: skip
        super().__init__(config)
        self.service = service
        self.was_cut = False  # requests under way were not finished
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut = asyncio.Event()
        self._signals = 0

    def _start(self) -> None:
        self._spawn(self._load())

    async def _load(self) -> None:
        models = self.service.models
        try:
            await models.load()
        except Exception as error:
            models.failure, models.phase = error, "draining"
            self.should_exit = True

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in (one for server in self.servers for one in server.sockets):
            host, port, *_ = listener.getsockname()
            log.info("listening", extra={"facts": {"host": host, "port": port}})

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's raises the signals again at its end, which would hide that all was finished."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        if self.service.keys is not None:
            loop.add_signal_handler(signal.SIGHUP, self.service.keys.reload)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals == 1:
            log.info("draining", extra={"facts": {"signal": sig, "under_way": self.service.under_way}})
            self.service.models.phase = "draining"
            self._spawn(self._drain())
        else:
            self._cut.set()

    async def _drain(self) -> None:
        """Wait for what is under way, then end; what the time does not suffice for is cut."""
        settings, started = self.service.settings, time.monotonic()
        while not self._cut.is_set():
            passed = time.monotonic() - started
            if passed >= settings.drain or (not self.service.under_way and passed >= settings.grace):
                break
            await asyncio.sleep(POLL)
        self.was_cut = bool(self.service.under_way)
        for engine in self.service.models.engines():
            await asyncio.to_thread(engine.close)
        until = time.monotonic() + CUT
        while self.service.under_way and time.monotonic() < until:
            await asyncio.sleep(POLL)
        self.should_exit = True
