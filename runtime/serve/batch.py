"""A batch: jobs of a manifest through an engine into files, each drawn once however often the process is killed.

read → submit (a bounded window) → the engine → encode, write (threads) → names, journal, shards (one thread)
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepforge.runtime.engine import Engine
from stepforge.runtime.engine.scheduler import CLOSED
from stepforge.runtime.errors import Cancelled, GenerationError, RequestError
from stepforge.runtime.files import printable
from stepforge.runtime.imaging.encode import encode
from stepforge.runtime.imaging.metadata import describe_image
from stepforge.runtime.request import Request, Result
from stepforge.runtime.serve.journal import Journal
from stepforge.runtime.serve.manifest import Manifest, Row, own_seed, request_of, split, with_pictures
from stepforge.runtime.serve.store import Store

ENCODERS = 4  # threads; they wait for the disk most of the time
TOGETHER = 32  # most jobs that share a wait for the disk
WAIT = 0.2  # seconds between looks at signals


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the bytes of a batch, beside bundle and manifest."""

    options: Mapping[str, Any]  # fields of the requests that a job leaves out
    layout: str  # "files", "webdataset" or "parquet"
    format: str  # "png", "webp" or "jpeg"
    quality: int  # of WebP and JPEG
    metadata: bool  # text chunks in PNG
    shard_size: int

    def facts(self, engine: Engine) -> dict[str, Any]:
        values = {
            **{name: getattr(self, name) for name in ("layout", "format", "quality", "metadata", "shard_size")},
            "options": self.options,
            "adapters": {name: adapter.sha256 for name, adapter in engine.adapters.list().items()},
            "backend": engine.backend.name,
            "precision": engine.backend.precision,
        }
        found: dict[str, Any] = json.loads(json.dumps(values))
        return found


@dataclass(slots=True)
class Report:
    """What a run did."""

    jobs: int  # in the manifest
    images: int = 0  # written by this run
    done: int = 0  # jobs, by this run
    resumed: int = 0  # jobs that an earlier run has done
    failed: int = 0  # jobs, earlier runs' too
    seconds: float = 0.0
    parts: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # part of the work -> seconds

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> int:
        """Jobs that nobody has done."""
        return self.jobs - self.done - self.resumed - self.failed


@dataclass(frozen=True, slots=True)
class _Ended:
    """A job on its way to the disk."""

    record: dict[str, Any]
    room: int
    seconds: Mapping[str, float]


class Batch:
    """One run of a batch.

    pictures: folder that pictures of jobs must lie in. window: most images that are between reading and the disk, or one
    job's. on_failure: told of each failed job: line, reason. on_tick: called on the thread of `run` as long as it waits.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        store: Store,
        settings: Settings,
        *,
        pictures: Path,
        window: int,
        max_failures: int | None = None,
        retry_failed: bool = False,
        on_failure: Callable[[int, str], None] = lambda line, reason: None,
        on_tick: Callable[[Report], None] = lambda report: None,
    ) -> None:
        if retry_failed and settings.layout != "files":
            raise RequestError("--retry-failed needs single files; a shard that is written stays as it is")
        self._engine, self._manifest, self._store, self._settings = engine, manifest, store, settings
        self._pictures, self._window = pictures, window
        self._max_failures, self._retry_failed = max_failures, retry_failed
        self._on_failure, self._on_tick = on_failure, on_tick
        self.report = Report(manifest.total)
        self.error: BaseException | None = None  # why nothing more is written
        self.gave_up = False  # more jobs failed than were allowed
        self._stopping = threading.Event()
        self._room = threading.Condition()
        self._used = 0  # images in the window
        self._ended: queue.SimpleQueue[_Ended | None] = queue.SimpleQueue()
        facts = {"bundle": engine.bundle.digest, "manifest": manifest.digest, "settings": settings.facts(engine)}
        self._journal = Journal(store.journal, facts, manifest.total)
        self._missing: Counter[int] = Counter()  # shard -> jobs that have not ended

    def stop(self) -> None:
        """Take no more jobs and stop after the current step; what is finished is written. Safe in a signal's handler."""
        self._stopping.set()

    def run(self) -> Report:
        """Do what is left. Raises OSError if files cannot be written; what was finished before is kept."""
        started = time.perf_counter()
        writer = threading.Thread(target=self._write_all, name="stepforge-write")
        try:
            self._resume()
            with ThreadPoolExecutor(ENCODERS, "stepforge-encode") as encoders:
                writer.start()
                try:
                    for row in self._manifest.rows():
                        if row.index not in self._journal:
                            self._start(row, encoders)
                        if self._stopping.is_set():
                            break
                finally:
                    self._wait(lambda: self._used == 0)
                    self._ended.put(None)
                    writer.join()
            self.report.seconds = time.perf_counter() - started
            if self.error is not None:
                raise self.error
            self._store.write_lists(self._journal.records())
        finally:
            self._journal.close()
        return self.report

    def _resume(self) -> None:
        """What earlier runs did, held to the files that are there."""
        journal, store = self._journal, self._store
        sharded = self._settings.layout != "files"
        lost = {shard for shard, record in journal.packed.items() if not store.has(record)}
        for job in range(len(journal)):
            shard = store.shard(job) if sharded else 0
            record = journal[job]
            if sharded and shard in journal.packed and shard not in lost and record is not None:
                store.unstage([record])
            elif record is not None and (
                not store.has(record, store.images) or (self._retry_failed and "error" in record)
            ):
                journal.forget(job)
                record = None
            if record is None:
                self._missing[shard] += 1
            elif "error" in record:
                self.report.failed += 1
            else:
                self.report.resumed += 1
        for shard in lost:
            del journal.packed[shard]
        if sharded:
            self._pack([s for s in range(store.shard(len(journal) - 1) + 1) if not self._missing[s]])

    def _start(self, row: Row, encoders: ThreadPoolExecutor) -> None:
        """Hand a job to the engine, as soon as there is room in the window."""
        name, request, reason = "", None, ""
        try:
            name, fields = split(row.values())
            fields.setdefault("seed", own_seed(row.index, name, fields))
            request = request_of(with_pictures(fields, self._pictures, self._pictures), self._settings.options)
        except ValueError as error:
            reason = _reason(error)
        room = request.images if request else 1
        if not self._enter(room):
            return
        if request is not None:
            try:
                future = self._engine.submit(request, wait=True)
                future.add_done_callback(lambda done: self._hand_on(encoders, row, name, request, done))
                return
            except RequestError as error:
                reason = _reason(error)
        if reason == CLOSED:  # of itself: it failed as a whole, and said so in the log
            self._give_up(GenerationError("the engine failed; what is finished is written, run the command again"))
        if self._stopping.is_set():
            self._leave(room)
        else:
            self._ended.put(_Ended(_failed(row, name, reason), room, {}))

    def _hand_on(
        self, encoders: ThreadPoolExecutor, row: Row, name: str, request: Request, done: Future[Result]
    ) -> None:
        try:
            encoders.submit(self._encode, row, name, request, done)
        except BaseException as error:  # no thread to be had
            self._give_up(error)
            self._leave(request.images)

    def _encode(self, row: Row, name: str, request: Request, done: Future[Result]) -> None:
        """On an encoder's thread: an outcome as the bytes of files."""
        images: list[tuple[str, bytes, dict[str, Any]]] = []
        seconds: dict[str, float] = {}
        started = time.perf_counter()
        try:
            result = done.result()
            images = [self._encoded(row, name, result, index) for index in range(len(result.images))]
            seconds = {part: value for part, value in result.stats.seconds.items() if part != "total"}
        except Cancelled:  # the batch stops
            self._leave(request.images)
            return
        except BaseException as error:
            record = _failed(row, name, _reason(error))
        else:
            encoded = time.perf_counter()
            seconds["encode"] = encoded - started
            try:
                record = {**_named(row, name), "files": [self._store.write(*image) for image in images]}
            except BaseException as error:
                self._give_up(error)
                self._leave(request.images)
                return
            seconds["write"] = time.perf_counter() - encoded
        self._ended.put(_Ended(record, request.images, seconds))

    def _encoded(self, row: Row, name: str, result: Result, index: int) -> tuple[str, bytes, dict[str, Any]]:
        """An image's name, bytes, and what there is to say of it."""
        settings, about = self._settings, describe_image(result, index)
        data = encode(
            result.images[index], settings.format, quality=settings.quality,
            metadata=about if settings.metadata else None,
        )  # fmt: skip
        return self._store.name(row.index, name, index, len(result.images)), data, about

    def _write_all(self) -> None:
        """The writer's thread. After an error nothing more is written; a later run goes on from there."""
        ended: list[_Ended | None] = []
        while not ended or ended[-1] is not None:
            ended = [self._ended.get()]
            while ended[-1] is not None and len(ended) < TOGETHER and not self._ended.empty():
                ended.append(self._ended.get())
            jobs = [job for job in ended if job is not None]
            try:
                if jobs and self.error is None:
                    self._write(jobs)
            except BaseException as error:
                self._give_up(error)
            finally:
                self._leave(sum(job.room for job in jobs))

    def _write(self, jobs: list[_Ended]) -> None:
        started = time.perf_counter()
        report = self.report
        self._store.publish(job.record for job in jobs)
        self._journal.append([job.record for job in jobs])
        for job in jobs:
            report.images += len(job.record.get("files", ()))
            for part, seconds in job.seconds.items():
                report.parts[part] += seconds
            if "error" in job.record:
                report.failed += 1
                self._on_failure(job.record["line"], job.record["error"])
            else:
                report.done += 1
        if self._max_failures is not None and report.failed > self._max_failures:
            self.gave_up = True
            self._stopping.set()
        if self._settings.layout != "files":
            shards = [self._store.shard(job.record["job"]) for job in jobs]
            self._missing.subtract(shards)
            self._pack([shard for shard in dict.fromkeys(shards) if not self._missing[shard]])
        report.parts["publish"] += time.perf_counter() - started

    def _pack(self, shards: list[int]) -> None:
        """Write shards whose jobs have all ended."""
        for shard in shards:
            if shard not in self._journal.packed:
                first = shard * self._store.shard_size
                jobs = range(first, min(first + self._store.shard_size, len(self._journal)))
                records = [record for job in jobs if (record := self._journal[job]) is not None]
                self._journal.append([self._store.pack(shard, records)])
                self._store.unstage(records)

    def _enter(self, images: int) -> bool:
        """Wait for room in the window; False if the batch stops."""
        self._wait(lambda: not self._used or self._used + images <= self._window or self._stopping.is_set())
        if self._stopping.is_set():
            return False
        with self._room:
            self._used += images
        return True

    def _leave(self, images: int) -> None:
        with self._room:
            self._used -= images
            self._room.notify()

    def _wait(self, ready: Callable[[], bool]) -> None:
        while True:
            if self._stopping.is_set():
                self._engine.close()
            self._on_tick(self.report)
            with self._room:
                if self._room.wait_for(ready, WAIT):
                    return

    def _give_up(self, error: BaseException) -> None:
        self.error = self.error or error
        self._stopping.set()


def _named(row: Row, name: str) -> dict[str, Any]:
    return {"job": row.index, "line": row.line, **({"id": name} if name else {})}


def _failed(row: Row, name: str, reason: str) -> dict[str, Any]:
    return {**_named(row, name), "error": printable(reason, 1000)}


def _reason(error: BaseException) -> str:
    return "out of memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
