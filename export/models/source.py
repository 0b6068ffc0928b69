"""A text-to-image model as the exporter sees it: settings, and a loader for each network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepforge.export.models.tokenizer import Pad
from stepforge.export.models.weights import Loader
from stepforge.runtime.bundle import ComponentId


@dataclass(frozen=True, slots=True)
class Source:
    """Settings of a model, and one loader for each network so that they need not be resident together."""

    name: str
    family: str  # "sd1", "sd2", "sdxl"
    unet: Loader  # UNet2DConditionModel
    vae: Loader  # AutoencoderKL
    text_encoders: tuple[Loader, ...]  # CLIPTextModel, or for SDXL CLIPTextModel and CLIPTextModelWithProjection
    tokenizers: tuple[Path, ...]  # folders, one for each text encoder
    pads: tuple[Pad | None, ...]  # how each text encoder's prompts are filled up; None: as its tokenizer's folder says
    scheduler: Mapping[str, Any]  # scheduler_config.json, with _class_name
    provenance: Mapping[str, Any]  # kind, file, sha256 of each weight file
    empty: Mapping[ComponentId, Callable[[], Any]]  # networks that a LoRA may change, without weights
    vae_scale: int  # pixels per latent
    force_zeros_for_empty_prompt: bool = False
    assumed: tuple[str, ...] = ()  # settings that the model does not state, a line each: what was assumed, and why
    corrected: tuple[str, ...] = ()  # settings that diffusers' pipelines override, a line each: from what to what

    @property
    def adaptable(self) -> dict[ComponentId, Loader]:
        """The loaders of the networks in `empty`."""
        return dict(zip(self.empty, (self.unet, *self.text_encoders), strict=True))
