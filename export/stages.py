"""Super-resolution stages into a bundle: their networks beside the base model's, and the card of each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from stepforge.export.graph import modules, trace, upscaler
from stepforge.export.graph.feedforward import feed_forward
from stepforge.export.models.pixel.feedforward import FeedForward, read_feed_forward
from stepforge.export.models.pixel.read import shares_text
from stepforge.export.models.scheduler import scheduler_card
from stepforge.export.models.source import Source, Upscaler
from stepforge.export.models.tokenizer import Pad
from stepforge.export.models.upscaler import read_upscaler
from stepforge.export.models.weights import Loader
from stepforge.runtime.bundle import (
    NAME,
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
from stepforge.runtime.files import printable

log = logging.getLogger(__name__)


class Add(Protocol):
    """Loads a network, exports it under its id and lets go of it; returns its config."""

    def __call__(self, key: ComponentId, loader: Loader, make: Callable[[Any], trace.Traced]) -> Any: ...


Tokenize = Callable[[Path, Pad | None, ComponentId], TextEncoder]  # tokenizer's folder -> card of the encoder it feeds


def read_upscalers(paths: Mapping[str, str | Path]) -> dict[str, Upscaler | FeedForward]:
    """The super-resolution models of an export, examined. Raises CheckpointError."""
    if bad := [name for name in paths if not NAME.fullmatch(name) or "." in name]:
        raise CheckpointError(f"stage name {bad[0]!r} is not allowed; use letters, digits, - and _")
    found: dict[str, Upscaler | FeedForward] = {}
    for name, path in paths.items():
        if not Path(path).is_dir():  # a single file, or nothing
            found[name] = read_feed_forward(Path(path))
            continue
        found[name] = stage = read_upscaler(path)
        for line in (*stage.source.assumed, *stage.source.corrected):
            log.warning("stage %s: %s", name, printable(line, 400))
    return found


def told(stage: Upscaler | FeedForward) -> dict[str, Any]:
    """Where a stage's model comes from, and what was assumed and corrected of it."""
    if isinstance(stage, FeedForward):
        return dict(stage.provenance)
    source = stage.source
    return {**source.provenance, "assumed": list(source.assumed), "corrected": list(source.corrected)}


def networks_of(stage: Upscaler | FeedForward) -> int:
    """Networks that an export of the stage traces."""
    if isinstance(stage, FeedForward):
        return 1
    source = stage.source
    return 1 + len(source.text_encoders) + (source.vae is not None) + (stage.kind == "x2")


def export_network(name: str, stage: FeedForward, add: Add) -> StageCard:
    """Export a feed-forward network. Raises CheckpointError."""
    add(ComponentId("upscaler", "upscaler", stage=name), stage.load, feed_forward)
    return StageCard("network", stage.scale, size_multiple=stage.size_multiple, least=stage.least)


def export_stage(
    name: str,
    stage: Upscaler,
    base_source: Source,
    base: ModelCard,
    add: Add,
    tokenize: Tokenize,
    vae: Callable[[Source, torch.dtype], Any],
) -> StageCard:
    """Export the networks of a stage. base_source, base: of the model whose pictures it enlarges. vae: loads a source's VAE in
    the precision that it needs. Raises CheckpointError."""
    source = stage.source
    encoders = tuple(
        base.text_encoders if shares_text(stage, base_source) else _text_encoders(name, stage, add, tokenize)
    )
    unet = add(
        replace(UNET, stage=name), source.unet, upscaler.latent_upscaler if stage.kind == "x2" else modules.denoiser
    )
    decoder = None
    if source.vae is not None:
        load = partial(vae, source)
        if stage.kind == "x2":
            add(replace(VAE_ENCODER, stage=name), load, modules.vae_encoder)
        decoder = add(replace(VAE_DECODER, stage=name), load, modules.vae_decoder)
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
        scheduler=scheduler_card(source.scheduler),
        noising=stage.noising,
        most_noise=stage.most_noise,
        noise_level=stage.noise_level,
        steps=stage.steps,
        guidance=stage.guidance,
    )


def _text_encoders(name: str, stage: Upscaler, add: Add, tokenize: Tokenize) -> Sequence[TextEncoder]:
    """Cards of the stage's own text encoders."""
    source = stage.source
    make: Callable[..., trace.Traced] = partial(modules.text_encoder, penultimate=False)
    if stage.kind != "x4":
        make = upscaler.text_encoder if stage.kind == "x2" else modules.t5_encoder
    cards = []
    for key, loader, tokens, pad in zip(
        TEXT_ENCODERS, source.text_encoders, source.tokenizers, source.pads, strict=False
    ):
        key = replace(key, stage=name)
        card = tokenize(tokens, pad, key)
        add(key, loader, partial(make, length=card.max_length))
        cards.append(card)
    return cards
