"""The application: routes, and the door around them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from stepforge.runtime.errors import StepforgeError
from stepforge.runtime.serve.http import adapters
from stepforge.runtime.serve.http.body import read_json
from stepforge.runtime.serve.http.door import HEALTH, Call, Door, call_of
from stepforge.runtime.serve.http.errors import ApiError, Envelope, answer_to
from stepforge.runtime.serve.http.images.drawing import Drawing
from stepforge.runtime.serve.http.page import FILES, add_page
from stepforge.runtime.serve.http.schema import document
from stepforge.runtime.serve.http.service import Service

log = logging.getLogger(__name__)

CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(service: Service, *, on_start: Callable[[], Any] | None = None) -> ASGIApp:
    """The ASGI application of a service. on_start: called when the server runs, before it answers."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.ensure_future(service.metrics.watch())
        if on_start is not None:
            on_start()
        yield
        watch.cancel()
        service.pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="stepforge", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.openapi = lambda: document(service.settings)  # type: ignore[method-assign]

    async def failed(request: Request, error: Exception) -> Response:
        """The envelope of whatever a route raises."""
        if isinstance(error, HTTPException):  # Starlette's own 404 and 405
            code = CODES.get(error.status_code, "http_error")
            error = ApiError(error.status_code, str(error.detail), code, headers=error.headers)
        answer = answer_to(error, retry_after=service.retry_after())
        call_of(request.scope).facts["error"] = answer.code
        return answer.response()

    for kind in (ApiError, StepforgeError, HTTPException, Exception):
        app.add_exception_handler(kind, failed)

    @app.get("/health/live")
    async def live() -> Response:
        failed = service.models.state == "failed"
        return Envelope({"status": "failed" if failed else "live"}, 503 if failed else 200)

    @app.get("/health/ready")
    async def ready() -> Response:
        state = service.models.state
        return Envelope({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await service.run(service.metrics.text), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Response:
        return Envelope({"object": "list", "data": [model.card() for model in service.models.models.values()]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Response:
        return Envelope(service.models.find(name)[0].card())

    @app.get("/v1/adapters")
    async def list_adapters(request: Request) -> Response:
        found = service.models.find(request.query_params.get("model"))
        caller = call_of(request.scope).caller
        return Envelope(await service.run(adapters.listed, service.settings, caller, *found))

    @app.post("/v1/adapters")
    async def load_adapter(request: Request) -> Response:
        service.models.check_open()
        adapters.check_caller(service.settings, call_of(request.scope).caller)
        try:
            values = await read_json(request)
        except ClientDisconnect:
            return Response(status_code=400)
        file, name, model = adapters.read_load(values)
        found = service.models.find(model)
        return Envelope(await service.run(adapters.load, service.settings, *found, file, name))

    @app.delete("/v1/adapters/{name}")
    async def unload_adapter(name: str, request: Request) -> Response:
        adapters.check_caller(service.settings, call_of(request.scope).caller)
        found = service.models.find(request.query_params.get("model"))
        return Envelope(await service.run(adapters.unload, *found, name))

    app.add_route("/v1/images/generations", Drawing(service, edit=False), methods=["POST"], name="generations")  # type: ignore[arg-type]
    app.add_route("/v1/images/edits", Drawing(service, edit=True), methods=["POST"], name="edits")  # type: ignore[arg-type]

    public: frozenset[str] = frozenset()
    if service.settings.page:
        add_page(app)
        public = frozenset(FILES)

    fixed = {route.path for route in app.routes if isinstance(route, Route) and "{" not in route.path}

    def on_end(scope: Scope, call: Call) -> None:
        path, seconds = scope["path"], time.perf_counter() - call.started
        route = path if path in fixed else getattr(scope.get("route"), "path", "none")
        service.metrics.ended(route, call.status, seconds, call.facts.get("error"))
        facts = {
            "request_id": call.id, "caller": call.caller.name, "method": scope["method"], "route": route,
            "status": call.status, "seconds": round(seconds, 4), "body_bytes": call.body_bytes, **call.facts,
        }  # fmt: skip
        log.log(logging.DEBUG if path in HEALTH else logging.INFO, "request", extra={"facts": facts})

    return Door(app, settings=service.settings, keys=service.keys, public=public, held=service.held, on_end=on_end)
