"""Server-sent events of one request: steps, previews, the images. The names of events are OpenAI's."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from starlette.types import Receive, Scope, Send

from stepforge.runtime.imaging.encode import encode
from stepforge.runtime.request import Progress, Result
from stepforge.runtime.serve.http.door import Call, call_of
from stepforge.runtime.serve.http.errors import answer_to
from stepforge.runtime.serve.http.images.answers import Drawn, echo, encoded, facts_of
from stepforge.runtime.serve.http.service import Service

HEARTBEAT = 15.0  # seconds of silence after which a comment is sent: proxies cut silent answers, nginx after 60
MOST_KEPT = 32  # events that a slow client has not read; the oldest go, never the images
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx
]


@dataclass(frozen=True, slots=True)
class Seen:
    """A step, and its preview where one was wanted."""

    image: int
    step: int
    steps: int
    stage: str
    index: int = 0  # of the preview within its image
    preview: Image.Image | None = None

    @property
    def facts(self) -> dict[str, Any]:
        return {"image": self.image, "step": self.step, "steps": self.steps, "stage": self.stage}


class Feed:
    """From the engine's threads to the event loop. partials: previews of each image, spread over its steps."""

    def __init__(self, *, partials: int, progress: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._partials, self._progress = partials, progress
        self._seen: deque[Seen] = deque(maxlen=MOST_KEPT)
        self.changed = asyncio.Event()

    def on_step(self, progress: Progress) -> None:
        """On the engine's thread."""
        seen = Seen(progress.image, progress.step, progress.steps, progress.stage)
        if self._progress:
            self._tell(seen)
        wanted = {(index + 1) * seen.steps // (self._partials + 1): index for index in range(self._partials)}
        if seen.step in wanted and not seen.stage and seen.step < seen.steps:
            preview = progress.preview()
            preview.add_done_callback(partial(self._previewed, seen, wanted[seen.step]))

    def _previewed(self, seen: Seen, index: int, done: Future[Image.Image]) -> None:
        """On the decoding thread. A preview that failed, or came too late, is none."""
        if not done.cancelled() and done.exception() is None:
            self._tell(Seen(seen.image, seen.step, seen.steps, seen.stage, index, done.result()))

    def _tell(self, seen: Seen) -> None:
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._put, seen)

    def _put(self, seen: Seen) -> None:
        self._seen.append(seen)
        self.changed.set()

    def take(self) -> list[Seen]:
        found = list(self._seen)
        self._seen.clear()
        self.changed.clear()
        return found


class EventStream:
    """The answer to a request with `stream: true`, an ASGI application. The request has been queued: what is wrong with it was
    told by a status; what goes wrong from now on is an `error` event."""

    def __init__(self, service: Service, drawn: Drawn, future: Future[Result], feed: Feed, *, edit: bool) -> None:
        self._service, self._drawn, self._future, self._feed = service, drawn, future, feed
        self._prefix = "image_edit" if edit else "image_generation"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = call_of(scope)
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        gone = asyncio.ensure_future(_disconnect(receive))
        events = self._events(call)
        try:
            while True:
                following = asyncio.ensure_future(anext(events))
                await asyncio.wait((following, gone), return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    following.cancel()
                    with suppress(asyncio.CancelledError):
                        await following
                    call.disconnected = True
                    return
                try:
                    event = following.result()
                except StopAsyncIteration:
                    break
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._future.cancel()
            gone.cancel()
            await events.aclose()

    async def _events(self, call: Call) -> AsyncGenerator[bytes, None]:
        waiting = asyncio.ensure_future(asyncio.wrap_future(self._future))
        waiting.add_done_callback(lambda _: self._feed.changed.set())
        try:
            while not waiting.done():
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        await self._feed.changed.wait()
                except TimeoutError:
                    yield b": waiting\n\n"
                for seen in self._feed.take():
                    yield await self._step(seen)
            for seen in self._feed.take():
                yield await self._step(seen)
            result = waiting.result()
            call.facts |= facts_of(result)
            self._service.finished(self._drawn.model.name, result)
            for index, file in enumerate(await self._service.run(encoded, result, self._drawn.asked)):
                yield self._completed(index, file, result, call)
        except Exception as error:
            answer = answer_to(error)
            call.facts["error"] = answer.code
            yield event("error", answer.body)
        finally:
            waiting.cancel()

    async def _step(self, seen: Seen) -> bytes:
        if seen.preview is None:
            return event(f"{self._prefix}.progress", {"stepforge": seen.facts})
        kind = self._drawn.asked.format
        file = await self._service.run(encode, seen.preview, kind, quality=self._drawn.asked.compression)
        values = {
            "b64_json": base64.b64encode(file).decode(),
            "partial_image_index": seen.index,
            "created_at": int(time.time()),
            **echo(self._drawn),
            "size": f"{seen.preview.width}x{seen.preview.height}",
            "stepforge": seen.facts,
        }
        return event(f"{self._prefix}.partial_image", values)

    def _completed(self, index: int, file: str, result: Result, call: Call) -> bytes:
        ours = {"image": index, "seed": result.seeds[index], "mode": self._drawn.asked.mode, "request_id": call.id}
        values = {"b64_json": file, "created_at": int(time.time()), **echo(self._drawn), "stepforge": ours}
        return event(f"{self._prefix}.completed", values)


def event(kind: str, values: dict[str, Any]) -> bytes:
    """A frame of the stream; JSON has no line breaks."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **values}, separators=(',', ':'))}\n\n".encode()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
