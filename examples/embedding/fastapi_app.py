"""An image service of your own with FastAPI: `BUNDLE=out/emoji.bundle uvicorn fastapi_app:app`.

One process, one engine: uvicorn's `--workers N` would load N of them. `stepforge serve` is the finished server.
"""

import asyncio
import io
import os
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image

import stepforge


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The engine is loaded in the process that serves, never before a fork."""
    engine = await asyncio.to_thread(stepforge.load, os.environ.get("BUNDLE", "fake"), queue_limit=32)
    await asyncio.to_thread(engine.warm_up)
    app.state.engine = engine
    yield
    await asyncio.to_thread(engine.close, drain=True, timeout=20)


app = FastAPI(lifespan=lifespan)


@app.get("/image", response_class=Response)
async def image(http: Request, prompt: str, steps: int = 20, seed: int = 0) -> Response:
    """A PNG of one image."""
    engine: stepforge.Engine = http.app.state.engine
    try:
        future = await engine.asubmit(prompt, steps=steps, seed=seed, deadline=60)
        result = await finished(http, future)
    except stepforge.QueueFull as error:
        raise HTTPException(429, str(error), {"Retry-After": "2"}) from None
    except (stepforge.EngineClosed, stepforge.Cancelled) as error:  # going down
        raise HTTPException(503, str(error), {"Retry-After": "10"}) from None
    except stepforge.RequestError as error:  # before this one: EngineClosed is one of them
        raise HTTPException(400, str(error)) from None
    except stepforge.DeadlineExceeded as error:
        raise HTTPException(504, str(error)) from None
    png = await asyncio.to_thread(encoded, result.images[0])
    return Response(png, media_type="image/png")


async def finished(http: Request, future: Future[stepforge.Result]) -> stepforge.Result:
    """The result; if the client goes away first, the request is cancelled, and its work stops at the next step."""
    result, gone = asyncio.wrap_future(future), asyncio.ensure_future(disconnected(http))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise HTTPException(499, "the client has gone")
        return result.result()
    finally:
        gone.cancel()
        result.cancel()


async def disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()
