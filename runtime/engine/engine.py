"""The engine: continuous batching of requests that each run their own plan. This is its face, for any number of threads.

Behind it the `Scheduler` says who runs next, and the `Worker`, on a thread of its own, runs it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, overload

from stepforge.runtime.backends import Backend
from stepforge.runtime.bundle import Bundle, Size
from stepforge.runtime.checks import shown, whole
from stepforge.runtime.engine.adapters import Adapters
from stepforge.runtime.engine.jobs.deadlines import Deadlines, check_seconds
from stepforge.runtime.engine.jobs.fork import keep_in_children
from stepforge.runtime.engine.jobs.future import RequestFuture
from stepforge.runtime.engine.jobs.intake import Intake, Outcome
from stepforge.runtime.engine.jobs.statistics import EngineStats
from stepforge.runtime.engine.legs import legs_of
from stepforge.runtime.engine.pictures.networks import WHOLE, Tiling
from stepforge.runtime.engine.scheduler import Scheduler
from stepforge.runtime.engine.state import Job, Leg, OnStep
from stepforge.runtime.engine.warm_up import masked, short_jobs
from stepforge.runtime.engine.worker import Worker
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan import Plan
from stepforge.runtime.plan.compile import Rows, check_variants, compile_plan
from stepforge.runtime.request import Request, Result
from stepforge.runtime.request.control import ImageSource
from stepforge.runtime.request.presets import resolve

log = logging.getLogger(__name__)

MAX_ROWS = 8  # denoiser rows in one call; on a CPU more rows cost memory and gain nothing (docs/speed.md)
MAX_PIXELS = 8 << 20  # pixels of all rows of a call: eight of 1024×1024
QUEUE_LIMIT = 1024  # waiting requests
MAX_PRIORITY = 10  # levels above and below 0

Asked = Request | str | Mapping[str, Any]


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
        self._adapters = Adapters(bundle, backend)
        self._scheduler = Scheduler(max_rows=max_rows, max_pixels=max_pixels, queue_limit=queue_limit)
        self._intake = Intake(self._scheduler)
        self._worker = Worker(bundle, backend, self._scheduler, self._adapters, tiling)
        self._warned_of_guidance = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._worker.run, name="stepforge-engine", daemon=True)
        self._thread.start()
        keep_in_children(self)
        # also at the interpreter's exit: an engine library that is called while the interpreter goes aborts the process
        self._end = weakref.finalize(self, _end, self._pid, self._scheduler, self._intake.deadlines, self._thread)

    @property
    def adapters(self) -> Adapters:
        """LoRA files by name: `load`, `list` and `unload` them. Raises RequestError in a forked child."""
        self._check_process()
        return self._adapters

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
        priority: int = 0,
        deadline: float | None = None,
        rows: Rows | None = None,
        wait: bool = False,
        timeout: float | None = None,
        **options: Any,
    ) -> Future[Result]:
        """Queue a request, a prompt or a mapping, with fields of `Request` as options; cancel its future to stop it.

        on_step: called on the engine's thread after each step of each image with a `Progress`; while it runs, nothing else
        does. It must not wait for the engine. priority: from -10 to 10, the higher first; a level is worth 30 s of waiting,
        so that no request waits for ever, and those of one level go in the order they came. deadline: seconds from now, by
        which waiting and running must have ended; the future then fails with DeadlineExceeded at once, and the work stops
        at the next step. rows: steps of the caller's own in place of the request's sampler, see `plan.compile.compile_plan`.
        wait: for room, if the queue is full, for `timeout` seconds at most.
        Raises RequestError at once if the request is bad, EngineClosed if the engine takes none any more, and QueueFull if
        `queue_limit` requests wait.
        """
        check_seconds("timeout", timeout)
        job = self._job(Request.of(request, **options), on_step, rows, priority, deadline)
        if wait:
            self._check_wait()
        self._intake.put(job, wait=wait, timeout=timeout)
        return job.future

    @overload
    def generate(
        self,
        request: Asked,
        *,
        on_step: OnStep | None = None,
        priority: int = 0,
        deadline: float | None = None,
        **options: Any,
    ) -> Result: ...
    @overload
    def generate(
        self,
        request: Sequence[Asked],
        *,
        on_step: OnStep | None = None,
        priority: int = 0,
        deadline: float | None = None,
        return_exceptions: bool = False,
        **options: Any,
    ) -> list[Result]: ...
    def generate(
        self,
        request: Asked | Sequence[Asked],
        *,
        on_step: OnStep | None = None,
        priority: int = 0,
        deadline: float | None = None,
        return_exceptions: bool = False,
        **options: Any,
    ) -> Result | list[Result]:
        """Run one request, or several together; `generate("a cat", steps=20)` is one. Waits for room in the queue.

        Of several, all are checked before any is queued. return_exceptions: a request that fails has its error in its
        place, as in asyncio.gather; otherwise the first failure is raised and the rest is cancelled.
        on_step, priority, deadline: see `submit`. Raises RequestError, Cancelled, DeadlineExceeded or GenerationError.
        """
        self._check_wait()
        more = {"on_step": on_step, "priority": priority, "deadline": deadline, **options}
        if isinstance(request, Request | str | Mapping):
            return self.submit(request, wait=True, **more).result()
        found: dict[int, Any] = {}
        outcomes = self.stream(request, **more)
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
        priority: int = 0,
        deadline: float | None = None,
        **options: Any,
    ) -> Result:
        """Enlarge a picture by one stage of the bundle; `generate` with an `Upscale` that has an image.

        options: further fields of `Upscale`. Raises what `generate` raises.
        """
        asked = Request(prompt=prompt, seed=seed, upscale={"name": stage, "image": image, **options})
        return self.generate(asked, on_step=on_step, priority=priority, deadline=deadline)

    def stream(
        self,
        requests: Iterable[Asked],
        *,
        on_step: OnStep | None = None,
        priority: int = 0,
        deadline: float | None = None,
        **options: Any,
    ) -> Generator[Outcome, None, None]:
        """Run several requests; an iterator of their outcomes, results and failures, as they end.

        All are checked before any is queued: RequestError is raised here. Closing the iterator cancels what is unfinished.
        on_step, priority, deadline: of each, see `submit`; deadlines count from the iterator's first step.
        """
        self._check_wait()
        return self._intake.outcomes(self._jobs(requests, on_step, priority, deadline, options))

    async def asubmit(
        self,
        request: Asked,
        *,
        on_step: OnStep | None = None,
        priority: int = 0,
        deadline: float | None = None,
        wait: bool = False,
        timeout: float | None = None,
        **options: Any,
    ) -> Future[Result]:
        """`submit` for asyncio: the request is checked on a thread of its own, and the event loop is never blocked.

        `await asyncio.wrap_future(...)` of what it returns is the result; cancelling either stops the request.
        """
        check_seconds("timeout", timeout)
        asked = Request.of(request, **options)
        job = await asyncio.to_thread(self._job, asked, on_step, None, priority, deadline)
        await self._intake.aput(job, timeout if wait else 0.0)
        return job.future

    async def agenerate(
        self,
        request: Asked,
        *,
        on_step: OnStep | None = None,
        priority: int = 0,
        deadline: float | None = None,
        **options: Any,
    ) -> Result:
        """`generate` for asyncio; cancelling the task cancels the request. The event loop is never blocked."""
        more = {"on_step": on_step, "priority": priority, "deadline": deadline, **options}
        return await asyncio.wrap_future(await self.asubmit(request, wait=True, **more))

    async def astream(
        self,
        requests: Iterable[Asked],
        *,
        on_step: OnStep | None = None,
        priority: int = 0,
        deadline: float | None = None,
        **options: Any,
    ) -> AsyncGenerator[Outcome, None]:
        """`stream` for asyncio. RequestError is raised before the first outcome."""
        asked = asyncio.to_thread(self._jobs, Request.list_of(requests, **options), on_step, priority, deadline, {})
        async for outcome in self._intake.aoutcomes(await asked):
            yield outcome

    def warm_up(self, *requests: Asked, images: int | None = None) -> None:
        """Run the networks that these requests use once in each batch size, so that the first of them need not open, compile
        or tune anything; without requests, one of the model's own size.

        A warm-up makes as few steps as show each network once, of 1 to `images` images together; by default of as many as
        `max_rows` and `max_pixels` let share a call, of which one passes the stages too. It waits in the queue, and counts in
        no statistics.
        Raises what `generate` raises.
        """
        self._check_wait()
        for request in requests or (masked(Request(prompt=""), self.bundle),):
            whole_job = self._job(Request.of(request), None, None, 0, None)
            for job in short_jobs(whole_job, images, self.max_rows, self._scheduler.max_pixels):
                self._scheduler.submit(job, wait=True)
                job.future.result()

    def stats(self) -> EngineStats:
        """Counts of the work so far, and what waits and runs now."""
        self._check_process()
        return self._intake.statistics.snapshot(queue_limit=self._scheduler.queue_limit, **self._scheduler.counts())

    @property
    def is_closed(self) -> bool:
        """Whether the engine takes no requests any more: it was closed, is being drained, or has failed."""
        return self._scheduler.is_draining

    def close(self, *, drain: bool = False, timeout: float | None = None) -> bool:
        """Take no more requests, and end. Any number of threads may call it, any number of times.

        drain: finish what waits and runs first, for `timeout` seconds at most. What is then unfinished stops after the
        current step and fails with Cancelled; images that have made all their steps are still decoded. Futures and stream
        iterators stay valid. Gives whether no request was aborted so.
        """
        if threading.current_thread() in self._threads():
            raise RequestError("close() was called inside a callback of this engine, which would wait for itself")
        check_seconds("timeout", timeout)
        if drain and os.getpid() == self._pid:
            self._scheduler.drain()
            self._thread.join(timeout)
        self._end()
        self._thread.join()  # also where another thread closes it
        return os.getpid() != self._pid or not self._intake.statistics.ended("aborted")

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

    def _job(
        self, request: Request, on_step: OnStep | None, rows: Rows | None, priority: object, deadline: object
    ) -> Job:
        """A request that can be run. Raises RequestError for one that cannot."""
        self._check_process()
        if not (on_step is None or callable(on_step)):
            raise RequestError(f"on_step is {shown(on_step)}; give a function of a Progress")
        level = whole("priority", priority, -MAX_PRIORITY, MAX_PRIORITY)
        seconds = check_seconds("deadline", deadline)
        if rows is not None and request.experts is not None:
            raise RequestError("steps of the caller's own name their denoisers; leave experts out")
        request = resolve(request, self.bundle)
        self._worker.check(request)  # unreadable prompts, unknown ControlNets
        legs = self._legs(request, rows)
        self._worker.check_tiles(legs, request)
        self._warn(request)
        return Job(
            request, legs, RequestFuture(self._check_wait), on_step=on_step, adapters=self._adapters.choose(request.adapters),
            priority=level, deadline=seconds, statistics=self._intake.statistics,
        )  # fmt: skip

    def _jobs(
        self,
        requests: Iterable[Asked],
        on_step: OnStep | None,
        priority: int,
        deadline: float | None,
        options: dict[str, Any],
    ) -> list[Job]:
        asked = Request.list_of(requests, **options)
        return [self._job(request, on_step, None, priority, deadline) for request in asked]

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

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RequestError("this engine was loaded before the process forked; load the engine after forking")

    def _threads(self) -> tuple[threading.Thread | None, ...]:
        """The engine's own, on which callbacks run."""
        return self._thread, self._worker.decoding.thread, self._intake.deadlines.thread

    def _check_wait(self) -> None:
        """Refuse waits that would never end."""
        self._check_process()
        if threading.current_thread() in self._threads():
            raise RequestError("a callback of this engine cannot wait for it; submit the request and return")


def _end(pid: int, scheduler: Scheduler, deadlines: Deadlines, thread: threading.Thread) -> None:
    """Close an engine. A forked child has its parent's engine without the thread: nothing ends there."""
    if os.getpid() == pid:
        scheduler.close()
        if thread is not threading.current_thread():
            thread.join()
        deadlines.close()
