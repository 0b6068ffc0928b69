"""The part of the proof that concerns ControlNets: each network against diffusers' ControlNetModel, on a drawn hint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from stepforge.export.build import read_controls
from stepforge.export.graph.rewire import RESIDUAL
from stepforge.export.models.controlnet import ControlSource
from stepforge.export.models.source import Source
from stepforge.export.parity.components import Probe, conditions, denoiser_inputs, positional, probes
from stepforge.export.parity.measures import relative_error
from stepforge.export.parity.reference import References, Settings
from stepforge.runtime.backends import Arrays, Backend
from stepforge.runtime.bundle import Bundle, Component, ComponentId
from stepforge.runtime.engine import Engine
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.imaging.preprocess import hint_of

TOKENS = 77  # length of the random prompt


def exported_controls(bundle: Bundle, source: Source, controls: Mapping[str, str | Path]) -> list[ControlSource]:
    """The ControlNets that the bundle was exported with. Raises CheckpointError if others are given, or not all."""
    if set(controls) != set(bundle.controls):
        needed = " ".join(f"--control {name}=PATH" for name in bundle.controls) or "no --control"
        raise CheckpointError(f"{bundle.path} was exported with other ControlNets; verify it with {needed}")
    nets = read_controls(source, controls)
    known = bundle.source.get("controls", {})
    for net in nets:
        if net.provenance.get("sha256") != known[net.name].get("sha256"):
            raise CheckpointError(
                f"{bundle.path} was exported from another ControlNet {net.name} than {controls[net.name]}"
            )
    return nets


@torch.no_grad()
def control_errors(
    bundle: Bundle, net: ControlSource, references: References, backend: Backend, engine: Engine, settings: Settings
) -> Iterator[tuple[str, float]]:
    """The hint encoder, and all residuals together, along the first prompt's trajectory: name and error of each."""
    network = net.network(torch.float32)
    hint_encoder, residuals = ComponentId("control_hint", net.name), ComponentId("control_residuals", net.name)
    image = hint_of(references.hint, "none", bundle.card.width, bundle.card.height)[None].repeat(2, axis=0)
    encoded = np.array(backend.open(hint_encoder)({"image": image})["hint"])
    pixels = torch.from_numpy(image)
    flipped = pixels.flip(1) if network.config.controlnet_conditioning_channel_order == "bgr" else pixels
    yield str(hint_encoder), relative_error(encoded, network.controlnet_cond_embedding(flipped).numpy())
    entry = bundle.components[residuals]
    graph = backend.open(residuals)
    names = [f"{RESIDUAL}{index}" for index in range(len(entry.outputs))]
    at: Sequence[Probe] = probes(engine, references.plain[settings.prompts[0]], settings)
    for step, latents in at:
        inputs = denoiser_inputs(bundle, step, latents, _random_texts(entry))
        down, mid = network(*positional(inputs), pixels, added_cond_kwargs=conditions(inputs), return_dict=False)
        outputs = graph({**inputs, "hint": encoded, "scale": np.ones((2, len(names)), np.float32)})
        ours = np.concatenate([np.asarray(outputs[name]).ravel() for name in names])
        theirs = np.concatenate([value.numpy().ravel() for value in (*down, mid)])
        yield f"{residuals} t={step.t:g}", relative_error(ours, theirs)


def _random_texts(entry: Component) -> Arrays:
    """Normal numbers in place of an encoded prompt, the same at each call; two rows."""
    random = np.random.default_rng(0)
    return {
        tensor.name: random.standard_normal(
            (2, *(TOKENS if isinstance(size, str) else size for size in tensor.shape[1:])), dtype=np.float32
        )
        for tensor in entry.inputs
        if tensor.name in ("encoder_hidden_states", "text_embeds")
    }
