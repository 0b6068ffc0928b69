"""Each network of a bundle against diffusers' on the same inputs: relative error of its outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from stepforge.export.parity.measures import relative_error
from stepforge.export.parity.reference import Reference, References, Settings
from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Arrays, Backend
from stepforge.runtime.bundle import UNET, VAE_DECODER, Bundle, ComponentId
from stepforge.runtime.engine import Engine
from stepforge.runtime.engine.adapters import no_adapter
from stepforge.runtime.engine.controls import no_residuals
from stepforge.runtime.plan import Step
from stepforge.runtime.request import Request

Probe = tuple[Step, Float32]  # a step of the plan, and latents [C, h, w] of the reference there


@torch.no_grad()
def component_errors(
    bundle: Bundle, references: References, backend: Backend, engine: Engine, settings: Settings
) -> Iterator[tuple[str, float]]:
    """Text encoders on the first prompt, denoiser along its trajectory, decoder at its end: name and error of each."""
    prompt, pipeline = settings.prompts[0], references.pipeline
    reference = references.plain[prompt]
    states: list[torch.Tensor] = []
    pooled = None
    networks = [(pipeline.text_encoder, pipeline.tokenizer)]
    if bundle.card.family == "sdxl":
        networks.append((pipeline.text_encoder_2, pipeline.tokenizer_2))
    for key, (network, tokenizer) in zip(bundle.text_encoders, networks, strict=True):
        ids = tokenizer(
            ["", prompt], padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        expected = network(ids, output_hidden_states=True)
        states.append(expected.hidden_states[-2] if bundle.card.family == "sdxl" else expected[0])
        outputs = backend.open(key)({"input_ids": ids.numpy(), **_no_adapter(bundle, key)})
        yield key.label, relative_error(outputs["hidden_states"], states[-1].numpy())
        if "pooled" in outputs:
            pooled = expected[0]
            yield f"{key.label} pooled", relative_error(outputs["pooled"], pooled.numpy())
    texts = {"encoder_hidden_states": torch.cat(states, dim=-1).numpy()}
    texts |= {} if pooled is None else {"text_embeds": pooled.numpy()}
    yield from _denoiser_errors(bundle, pipeline.unet, backend, probes(engine, reference, settings), texts)
    latents = reference.latents[-1][None]
    pixels = pipeline.vae.decode(torch.from_numpy(latents) / pipeline.vae.config.scaling_factor).sample
    yield VAE_DECODER.label, relative_error(backend.open(VAE_DECODER)({"latents": latents})["pixels"], pixels.numpy())


def _denoiser_errors(
    bundle: Bundle, unet: Any, backend: Backend, at: Sequence[Probe], texts: Arrays
) -> Iterator[tuple[str, float]]:
    denoiser = backend.open(UNET)
    fixed = {**_no_adapter(bundle, UNET), **no_residuals(bundle.components[UNET])}
    for step, latents in at:
        inputs = denoiser_inputs(bundle, step, latents, texts)
        expected = unet(*positional(inputs), added_cond_kwargs=conditions(inputs)).sample
        yield f"denoiser t={step.t:g}", relative_error(denoiser({**inputs, **fixed})["prediction"], expected.numpy())


def probes(engine: Engine, reference: Reference, settings: Settings) -> list[Probe]:
    """Start, middle and end of a trajectory."""
    steps = engine.plan(Request(prompt="", steps=settings.steps)).steps
    places = sorted({0, len(steps) // 2, len(steps) - 1})
    return [(steps[index], reference.latents[max(0, index - 1)]) for index in places]


def denoiser_inputs(bundle: Bundle, step: Step, latents: Float32, texts: Arrays) -> dict[str, Any]:
    """Inputs of a denoiser or a ControlNet at a step, two equal rows."""
    inputs = {
        "sample": np.stack([latents, latents]) * np.float32(step.scale_in),
        "timestep": np.full(2, step.t, np.float32),
        **texts,
    }
    if "text_embeds" in texts:
        size = [float(bundle.card.height), float(bundle.card.width)]
        inputs["time_ids"] = np.array([[*size, 0, 0, *size]] * 2, np.float32)
    return inputs


def positional(inputs: Arrays) -> list[torch.Tensor]:
    """The arguments that diffusers' networks take by position."""
    return [torch.from_numpy(inputs[name]) for name in ("sample", "timestep", "encoder_hidden_states")]


def conditions(inputs: Arrays) -> dict[str, torch.Tensor] | None:
    """SDXL's further conditioning."""
    names = [name for name in ("text_embeds", "time_ids") if name in inputs]
    return {name: torch.from_numpy(inputs[name]) for name in names} or None


def _no_adapter(bundle: Bundle, component: ComponentId) -> Arrays:
    return no_adapter(2) if bundle.components[component].bank is not None else {}
