"""One request for images: from its body to its answer."""

from __future__ import annotations

import asyncio
import base64
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from stepforge.runtime.engine import Engine
from stepforge.runtime.imaging.encode import encode
from stepforge.runtime.request import Result
from stepforge.runtime.serve.http.body import read_body
from stepforge.runtime.serve.http.door import call_of
from stepforge.runtime.serve.http.errors import ApiError, Envelope, bad, too_late
from stepforge.runtime.serve.http.fields import Asked, read_fields
from stepforge.runtime.serve.http.models import Model
from stepforge.runtime.serve.http.service import Service

CLOSED = 499  # the client has gone; nginx's status, seen in logs and metrics alone


@dataclass(frozen=True, slots=True)
class Drawn:
    """A request that a client waits for."""

    asked: Asked
    model: Model
    engine: Engine
    size: tuple[int, int]  # of the pictures


async def draw(service: Service, request: Request, *, edit: bool) -> Response:
    """The answer to a call of `/v1/images/generations` or `/v1/images/edits`. Raises ApiError and the engine's errors."""
    service.models.check_open()
    with service.admitted():
        try:
            values, _ = await read_body(request)
        except ClientDisconnect:
            return Response(status_code=CLOSED)
        drawn = await service.run(_drawn, service, values, edit)
        facts = call_of(request.scope).facts
        facts |= {
            "model": drawn.model.name, "mode": drawn.asked.mode, "n": drawn.asked.request.images,
            "steps": drawn.asked.request.steps, "width": drawn.size[0], "height": drawn.size[1],
            "seed": drawn.asked.request.seed, "stream": drawn.asked.stream,
        }  # fmt: skip
        if service.settings.log_prompts:
            facts["prompt"] = drawn.asked.request.prompt
        return await _whole(service, request, drawn)


def _drawn(service: Service, values: dict[str, Any], edit: bool) -> Drawn:
    """On a thread. Raises ApiError and RequestError."""
    asked = read_fields(values, service.settings, edit=edit)
    model, engine = service.models.find(asked.model)
    size = engine.size(asked.request)
    if size.width * size.height > service.settings.max_pixels:
        raise bad(
            f"an image would have {size.width}x{size.height} pixels; at most {service.settings.max_pixels} are drawn",
            param="size",
        )
    return Drawn(asked, model, engine, (size.width, size.height))


async def _whole(service: Service, request: Request, drawn: Drawn) -> Response:
    """All images in one answer, or nothing for a client that has gone."""
    future = await service.run(drawn.engine.submit, drawn.asked.request)
    try:
        result = await _result(request, future, drawn.asked.deadline)
    finally:
        future.cancel()
    if result is None:
        return Response(status_code=CLOSED)
    call_of(request.scope).facts["seconds_of"] = {name: round(value, 4) for name, value in result.stats.seconds.items()}
    files = await service.run(encoded, result, drawn.asked)
    return Envelope(answer(drawn, result, files, call_of(request.scope).id))


async def _result(request: Request, future: Future[Result], deadline: float) -> Result | None:
    """None if the client goes first. Raises ApiError behind the deadline, and the engine's errors."""
    waiting = asyncio.ensure_future(asyncio.wrap_future(future))
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait((waiting, gone), timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if gone.done():
            return None
        raise too_late(deadline)
    finally:
        waiting.cancel()
        gone.cancel()


async def disconnected(request: Request) -> None:
    """Returns when the client has gone. Its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def encoded(result: Result, asked: Asked) -> list[str]:
    """The images as base64 of their files. On a thread."""
    files = (encode(image, asked.format, quality=asked.compression) for image in result.images)
    return [base64.b64encode(file).decode() for file in files]


def answer(drawn: Drawn, result: Result, files: list[str], call: str) -> dict[str, Any]:
    """OpenAI's answer, and what we tell beside under one key."""
    return {
        "created": int(time.time()),
        "data": [{"b64_json": file} for file in files],
        **echo(drawn),
        "stepforge": {
            "request_id": call,
            "model": result.model,
            "digest": result.digest,
            "mode": drawn.asked.mode,
            "seeds": list(result.seeds),
            "steps": drawn.asked.request.steps,
            "seconds": result.stats.seconds,
        },
    }


def echo(drawn: Drawn) -> dict[str, str]:
    """What OpenAI's answers and events repeat of a request."""
    width, height = drawn.size
    return {
        "background": "opaque",
        "output_format": drawn.asked.format,
        "quality": drawn.asked.quality,
        "size": f"{width}x{height}",
    }


__all__ = ["ApiError", "draw"]
