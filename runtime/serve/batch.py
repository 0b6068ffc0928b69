"""A batch: jobs of a manifest through an engine into files, each drawn once however often the process is killed.

read → submit (within `Room`) → a `Drawer`: engine, encode, write (its threads) → names, journal, shards (one thread)
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stepforge.runtime.errors import Cancelled, RequestError
from stepforge.runtime.files import printable
from stepforge.runtime.serve.draw import Drawer, Encoding, Ended, Task, failed, reason
from stepforge.runtime.serve.journal import Journal
from stepforge.runtime.serve.manifest import Manifest, Row, own_seed, request_of, split, with_pictures
from stepforge.runtime.serve.room import Need, Room
from stepforge.runtime.serve.store import Store

TOGETHER = 32  # most jobs that share a wait for the disk
WAIT = 0.2  # seconds between looks at signals
OURS = ("encode", "write", "publish")  # parts that are not the engine's
ONE = Need(1)  # of a job that cannot be drawn


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the bytes of a batch, beside bundle, adapters and manifest."""

    options: Mapping[str, Any]  # fields of the requests that a job leaves out
    layout: str  # "files", "webdataset" or "parquet"
    shard_size: int
    encoding: Encoding
    tiling: tuple[int | None, str] = (None, "even")  # as of `load`

    def facts(self, drawer: Drawer) -> dict[str, Any]:
        """As JSON; a picture among the options is told by its digest. Raises RequestError if that cannot be read."""
        encoding = {name: getattr(self.encoding, name) for name in ("format", "quality", "metadata")}
        values = {"layout": self.layout, "shard_size": self.shard_size, **encoding, "tiling": self.tiling}
        rest = {name: value for name, value in drawer.facts.items() if name != "bundle"}
        found: dict[str, Any] = json.loads(json.dumps({**values, "options": self.options, **rest}, default=_digest))
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
    def busy(self) -> float:
        """Share of the time that the busier of the engine's threads worked, the one that denoises or the one that decodes:
        1 is the engine's own rate. Beyond 1 with several engines."""
        threads: dict[bool, float] = {True: 0.0, False: 0.0}
        for part, seconds in self.parts.items():
            if part not in OURS:
                threads[part.endswith(("prompt", "denoise"))] += seconds
        return max(threads.values()) / self.seconds if self.seconds else 0.0

    @property
    def left(self) -> int:
        """Jobs that nobody has done."""
        return self.jobs - self.done - self.resumed - self.failed


class Batch:
    """One run of a batch.

    pictures: folder that pictures of jobs must lie in. room: what jobs may hold between reading and the disk. retry_failed:
    for single files; a shard that is written stays as it is. on_failure: told of each failed job: line, reason. on_tick:
    called on the thread of `run` as long as it waits.
    """

    def __init__(
        self,
        drawer: Drawer,
        manifest: Manifest,
        store: Store,
        settings: Settings,
        *,
        pictures: Path,
        room: Room,
        max_failures: int | None = None,
        retry_failed: bool = False,
        on_failure: Callable[[int, str], None] = lambda line, reason: None,
        on_tick: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self._drawer, self._manifest, self._store, self._settings = drawer, manifest, store, settings
        self._pictures, self._room = pictures, room
        self._max_failures, self._retry_failed = max_failures, retry_failed
        self._on_failure, self._on_tick = on_failure, on_tick
        self.report = Report(manifest.total)
        self.error: BaseException | None = None  # why nothing more is written
        self.gave_up = False  # more jobs failed than were allowed
        self._stopping = threading.Event()
        self._ended: queue.SimpleQueue[tuple[Ended, Need] | None] = queue.SimpleQueue()
        facts = {"bundle": drawer.facts["bundle"], "manifest": manifest.digest, "settings": settings.facts(drawer)}
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
            self._store.sweep()
            self._resume()
            writer.start()
            try:
                for row in self._manifest.rows():
                    if row.index not in self._journal:
                        self._start(row)
                    if self._stopping.is_set():
                        break
            finally:
                self._wait(lambda: self._room.is_empty)
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

    def _start(self, row: Row) -> None:
        """Hand a job over as soon as there is room for it."""
        task, need = self._task(row)
        self._wait(lambda: self._stopping.is_set() or self._room.fits(need))
        if self._stopping.is_set():
            return
        self._room.enter(need)
        if isinstance(task, Ended):
            self._ended.put((task, need))
        else:
            self._drawer.submit(task).add_done_callback(partial(self._take, need))

    def _task(self, row: Row) -> tuple[Task | Ended, Need]:
        """A job as a request, or why it is none, and the room that it needs."""
        name = ""
        try:
            name, fields = split(row.values())
            fields.setdefault("seed", own_seed(row.index, name, fields))
            request = request_of(with_pictures(fields, self._pictures, self._pictures), self._settings.options)
            return Task(row.index, row.line, name, request), self._room.need(request)
        except (ValueError, MemoryError) as error:
            return failed(row.index, row.line, name, reason(error)), ONE

    def _take(self, need: Need, drawn: Future[Ended]) -> None:
        """On the drawer's thread: a task's end to the writer, or the end of all."""
        try:
            self._ended.put((drawn.result(), need))
            return
        except Cancelled:  # the batch stops
            pass
        except BaseException as error:
            self._give_up(error)
        self._room.leave([need])

    def _write_all(self) -> None:
        """The writer's thread. After an error nothing more is written; a later run goes on from there."""
        ended: list[tuple[Ended, Need] | None] = []
        while not ended or ended[-1] is not None:
            ended = [self._ended.get()]
            while ended[-1] is not None and len(ended) < TOGETHER and not self._ended.empty():
                ended.append(self._ended.get())
            pairs = [pair for pair in ended if pair is not None]
            try:
                if pairs and self.error is None:
                    self._write([job for job, _ in pairs])
            except BaseException as error:
                self._give_up(error)
            finally:
                self._room.leave([need for _, need in pairs])

    def _write(self, jobs: list[Ended]) -> None:
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

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Until something is so, with an eye on signals."""
        while True:
            if self._stopping.is_set():
                self._drawer.stop()
            self._on_tick(self.report)
            if self._room.wait_for(ready, WAIT):
                return

    def _give_up(self, error: BaseException) -> None:
        self.error = self.error or error
        self._stopping.set()


def _digest(picture: object) -> str:
    """What the journal says of an option that is not JSON: a file, by its content."""
    if not isinstance(picture, Path):
        raise TypeError(f"{type(picture).__name__} is no option of a batch")
    try:
        with picture.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"image {printable(picture)} cannot be read: {error.strerror}") from error
