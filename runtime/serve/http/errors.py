"""Every failure as OpenAI's error envelope: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastapi.responses import JSONResponse

from stepforge.runtime.errors import (
    AdapterError,
    Cancelled,
    DeadlineExceeded,
    EngineClosed,
    GenerationError,
    QueueFull,
    RequestError,
)
from stepforge.runtime.files import printable
from stepforge.runtime.request import Request

log = logging.getLogger(__name__)

NAMES = frozenset(option.name for option in fields(Request))
LONGEST = 600  # characters of a message
INVALID, BUSY, UNAVAILABLE, FAULT = (
    "invalid_request_error",
    "rate_limit_error",
    "service_unavailable_error",
    "server_error",
)
# Answers that no retry cures: clients of OpenAI's library would draw the picture three times
FINAL = {"x-should-retry": "false"}


class ApiError(Exception):
    """An answer other than 200. kind: OpenAI's `type`."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.kind, self.param = status, code, kind, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        message = printable(str(self), LONGEST)
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return Envelope(self.body, self.status, self.headers)


class Envelope(JSONResponse):
    """JSON that holds no NaN and escapes what is not ASCII: no text of a client breaks it."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def bad(message: str, *, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code, param=param)


def unavailable(code: str, seconds: int = 5) -> ApiError:
    """503 while the server is `starting` or `draining`, or has `failed`."""
    text = {"starting": "is starting", "draining": "is shutting down", "failed": "has failed and waits for a restart"}[
        code
    ]
    text = f"the server {text}"
    return ApiError(503, text, code, kind=UNAVAILABLE, headers={"retry-after": str(seconds)})


def queue_full(seconds: int) -> ApiError:
    return ApiError(
        429, "as many requests wait as this server holds; try again later", "queue_full",
        kind=BUSY, headers={"retry-after": str(seconds)},
    )  # fmt: skip


def internal(message: str = "the server failed; the request id finds the reason in its log") -> ApiError:
    return ApiError(500, message, "internal_error", kind=FAULT, headers=FINAL)


def answer_to(error: BaseException, *, retry_after: int = 5) -> ApiError:
    """What a client is told of an error; what it is not told is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return queue_full(retry_after)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, str(error), "deadline_exceeded", kind=FAULT, headers=FINAL)
    if isinstance(error, Cancelled | EngineClosed):
        return unavailable("draining")
    if isinstance(error, RequestError):
        return bad(str(error), param=_param(str(error)))
    if isinstance(error, AdapterError):
        return bad(str(error), code="adapter_refused")
    if isinstance(error, GenerationError) and error.__cause__ is None:  # words of ours, without an engine library's
        log.warning("generation failed: %s", error)
        return ApiError(500, str(error), "generation_failed", kind=FAULT, headers=FINAL)
    log.error("request failed", exc_info=error)
    if isinstance(error, GenerationError):
        text = "the image could not be generated; the request id finds the reason in the server's log"
        return ApiError(500, text, "generation_failed", kind=FAULT, headers=FINAL)
    return internal()


def _param(message: str) -> str | None:
    """Field that a message of RequestError begins with."""
    word = message.split(" ", 1)[0]
    return word if word in NAMES else None
