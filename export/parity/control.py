"""The part of the proof that concerns ControlNets: each against diffusers' ControlNetModel and pipeline, on a drawn hint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw

from stepforge.export.build import read_controls
from stepforge.export.graph.rewire import RESIDUAL
from stepforge.export.models.controlnet import ControlSource
from stepforge.export.models.source import Source
from stepforge.runtime.backends import Backend
from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.engine import Engine
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.imaging.preprocess import hint_of
from stepforge.runtime.request import Request

if TYPE_CHECKING:
    from stepforge.export.parity.verify import Reference


def sources(bundle: Bundle, source: Source, controls: Mapping[str, str | Path]) -> list[ControlSource]:
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


def drawn_hint(bundle: Bundle) -> Image.Image:
    """A disc in a frame, with edges in every direction; of the model's size."""
    width, height = bundle.card.width, bundle.card.height
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 4, width * 5 // 8, height * 7 // 8), fill="white")
    draw.rectangle((width // 2, height // 8, width * 7 // 8, height // 2), outline="white", width=max(1, width // 64))
    return image


def pipeline_with(pipeline: Any, net: ControlSource) -> Any:
    """diffusers' ControlNet pipeline over the networks of a plain one."""
    xl = isinstance(pipeline, diffusers.StableDiffusionXLPipeline)
    options: dict[str, Any] = {"controlnet": net.network(torch.float32)}
    if xl:
        options |= {
            "force_zeros_for_empty_prompt": pipeline.config.force_zeros_for_empty_prompt,
            "add_watermarker": False,
        }
    else:
        options["requires_safety_checker"] = False
    kind = diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
    made = kind(**{**pipeline.components, **options})
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def component_errors(
    bundle: Bundle,
    net: ControlSource,
    backend: Backend,
    reference: Reference,
    steps: int,
    engine: Engine,
    hint: Image.Image,
) -> Iterator[tuple[str, float]]:
    """The hint encoder, and all residuals together, at the start, the middle and the end of a trajectory."""
    from stepforge.export.parity.verify import relative_error

    network = net.network(torch.float32)
    hint_encoder, residuals = ComponentId("control_hint", net.name), ComponentId("control_residuals", net.name)
    image = hint_of(hint, "none", bundle.card.width, bundle.card.height)[None].repeat(2, axis=0)
    encoded = np.array(backend.open(hint_encoder)({"image": image})["hint"])
    pixels = torch.from_numpy(image)
    flipped = pixels.flip(1) if network.config.controlnet_conditioning_channel_order == "bgr" else pixels
    yield str(hint_encoder), relative_error(encoded, network.controlnet_cond_embedding(flipped).numpy())
    plan = engine.plan(Request(prompt="", steps=steps))
    entry = bundle.components[residuals]
    random = np.random.default_rng(0)
    texts = {
        tensor.name: random.standard_normal((2, *_fixed(tensor.shape[1:])), dtype=np.float32)
        for tensor in entry.inputs
        if tensor.name in ("encoder_hidden_states", "text_embeds")
    }
    count = len(entry.outputs)
    graph = backend.open(residuals)
    for index in sorted({0, len(plan.steps) // 2, len(plan.steps) - 1}):
        step = plan.steps[index]
        latents = reference.latents[max(0, index - 1)]
        inputs = {
            "sample": np.stack([latents, latents]) * np.float32(step.scale_in),
            "timestep": np.full(2, step.t, np.float32),
            "hint": encoded,
            "scale": np.ones((2, count), np.float32),
            **texts,
        }
        conditions = None
        if "text_embeds" in texts:
            size = [float(bundle.card.height), float(bundle.card.width)]
            inputs["time_ids"] = np.array([[*size, 0, 0, *size]] * 2, np.float32)
            conditions = {name: torch.from_numpy(inputs[name]) for name in ("text_embeds", "time_ids")}
        down, mid = network(
            *(torch.from_numpy(inputs[name]) for name in ("sample", "timestep", "encoder_hidden_states")),
            pixels,
            added_cond_kwargs=conditions,
            return_dict=False,
        )
        outputs = graph(inputs)
        ours = [np.asarray(outputs[f"{RESIDUAL}{i}"]).ravel() for i in range(count)]
        theirs = [value.numpy().ravel() for value in (*down, mid)]
        yield f"{residuals} t={step.t:g}", relative_error(np.concatenate(ours), np.concatenate(theirs))


def _fixed(shape: Sequence[int | str]) -> list[int]:
    return [77 if isinstance(size, str) else size for size in shape]
