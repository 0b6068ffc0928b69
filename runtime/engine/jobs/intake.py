"""Jobs into the queue, at once or as room comes, and out of it as they end."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from stepforge.runtime.engine.jobs.deadlines import Deadlines
from stepforge.runtime.engine.jobs.statistics import Statistics
from stepforge.runtime.engine.scheduler import CLOSED, Scheduler
from stepforge.runtime.engine.state import Job
from stepforge.runtime.errors import Cancelled, EngineClosed, QueueFull
from stepforge.runtime.request import Request, Result


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request of `Engine.stream`: a result, or the error that ended it."""

    index: int  # among the requests that were given
    request: Request
    result: Result | None
    error: BaseException | None

    @classmethod
    def of(cls, index: int, job: Job) -> Outcome:
        """Of a job whose future is done."""
        try:
            return cls(index, job.request, job.future.result(), None)
        except BaseException as error:
            return cls(index, job.request, None, error)


class Intake:
    """Queues jobs, starts the clocks of their deadlines, and counts how they end. Safe from any thread."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.statistics, self.deadlines = Statistics(), Deadlines()

    def put(self, job: Job, *, wait: bool, timeout: float | None) -> None:
        """Queue a job, or wait for room, `timeout` seconds at most. Raises QueueFull or EngineClosed."""
        try:
            self._begin(job)
            self._queue(job, wait=wait, timeout=timeout)
        except BaseException as error:
            self._refuse(job, error)
            raise

    async def aput(self, job: Job, timeout: float | None) -> None:
        """`put` for asyncio."""
        pause, until = 0.005, None if timeout is None else time.monotonic() + timeout
        try:
            self._begin(job)
            while True:
                with suppress(QueueFull):
                    return self._queue(job, wait=False)
                if until is not None and time.monotonic() >= until:
                    return self._queue(job, wait=False)
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.25)
        except BaseException as error:
            self._refuse(job, error)
            raise

    def outcomes(self, jobs: Sequence[Job]) -> Generator[Outcome, None, None]:
        """Queue jobs while there is room, and yield their outcomes as they end. Closed, it cancels what is unfinished."""
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        queued = yielded = 0
        try:
            for job in jobs:
                self._begin(job)
            while yielded < len(jobs):
                while queued < len(jobs):
                    try:
                        # with nothing of ours on its way, others fill the queue: wait for them
                        self._queue(jobs[queued], wait=queued == yielded)
                    except QueueFull:
                        break
                    except EngineClosed:  # what has ended is still told
                        jobs[queued].future.settle(Cancelled(CLOSED))
                    jobs[queued].future.add_done_callback(lambda _, index=queued: ended.put(index))  # type: ignore[misc]
                    queued += 1
                index = ended.get()
                yielded += 1
                yield Outcome.of(index, jobs[index])
        finally:
            for job in jobs:
                job.future.cancel()

    async def aoutcomes(self, jobs: Sequence[Job]) -> AsyncGenerator[Outcome, None]:
        """`outcomes` for asyncio."""

        async def run(index: int, job: Job) -> Outcome:
            try:
                await self.aput(job, None)
            except EngineClosed:
                return Outcome(index, job.request, None, Cancelled(CLOSED))
            await asyncio.wait([asyncio.wrap_future(job.future)])
            return Outcome.of(index, job)

        tasks = [asyncio.ensure_future(run(index, job)) for index, job in enumerate(jobs)]
        try:
            for ended in asyncio.as_completed(tasks):
                yield await ended
        finally:
            for job, task in zip(jobs, tasks, strict=True):
                job.future.cancel()
                task.cancel()

    def _begin(self, job: Job) -> None:
        """A job that ends while it waits, for room or in the queue, wakes those who wait for room."""
        wake = self._scheduler.wake
        job.future.add_done_callback(lambda _: wake())
        if job.deadline is not None:
            self.deadlines.add(job.future, job.deadline)

    def _queue(self, job: Job, *, wait: bool, timeout: float | None = None) -> None:
        self._scheduler.submit(job, wait=wait, timeout=timeout)
        job.future.add_done_callback(self.statistics.end)

    def _refuse(self, job: Job, error: BaseException) -> None:
        """Forget a job that was not queued."""
        job.future.cancel()
        if isinstance(error, QueueFull):
            self.statistics.refuse()
