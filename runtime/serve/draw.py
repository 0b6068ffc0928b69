"""Jobs through an engine to files that wait for their names: what one process of a batch does.

submit → the engine → encode, write (threads) → what the journal will say
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from stepforge.runtime.engine import Engine
from stepforge.runtime.errors import Cancelled, EngineClosed, GenerationError, RequestError
from stepforge.runtime.files import printable
from stepforge.runtime.imaging.encode import encode
from stepforge.runtime.imaging.metadata import describe_image
from stepforge.runtime.request import Request, Result
from stepforge.runtime.serve.store import Files

ENCODERS = 4  # threads; they wait for the disk most of the time
WAITS = ("total", "queue")  # of a result's seconds, what is no work


@dataclass(frozen=True, slots=True)
class Task:
    """A job of a manifest as a request. Values only, so that it can go to another process."""

    job: int  # index among the jobs
    line: int
    name: str  # id, empty if it has none
    request: Request

    def failed(self, reason: str) -> Ended:
        return failed(self.job, self.line, self.name, reason)


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that has been drawn, or has failed, on its way to the journal. record: the journal's line; seconds: by part."""

    record: dict[str, Any]
    seconds: Mapping[str, float] = field(default_factory=dict)


class Drawer(Protocol):
    """Whatever draws tasks for a `Batch`: an engine in this process, or workers elsewhere."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What decides pictures beside requests: `facts_of` an engine."""

    def submit(self, task: Task) -> Future[Ended]:
        """Draw a task and write its images with `Files`. What is wrong with a job is in what the future gives.

        The future raises Cancelled for a task that `stop` ended, which a later run takes up; any other error ends the batch:
        OSError for a disk that is full, GenerationError for an engine that failed as a whole. May wait; never raises.
        """

    def stop(self) -> None:
        """Stop after the current step; tasks that have made all their steps are still written. May be called again."""


def facts_of(engine: Engine) -> dict[str, Any]:
    """What decides an engine's pictures beside requests."""
    return {
        "bundle": engine.bundle.digest,
        "adapters": {name: adapter.sha256 for name, adapter in engine.adapters.list().items()},
        "backend": engine.backend.name,
        "precision": engine.backend.precision,
    }


@dataclass(frozen=True, slots=True)
class Encoding:
    """How pictures become the bytes of files."""

    format: str  # "png", "webp" or "jpeg"
    quality: int  # of WebP and JPEG
    metadata: bool  # text chunks in PNG


class EngineDrawer:
    """An engine as a `Drawer`. For any number of threads; a context manager that waits for its encoders."""

    def __init__(self, engine: Engine, files: Files, encoding: Encoding) -> None:
        self._engine, self._files, self._encoding = engine, files, encoding
        self._facts = facts_of(engine)
        self._encoders = ThreadPoolExecutor(ENCODERS, "stepforge-encode")
        self._is_stopped = False

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def submit(self, task: Task) -> Future[Ended]:
        ended: Future[Ended] = Future()
        try:
            drawn = self._engine.submit(task.request, wait=True)
        except EngineClosed as error:
            if self._is_stopped:
                ended.set_exception(Cancelled(str(error)))
            else:  # of itself: it failed as a whole, and said so in the log
                text = "the engine failed; what is finished is written, run the command again"
                ended.set_exception(GenerationError(text))
        except (RequestError, MemoryError) as error:
            ended.set_result(task.failed(reason(error)))
        except Exception as error:  # a defect of ours
            ended.set_exception(error)
        else:
            drawn.add_done_callback(lambda done: self._hand_on(task, done, ended))
        return ended

    def stop(self) -> None:
        self._is_stopped = True
        self._engine.close()

    def __enter__(self) -> EngineDrawer:
        return self

    def __exit__(self, *_: object) -> None:
        self._encoders.shutdown()

    def _hand_on(self, task: Task, drawn: Future[Result], ended: Future[Ended]) -> None:
        """On the engine's threads: the rest is for an encoder's."""
        try:
            self._encoders.submit(settle, ended, lambda: self._finish(task, drawn))
        except BaseException as error:  # no thread to be had
            ended.set_exception(error)

    def _finish(self, task: Task, drawn: Future[Result]) -> Ended:
        """On an encoder's thread: images on disk. Raises Cancelled, and OSError if they cannot be written."""
        started = time.perf_counter()
        try:
            result = drawn.result()
            names = [self._files.name(task.job, task.name, i, len(result.images)) for i in range(len(result.images))]
            abouts = [describe_image(result, index) for index in range(len(names))]
            images = [self._encode(result, index, about) for index, about in enumerate(abouts)]
        except Cancelled:
            raise
        except BaseException as error:
            return task.failed(reason(error))
        encoded = time.perf_counter()
        stored = [self._files.write(*image) for image in zip(names, images, abouts, strict=True)]
        seconds = {part: value for part, value in result.stats.seconds.items() if part not in WAITS}
        seconds |= {"encode": encoded - started, "write": time.perf_counter() - encoded}
        return Ended({**_named(task.job, task.line, task.name), "files": stored}, seconds)

    def _encode(self, result: Result, index: int, about: Mapping[str, Any]) -> bytes:
        how = self._encoding
        metadata = about if how.metadata else None
        return encode(result.images[index], how.format, quality=how.quality, metadata=metadata)


def settle(future: Future[Any], work: Callable[[], Any]) -> None:
    """Give a future what a call returns or raises."""
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)


def failed(job: int, line: int, name: str, reason: str) -> Ended:
    return Ended({**_named(job, line, name), "error": printable(reason, 1000)})


def reason(error: BaseException) -> str:
    return "out of memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__


def _named(job: int, line: int, name: str) -> dict[str, Any]:
    return {"job": job, "line": line, **({"id": name} if name else {})}
