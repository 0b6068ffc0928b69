"""The bundle: a directory of graphs, tokenizers and one manifest. This file is the one statement of the format.

    bundle.json                 the manifest below
    tokenizer*/tokenizer.json   read by the `tokenizers` library
    scheduler/steps.json        steps of the model's sampler where stepforge has no formula for it, see steps.py
    text_encoder*/model.onnx    ids [n, L] -> hidden states (SDXL: and pooled)
    denoiser/<name>/model.onnx  sample, timestep, encoder_hidden_states, ... -> prediction
    sr/<name>/...               the networks of a super-resolution stage and its steps, in folders as the base model's
    control/<name>/hint/model.onnx       image in 0..1 -> hint
    control/<name>/residuals/model.onnx  what the denoiser reads, hint, scale -> residual_i
    vae_decoder/model.onnx      latents -> pixels in [-1, 1]

Weights lie beside each graph as ONNX external data, once; a component may have further graphs over the same weights,
derived for one engine or for integers (`Component.derived`). A component with a LoRA bank takes further inputs, see
`Bank`. A bundle with ControlNets has a denoiser that takes `residual_i` too; what is 0 may be given as [1, C, 1, 1].
A component has a role, a name and a variant (`ComponentId`), which the manifest states; folders are for people. A variant
reuses what an earlier step computed: outputs of the network are its inputs (export/graph/rewire.py). It lies in the
network's folder, shares its weights and reads its banks.
Nothing in a bundle is code, and every file is hashed before it is parsed.
All graph inputs and outputs are float32 or int64, whatever the precision inside.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from stepforge.runtime.bundle.preset import Preset
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.bundle.typed import Between, Matches, OneOf
from stepforge.runtime.errors import RequestError

FORMAT = 5
MANIFEST = "bundle.json"
FAMILIES = ("sd1", "sd2", "sdxl", "x4", "x2", "if")  # x4, x2: the upscalers of SD; if: pixels as latents
STAGE_KINDS = ("network", "x4", "x2", "pixel")
WEIGHT_PRECISIONS = ("fp32", "fp16")  # precisions of a bundle's weights
INT8 = "int8"  # precision of a run, and name of derived graphs
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
SIZE = re.compile(r"[A-Za-z_]\w*|[1-9]\d{0,3}\*[A-Za-z_]\w*|[A-Za-z_]\w*/[1-9]\d{0,3}", re.ASCII)

# What values of a manifest may be; typed.py reads them so.
Role = Literal[
    "text_encoder", "denoiser", "control_hint", "control_residuals", "vae_encoder", "vae_decoder", "upscaler"
]
Precision = Annotated[str, OneOf(WEIGHT_PRECISIONS)]
Text = Annotated[str, Between(1, 1000)]
Word = Annotated[str, Matches(WORD, "a name of letters, digits, - and _")]
Named = Annotated[str, Matches(NAME, "a name of letters, digits, ., - and _")]
File = Annotated[str, Matches(re.compile(rf"({NAME.pattern}/){{0,8}}{NAME.pattern}"), "a plain relative path")]
Variant = Annotated[str, Matches(re.compile(rf"({WORD.pattern})?"), "a name of letters, digits, - and _, or empty")]
Pixels = Annotated[int, Between(1, 1 << 16)]
Channels = Annotated[int, Between(1, 1 << 20)]
TokenId = Annotated[int, Between(0, 1 << 24)]
Symbol = Annotated[str, Between(1, 100), Matches(SIZE, 'a size such as "rows", "8*height" or "width/2"')]


@dataclass(frozen=True, slots=True, order=True)
class ComponentId:
    """Which network of a bundle.

    name: of the text encoder and the VAE as in diffusers, of the expert for a denoiser, of the ControlNet for its two parts.
    variant: what it reuses of earlier steps ("deepcache", "tgate"); empty for the whole network.
    stage: super-resolution stage that it belongs to; empty for the base model.
    """

    role: Role
    name: Word
    variant: Variant = ""
    stage: Variant = ""

    @property
    def whole(self) -> ComponentId:
        """The network that this is a variant of, or itself."""
        return replace(self, variant="") if self.variant else self

    @property
    def folder(self) -> str:
        """Where an export puts its graphs, relative to the bundle. Readers go by `Component.graph`."""
        return f"sr/{self.stage}/{self._place}" if self.stage else self._place

    @property
    def _place(self) -> str:
        match self.role:
            case "text_encoder":
                return self.name
            case "denoiser":
                return f"denoiser/{self.name}"
            case "control_hint":
                return f"control/{self.name}/hint"
            case "control_residuals":
                return f"control/{self.name}/residuals"
            case "vae_encoder" | "vae_decoder" | "upscaler":
                return self.role

    @property
    def label(self) -> str:
        """As statistics and plans print it: "unet", "unet.deepcache", "control/edge", "control/edge/hint"."""
        match self.role:
            case "denoiser":
                base = f"{self.stage}/{self.name}" if self.stage else self.name
            case "control_residuals":
                base = f"control/{self.name}"
            case _:
                base = self.folder
        return f"{base}.{self.variant}" if self.variant else base

    def __str__(self) -> str:
        return f"{self.folder}.{self.variant}" if self.variant else self.folder


UNET = ComponentId("denoiser", "unet")
VAE_ENCODER = ComponentId("vae_encoder", "vae")
VAE_DECODER = ComponentId("vae_decoder", "vae")
TEXT_ENCODERS = (ComponentId("text_encoder", "text_encoder"), ComponentId("text_encoder", "text_encoder_2"))


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of a graph. A string in `shape` names a dynamic dimension."""

    name: Text
    dtype: Annotated[str, OneOf(("float32", "int64"))]
    shape: Annotated[tuple[Channels | Symbol, ...], Between(1, 8)]


@dataclass(frozen=True, slots=True)
class Module:
    """A layer of a network that a LoRA may change."""

    path: Text  # diffusers' path; in text encoders without "text_model."
    kind: Annotated[str, OneOf(("linear", "conv", "norm"))]
    shape: Annotated[tuple[Channels, ...], Between(1, 5)]  # weight's: [out, in], [out, in, k, k] or [channels]
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

    slots: Annotated[int, Between(2, 65)]  # slot 0 included
    rank: Annotated[int, Between(1, 512)]
    shared: Mapping[
        Text, Annotated[tuple[Text, ...], Between(1, 64)]
    ]  # module whose name the shared A has -> modules in the order of their ranks

    @property
    def targets(self) -> Mapping[str, tuple[str, int]]:
        """Path of a module -> name of its A, and its place among the ranks there."""
        return {path: (name, place) for name, paths in self.shared.items() for place, path in enumerate(paths)}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one call of a VAE or a feed-forward network, read off its graph by export/graph/footprint.py.

    bytes: for each position (height times width) of what it reads; squared: for each pair of them, where attention writes
    all its scores. tile: side of the tiles of diffusers' enable_tiling, in positions; 0 where diffusers has none.
    """

    bytes: Annotated[float, Between(0.0, 1e12)]
    squared: Annotated[float, Between(0.0, 1e12)] = 0.0
    tile: Annotated[int, Between(0, 1 << 16)] = 0

    def __call__(self, positions: int) -> float:
        return self.bytes * positions + self.squared * positions**2


@dataclass(frozen=True, slots=True)
class Component:
    """One network: its graph, its signature, and graphs derived from it for one engine over the same weights."""

    graph: File
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    derived: Mapping[Word, File] = field(default_factory=dict)  # backend name, "int8" or "int8-<backend>" -> graph
    modules: tuple[Module, ...] = ()
    bank: Bank | None = None
    footprint: Footprint | None = None

    @property
    def has_int8(self) -> bool:
        """Whether `stepforge quantize` gave it a graph with integer products."""
        return INT8 in self.derived

    def graph_for(self, backend: str, precision: str) -> File:
        """The graph that a backend opens: its own, else the standard one; in int8 the quantised one where there is one."""
        if precision == INT8 and self.has_int8:
            return self.derived.get(f"{INT8}-{backend}", self.derived[INT8])
        return self.derived.get(backend, self.graph)


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One text encoder and the tokenizer that feeds it."""

    name: Word  # component's name
    tokenizer: File  # path of tokenizer.json
    max_length: Annotated[int, Between(3, 4096)]  # tokens of one chunk, with begin and end
    bos_id: TokenId
    eos_id: TokenId
    pad_id: TokenId
    stage: Variant = ""  # component's stage, which need not be the model's own: stages share encoders

    @property
    def component(self) -> ComponentId:
        return ComponentId("text_encoder", self.name, stage=self.stage)


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height of an image in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the engine must know of the model."""

    name: Text
    family: Annotated[str, OneOf(FAMILIES)]
    width: Pixels  # the size the model was trained for
    height: Pixels
    latent_channels: Annotated[int, Between(1, 256)]
    vae_scale: Annotated[int, Between(1, 64)]  # pixels per latent
    size_multiple: Annotated[int, Between(1, 4096)]  # width and height must be multiples of this many pixels
    scaling_factor: Annotated[float, Between(1e-6, 1e6)]  # latents = scaling_factor · vae latents
    text_encoders: Annotated[tuple[TextEncoder, ...], Between(0, 2)]
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
class StageCard:
    """What the engine must know of a super-resolution stage.

    kind: "network": one pass of a feed-forward network; the others are diffusion models that read the smaller image:
    "x4": SD x4 upscaler, "x2": latent upscaler, "pixel": DeepFloyd IF's stage II.
    """

    kind: Annotated[str, OneOf(STAGE_KINDS)]
    scale: Annotated[int, Between(1, 16)]  # sides of what it makes / sides of what it reads
    model: ModelCard | None = None  # of a diffusion stage
    scheduler: SchedulerCard | None = None
    noising: SchedulerCard | None = None  # noise levels of what it reads; None: it is read as it is
    most_noise: Annotated[int, Between(0, 100_000)] = 0  # highest noise level
    noise_level: Annotated[int, Between(0, 100_000)] = 0  # used where a request names none; so are the following
    steps: Annotated[int, Between(1, 1000)] = 50
    guidance: Annotated[float, Between(0.0, 100.0)] = 1.0
    size_multiple: Annotated[int, Between(1, 256)] = (
        1  # sides that a feed-forward network reads are padded to multiples of it
    )
    least: Annotated[int, Between(1, 4096)] = 1  # ... and to at least this

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        cards = {name: getattr(self, name) for name in ("scheduler", "noising")}
        return asdict(self) | {name: None if card is None else card.to_dict() for name, card in cards.items()}


@dataclass(frozen=True, slots=True)
class ExpertCard:
    """What the engine must know of a further denoiser of the base model's latents.

    start, end: where it runs unless a request says otherwise, see `plan.switch.Switch`; an end of None is beyond all sigmas.
    """

    unit: Annotated[str, OneOf(("timesteps", "sigma"))]
    start: Annotated[float, Between(0.0, 1e6)]
    end: Annotated[float, Between(0.0, 1e6)] | None
    text_encoders: Annotated[
        tuple[TextEncoder, ...], Between(0, 2)
    ] = ()  # what it reads of prompts; empty: the model's
    zero_empty_negative: bool = False  # where it has text encoders of its own
    aesthetic: bool = False  # its time_ids end with an aesthetic score in place of the target size


@dataclass(frozen=True)  # no slots: the digest is kept
class Bundle:
    """A manifest and where it lies."""

    path: Path
    card: ModelCard
    scheduler: SchedulerCard
    components: Mapping[ComponentId, Component]
    precision: Precision  # type of the weights
    versions: Mapping[str, str]
    source: Mapping[str, Any]  # where the model came from: kind, file name, sha256 of its weights
    files: Mapping[str, tuple[int, str]]  # relative path -> (bytes, sha256)
    controls: Mapping[str, ControlCard] = field(default_factory=dict)
    stages: Mapping[str, StageCard] = field(default_factory=dict)  # super-resolution, by name
    experts: Mapping[str, ExpertCard] = field(default_factory=dict)  # denoisers beside the base model's own, by name
    verdict: Mapping[str, Any] | None = None  # what `stepforge verify` found; not part of the digest
    presets: Mapping[str, Preset] = field(default_factory=dict)  # not part of the digest

    def file(self, relative: str) -> Path:
        return self.path / relative

    @cached_property
    def digest(self) -> str:
        """sha256 over everything but verdict and presets: equal digests give equal images on one machine."""
        body = to_dict(self)
        body.pop("verdict")
        body.pop("presets")
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    @property
    def denoisers(self) -> tuple[ComponentId, ...]:
        """The whole denoisers of the base model, without variants: one, or one for each expert."""
        return tuple(key for key in self.components if key.role == "denoiser" and not key.variant and not key.stage)

    @property
    def text_encoders(self) -> tuple[ComponentId, ...]:
        """In the order in which their hidden states stand side by side."""
        return tuple(encoder.component for encoder in self.card.text_encoders)

    @property
    def models(self) -> tuple[ModelCard, ...]:
        """The base model's card and those of diffusion stages."""
        return self.card, *(stage.model for stage in self.stages.values() if stage.model is not None)

    @property
    def reads_mask(self) -> bool:
        """Whether the base model reads a mask and the masked image beside its latents: an inpainting model."""
        shapes = (tensor.shape for tensor in self.components[UNET].inputs if tensor.name == "sample")
        return next(shapes, ())[1:2] == (2 * self.card.latent_channels + 1,)

    def reading(self, stage: str, denoiser: str) -> tuple[tuple[TextEncoder, ...], bool]:
        """Text encoders that a denoiser reads, and whether an empty negative prompt is zeros for it."""
        expert = None if stage else self.experts.get(denoiser)
        if expert is not None and expert.text_encoders:
            return expert.text_encoders, expert.zero_empty_negative
        card = self.model(stage)
        return ((), False) if card is None else (card.text_encoders, card.zero_empty_negative)

    def model(self, stage: str) -> ModelCard | None:
        """Card of the base model ("") or of a stage; None for a feed-forward network."""
        return self.stages[stage].model if stage else self.card

    def variants(self, key: ComponentId) -> tuple[str, ...]:
        """The variants of a network, without the network itself."""
        return tuple(other.variant for other in self.components if other.variant and other.whole == key.whole)


def to_dict(bundle: Bundle) -> dict[str, Any]:
    """The manifest as JSON has it."""
    return {
        "format": FORMAT,
        "model": asdict(bundle.card),
        "scheduler": bundle.scheduler.to_dict(),
        "components": [{**asdict(key), **asdict(component)} for key, component in bundle.components.items()],
        "precision": bundle.precision,
        "versions": dict(bundle.versions),
        "source": dict(bundle.source),
        "files": {name: list(entry) for name, entry in sorted(bundle.files.items())},
        "controls": {name: asdict(card) for name, card in bundle.controls.items()},
        "stages": {name: card.to_dict() for name, card in bundle.stages.items()},
        "experts": {name: asdict(card) for name, card in bundle.experts.items()},
        "verdict": bundle.verdict,
        "presets": {name: preset.to_dict() for name, preset in bundle.presets.items()},
    }
