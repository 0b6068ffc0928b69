"""Reading a bundle: the manifest is parsed into typed values, and every file is checked before any parser sees it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from stepforge.runtime.bundle.fit import check_fit
from stepforge.runtime.bundle.format import (
    FORMAT,
    MANIFEST,
    Bundle,
    Component,
    ComponentId,
    ControlCard,
    ExpertCard,
    File,
    ModelCard,
    Named,
    Precision,
    StageCard,
    Text,
    Word,
)
from stepforge.runtime.bundle.preset import Preset
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.bundle.steps import MOST_BYTES as MOST_STEPS_BYTES
from stepforge.runtime.bundle.steps import StepTable, steps_file
from stepforge.runtime.bundle.typed import Between, Matches, parse, reader
from stepforge.runtime.checks import shown
from stepforge.runtime.errors import BundleError
from stepforge.runtime.files import printable, strict_json

PARTIAL = re.compile(r"\.[0-9a-f]{16}\.tmp")  # a manifest that is being written, see `files.written`; nobody reads it
MOST_BYTES = 32 << 20  # bytes of a manifest
MOST_FILES = 4096  # files and folders of a bundle

Digest = Annotated[str, Matches(re.compile(r"[0-9a-f]{64}"), "a sha256")]
SOURCE: tuple[
    tuple[str, Any, Any], ...
] = (  # what readers of `source` take for granted, and what they take where it is missing
    ("kind", str, ""),
    ("assumed", tuple[str, ...], []),
    ("corrected", tuple[str, ...], []),
    ("controls", Mapping[str, Mapping[str, Any]], {}),
)
Plain = bool | int | float | Text | None


@dataclass(frozen=True, slots=True)
class _Manifest:
    """Fields of bundle.json, see `format.to_dict`."""

    format: int
    model: ModelCard
    scheduler: Mapping[str, Plain | tuple[float, ...]]
    components: Annotated[tuple[Mapping[str, Any], ...], Between(1, 256)]
    precision: Precision
    versions: Mapping[str, str]
    source: Mapping[str, Any]
    files: Mapping[File, tuple[Annotated[int, Between(0, 1 << 50)], Digest]]
    controls: Annotated[Mapping[Word, ControlCard], Between(0, 64)]
    stages: Annotated[Mapping[Word, Mapping[str, Any]], Between(0, 64)]
    experts: Annotated[Mapping[Word, ExpertCard], Between(0, 16)]
    verdict: Mapping[str, Any] | None
    presets: Annotated[Mapping[Named, Mapping[str, Any]], Between(0, 4096)]


def read(path: str | Path, *, check: bool = True) -> Bundle:
    """Read a bundle and check every file's size and hash.

    Raises BundleError in one line if the manifest is missing, malformed or of another format, if its parts do not fit each
    other, or if a file is missing, unknown, linked from elsewhere, no plain file, or does not match its hash.
    `check=False` skips the hashes only (`stepforge info`).
    """
    path = Path(path)
    manifest = path / MANIFEST
    try:
        bundle = _parse(path, strict_json(_bytes(manifest)))
        check_fit(bundle)
    except ValueError as error:
        raise BundleError(f"{printable(manifest)} is damaged: {error}") from error
    _check_tree(bundle)
    if check:
        _check_hashes(bundle)
    stages = {
        name: card if card.scheduler is None else replace(card, scheduler=_with_table(bundle, card.scheduler, name))
        for name, card in bundle.stages.items()
    }
    return replace(bundle, scheduler=_with_table(bundle, bundle.scheduler), stages=stages)


def _with_table(bundle: Bundle, scheduler: SchedulerCard, stage: str = "") -> SchedulerCard:
    """The card with the compiled steps of its sampler, if it has such."""
    if not scheduler.is_compiled:
        return scheduler
    if (file := steps_file(stage)) not in bundle.files:
        raise BundleError(f"{bundle.path} has the sampler {scheduler.sampler} without {file}")
    size = bundle.files[file][0]
    if size > MOST_STEPS_BYTES:
        raise BundleError(f"{bundle.path}: {file} has {size} bytes; at most {MOST_STEPS_BYTES} are allowed")
    return replace(scheduler, table=StepTable.parse(bundle.file(file).read_bytes()))


def _bytes(manifest: Path) -> bytes:
    """The manifest's text. Raises BundleError if there is none that can be read."""
    try:
        if manifest.is_symlink():
            raise BundleError(f"{printable(manifest)} is a link; a bundle holds plain files only")
        if not manifest.is_file():
            raise BundleError(
                f"{printable(manifest.parent)} is not a bundle: it has no {MANIFEST}; `stepforge export` writes one"
            )
        with manifest.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise BundleError(f"{printable(manifest)} cannot be read: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise BundleError(f"{printable(manifest)} is larger than {MOST_BYTES >> 20} MiB; no bundle's is")
    return data


def _parse(path: Path, data: Any) -> Bundle:
    """Raises ValueError for what is not of its type, BundleError for another format."""
    if isinstance(data, dict) and data.get("format") != FORMAT and "format" in data:
        raise BundleError(
            f"{printable(path)} has bundle format {shown(data['format'])}; this version reads {FORMAT}: export it again"
        )
    manifest = parse(_Manifest, data)
    for name, kind, empty in SOURCE:
        reader(kind)(manifest.source.get(name, empty), f"source.{name}")
    if manifest.verdict is not None:
        reader(bool)(manifest.verdict.get("passed"), "verdict.passed")
        reader(str)(manifest.verdict.get("summary"), "verdict.summary")
    return Bundle(
        path=path,
        card=manifest.model,
        scheduler=_scheduler(manifest.scheduler),
        components=_components(manifest.components),
        precision=manifest.precision,
        versions=manifest.versions,
        source=manifest.source,
        files=manifest.files,
        controls=manifest.controls,
        stages={name: _stage(values, f"stages.{name}") for name, values in manifest.stages.items()},
        experts=manifest.experts,
        verdict=manifest.verdict,
        presets={name: Preset.from_dict(values) for name, values in manifest.presets.items()},
    )


def _scheduler(values: Mapping[str, Any]) -> SchedulerCard:
    try:
        return SchedulerCard.from_dict(values)
    except (BundleError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"scheduler: {printable(error)}") from error


def _stage(values: Mapping[str, Any], where: str) -> StageCard:
    names = ("scheduler", "noising")
    card = parse(StageCard, {**values, **{name: None for name in names if name in values}}, where)
    scheduler, noising = (None if values[name] is None else _scheduler(values[name]) for name in names)
    return replace(card, scheduler=scheduler, noising=noising)


def _components(rows: tuple[Mapping[str, Any], ...]) -> dict[ComponentId, Component]:
    found: dict[ComponentId, Component] = {}
    for index, row in enumerate(rows):
        where = f"components[{index}]"
        names = ("role", "name", "variant", "stage")
        key = parse(ComponentId, {name: row[name] for name in names if name in row}, where)
        if key in found:
            raise ValueError(f"it has the component {str(key)!r} twice")
        found[key] = parse(Component, {name: value for name, value in row.items() if name not in names}, where)
    return found


def _check_tree(bundle: Bundle) -> None:
    root, shown_path = bundle.path.resolve(), printable(bundle.path)
    present = set()
    try:
        for count, file in enumerate(root.rglob("*")):
            relative = file.relative_to(root).as_posix()
            if count >= MOST_FILES:
                raise BundleError(f"{shown_path} holds more than {MOST_FILES} files and folders; no bundle does")
            if file.is_symlink():
                raise BundleError(
                    f"{shown_path} contains the link {printable(relative)}; a bundle holds plain files only"
                )
            if PARTIAL.fullmatch(relative):
                continue  # it may be gone by now
            if not file.is_dir() and not file.is_file():
                raise BundleError(f"{shown_path} contains {printable(relative)}, which is no plain file")
            if file.is_file() and relative != MANIFEST:
                present.add(relative)
        if missing := sorted(set(bundle.files) - present):
            raise BundleError(f"{shown_path} lacks {printable(', '.join(missing))}")
        if unknown := sorted(present - set(bundle.files)):
            raise BundleError(
                f"{shown_path} contains files that its manifest does not list: {printable(', '.join(unknown))}"
            )
        for name, (size, _) in bundle.files.items():
            if (found := bundle.file(name).stat().st_size) != size:
                raise BundleError(f"{shown_path}: {name} has {found} bytes, the manifest says {size}")
    except OSError as error:
        raise BundleError(f"{shown_path} cannot be read: {error.strerror}") from error


def _check_hashes(bundle: Bundle) -> None:
    shown_path = printable(bundle.path)
    with ThreadPoolExecutor(2) as pool:  # hashing releases the GIL
        found = pool.map(sha256, (bundle.file(name) for name in bundle.files))
        try:
            for (name, (_, expected)), digest in zip(bundle.files.items(), found, strict=True):
                if digest != expected:
                    raise BundleError(f"{shown_path}: {name} does not match its sha256; the bundle is damaged")
        except OSError as error:
            raise BundleError(f"{shown_path} cannot be read: {error.strerror}") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
