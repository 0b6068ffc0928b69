"""Super-resolution stages into a bundle: their networks beside the base model's, and the card of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from stepforge.export.graph import trace, upscaler
from stepforge.export.models.scheduler import scheduler_card
from stepforge.export.models.source import Upscaler
from stepforge.export.models.tokenizer import Pad
from stepforge.export.models.weights import Loader
from stepforge.runtime.bundle import (
    TEXT_ENCODERS,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
    ComponentId,
    ModelCard,
    StageCard,
    TextEncoder,
)
from stepforge.runtime.errors import CheckpointError


class Add(Protocol):
    """Loads a network, exports it under its id and lets go of it; returns its config."""

    def __call__(self, key: ComponentId, loader: Loader, make: Callable[[Any], trace.Traced]) -> Any: ...


Tokenize = Callable[[Path, Pad | None, ComponentId], TextEncoder]  # tokenizer's folder -> card of the encoder it feeds


def networks_of(stage: Upscaler) -> int:
    """Networks that an export of the stage traces."""
    source = stage.source
    return 1 + len(source.text_encoders) + (source.vae is not None) + (stage.kind == "x2")


def export_stage(
    name: str, stage: Upscaler, base: ModelCard, add: Add, tokenize: Tokenize, vae: Callable[[Any], Any]
) -> StageCard:
    """Export the networks of a stage. base: of the model whose pictures it enlarges. vae: loads a source's VAE in the
    precision that it needs. Raises CheckpointError."""
    source = stage.source
    scheduler = scheduler_card(source.scheduler, ())
    if scheduler.is_compiled:
        raise CheckpointError(
            f"stage {name}: stepforge has no formula for {scheduler.sampler} with these options; name another scheduler "
            "class in its model_index.json"
        )
    encoders = tuple(_text_encoders(name, stage, base, add, tokenize))
    unet = add(
        replace(UNET, stage=name), source.unet, upscaler.latent_upscaler if stage.kind == "x2" else trace.denoiser
    )
    decoder = None
    if source.vae is not None:
        load = partial(vae, source)
        if stage.kind == "x2":
            add(replace(VAE_ENCODER, stage=name), load, trace.vae_encoder)
        decoder = add(replace(VAE_DECODER, stage=name), load, trace.vae_decoder)
    size = int(unet.sample_size) * source.vae_scale
    model = ModelCard(
        name=source.name,
        family=source.family,
        width=size,
        height=size,
        latent_channels=unet.in_channels // 2 if decoder is None else decoder.latent_channels,
        vae_scale=source.vae_scale,
        size_multiple=stage.size_multiple,
        scaling_factor=1.0 if decoder is None else decoder.scaling_factor,
        text_encoders=encoders,
    )
    return StageCard(
        kind=stage.kind,
        scale=stage.scale_over(base.width),
        model=model,
        scheduler=scheduler,
        noising=stage.noising,
        most_noise=stage.most_noise,
        noise_level=stage.noise_level,
        steps=stage.steps,
        guidance=stage.guidance,
    )


def _text_encoders(name: str, stage: Upscaler, base: ModelCard, add: Add, tokenize: Tokenize) -> Sequence[TextEncoder]:
    """Cards of the stage's text encoders: its own, or the base model's where it comes without and reads text."""
    source = stage.source
    if stage.text_width and not source.text_encoders:
        return base.text_encoders
    make = upscaler.text_encoder if stage.kind == "x2" else partial(trace.text_encoder, penultimate=False)
    cards = []
    for key, loader, tokens, pad in zip(
        TEXT_ENCODERS, source.text_encoders, source.tokenizers, source.pads, strict=False
    ):
        key = replace(key, stage=name)
        card = tokenize(tokens, pad, key)
        add(key, loader, partial(make, length=card.max_length))
        cards.append(card)
    return cards
