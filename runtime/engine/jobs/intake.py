"""Jobs into the queue, at once or as room comes, and out of it as they end."""

from __future__ import annotations

import asyncio
import queue
import time
from collections import deque
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
        """Queue jobs while there is room, and yield their outcomes as they end; nothing of one that was yielded is kept.
        Closed, it cancels what is unfinished."""
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        left = dict(enumerate(jobs))  # jobs not yielded yet
        del jobs
        try:
            self._begin(*left.values())
            waiting = deque(left)  # indices not queued yet
            while left:
                while waiting and self._queue_next(left[waiting[0]], waiting, ended, wait=len(waiting) == len(left)):
                    pass
                index = ended.get()
                yield Outcome.of(index, left.pop(index))
        finally:
            for job in left.values():
                job.future.cancel()

    def _queue_next(self, job: Job, waiting: deque[int], ended: queue.SimpleQueue[int], *, wait: bool) -> bool:
        """Queue the first of those that wait; False where there is no room. wait: for room that others have."""
        try:
            self._queue(job, wait=wait)
        except QueueFull:
            return False
        except EngineClosed:  # what has ended is still told
            job.future.settle(Cancelled(CLOSED))
        job.future.add_done_callback(lambda _, index=waiting.popleft(): ended.put(index))  # type: ignore[misc]
        return True

    async def aoutcomes(self, jobs: Sequence[Job]) -> AsyncGenerator[Outcome, None]:
        """`outcomes` for asyncio."""

        async def run(index: int, job: Job) -> Outcome:
            try:
                await self.aput(job, None)
            except EngineClosed:
                return Outcome(index, job.request, None, Cancelled(CLOSED))
            await asyncio.wait([asyncio.wrap_future(job.future)])
            return Outcome.of(index, job)

        def begin(index: int, job: Job) -> asyncio.Task[Outcome]:
            task = asyncio.ensure_future(run(index, job))
            task.add_done_callback(ended.put_nowait)
            return task

        def take(task: asyncio.Task[Outcome]) -> Outcome:
            del left[task]
            return task.result()

        ended: asyncio.Queue[asyncio.Task[Outcome]] = asyncio.Queue()
        left = {begin(index, job): job for index, job in enumerate(jobs)}
        del jobs
        try:
            while left:
                yield take(await ended.get())
        finally:
            for task, job in left.items():
                job.future.cancel()
                task.cancel()

    def _begin(self, *jobs: Job) -> None:
        """Jobs that end while they wait, for room or in the queue, wake those who wait for room."""
        wake = self._scheduler.wake
        for job in jobs:
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
