"""A batch's workers on Ray: actors that hold engines, replaced when they die, whose jobs others draw again.

Plain actors, not Ray Data: the batch's journal is the truth, so that a run can be killed at any byte and may go on with another
number of workers or with none. Ray Data's checkpoint is a second truth, written by blocks, and a job that fails takes its
block along (docs/scale.md).
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any

from stepforge.runtime.errors import Cancelled, GenerationError, RequestError, StepforgeError
from stepforge.runtime.files import printable
from stepforge.runtime.serve.draw import Ended, Task, settle
from stepforge.runtime.serve.ray.worker import STOPPED, Setup, Worker, take_over

log = logging.getLogger(__name__)

LOCAL = "local"  # address of a cluster that is started for the run, in this machine
AUTO = "auto"  # of the one that this machine belongs to
CONNECT = 10.0  # seconds for a head to answer
MOST_DEATHS = 3  # of workers under one job, after which it has failed
SUSPECT = 2  # deaths after which a job is drawn alone, so that it takes no others along
MOST_IN_A_ROW = 5  # deaths a worker's place has without a job done in between
STORE_BYTES = 150 << 20  # object store of a local cluster; records pass through it, images do not
LAST_WORDS = 60.0  # seconds that workers have to write what is finished when the batch stops


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where workers run, and what each asks of its node."""

    address: str  # "local", "auto" or HOST:PORT
    workers: int
    threads: int | None = None  # processor threads of each, Ray's num_cpus; None: the cluster's, shared out
    gpus: float = 0.0  # GPUs of each, Ray's num_gpus
    depth: int = 8  # jobs in one worker at a time; the engine's max_rows, so that no call lacks rows
    stall: float = 600.0  # seconds without a job done after which the run gives up


@dataclass(eq=False, slots=True)
class _Draw:
    """A job on its way."""

    task: Task
    ended: Future[Ended]
    deaths: int = 0


@dataclass(eq=False, slots=True)
class _Place:
    """One of the workers, as the driver sees it."""

    actor: Any
    is_ready: bool = False
    busy: set[_Draw] = field(default_factory=set)

    def has_room(self, draw: _Draw, depth: int) -> bool:
        if not self.is_ready or (draw.deaths >= SUSPECT and self.busy):
            return False
        return len(self.busy) < depth and not any(other.deaths >= SUSPECT for other in self.busy)


class RayDrawer:
    """Workers of a Ray cluster as a `Drawer`; a context manager.

    It works as soon as one worker has its engine; others join as the cluster has room, so an autoscaler that adds nodes for
    actors which wait serves it. All workers must agree on bundle, adapters, backend and precision.
    Raises RequestError if there is no cluster.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._ray = _package()
        self._cluster = cluster
        self._lock = threading.RLock()
        self._waiting: deque[_Draw] = deque()
        self._places: list[_Place] = []
        self._error: BaseException | None = None  # why nothing more is drawn
        self._is_stopped = False
        self._deaths = 0  # in a row
        self._moved = time.monotonic()  # when something ended or began
        self._first: Future[Mapping[str, Any]] = Future()
        self._closing = threading.Event()
        self._news: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # from Ray's threads, for ours
        self._owns = not self._ray.is_initialized()
        if self._owns:
            self._connect()

    def start(self, setup: Setup) -> None:
        """Ask for the workers and wait for the first. Raises StepforgeError."""
        cluster = self._cluster
        cores = int(self._ray.cluster_resources().get("CPU", 1))
        self._threads = cluster.threads or max(1, cores // cluster.workers)
        self._setup = replace(setup, options={**setup.options, "threads": self._threads})
        self._moved = time.monotonic()
        for work in (self._listen, self._watch):
            threading.Thread(target=work, name=f"stepforge-ray{work.__name__}", daemon=True).start()
        with self._lock:
            for _ in range(cluster.workers):
                self._hire()
        self._first.result()

    @property
    def facts(self) -> Mapping[str, Any]:
        """Those of all workers, see `Drawer`."""
        return self._first.result()

    def submit(self, task: Task) -> Future[Ended]:
        """See `Drawer`. Does not wait: `Batch` bounds what is on its way."""
        draw = _Draw(task, Future())
        with self._lock:
            if self._is_stopped:
                draw.ended.set_exception(self._error or Cancelled(STOPPED))
            else:
                if not self._waiting and not any(place.busy for place in self._places):
                    self._moved = time.monotonic()
                self._waiting.append(draw)
                self._pump()
        return draw.ended

    def stop(self) -> None:
        with self._lock:
            if self._is_stopped:
                return
            self._is_stopped = True
            self._moved = time.monotonic()
            dropped = list(self._waiting)
            self._waiting.clear()
            for place in self._places:
                if place.is_ready:
                    place.actor.stop.remote()
        for draw in dropped:
            draw.ended.set_exception(self._error or Cancelled(STOPPED))

    def close(self) -> None:
        """End the workers, and the connection to the cluster if it is ours."""
        self._closing.set()
        self._news.put(None)
        self._abort(Cancelled(STOPPED))
        if self._owns:
            self._ray.shutdown()

    def __enter__(self) -> RayDrawer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> None:
        cluster = self._cluster
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"address": cluster.address, "log_to_driver": False, "logging_level": logging.ERROR}
        if cluster.address == LOCAL:
            cores = max(len(os.sched_getaffinity(0)), cluster.workers * (cluster.threads or 1))
            options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE_BYTES}
        _check_there(cluster.address)
        with _signals():
            try:
                self._ray.init(**options)
            except Exception as error:  # some of its own are of no other class
                raise RequestError(f"no Ray cluster at {printable(cluster.address)}: {printable(error)}") from error

    def _hire(self) -> None:
        """Ask for a worker; the cluster gives it a node when it has room."""
        actor = (
            self._ray.remote(Worker)
            .options(num_cpus=self._threads, num_gpus=self._cluster.gpus, max_restarts=0, max_task_retries=0)
            .remote(self._setup)
        )
        place = _Place(actor)
        self._places.append(place)
        self._when_done(actor.load.remote(), partial(self._loaded, place))

    def _when_done(self, reference: Any, act: Callable[[Future[Any]], None]) -> None:
        """Have a call's end looked at on our own thread: on Ray's, ray.kill waits for itself."""
        reference.future().add_done_callback(lambda done: self._news.put(partial(act, done)))

    def _listen(self) -> None:
        while (act := self._news.get()) is not None:
            try:
                act()
            except Exception as error:
                log.exception("a defect of ours")
                self._abort(error)

    def _loaded(self, place: _Place, loaded: Future[Mapping[str, Any]]) -> None:
        error = loaded.exception()
        cause = getattr(error, "cause", None)
        with self._lock:
            if place not in self._places:
                return
            if isinstance(cause, StepforgeError):
                failure: BaseException | None = cause
            elif error is not None:
                return self._bury(place, error)
            else:
                failure = self._disagreement(loaded.result())
            if failure is None:
                place.is_ready = True
                self._moved = time.monotonic()
                if self._is_stopped:
                    return
                self._pump()
        if failure is not None:
            self._abort(failure)
        elif not self._first.done():
            self._first.set_result(loaded.result())

    def _disagreement(self, facts: Mapping[str, Any]) -> RequestError | None:
        """Of a worker with the first: pictures would depend on who draws them."""
        first = self._first.result() if self._first.done() else facts
        differ = [name for name in facts if facts[name] != first[name]]
        if not differ:
            return None
        name = differ[0]
        return RequestError(
            f"workers differ in their {name}: {printable(first[name], 80)} and {printable(facts[name], 80)}; "
            "give --backend and --precision, and the same files on all nodes"
        )

    def _pump(self) -> None:
        """Hand out what waits, to the least busy."""
        while self._waiting:
            draw = self._waiting[0]
            rooms = [place for place in self._places if place.has_room(draw, self._cluster.depth)]
            if not rooms:
                return
            place = min(rooms, key=lambda room: len(room.busy))
            place.busy.add(self._waiting.popleft())
            self._when_done(place.actor.draw.remote(draw.task), partial(self._drawn, place, draw))

    def _drawn(self, place: _Place, draw: _Draw, drawn: Future[Ended | None]) -> None:
        error = drawn.exception()
        cause = getattr(error, "cause", None)  # what was raised inside the worker
        with self._lock:
            if draw not in place.busy:  # `_abort` has settled it
                return
            place.busy.discard(draw)
            self._moved = time.monotonic()
            if error is None:
                self._deaths = 0
            elif cause is None or isinstance(cause, GenerationError):  # the worker is gone, or its engine
                reason, draw.deaths = cause or error, draw.deaths + 1
                self._bury(place, reason)
                if self._is_stopped:
                    cause = self._error or Cancelled(STOPPED)
                elif draw.deaths < MOST_DEATHS:
                    self._waiting.appendleft(draw)
                    return self._pump()
                else:
                    text = f"{draw.deaths} workers died while they drew it; the last: {printable(reason, 300)}"
                    drawn, error = Future(), None
                    drawn.set_result(draw.task.failed(text))
            self._pump()
        if error is None:
            settle(draw.ended, lambda: take_over(self._setup.files, drawn.result()))
        else:
            draw.ended.set_exception(cause or error)

    def _bury(self, place: _Place, error: BaseException) -> None:
        """Replace a worker that died. Those of its jobs that are still on their way come to `_drawn` by themselves."""
        if place not in self._places:
            return
        self._places.remove(place)
        self._kill(place)
        if self._is_stopped:
            return
        log.warning("a worker died and is replaced: %s", printable(error, 300))
        self._deaths += 1
        if self._deaths < MOST_IN_A_ROW * self._cluster.workers:
            self._hire()
        else:
            text = f"{self._deaths} workers died in a row; the last: {printable(error, 300)}"
            self._news.put(partial(self._abort, GenerationError(text)))

    def _kill(self, place: _Place) -> None:
        """Make sure that a worker has gone, without waiting for a node that may have gone as well."""

        def kill() -> None:
            with suppress(Exception):
                self._ray.kill(place.actor)

        threading.Thread(target=kill, name="stepforge-ray-kill", daemon=True).start()

    def _abort(self, error: BaseException) -> None:
        """End all work at once; what is unfinished fails with this error."""
        with self._lock:
            if self._error is None:
                self._error = error
            self._is_stopped = True
            draws = [*self._waiting, *(draw for place in self._places for draw in place.busy)]
            self._waiting.clear()
            for place in self._places:
                place.busy.clear()
                self._kill(place)
            self._places.clear()
        for draw in draws:
            draw.ended.set_exception(self._error)
        if not self._first.done():
            self._first.set_exception(self._error)

    def _watch(self) -> None:
        """Give up when nothing moves: what hangs says nothing by itself."""
        while not self._closing.wait(1.0):
            with self._lock:
                works = bool(self._waiting) or any(place.busy for place in self._places) or not self._first.done()
                limit = min(LAST_WORDS, self._cluster.stall) if self._is_stopped else self._cluster.stall
                if not works or time.monotonic() - self._moved < limit:
                    continue
                error = Cancelled(STOPPED) if self._is_stopped else GenerationError(self._stalled())
            self._abort(error)

    def _stalled(self) -> str:
        ready, asked = sum(place.is_ready for place in self._places), self._cluster
        if not ready:
            there = ", ".join(
                f"{n:g} {name}" for name, n in self._ray.cluster_resources().items() if name in ("CPU", "GPU")
            )
            return (
                f"no worker has started in {asked.stall:g} s; each asks for {self._threads} CPU and {asked.gpus:g} GPU, "
                f"the cluster has {there or 'neither'}"
            )
        waiting = len(self._waiting) + sum(len(place.busy) for place in self._places)
        return (
            f"no job has ended in {asked.stall:g} s; {ready} of {asked.workers} workers are there, {waiting} jobs wait"
        )


def _package() -> Any:
    """Ray. Raises RequestError where it is not installed."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise RequestError("batches on Ray need the package ray; pip install 'stepforge[ray]'") from error
    return ray


def _check_there(address: str) -> None:
    """Raise RequestError where nothing listens: Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in (LOCAL, AUTO):
        return
    if not colon or not port.isdigit():
        raise RequestError(f"--ray is {printable(address)}; give HOST:PORT, {AUTO} or {LOCAL}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except (OSError, OverflowError) as error:
        raise RequestError(f"no Ray cluster at {printable(address)}: {printable(error)}") from error


@contextmanager
def _signals() -> Any:
    """ray.init puts its own handler of SIGTERM in place of ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
