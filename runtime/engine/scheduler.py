"""Who runs next: which requests wait, which images are on their way, and which of them share a network call.

Touches no arrays and no networks. `submit`, `resume`, `returned`, `wake`, `drain`, `close` and `counts` are for any thread,
everything else for the engine's own.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from operator import attrgetter

from stepforge.runtime.bundle import ComponentId
from stepforge.runtime.engine.state import Job
from stepforge.runtime.engine.trajectory import Batch, Trajectory, Waypoint
from stepforge.runtime.errors import Cancelled, EngineClosed, QueueFull

CLOSED = "the engine was closed"


class Scheduler:
    """Continuous batching: images join and leave between steps, those of the request of lowest rank first, the oldest but for
    priorities (`Job.rank`).

    max_rows: denoiser rows in one call. max_pixels: pixels of all its rows, unless one image alone has more; both bound
    the images on their way as well. queue_limit: requests that wait.
    """

    def __init__(self, *, max_rows: int, max_pixels: int, queue_limit: int) -> None:
        self.max_rows, self.max_pixels, self.queue_limit = max_rows, max_pixels, queue_limit
        self._waiting: list[Job] = []  # by rank
        self._between: deque[Waypoint] = deque()  # images whose next leg can start
        self._away = 0  # images that are being decoded
        self._lent = 0  # given images among them, which feed-forward networks work on
        self._running: list[Trajectory] = []
        self._most_pixels: dict[ComponentId, int] = {}  # network -> what fitted in memory
        self._changed = threading.Condition()
        self.is_draining = self.is_closed = False

    def submit(self, job: Job, *, wait: bool, timeout: float | None = None) -> None:
        """Queue a job, unless it is over. Raises QueueFull, with `wait` after as many seconds without room as `timeout`
        says; EngineClosed once the scheduler drains or is closed."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not (self.is_draining or job.is_over) and len(self._waiting) >= self.queue_limit:
                self._drop_ended()
                if len(self._waiting) < self.queue_limit:
                    break
                left = None if until is None else until - time.monotonic()
                if not wait or (left is not None and left <= 0):
                    raise QueueFull(f"{self.queue_limit} requests wait already; raise queue_limit, or try again later")
                self._changed.wait(left)
            if self.is_draining:
                raise EngineClosed(CLOSED)
            if not job.is_over:
                insort(self._waiting, job, key=attrgetter("rank"))
                self._changed.notify_all()

    def wake(self) -> None:
        """A job has ended without the engine's doing: one that waits makes room."""
        with self._changed:
            self._changed.notify_all()

    def resume(self, waypoint: Waypoint) -> None:
        """An image has come to its next leg. Raises Cancelled once the scheduler is closed."""
        with self._changed:
            if self.is_closed:
                raise Cancelled(CLOSED)
            self._between.append(waypoint)
            self._changed.notify_all()

    def drain(self) -> None:
        """Take no more jobs: `has_work` gives False once all are done."""
        with self._changed:
            self.is_draining = True
            self._changed.notify_all()

    def close(self) -> None:
        """No more work: `has_work` gives False from now on."""
        with self._changed:
            self.is_draining = self.is_closed = True
            self._changed.notify_all()

    def has_work(self) -> bool:
        """Wait until there is some; False once the scheduler is closed, or drained."""
        with self._changed:
            while not (self.is_closed or self._running or self._between or (self._waiting and not self._is_held)):
                if self.is_draining and not (self._waiting or self._away):
                    return False
                self._changed.wait()
            return not self.is_closed

    def counts(self) -> dict[str, int]:
        """Jobs that wait; images that run, and that are being decoded."""
        with self._changed:
            waiting = sum(not job.is_over for job in self._waiting)
            return {"waiting": waiting, "running": len(self._running), "decoding": max(0, self._away)}

    def admissible(self) -> Waypoint | Job | None:
        """What starts next, if rows and pixels are free for it: the image that has waited longest for its next leg, before
        one of the oldest waiting job."""
        with self._changed:
            while self._between and self._between[0].job.is_over:
                self._between.popleft()
            while self._waiting and self._waiting[0].is_over:
                del self._waiting[0]
                self._changed.notify_all()
            if not (self._between or self._waiting) or len(self._running) >= self.max_rows:
                return None
            asked: Waypoint | Job = self._between[0] if self._between else self._waiting[0]
            leg = asked.next if isinstance(asked, Waypoint) else asked.legs[0]
            assert leg is not None
            if leg.is_network and self._is_held:
                return None
            used = sum(trajectory.pixels for trajectory in self._running)
            return asked if not self._running or used + leg.pixels <= self.max_pixels else None

    def start(self, trajectory: Trajectory) -> None:
        """One image is on its way, before those of requests of higher rank."""
        insort(self._running, trajectory, key=attrgetter("job.rank"))

    @property
    def _is_held(self) -> bool:
        """Whether the oldest waiting job is for a feed-forward network, whose given images stand in memory, and has to wait."""
        return self._lent >= self.max_rows and bool(self._waiting) and self._waiting[0].legs[0].is_network

    def lend(self, image: Waypoint) -> None:
        """An image goes to the decoding stage, which `returned` tells the end of."""
        with self._changed:
            self._away += 1
            self._lent += not image.done

    def returned(self, image: Waypoint) -> None:
        with self._changed:
            self._away -= 1
            self._lent -= not image.done
            self._changed.notify_all()

    def took(self, asked: Waypoint | Job) -> None:
        """What `admissible` gave has started, or failed to: an image leaves the queue, a job with the last of its images."""
        if isinstance(asked, Waypoint):
            with self._changed:
                self._between.remove(asked)
            return
        asked.started += 1
        if asked.started == asked.request.images:
            self.drop(asked)

    def drop(self, job: Job) -> None:
        """Take a job out of the queue."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify_all()

    def running(self) -> Iterator[Trajectory]:
        return iter(self._running)

    def pack(self) -> Batch | None:
        """The oldest image and all of its kind that fit in one call with it; None if nothing runs."""
        self._running = [trajectory for trajectory in self._running if not trajectory.job.is_over]
        if not self._running:
            return None
        first = self._running[0]
        kind = first.kind
        most = min(self.max_pixels, self._most_pixels.get(kind.network, self.max_pixels))
        chosen: list[Trajectory] = []
        rows = 0
        for trajectory in self._running:
            need = len(trajectory.rows())
            fits = rows + need <= self.max_rows and (rows + need) * first.pixels <= most
            if trajectory.kind == kind and (fits or not chosen):
                chosen.append(trajectory)
                rows += need
        return Batch.of(chosen)

    def learn_out_of_memory(self, batch: Batch) -> None:
        """A call was too large: no later one of this network has more than half of its pixels."""
        self._most_pixels[batch.network] = batch.pixels // 2

    def retire(self) -> list[Trajectory]:
        """Take out the images that have made their last step."""
        done = [trajectory for trajectory in self._running if trajectory.is_done]
        self._running = [trajectory for trajectory in self._running if not trajectory.is_done]
        return done

    def abandon(self, tell: Callable[[Job], None]) -> None:
        """Empty queue and batch; `tell` settles each job that is left."""
        with self._changed:
            images: tuple[Waypoint | Trajectory, ...] = (*self._between, *self._running)
            jobs = dict.fromkeys((*self._waiting, *(image.job for image in images)))
            self._waiting.clear()
            self._between.clear()
            self._running.clear()
            self._changed.notify_all()
        for job in jobs:
            tell(job)

    def _drop_ended(self) -> None:
        """Cancelled jobs leave the queue wherever they stand."""
        if any(job.is_over for job in self._waiting):
            self._waiting = [job for job in self._waiting if not job.is_over]
            self._changed.notify_all()
