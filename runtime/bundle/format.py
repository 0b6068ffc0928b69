"""The bundle: a directory of graphs, tokenizers and one manifest. This file is the one statement of the format.

    bundle.json                 the manifest below
    tokenizer*/tokenizer.json   read by the `tokenizers` library
    text_encoder*/model.onnx    ids [n, L] -> hidden states (SDXL: and pooled)
    denoiser/<name>/model.onnx  sample, timestep, encoder_hidden_states, ... -> prediction
    control/<name>/hint/model.onnx       image in 0..1 -> hint
    control/<name>/residuals/model.onnx  what the denoiser reads, hint, scale -> residual_i
    vae_decoder/model.onnx      latents -> pixels in [-1, 1]

Weights lie beside each graph as ONNX external data, once; a component may have further graphs over the same weights,
derived for one engine (`Component.derived`). A component with a LoRA bank takes further inputs, see `Bank`. A bundle with
ControlNets has a denoiser that takes `residual_i` too; what is 0 may be given as [1, C, 1, 1].
A component named "<network>.<variant>" is a variant of a network that reuses what an earlier step computed: outputs of the
network are its inputs (export/rewire.py). It lies in the network's folder, shares its weights and reads its banks.
Nothing in a bundle is code, and every file is hashed before it is parsed.
All graph inputs and outputs are float32 or int64, whatever the precision inside.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from stepforge.runtime.errors import BundleError, RequestError

FORMAT = 3
MANIFEST = "bundle.json"
FAMILIES = ("sd1", "sd2", "sdxl")
PRECISIONS = ("fp32", "fp16")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of a graph. A string in `shape` names a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Module:
    """A layer of a network that a LoRA may change."""

    path: str  # as in diffusers; in text encoders without "text_model."
    kind: str  # "linear", "conv" or "norm"
    shape: tuple[int, ...]  # of its weight: [out, in], [out, in, k, k] or [channels]
    bias: bool


@dataclass(frozen=True, slots=True)
class Bank:
    """LoRA banks as inputs of a graph, so that adapters are swapped by copying and rows of a batch can differ.

        y = W·x + strength·((x·A[slot])·B[slot])

    Each input `<path>.lora_A` is [slots, in, rank], each `<path>.lora_B` [slots, rank, out]; a convolution's are
    [slots, rank·k·k, in], rows ordered by rank, then tap, and [slots, out, rank]. Layers that read the same value share one
    A, with their ranks side by side. `adapter` [rows] int64 is the slot of each row, `adapter_strength` [rows, 1, 1] its
    strength. Slot 0 holds zeros: no adapter.
    """

    slots: int  # with slot 0
    rank: int
    shared: Mapping[str, tuple[str, ...]]  # module whose name the shared A has -> modules in the order of their ranks

    @property
    def targets(self) -> Mapping[str, tuple[str, int]]:
        """Path of a module -> name of its A, and its place among the ranks there."""
        return {path: (name, place) for name, paths in self.shared.items() for place, path in enumerate(paths)}


@dataclass(frozen=True, slots=True)
class Component:
    """One network: its graph, its signature, and graphs derived from it for one engine over the same weights."""

    graph: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    derived: Mapping[str, str] = field(default_factory=dict)  # backend name -> graph
    modules: tuple[Module, ...] = ()
    bank: Bank | None = None


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One text encoder and the tokenizer that feeds it."""

    component: str
    tokenizer: str  # path of tokenizer.json
    max_length: int  # tokens of one chunk, with begin and end
    bos_id: int
    eos_id: int
    pad_id: int


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height of an image in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the engine must know of the model."""

    name: str
    family: str
    width: int  # pixels, the size the model was trained for
    height: int
    latent_channels: int
    vae_scale: int  # pixels per latent
    size_multiple: int  # width and height must be multiples of this many pixels
    scaling_factor: float  # latents = scaling_factor · vae latents
    text_encoders: tuple[TextEncoder, ...]
    zero_empty_negative: bool = False  # SDXL's force_zeros_for_empty_prompt

    def size(self, width: int | None, height: int | None) -> Size:
        """The asked image size, the model's own where None. Raises RequestError if the networks cannot run it."""
        size = Size(width or self.width, height or self.height)
        for name, value in (("width", size.width), ("height", size.height)):
            if value % self.size_multiple:
                low = max(self.size_multiple, value // self.size_multiple * self.size_multiple)
                raise RequestError(
                    f"{name} is {value}; {self.name} needs a multiple of {self.size_multiple}, "
                    f"such as {low} or {low + self.size_multiple}"
                )
        return size

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Shape of one latent, [C, h, w]."""
        return self.latent_channels, size.height // self.vae_scale, size.width // self.vae_scale


@dataclass(frozen=True, slots=True)
class ControlCard:
    """What the engine must know of a ControlNet."""

    global_pool: bool = False  # its residuals are means over height and width; guess mode does not scale them


@dataclass(frozen=True, slots=True)
class Bundle:
    """A manifest and where it lies."""

    path: Path
    card: ModelCard
    scheduler: Mapping[str, Any]  # schedules.SchedulerCard.to_dict()
    components: Mapping[str, Component]
    precision: str
    versions: Mapping[str, str]
    source: Mapping[str, Any]  # where the model came from: kind, file name, sha256 of its weights
    files: Mapping[str, tuple[int, str]]  # relative path -> (bytes, sha256)
    controls: Mapping[str, ControlCard] = field(default_factory=dict)
    verdict: Mapping[str, Any] | None = None  # what `stepforge verify` found; not part of the digest
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # see presets.py; not part of the digest

    def file(self, relative: str) -> Path:
        return self.path / relative

    @property
    def digest(self) -> str:
        """sha256 over everything but verdict and presets: equal digests give equal images on one machine."""
        body = _manifest(self)
        body.pop("verdict")
        body.pop("presets")
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _manifest(bundle: Bundle) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": asdict(bundle.card),
        "scheduler": dict(bundle.scheduler),
        "components": {name: asdict(component) for name, component in bundle.components.items()},
        "precision": bundle.precision,
        "versions": dict(bundle.versions),
        "source": dict(bundle.source),
        "files": {name: list(entry) for name, entry in sorted(bundle.files.items())},
        "controls": {name: asdict(card) for name, card in bundle.controls.items()},
        "verdict": bundle.verdict,
        "presets": {name: dict(preset) for name, preset in bundle.presets.items()},
    }


def write_manifest(bundle: Bundle) -> None:
    """Write bundle.json in one atomic step."""
    text = json.dumps(_manifest(bundle), indent=1)
    with tempfile.NamedTemporaryFile("w", dir=bundle.path, prefix=".manifest", delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(bundle.path / MANIFEST)


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
    return bundle


def _parse(path: Path, data: Mapping[str, Any]) -> Bundle:
    if data["format"] != FORMAT:
        raise BundleError(f"{path} has bundle format {data['format']!r}; this version reads {FORMAT}: export it again")
    model = dict(data["model"])
    model["text_encoders"] = tuple(TextEncoder(**entry) for entry in model["text_encoders"])
    bundle = Bundle(
        path=path,
        card=ModelCard(**model),
        scheduler=data["scheduler"],
        components={name: _component(entry) for name, entry in data["components"].items()},
        precision=data["precision"],
        versions=data["versions"],
        source=data["source"],
        files={name: (int(size), str(digest)) for name, (size, digest) in data["files"].items()},
        controls={name: ControlCard(**card) for name, card in data["controls"].items()},
        verdict=data["verdict"],
        presets=dict(data["presets"]),
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
    for encoder in bundle.card.text_encoders:
        if encoder.component not in bundle.components:
            raise BundleError(f"{path} has no component {encoder.component!r}")
    for control in bundle.controls:
        for part in ("hint", "residuals"):
            if f"control/{control}/{part}" not in bundle.components:
                raise BundleError(f"{path} has no component 'control/{control}/{part}'")
    return bundle


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
        if file.is_file() and relative != MANIFEST:
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
