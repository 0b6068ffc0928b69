"""One request for images: from its body to its answer."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from stepforge.runtime.request import Result
from stepforge.runtime.serve.http.body import read_body
from stepforge.runtime.serve.http.door import Call, call_of
from stepforge.runtime.serve.http.errors import ApiError, Envelope, bad
from stepforge.runtime.serve.http.images.answers import Drawn, answer, encoded, facts_of
from stepforge.runtime.serve.http.images.events import EventStream, Feed
from stepforge.runtime.serve.http.images.fields import read_fields
from stepforge.runtime.serve.http.service import Service

PIXEL = 8  # bytes of an image's pixel on its way out: 3 as it is drawn, up to 4 as base64 of noise in a PNG


class Drawing:
    """The answer to one call of `/v1/images/generations` or `/v1/images/edits`, an ASGI application.

    Raises ApiError and the engine's errors before the first byte of the answer.
    """

    def __init__(self, service: Service, *, edit: bool) -> None:
        self._service, self._edit = service, edit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, call, request = self._service, call_of(scope), Request(scope, receive, send)
        service.models.check_open()
        with service.admitted():
            try:
                values = await read_body(request)
            except ClientDisconnect:
                return
            drawn = await service.run(self._drawn, values, call)
            self._note(call, drawn)
            with service.held.holding(drawn.asked.request.images * drawn.size[0] * drawn.size[1] * PIXEL):
                app = await (self._stream(drawn) if drawn.asked.stream else self._whole(drawn, request, call))
                if app is not None:
                    await app(scope, receive, send)

    def _drawn(self, values: dict[str, Any], call: Call) -> Drawn:
        """On a thread. Raises ApiError and RequestError."""
        settings = self._service.settings
        asked = read_fields(values, settings, edit=self._edit)
        if asked.priority > 0 and not call.caller.is_admin:
            raise ApiError(403, "a priority above 0 needs an admin's key", "admin_only", param="priority")
        model, engine = self._service.models.named(asked.model)  # a call that was let in is drawn, a drain or not
        size = engine.size(asked.request)
        if (pixels := size.width * size.height) > settings.max_pixels:
            text = f"an image would have {size.width}x{size.height} pixels, {pixels}; at most {settings.max_pixels} are drawn"
            raise bad(text, param="size")
        return Drawn(asked, model, engine, (size.width, size.height))

    def _note(self, call: Call, drawn: Drawn) -> None:
        """Facts for the log."""
        request = drawn.asked.request
        call.facts |= {
            "model": drawn.model.name, "mode": drawn.asked.mode, "n": request.images, "steps": request.steps,
            "width": drawn.size[0], "height": drawn.size[1], "seed": request.seed, "stream": drawn.asked.stream,
        }  # fmt: skip
        if self._service.settings.log_prompts:
            call.facts["prompt"] = request.prompt

    async def _stream(self, drawn: Drawn) -> ASGIApp:
        feed = Feed(partials=drawn.asked.partials, progress=drawn.asked.progress)
        watched = drawn.asked.partials or drawn.asked.progress
        future = await self._submit(drawn, feed.on_step if watched else None)
        return EventStream(self._service, drawn, future, feed, edit=self._edit)

    async def _whole(self, drawn: Drawn, request: Request, call: Call) -> ASGIApp | None:
        """All images in one answer; None for a client that has gone."""
        future = await self._submit(drawn, None)
        try:
            result = await _result(request, future)
        finally:
            future.cancel()
        if result is None:
            return None
        call.facts |= facts_of(result)
        self._service.finished(drawn.model.name, result)
        files = await self._service.run(encoded, result, drawn.asked)
        return Envelope(answer(drawn, result, files, call.id))

    async def _submit(self, drawn: Drawn, on_step: Any) -> Future[Result]:
        """Raises RequestError and QueueFull."""
        asked = drawn.asked
        return await drawn.engine.asubmit(
            asked.request, on_step=on_step, priority=asked.priority, deadline=asked.deadline
        )


async def _result(request: Request, future: Future[Result]) -> Result | None:
    """None if the client goes first. Raises the engine's errors."""
    waiting = asyncio.ensure_future(asyncio.wrap_future(future))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((waiting, gone), return_when=asyncio.FIRST_COMPLETED)
        return waiting.result() if waiting.done() else None
    finally:
        waiting.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone. Its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
