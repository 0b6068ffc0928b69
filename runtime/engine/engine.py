"""The engine: continuous batching of requests that each run their own plan. This is its face, for any number of threads.

Behind it the `Scheduler` says who runs next, and the `Worker`, on a thread of its own, runs it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, overload

from stepforge.runtime.backends import Backend
from stepforge.runtime.bundle import Bundle, Size
from stepforge.runtime.engine.adapters import Adapters
from stepforge.runtime.engine.future import RequestFuture
from stepforge.runtime.engine.legs import legs_of
from stepforge.runtime.engine.pictures.networks import WHOLE, Tiling
from stepforge.runtime.engine.scheduler import CLOSED, Scheduler
from stepforge.runtime.engine.state import Job, Leg, OnStep
from stepforge.runtime.engine.worker import Worker
from stepforge.runtime.errors import Cancelled, QueueFull, RequestError
from stepforge.runtime.plan import Plan
from stepforge.runtime.plan.compile import Rows, check_variants, compile_plan
from stepforge.runtime.request import Request, Result
from stepforge.runtime.request.control import ImageSource
from stepforge.runtime.request.presets import resolve

log = logging.getLogger(__name__)

MAX_ROWS = 8  # denoiser rows in one call; on a CPU more rows cost memory and gain nothing (reference: measured.md)
MAX_PIXELS = 8 << 20  # pixels of all rows of a call: eight of 1024×1024
QUEUE_LIMIT = 1024  # waiting requests

Asked = Request | str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request of `Engine.stream`: a result, or the error that ended it."""

    index: int  # among the requests that were given
    request: Request
    result: Result | None
    error: BaseException | None


class Engine:
    """Runs requests on a bundle. Safe to use from many threads; close it, or use it as a context manager.

    An engine that nobody closes ends with the process, or when nothing refers to it any more.

    max_rows: most denoiser rows in one network call. max_pixels: most pixels of all its rows, unless one image has more;
    a call that runs out of memory halves it for its network. queue_limit: most requests that wait.
    tiling: how large pictures pass VAEs and feed-forward networks.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        max_rows: int = MAX_ROWS,
        max_pixels: int = MAX_PIXELS,
        queue_limit: int = QUEUE_LIMIT,
        tiling: Tiling = WHOLE,
    ) -> None:
        for name, value, least in (
            ("max_rows", max_rows, 2),
            ("max_pixels", max_pixels, 1),
            ("queue_limit", queue_limit, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RequestError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        self.bundle, self.backend, self.max_rows = bundle, backend, max_rows
        self.scheduler_card = bundle.scheduler
        self.adapters = Adapters(bundle, backend)
        self._scheduler = Scheduler(max_rows=max_rows, max_pixels=max_pixels, queue_limit=queue_limit)
        self._worker = Worker(bundle, backend, self._scheduler, self.adapters, tiling)
        self._warned_of_guidance = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._worker.run, name="stepforge-engine", daemon=True)
        self._thread.start()
        # also at the interpreter's exit: an engine library that is called while the interpreter goes aborts the process
        self._end = weakref.finalize(self, _end, self._pid, self._scheduler, self._thread)

    def plan(self, request: Asked, **options: Any) -> Plan:
        """The plan that `generate` would run, of the base model. Raises RequestError."""
        return self._plan(resolve(Request.of(request, **options), self.bundle), None)

    def size(self, request: Asked, **options: Any) -> Size:
        """Size of the pictures that `generate` would make, behind all stages. Raises RequestError."""
        return self._legs(resolve(Request.of(request, **options), self.bundle), None)[-1].size

    def plans(self, request: Asked, **options: Any) -> list[tuple[str, Plan]]:
        """The plans that `generate` would run, each with the name of its stage, which is empty for the base model; those of
        feed-forward networks are empty. Raises RequestError."""
        request = resolve(Request.of(request, **options), self.bundle)
        return [(leg.stage, leg.plan) for leg in self._legs(request, None)]

    def submit(
        self,
        request: Asked,
        *,
        on_step: OnStep | None = None,
        rows: Rows | None = None,
        wait: bool = False,
        **options: Any,
    ) -> Future[Result]:
        """Queue a request, or a prompt with fields of `Request` as options; cancel its future to stop it at the next step.

        on_step: called on the engine's thread after each step of each image with a `Progress`; while it runs, nothing else
        does. It must not wait for the engine. rows: steps of the caller's own in place of the request's sampler, see
        `plan.compile.compile_plan`. wait: for room, if the queue is full.
        Raises RequestError at once if the request is bad, QueueFull if `queue_limit` requests wait.
        """
        job = self._job(Request.of(request, **options), on_step, rows)
        if wait:
            self._check_wait()
        self._scheduler.submit(job, wait=wait)
        return job.future

    @overload
    def generate(self, request: Asked, *, on_step: OnStep | None = None, **options: Any) -> Result: ...
    @overload
    def generate(
        self,
        request: Sequence[Asked],
        *,
        on_step: OnStep | None = None,
        return_exceptions: bool = False,
        **options: Any,
    ) -> list[Result]: ...
    def generate(
        self,
        request: Asked | Sequence[Asked],
        *,
        on_step: OnStep | None = None,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Result | list[Result]:
        """Run one request, or several together; `generate("a cat", steps=20)` is one. Waits for room in the queue.

        Of several, all are checked before any is queued. return_exceptions: a request that fails has its error in its
        place, as in asyncio.gather; otherwise the first failure is raised and the rest is cancelled.
        Raises RequestError, Cancelled or GenerationError.
        """
        self._check_wait()
        if isinstance(request, Request | str):
            return self.submit(request, on_step=on_step, wait=True, **options).result()
        found: dict[int, Any] = {}
        outcomes = self.stream(request, on_step=on_step, **options)
        for outcome in outcomes:
            if outcome.error is not None and not return_exceptions:
                outcomes.close()
                raise outcome.error
            found[outcome.index] = outcome.result if outcome.error is None else outcome.error
        return [found[index] for index in range(len(found))]

    def upscale(
        self,
        image: ImageSource,
        stage: str,
        *,
        prompt: str = "",
        seed: int = 0,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Result:
        """Enlarge a picture by one stage of the bundle; `generate` with an `Upscale` that has an image.

        options: further fields of `Upscale`. Raises RequestError, Cancelled or GenerationError.
        """
        asked = {"name": stage, "image": image, **options}
        return self.generate(Request(prompt=prompt, seed=seed, upscale=asked), on_step=on_step)

    def stream(
        self, requests: Iterable[Asked], *, on_step: OnStep | None = None, **options: Any
    ) -> Generator[Outcome, None, None]:
        """Run several requests; an iterator of their outcomes, results and failures, as they end.

        All are checked before any is queued: RequestError is raised here. Closing the iterator cancels what is unfinished.
        """
        self._check_wait()
        return self._outcomes([self._job(Request.of(request, **options), on_step, None) for request in requests])

    async def agenerate(self, request: Asked, *, on_step: OnStep | None = None, **options: Any) -> Result:
        """`generate` for asyncio; cancelling the task cancels the request. The event loop is never blocked."""
        job = await asyncio.to_thread(self._job, Request.of(request, **options), on_step, None)
        await self._enqueue(job)
        return await asyncio.wrap_future(job.future)

    async def astream(
        self, requests: Iterable[Asked], *, on_step: OnStep | None = None, **options: Any
    ) -> AsyncGenerator[Outcome, None]:
        """`stream` for asyncio. RequestError is raised before the first outcome."""
        asked = [Request.of(request, **options) for request in requests]
        jobs = await asyncio.to_thread(lambda: [self._job(request, on_step, None) for request in asked])

        async def run(index: int, job: Job) -> Outcome:
            await self._enqueue(job)
            await asyncio.wait([asyncio.wrap_future(job.future)])
            return _outcome(index, job)

        tasks = [asyncio.ensure_future(run(index, job)) for index, job in enumerate(jobs)]
        try:
            for ended in asyncio.as_completed(tasks):
                yield await ended
        finally:
            for job, task in zip(jobs, tasks, strict=True):
                job.future.cancel()
                task.cancel()

    def close(self) -> None:
        """Stop after the current step. Images that have made all their steps are still decoded; what is unfinished fails
        with Cancelled."""
        if threading.current_thread() in (self._thread, self._worker.decoding.thread):
            raise RequestError("close() was called inside a callback of this engine, which would wait for itself")
        self._end()
        self._thread.join()  # also where another thread closes it

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plan(self, request: Request, rows: Rows | None) -> Plan:
        plan = compile_plan(request, self.scheduler_card, rows, blends=not self.bundle.reads_mask)
        check_variants(plan, self.bundle)
        return plan

    def _legs(self, request: Request, rows: Rows | None) -> list[Leg]:
        return legs_of(request, self.bundle, partial(self._plan, request, rows))

    def _job(self, request: Request, on_step: OnStep | None, rows: Rows | None) -> Job:
        """A request that can be run. Raises RequestError for one that cannot."""
        self._check_process()
        if rows is not None and request.experts is not None:
            raise RequestError("steps of the caller's own name their denoisers; leave experts out")
        request = resolve(request, self.bundle)
        self._worker.check(request)  # unreadable prompts, unknown ControlNets
        legs = self._legs(request, rows)
        self._warn(request)
        return Job(
            request, legs, RequestFuture(self._check_wait),
            on_step=on_step, adapters=self.adapters.choose(request.adapters),
        )  # fmt: skip

    def _warn(self, request: Request) -> None:
        """Once an engine: constant guidance below 1 is not what diffusers makes of it."""
        w = request.guidance
        if isinstance(w, float) and w < 1.0 and not self._warned_of_guidance:
            self._warned_of_guidance = True
            log.warning(
                "guidance %g %s; diffusers runs the conditional row alone for a guidance_scale of 1 or less: "
                "give 1.0 for that",
                w,
                "runs the unconditional row alone" if w == 0.0 else "leans to the negative prompt",
            )

    def _outcomes(self, jobs: Sequence[Job]) -> Generator[Outcome, None, None]:
        """Queue jobs while there is room, and yield them as they end."""
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        queued = yielded = 0
        try:
            while yielded < len(jobs):
                while queued < len(jobs):
                    try:
                        # with nothing of ours on its way, others fill the queue: wait for them
                        self._scheduler.submit(jobs[queued], wait=queued == yielded)
                    except QueueFull:
                        break
                    except RequestError:  # the engine was closed: what has ended is still told
                        jobs[queued].future.settle(Cancelled(CLOSED))
                    jobs[queued].future.add_done_callback(lambda _, index=queued: ended.put(index))  # type: ignore[misc]
                    queued += 1
                index = ended.get()
                yielded += 1
                yield _outcome(index, jobs[index])
        finally:
            for job in jobs:
                job.future.cancel()

    async def _enqueue(self, job: Job) -> None:
        """Queue a job as soon as there is room."""
        pause = 0.005
        while True:
            try:
                return self._scheduler.submit(job, wait=False)
            except QueueFull:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.25)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RequestError("this engine was loaded before the process forked; load the engine after forking")

    def _check_wait(self) -> None:
        """Refuse waits that would never end."""
        self._check_process()
        if threading.current_thread() in (self._thread, self._worker.decoding.thread):
            raise RequestError("a callback of this engine cannot wait for it; submit the request and return")


def _outcome(index: int, job: Job) -> Outcome:
    """Of a job whose future is done."""
    try:
        return Outcome(index, job.request, job.future.result(), None)
    except BaseException as error:
        return Outcome(index, job.request, None, error)


def _end(pid: int, scheduler: Scheduler, thread: threading.Thread) -> None:
    """Close an engine. A forked child has its parent's engine without the thread: nothing ends there."""
    if os.getpid() == pid:
        scheduler.close()
        if thread is not threading.current_thread():
            thread.join()
