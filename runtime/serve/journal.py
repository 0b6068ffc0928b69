"""The journal of a batch: what became of each job, appended as lines of JSON.

The first line says of which bundle, manifest and settings the batch is. A line stands here only when what it tells of is
on disk under its name. A process that is killed leaves at most one torn line, the last, which is cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import printable, sync_folder

VERSION = 1
NONE = -1  # offset of a job that has no line


class Journal:
    """Lines of a journal, found by job: eight bytes a job are in memory. One process at a time has it open.

    facts: what the first line must say. Raises RequestError if another process has the journal, if it tells of other
    facts, or is damaged before its last line.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], jobs: int) -> None:
        self._path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b", buffering=0)
        self._offsets = array("q", [NONE]) * jobs
        self.packed: dict[int, dict[str, Any]] = {}  # number of a shard -> its line
        try:
            lock(self._file.fileno(), path)
            self._end = self._read({"stepforge": "batch", "version": VERSION, **facts})
        except BaseException:
            self._file.close()
            raise

    def __getitem__(self, job: int) -> dict[str, Any] | None:
        """What became of a job; None if nobody knows yet."""
        if self._offsets[job] == NONE:
            return None
        found: dict[str, Any] = json.loads(self._line(self._offsets[job]))
        return found

    def __contains__(self, job: int) -> bool:
        return self._offsets[job] != NONE

    def __len__(self) -> int:
        return len(self._offsets)

    def records(self) -> Iterator[dict[str, Any]]:
        """What became of the jobs, in their order."""
        for job in range(len(self._offsets)):
            if (record := self[job]) is not None:
                yield record

    def forget(self, job: int) -> None:
        """Have a job done again; its next line counts."""
        self._offsets[job] = NONE

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Lines at the end, on disk when this returns. Raises OSError, after which nothing may be appended."""
        data, places = bytearray(), []
        for record in records:
            places.append((record, self._end + len(data)))
            data += _dumped(record)
        os.lseek(self._file.fileno(), self._end, os.SEEK_SET)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._file.fileno(), rest) :]
        os.fsync(self._file.fileno())
        self._end += len(data)
        for record, offset in places:
            self._note(record, offset)

    def close(self) -> None:
        self._file.close()

    def _note(self, record: Mapping[str, Any], offset: int) -> None:
        if "job" in record:
            self._offsets[record["job"]] = offset
        else:
            self.packed[record["shard"]] = dict(record)

    def _line(self, offset: int) -> bytes:
        found = bytearray()
        while not found.endswith(b"\n"):
            piece = os.pread(self._file.fileno(), 4096, offset + len(found))
            end = piece.find(b"\n")
            found += piece[: end + 1] if end >= 0 else piece
            if not piece:
                raise OSError(f"{self._path} was cut while it was in use")
        return bytes(found)

    def _read(self, facts: dict[str, Any]) -> int:
        """Take in the lines there are, or begin. Returns the offset behind the last whole line."""
        end = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                self._take(number, line, facts, end)
                end += len(line)
        os.ftruncate(self._file.fileno(), end)
        if not end:
            line = _dumped(facts)
            os.pwrite(self._file.fileno(), line, 0)
            end = len(line)
        os.fsync(self._file.fileno())
        sync_folder(self._path.parent)
        return end

    def _take(self, number: int, line: bytes, facts: dict[str, Any], offset: int) -> None:
        damaged = RequestError(
            f"{printable(self._path)} is damaged at line {number}; give --overwrite to begin anew, or another folder"
        )
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise damaged from None
        if number == 1:
            if not isinstance(record, dict) or record.get("stepforge") != "batch":
                raise damaged
            if other := [name for name in facts if record.get(name) != facts[name]]:
                raise RequestError(
                    f"{printable(self._path.parent.parent)} holds a batch of {_worded(other[0], facts, record)}; "
                    "give what it was begun with, --overwrite to begin anew, or another folder"
                )
        elif not is_record(record, len(self._offsets)):
            raise damaged
        else:
            self._note(record, offset)


def is_record(record: object, jobs: int) -> bool:
    """Whether a line says what became of one of so many jobs, or of a shard, by names that stay in the folder."""
    if not isinstance(record, dict):
        return False
    number = record.get("job", record.get("shard"))
    files = record.get("files", [])
    return (
        isinstance(number, int)
        and not isinstance(number, bool)
        and 0 <= number < jobs
        and isinstance(files, list)
        and all(isinstance(f, dict) and _is_name(f.get("name")) and isinstance(f.get("size"), int) for f in files)
    )


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name) and "/" not in name and "\0" not in name and not name.startswith(".")


def _worded(name: str, facts: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    if name != "settings" or not isinstance(record.get(name), dict):
        return {"bundle": "another bundle", "manifest": "another manifest"}.get(name, f"another {name}")
    now, then = facts[name], record[name]
    differ = _differing(now, then)
    if "options" in differ and isinstance(then.get("options"), dict):  # options of requests
        differ.remove("options")
        differ += _differing(now["options"], then["options"])
    return f"other options ({', '.join(dict.fromkeys(differ))})"


def _differing(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    return [key for key in {**now, **then} if now.get(key) != then.get(key)]


def _dumped(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def lock(descriptor: int, path: Path) -> None:
    """Have a journal for this process until its descriptor is closed. Raises RequestError if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RequestError(f"another process is writing the batch in {printable(path.parent.parent)}") from None
