"""The application: routes, and the door around them."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Scope

from stepforge.runtime.serve.http.door import Call, Door
from stepforge.runtime.serve.http.drawing import draw
from stepforge.runtime.serve.http.errors import ApiError, Envelope, answer_to
from stepforge.runtime.serve.http.service import Service
from stepforge.runtime.serve.http.static import FILES, add_page

log = logging.getLogger(__name__)

CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(service: Service, *, on_start: Callable[[], Any] | None = None) -> ASGIApp:
    """The ASGI application of a service. on_start: awaited when the server runs, before it answers."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if on_start is not None:
            await on_start()
        yield
        service.pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="stepforge", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _http_error)

    @app.get("/health/live")
    async def live() -> Response:
        """The server answers."""
        return JSONResponse({"status": "live"})

    @app.get("/health/ready")
    async def ready() -> Response:
        """It takes requests: 200; while it starts or shuts down: 503."""
        state = service.models.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/v1/models")
    async def models() -> Response:
        return Envelope({"object": "list", "data": [model.card() for model in service.models.models.values()]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        return Envelope(service.models.find(name)[0].card())

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        return await answered(request, edit=False)

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        return await answered(request, edit=True)

    async def answered(request: Request, *, edit: bool) -> Response:
        try:
            return await draw(service, request, edit=edit)
        except Exception as error:
            return answer_to(error, retry_after=service.retry_after()).response()

    def on_end(scope: Scope, call: Call) -> None:
        route = scope.get("route")
        facts = {
            "request_id": call.id, "caller": call.caller.name, "method": scope["method"],
            "route": getattr(route, "path", "none"), "status": call.status,
            "seconds": round(time.perf_counter() - call.started, 4), "body_bytes": call.body_bytes, **call.facts,
        }  # fmt: skip
        log.info("request", extra={"facts": facts})

    public: frozenset[str] = frozenset()
    if service.settings.page:
        add_page(app)
        public = frozenset(FILES)
    return Door(app, settings=service.settings, keys=service.keys, public=public, on_end=on_end)


async def _http_error(_: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405."""
    assert isinstance(error, HTTPException)
    code = CODES.get(error.status_code, "http_error")
    return ApiError(error.status_code, str(error.detail), code, headers=error.headers).response()
