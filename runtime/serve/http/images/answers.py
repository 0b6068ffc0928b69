"""What answers and events say of a request and its images."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Any

from stepforge.runtime.engine import Engine
from stepforge.runtime.imaging.encode import encode
from stepforge.runtime.request import Result
from stepforge.runtime.serve.http.images.fields import Asked
from stepforge.runtime.serve.http.models import Model


@dataclass(frozen=True, slots=True)
class Drawn:
    """A request that a client waits for."""

    asked: Asked
    model: Model
    engine: Engine
    size: tuple[int, int]  # of the images


def encoded(result: Result, asked: Asked) -> list[str]:
    """The images as base64 of their files. On a thread."""
    files = (encode(image, asked.format, quality=asked.compression) for image in result.images)
    return [base64.b64encode(file).decode() for file in files]


def answer(drawn: Drawn, result: Result, files: list[str], request_id: str) -> dict[str, Any]:
    """OpenAI's answer, and what we tell beside under one key."""
    return {
        "created": int(time.time()),
        "data": [{"b64_json": file} for file in files],
        **echo(drawn),
        "stepforge": {
            "request_id": request_id,
            "model": drawn.model.name,
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


def facts_of(result: Result) -> dict[str, Any]:
    """What the log says of a result."""
    return {"digest": result.digest, "parts": {name: round(value, 4) for name, value in result.stats.seconds.items()}}
