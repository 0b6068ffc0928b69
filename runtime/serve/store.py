"""Files of a batch: each gets its name when all of it is on disk; images by themselves, or collected in shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import printable, sync_folder
from stepforge.runtime.imaging.encode import FORMATS
from stepforge.runtime.serve.journal import is_record, lock
from stepforge.runtime.serve.manifest import pyarrow

OWN = ".stepforge"  # folder of the journal, of half-written files and of images that wait for their shard
SIDECAR, FAILURES = "images.jsonl", "failures.jsonl"
LAYOUTS = {"files": "", "webdataset": "shard-{:06d}.tar", "parquet": "part-{:06d}.parquet"}


@dataclass(frozen=True, slots=True)
class Files:
    """Images on their way to `Store.publish`: complete and on disk, without their names yet. For any thread or process that
    sees the folder."""

    partial: Path
    ending: str

    def name(self, job: int, name: str, image: int, images: int) -> str:
        """Of an image's file: no two jobs share one, whatever their ids are."""
        parts = [f"{job:08d}", *([name] if name else ()), *([str(image)] if images > 1 else ())]
        return f"{'-'.join(parts)}.{self.ending}"

    def write(self, name: str, data: bytes, about: Mapping[str, Any]) -> dict[str, Any]:
        """Put an image on disk; what the journal says of it. Raises OSError."""
        with (self.partial / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "about": about}


class Store:
    """The folder of a batch. layout: one of `LAYOUTS`; shard_size: jobs in a shard, which are neighbours in the manifest.

    Raises RequestError for a folder that holds other things, OSError for one that cannot be written.
    """

    def __init__(self, out: Path, *, layout: str, kind: str, shard_size: int, overwrite: bool) -> None:
        self.out, self.layout, self.shard_size = out, layout, shard_size
        self.own = out / OWN
        self._partial, self._staging = self.own / "partial", self.own / "staging"
        self.files = Files(self._partial, FORMATS[kind])
        self.journal = self.own / "journal.jsonl"
        if layout == "parquet":
            pyarrow("parquet")  # refused before anything is drawn
        if out.exists() and not out.is_dir():
            raise RequestError(f"{printable(out)} is not a folder")
        out.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self._clear()
        elif not self.own.is_dir() and any(out.iterdir()):
            raise RequestError(f"{printable(out)} holds other files; give an empty folder, or --overwrite")
        for folder in (self.own, self._partial, self._staging):
            folder.mkdir(exist_ok=True)

    def sweep(self) -> None:
        """Remove what a process that was killed has left half written. For whoever has the journal's lock alone."""
        for partial in self._partial.iterdir():
            partial.unlink()

    @property
    def images(self) -> Path:
        """Where images go first."""
        return self.out if self.layout == "files" else self._staging

    def shard(self, job: int) -> int:
        return job // self.shard_size

    def publish(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Give images their names."""
        names = [file["name"] for record in records for file in record.get("files", [])]
        for name in names:
            (self._partial / name).replace(self.images / name)
        if names:
            sync_folder(self.images)

    def has(self, record: Mapping[str, Any], folder: Path | None = None) -> bool:
        """Whether the files of a journal's line are there, as long as they were."""
        try:
            return all(
                ((folder or self.out) / file["name"]).stat().st_size == file["size"] for file in record.get("files", [])
            )
        except OSError:
            return False

    def pack(self, shard: int, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collect the images of a shard's jobs; the journal's line about it. Without images there is no file."""
        samples = list(_samples(records))
        if not samples:
            return {"shard": shard, "files": []}
        name = LAYOUTS[self.layout].format(shard)
        partial = self._partial / name
        with partial.open("wb") as file:
            if self.layout == "webdataset":
                self._tar(file, samples)
            else:
                self._parquet(file, samples)
            file.flush()
            os.fsync(file.fileno())
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = partial.stat().st_size
        partial.replace(self.out / name)
        sync_folder(self.out)
        return {"shard": shard, "files": [{"name": name, "size": size, "sha256": digest}]}

    def unstage(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Remove images that are in their shard."""
        for record in records:
            for file in record.get("files", []):
                (self._staging / file["name"]).unlink(missing_ok=True)

    def write_lists(self, records: Iterable[Mapping[str, Any]]) -> None:
        """`SIDECAR`, a line an image, and `FAILURES`, a line a failed job, from the journal's lines in the order of jobs."""
        images, failures = self._partial / SIDECAR, self._partial / FAILURES
        with images.open("wb") as done, failures.open("wb") as failed:
            for record in records:
                said = {name: record[name] for name in ("line", "id") if record.get(name)}
                if "error" in record:
                    failed.write(_line({**said, "error": record["error"]}))
                for file in record.get("files", []):
                    facts = {"file": file["name"], "sha256": file["sha256"], **said, **file["about"]}
                    done.write(_line(facts))
            for stream in (done, failed):
                stream.flush()
                os.fsync(stream.fileno())
        for path, wanted in ((images, self.layout == "files"), (failures, True)):
            if wanted and path.stat().st_size:
                path.replace(self.out / path.name)
            else:
                (self.out / path.name).unlink(missing_ok=True)
                path.unlink()
        sync_folder(self.out)

    def _tar(self, file: Any, samples: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """WebDataset's layout: KEY.json and the image as KEY.png. No times and no owners, so that bytes repeat."""
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, stored in samples:
                image = (self._staging / stored["name"]).read_bytes()
                for name, data in ((f"{key}.json", _line(stored["about"])), (stored["name"], image)):
                    member = tarfile.TarInfo(name)
                    member.size, member.mode = len(data), 0o444
                    tar.addfile(member, io.BytesIO(data))

    def _parquet(self, file: Any, samples: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        pa, parquet = pyarrow("lib"), pyarrow("parquet")
        columns = {
            "key": pa.array([key for key, _ in samples], pa.string()),
            "image": pa.array([(self._staging / stored["name"]).read_bytes() for _, stored in samples], pa.binary()),
            "prompt": pa.array([stored["about"]["prompt"] for _, stored in samples], pa.string()),
            "seed": pa.array([stored["about"]["seed"] for _, stored in samples], pa.uint64()),
            "about": pa.array([json.dumps(stored["about"]) for _, stored in samples], pa.string()),
        }
        # images are compressed already
        parquet.write_table(pa.Table.from_pydict(columns), file, compression="none", row_group_size=len(samples))

    def _clear(self) -> None:
        """Remove what the journal of an earlier batch tells of, and what belongs to it."""
        with ExitStack() as held:
            if self.journal.exists():
                file = held.enter_context(self.journal.open("rb"))
                lock(file.fileno(), self.journal)
                for line in file:
                    with suppress(ValueError, RecursionError):
                        record = json.loads(line)
                        if is_record(record, 1 << 62):
                            for stored in record.get("files", []):
                                (self.out / stored["name"]).unlink(missing_ok=True)
            for name in (SIDECAR, FAILURES):
                (self.out / name).unlink(missing_ok=True)
            if self.own.exists():
                shutil.rmtree(self.own)


def _samples(records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for record in records:
        for file in record.get("files", []):
            yield file["name"].partition(".")[0], file


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"
