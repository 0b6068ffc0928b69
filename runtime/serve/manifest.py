"""Manifests of jobs: JSON lines, CSV and Parquet, read as a stream; what a line says, as a request."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import LFS_POINTER, printable, strict_json
from stepforge.runtime.request import Request, canonical

LONGEST_LINE = 4 << 20  # bytes; a prompt has at most 20,000 letters
PARQUET_ROWS = 256  # rows read at a time
KINDS = (".jsonl", ".csv", ".parquet")
ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
# Columns of a CSV file whose cells are text; those of every other column are JSON
TEXTS = frozenset(
    ("id", "prompt", "negative", "negative_prompt", "sampler", "schedule", "spacing", "guidance", "guidance_scale",
     "guider", "reuse", "experts", "preset", "prompt_syntax")
)  # fmt: skip
PICTURES = {"controls": ("image",), "init": ("image", "mask"), "upscale": ("image",)}  # fields that name files


@dataclass(frozen=True, slots=True)
class Row:
    """One job of a manifest, not yet parsed."""

    index: int  # among the jobs, from 0
    line: int  # in the file, from 1; a row's number in Parquet
    values: Callable[[], dict[str, Any]]  # raises ValueError in one line


class Manifest:
    """A file of jobs, gone through as often as needed; a line at a time is in memory.

    Raises RequestError for a file that cannot be read; what is wrong with one job is its row's, when it is parsed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kind = path.suffix.lower()
        if self.kind not in KINDS:
            raise RequestError(f"{printable(path)} is no manifest; its name ends in {', '.join(KINDS)}")
        try:
            if not path.is_file():
                raise RequestError(f"{printable(path)} is not a file")
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise RequestError(f"{printable(path)} is a Git LFS pointer, not the file; run `git lfs pull`")
                file.seek(0)
                self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise RequestError(f"cannot read {printable(path)}: {error.strerror}") from error
        self.total = sys.maxsize  # until they are counted
        self.total = sum(1 for _ in self.rows())
        if not self.total:
            raise RequestError(f"{printable(path)} has no jobs")

    def rows(self) -> Iterator[Row]:
        """The jobs in the order of the file."""
        read = {".jsonl": self._json_lines, ".csv": self._cells, ".parquet": self._columns}[self.kind]
        try:
            for index, (line, values) in enumerate(read()):
                if index >= self.total:
                    raise RequestError(f"{printable(self.path)} has grown while it was read")
                yield Row(index, line, values)
        except OSError as error:
            raise RequestError(f"cannot read {printable(self.path)}: {error.strerror or error}") from error

    def _json_lines(self) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
        for number, line in _lines(self.path):
            if line is None or line.strip(b" \t\r\n"):
                yield number, lambda line=line: _object(line)  # type: ignore[misc]

    def _cells(self) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
        texts = (_text(line, number) for number, line in _lines(self.path))
        reader = csv.reader(texts, strict=True)
        try:
            header = next(reader, [])
        except (csv.Error, ValueError) as error:
            raise RequestError(f"{printable(self.path)}, line 1: {error}") from error
        names = [name.strip() for name in header]
        if len(set(names)) < len(names) or "prompt" not in names:
            raise RequestError(f"{printable(self.path)}, line 1: column names are needed, each once, prompt among them")
        while True:
            first = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:  # the reader goes on behind it
                yield first, lambda error=error: _refuse(error)  # type: ignore[misc]
                continue
            except ValueError as error:
                raise RequestError(f"{printable(self.path)}: {error}") from error
            if cells is None:
                return
            if cells:
                yield first, lambda cells=cells: _typed(names, cells)  # type: ignore[misc]

    def _columns(self) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
        parquet = pyarrow("parquet")
        try:
            with parquet.ParquetFile(self.path) as file:
                number = 0
                for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                    for values in batch.to_pylist():
                        number += 1
                        yield number, lambda values=values: _present(values)  # type: ignore[misc]
        except pyarrow("lib").ArrowException as error:
            raise RequestError(f"{printable(self.path)} cannot be read as Parquet: {printable(error)}") from error


def pyarrow(module: str) -> Any:
    """A module of pyarrow. Raises RequestError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ModuleNotFoundError as error:
        raise RequestError("Parquet needs the package pyarrow; pip install 'stepforge[parquet]'") from error


def split(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A job's id, empty if it has none, and the fields of its request. Raises RequestError."""
    fields = canonical({name: value for name, value in values.items() if name != "id"})
    name = values.get("id", "")
    if name != "" and not (isinstance(name, str) and ID.fullmatch(name)):
        raise RequestError(f"the id is {printable(repr(name), 60)}; it has up to 100 of the signs A-Z a-z 0-9 _ -")
    return name, fields


def own_seed(index: int, name: str, fields: Mapping[str, Any]) -> int:
    """Seed of a job that states none: 48 bits of the sha256 of its fields and its id, or of its place if it has no id.

    The same job has it in each run, whatever is drawn beside it or before.
    """
    said = json.dumps([name or index, fields], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()[:6], "big")


def request_of(fields: Mapping[str, Any], options: Mapping[str, Any]) -> Request:
    """A request from fields, see `canonical`, over the options of a command."""
    return Request.of({**options, **fields})


def with_pictures(fields: Mapping[str, Any], folder: Path, inside: Path | None = None) -> dict[str, Any]:
    """Fields whose pictures are looked for in a folder: those of ControlNets, of `init` and of `upscale`.

    inside: a folder that they must lie in, links followed. Raises RequestError for others.
    """

    def found(given: Any) -> Any:
        if not isinstance(given, str):
            return given
        path = folder / given
        if inside is not None:
            _check_inside(path, inside)
        return path

    def resolved(value: Any, names: Iterable[str]) -> Any:
        if isinstance(value, list):
            return [resolved(one, names) for one in value]
        if isinstance(value, dict):
            return {key: found(given) if key in names else given for key, given in value.items()}
        return value

    return {name: resolved(value, PICTURES.get(name, ())) for name, value in fields.items()}


def _check_inside(path: Path, folder: Path) -> None:
    try:
        lies = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL, a circle of links
        lies = False
    if not lies:
        raise RequestError(f"the picture {printable(path)} is not in {printable(folder)}; --pictures names the folder")


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers; None for one that is too long, of which no more than its beginning was in memory."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
            else:
                yield number, line


def _object(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise ValueError(f"the line is longer than {LONGEST_LINE >> 20} MiB")
    values = strict_json(line)
    if not isinstance(values, dict):
        raise ValueError("an object with the fields of a request is needed")
    return values


def _text(line: bytes | None, number: int) -> str:
    """A line of a CSV file. A bad one ends the file's reading: nobody knows where the next row begins."""
    if line is None:
        raise ValueError(f"line {number} is longer than {LONGEST_LINE >> 20} MiB")
    try:
        return io.TextIOWrapper(io.BytesIO(line), "utf-8", newline="").read()
    except UnicodeDecodeError:
        raise ValueError(f"line {number} is not UTF-8 text") from None


def _typed(names: list[str], cells: list[str]) -> dict[str, Any]:
    """Cells as values: an empty cell says nothing, `TEXTS` are text, the rest is JSON."""
    if len(cells) != len(names):
        raise ValueError(f"the row has {len(cells)} cells, the first line {len(names)}")
    values: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=True):
        if name in TEXTS and cell:
            values[name] = cell
        elif cell.strip():
            try:
                values[name] = strict_json(cell.encode("utf-8", "surrogatepass"))
            except ValueError as error:
                raise ValueError(f"the cell of {printable(name, 60)}: {error}") from error
    return values


def _present(values: dict[str, Any]) -> dict[str, Any]:
    """A Parquet row without its nulls, those of nested fields too."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(one) for name, one in value.items() if one is not None}
        return [kept(one) for one in value] if isinstance(value, list) else value

    found: dict[str, Any] = kept(values)
    return found


def _refuse(error: Exception) -> dict[str, Any]:
    raise ValueError(f"the row cannot be read as CSV: {printable(error)}")
