"""Reading a bundle: the manifest is parsed, and every file is checked before any parser sees it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from stepforge.runtime.bundle.format import (
    FAMILIES,
    FORMAT,
    MANIFEST,
    NAME,
    ROLES,
    VAE_DECODER,
    Bank,
    Bundle,
    Component,
    ComponentId,
    ControlCard,
    ModelCard,
    Module,
    Tensor,
    TextEncoder,
)
from stepforge.runtime.bundle.preset import Preset
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.bundle.steps import MOST_BYTES, STEPS_FILE, StepTable
from stepforge.runtime.errors import BundleError

PARTIAL = re.compile(r"\.[0-9a-f]{16}\.tmp")  # a manifest that is being written, see `files.written`; nobody reads it


def read(path: str | Path, *, check: bool = True) -> Bundle:
    """Read a bundle and check every file's size and hash.

    Raises BundleError if the manifest is missing, malformed or of another format, or if a file is missing, unknown,
    linked from elsewhere, or does not match its hash. `check=False` skips the hashes only (`stepforge info`).
    """
    path = Path(path)
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}; `stepforge export` writes one")
    try:
        bundle = _parse(path, json.loads(manifest.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{manifest} is damaged: {type(error).__name__}: {error}") from error
    _check_tree(bundle)
    if check:
        _check_hashes(bundle)
    return _with_table(bundle)


def _with_table(bundle: Bundle) -> Bundle:
    """The bundle with the compiled steps of its sampler, if it has such."""
    if not bundle.scheduler.is_compiled:
        return bundle
    if STEPS_FILE not in bundle.files:
        raise BundleError(f"{bundle.path} has the sampler {bundle.scheduler.sampler} without {STEPS_FILE}")
    size = bundle.files[STEPS_FILE][0]
    if size > MOST_BYTES:
        raise BundleError(f"{bundle.path}: {STEPS_FILE} has {size} bytes; at most {MOST_BYTES} are allowed")
    table = StepTable.parse(bundle.file(STEPS_FILE).read_bytes())
    return replace(bundle, scheduler=replace(bundle.scheduler, table=table))


def _parse(path: Path, data: Mapping[str, Any]) -> Bundle:
    if data["format"] != FORMAT:
        raise BundleError(f"{path} has bundle format {data['format']!r}; this version reads {FORMAT}: export it again")
    model = dict(data["model"])
    model["text_encoders"] = tuple(TextEncoder(**entry) for entry in model["text_encoders"])
    bundle = Bundle(
        path=path,
        card=ModelCard(**model),
        scheduler=SchedulerCard.from_dict(data["scheduler"]),
        components=_components(path, data["components"]),
        precision=data["precision"],
        versions=data["versions"],
        source=data["source"],
        files={name: (int(size), str(digest)) for name, (size, digest) in data["files"].items()},
        controls={name: ControlCard(**card) for name, card in data["controls"].items()},
        verdict=data["verdict"],
        presets={name: Preset.from_dict(values) for name, values in data["presets"].items()},
    )
    if bundle.card.family not in FAMILIES:
        raise BundleError(f"{path} has model family {bundle.card.family!r}; known: {', '.join(FAMILIES)}")
    named = [
        *(component.graph for component in bundle.components.values()),
        *(graph for component in bundle.components.values() for graph in component.derived.values()),
        *(encoder.tokenizer for encoder in bundle.card.text_encoders),
    ]
    for name in (*bundle.files, *named):
        if not all(NAME.fullmatch(part) for part in PurePosixPath(name).parts) or "\\" in name:
            raise BundleError(f"{path} names the file {name!r}, which is not a plain relative path")
    for name in named:
        if name not in bundle.files:
            raise BundleError(f"{path} uses {name!r} but does not list it under files")
    needed = [*bundle.text_encoders, VAE_DECODER]
    for control in bundle.controls:
        needed += [ComponentId("control_hint", control), ComponentId("control_residuals", control)]
    needed += [key.whole for key in bundle.components]
    for key in needed:
        if key not in bundle.components:
            raise BundleError(f"{path} has no component {str(key)!r}")
    if not bundle.denoisers:
        raise BundleError(f"{path} has no denoiser")
    return bundle


def _components(path: Path, rows: Any) -> dict[ComponentId, Component]:
    found: dict[ComponentId, Component] = {}
    for row in rows:
        key = ComponentId(row["role"], row["name"], row["variant"])
        if key.role not in ROLES:
            raise BundleError(f"{path} has a component of the role {key.role!r}; known: {', '.join(ROLES)}")
        if key in found:
            raise BundleError(f"{path} has the component {str(key)!r} twice")
        for text in (key.name, *([key.variant] if key.variant else ())):
            if not NAME.fullmatch(text) or "." in text:
                raise BundleError(f"{path} has a component named {text!r}; letters, digits, - and _ are allowed")
        found[key] = _component(row)
    return found


def _component(entry: Mapping[str, Any]) -> Component:
    def tensors(rows: Any) -> tuple[Tensor, ...]:
        return tuple(Tensor(row["name"], row["dtype"], tuple(row["shape"])) for row in rows)

    bank = entry["bank"]
    return Component(
        entry["graph"],
        tensors(entry["inputs"]),
        tensors(entry["outputs"]),
        dict(entry["derived"]),
        tuple(Module(m["path"], m["kind"], tuple(m["shape"]), m["bias"]) for m in entry["modules"]),
        None if bank is None else Bank(bank["slots"], bank["rank"], {k: tuple(v) for k, v in bank["shared"].items()}),
    )


def _check_tree(bundle: Bundle) -> None:
    root = bundle.path.resolve()
    present = set()
    for file in root.rglob("*"):
        relative = file.relative_to(root).as_posix()
        if file.is_symlink():
            raise BundleError(f"{bundle.path} contains the link {relative}; a bundle holds plain files only")
        if file.is_file() and relative != MANIFEST and not PARTIAL.fullmatch(relative):
            present.add(relative)
    if missing := sorted(set(bundle.files) - present):
        raise BundleError(f"{bundle.path} lacks {', '.join(missing)}")
    if unknown := sorted(present - set(bundle.files)):
        raise BundleError(f"{bundle.path} contains files that its manifest does not list: {', '.join(unknown)}")
    for name, (size, _) in bundle.files.items():
        if (found := bundle.file(name).stat().st_size) != size:
            raise BundleError(f"{bundle.path}: {name} has {found} bytes, the manifest says {size}")


def _check_hashes(bundle: Bundle) -> None:
    with ThreadPoolExecutor(2) as pool:  # hashing releases the GIL
        found = pool.map(sha256, (bundle.file(name) for name in bundle.files))
        for (name, (_, expected)), digest in zip(bundle.files.items(), found, strict=True):
            if digest != expected:
                raise BundleError(f"{bundle.path}: {name} does not match its sha256; the bundle is damaged")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
