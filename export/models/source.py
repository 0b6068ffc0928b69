"""A text-to-image model as the exporter sees it: settings, and a loader for each network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepforge.export.models.tokenizer import Pad
from stepforge.export.models.weights import Loader
from stepforge.runtime.bundle import ComponentId
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Source:
    """Settings of a model, and one loader for each network so that they need not be resident together."""

    name: str
    family: str  # a family of the bundle's model card
    unet: Loader  # UNet2DConditionModel
    vae: Loader | None  # AutoencoderKL; None: the denoiser works on pixels
    text_encoders: tuple[Loader, ...]  # CLIPTextModel, SDXL's second CLIPTextModelWithProjection, IF's T5EncoderModel
    tokenizers: tuple[Path, ...]  # folders, one for each text encoder
    pads: tuple[Pad | None, ...]  # how each text encoder's prompts are filled up; None: as its tokenizer's folder says
    scheduler: Mapping[str, Any]  # scheduler_config.json, with _class_name
    provenance: Mapping[str, Any]  # kind, file, sha256 of each weight file
    empty: Mapping[ComponentId, Callable[[], Any]]  # networks that a LoRA may change, without weights
    vae_scale: int  # pixels per latent
    size_multiple: int | None = None  # width and height must be multiples of this many pixels; None: of vae_scale
    empty_text: Callable[[], Any] | None = None  # T5's config
    force_zeros_for_empty_prompt: bool = False
    assumed: tuple[str, ...] = ()  # settings that the model does not state, a line each: what was assumed, and why
    corrected: tuple[str, ...] = ()  # settings that diffusers' pipelines override, a line each: from what to what

    @property
    def adaptable(self) -> dict[ComponentId, Loader]:
        """The loaders of the networks in `empty`."""
        return dict(zip(self.empty, (self.unet, *self.text_encoders), strict=False))  # no LoRA changes T5


@dataclass(frozen=True, slots=True)
class Upscaler:
    """A super-resolution model as the exporter sees it."""

    kind: str  # `StageCard.kind`
    scale: int  # pixels of the result for one of the image, a side; 0: what its trained size is over the base model's
    source: Source  # networks, sampler, provenance
    size_multiple: int  # width and height of the result must be multiples of this many pixels
    # what requests take unless they say otherwise, diffusers' defaults
    steps: int
    guidance: float
    noise_level: int = 0
    most_noise: int = 0  # highest noise level
    noising: SchedulerCard | None = None  # schedule of the noise on the low-resolution image
    size: int = 0  # side of the images that a stage on pixels was trained to make
    text_width: int = 0  # numbers a token that a stage on pixels reads; 0: no text

    def scale_over(self, size: int) -> int:
        """Scale of the stage behind a model of images of this side. Raises CheckpointError."""
        if self.scale:
            return self.scale
        if self.size % size or self.size == size:
            raise CheckpointError(
                f"{self.source.name} makes {self.size} pixels a side, no multiple of the {size} that it is given"
            )
        return self.size // size
