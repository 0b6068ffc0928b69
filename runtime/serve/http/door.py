"""What every call passes before a route sees it: request id, host, API key, limits of the body; and the last error handler.

Pure ASGI: Starlette's BaseHTTPMiddleware hides that a client has gone.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stepforge.runtime.serve.http.errors import ApiError, answer_to
from stepforge.runtime.serve.http.held import Held
from stepforge.runtime.serve.http.keys import ANYONE, NOBODY, Caller, Keys
from stepforge.runtime.serve.http.settings import Settings

log = logging.getLogger(__name__)

HEALTH = ("/health/live", "/health/ready")
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
CROSS_SITE = (b"cross-site", b"same-site")  # Sec-Fetch-Site of browsers
CLOSED = 499  # status of a call whose client has gone, in logs and metrics; nginx's
PIECE = 256 << 10  # bytes of an answer that are sent at a time
NOSNIFF = (b"x-content-type-options", b"nosniff")  # no browser takes JSON that repeats a name for a page
LINGER = 2.0  # seconds for a body that is refused to arrive: a client that is still sending reads no answer


class Call:
    """One HTTP call: what its log line says. Routes add to `facts`."""

    def __init__(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        self.id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        self.headers: dict[bytes, bytes] = headers
        self.caller: Caller = NOBODY
        self.started = time.perf_counter()
        self.status = 0
        self.body_bytes = 0
        self.body_ended = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
        self.disconnected = False
        self.facts: dict[str, Any] = {}


class Door:
    """Wraps the whole application: routes, 404s and errors alike.

    keys: None lets everybody in. public: paths that need no key. held: where bodies are charged. on_end: told of every call
    that has ended.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        keys: Keys | None,
        public: frozenset[str],
        held: Held,
        on_end: Callable[[Scope, Call], None],
    ) -> None:
        self._app, self._settings, self._keys, self._on_end = app, settings, keys, on_end
        self._public = public | set(HEALTH)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._call(scope, receive, send)
        else:  # no WebSocket is served
            await send({"type": "websocket.close", "code": 1008})

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = Call(scope)
        scope.setdefault("state", {})["call"] = call
        body = Body(receive, call, self._settings, self._held)
        answer = _Answer(send, call, body, self._settings.stall_seconds)
        try:
            try:
                self._admit(scope, call)
                await self._app(scope, body, answer)
            except _Stalled:
                call.disconnected = True
                raise
            except Exception as error:
                if answer.started:  # logged where it was told
                    return
                refused = answer_to(error)
                call.facts["error"] = refused.code
                await refused.response()(scope, body, answer)
        except _Stalled:
            log.info("a client did not read its answer", extra={"facts": {"request_id": call.id}})
        finally:
            if call.disconnected:
                call.status = CLOSED
            body.release()
            self._on_end(scope, call)

    def _admit(self, scope: Scope, call: Call) -> None:
        """Raises ApiError for who may not call, and for a body that says itself that it is too large."""
        path = scope["path"]  # never request.url: a malformed Host changes that (CVE-2026-48710)
        hosts = self._settings.hosts
        if hosts is not None and path not in HEALTH and _host(call.headers.get(b"host", b"")) not in hosts:
            raise ApiError(403, "this server does not answer to that Host", "host_refused")
        if call.headers.get(b"sec-fetch-site") in CROSS_SITE and scope["method"] not in ("GET", "HEAD"):
            raise ApiError(403, "calls from other web sites are refused", "cross_site")
        if self._keys is None:
            call.caller = ANYONE
        elif path not in self._public:
            caller = self._keys.caller(call.headers)
            if caller is None:
                raise ApiError(
                    401, "an API key is needed: Authorization: Bearer KEY", "invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
            call.caller = caller
        length = call.headers.get(b"content-length", b"0")
        if not (length.isdigit() and len(length) < 20):
            raise ApiError(400, "Content-Length is not a number", "invalid_header")
        if int(length) > self._settings.max_body:
            raise too_large(self._settings.max_body)


class Body:
    """`receive` with limits. Raises ApiError where a body is too large, or does not arrive in time."""

    def __init__(self, receive: Receive, call: Call, settings: Settings, held: Held) -> None:
        self._receive, self._call, self._settings, self._held = receive, call, settings, held
        self._until = call.started + settings.body_seconds
        self._taken = 0  # bytes of `held`
        self._given_up = False  # the rest did not come in time

    async def __call__(self) -> Message:
        call = self._call
        if call.body_ended or self._given_up:
            message = await self._receive()
            call.disconnected = call.disconnected or message["type"] == "http.disconnect"
            return message
        left = self._until - time.perf_counter()
        try:
            async with asyncio.timeout(max(0.0, min(left, self._settings.stall_seconds))):
                message = await self._receive()
        except TimeoutError:
            self._given_up = True
            raise ApiError(408, "the body did not arrive in time", "body_timeout") from None
        if message["type"] == "http.disconnect":
            call.disconnected = call.body_ended = True
            return message
        size = len(message.get("body", b""))
        call.body_bytes += size
        call.body_ended = not message.get("more_body", False)
        if call.body_bytes > self._settings.max_body:
            raise too_large(self._settings.max_body)
        self._held.take(size)
        self._taken += size
        return message

    def release(self) -> None:
        """The call has ended: its body is no longer in memory."""
        self._held.give(self._taken)

    async def discard(self) -> None:
        """Take what a refused client is still sending, for a moment and up to the limit of a body, and keep none of it."""
        call, size = self._call, 0
        if call.body_ended or self._given_up or b"expect" in call.headers:
            return
        try:
            async with asyncio.timeout(LINGER):
                while size <= self._settings.max_body:
                    message = await self._receive()
                    size += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        call.body_ended = True
                        return
        except TimeoutError:
            return


class _Stalled(Exception):
    """A client reads no more of its answer."""


class _Answer:
    """`send` that adds the request id and, where the body was not read to its end, closes the connection. Answers leave in
    pieces, each within `stall` seconds: nobody keeps images in memory by not reading them."""

    def __init__(self, send: Send, call: Call, body: Body, stall: float) -> None:
        self._send, self._call, self._body, self._stall = send, call, body, stall
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._call.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._call.id.encode()), NOSNIFF]
            if message["status"] >= 400:
                await self._body.discard()
            if not self._call.body_ended:
                headers.append((b"connection", b"close"))
            await self._send({**message, "headers": headers})
            return
        data, more = message.get("body", b""), message.get("more_body", False)
        for start in range(0, len(data) or 1, PIECE):
            piece = data[start : start + PIECE]
            last = start + PIECE >= len(data)
            try:
                async with asyncio.timeout(self._stall):
                    await self._send({**message, "body": piece, "more_body": more or not last})
            except TimeoutError:
                raise _Stalled from None


def too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes, the most that is read", "request_too_large")


def call_of(scope: MutableMapping[str, Any]) -> Call:
    """The call that a route answers."""
    call: Call = scope["state"]["call"]
    return call


def _host(header: bytes) -> str:
    """Name in a Host header, without its port; [::1] in its brackets."""
    text = header.decode("latin-1").lower()
    return text.partition("]")[0] + "]" if text.startswith("[") else text.partition(":")[0]
