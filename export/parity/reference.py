"""The authority: diffusers' own pipelines over the source's networks in fp32, and what they did with a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from transformers import CLIPTokenizer

from stepforge.export.models.controlnet import ControlSource
from stepforge.export.models.source import Source
from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import Bundle


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of both sides."""

    prompts: tuple[str, ...]
    steps: int
    guidance: float
    seed: int


@dataclass(frozen=True, slots=True)
class Reference:
    """One run of diffusers' pipeline."""

    latents: list[Float32]  # after every network evaluation, [C, h, w]
    image: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class References:
    """All that a bundle is compared with."""

    pipeline: Any  # diffusers' StableDiffusionPipeline or its SDXL kin
    plain: Mapping[str, Reference]  # run of each prompt
    again: Reference  # the first prompt with one thread
    controlled: Mapping[str, Reference]  # the first prompt with the drawn hint, by ControlNet
    hint: Image.Image


def run_references(
    source: Source, nets: Sequence[ControlSource], bundle: Bundle, settings: Settings, progress: Callable[[str], None]
) -> References:
    """Every prompt without, and the first with each ControlNet."""

    def run(pipeline: Any, prompt: str, **more: Any) -> Reference:
        return run_reference(pipeline, prompt, bundle, settings.steps, settings.guidance, settings.seed, **more)

    progress("reference: loading")
    pipeline = reference_pipeline(source)
    first, hint = settings.prompts[0], drawn_hint(bundle)
    plain, controlled = {}, {}
    for prompt in settings.prompts:
        progress(f"reference: {prompt!r}")
        plain[prompt] = run(pipeline, prompt)
    progress("reference: spread")
    with threads(1):
        again = run(pipeline, first)
    for net in nets:
        progress(f"reference: ControlNet {net.name}")
        controlled[net.name] = run(control_pipeline(pipeline, net), first, image=hint)
    return References(pipeline, plain, again, controlled, hint)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reference_pipeline(source: Source) -> Any:
    """diffusers' own pipeline in fp32, from the source's networks."""
    tokenizers = [CLIPTokenizer.from_pretrained(folder, local_files_only=True) for folder in source.tokenizers]
    encoders = [loader(torch.float32) for loader in source.text_encoders]
    config = dict(source.scheduler)
    parts = {
        "unet": source.unet(torch.float32),
        "vae": source.vae(torch.float32),
        "scheduler": getattr(diffusers, config["_class_name"]).from_config(config),
        "text_encoder": encoders[0],
        "tokenizer": tokenizers[0],
    }
    if source.family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=encoders[1],
            tokenizer_2=tokenizers[1],
            force_zeros_for_empty_prompt=source.force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_reference(
    pipeline: Any, prompt: str, bundle: Bundle, steps: int, guidance: float, seed: int, **more: Any
) -> Reference:
    """One image of the reference, with the latents after every step."""
    trajectory: list[Float32] = []

    def note(_: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        trajectory.append(values["latents"][0].float().numpy().copy())
        return {}

    output = pipeline(
        prompt,
        width=bundle.card.width,
        height=bundle.card.height,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=note,
        output_type="np",
        **more,
    )
    return Reference(trajectory, (output.images[0] * 255).round().astype(np.uint8))


def control_pipeline(pipeline: Any, net: ControlSource) -> Any:
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


def drawn_hint(bundle: Bundle) -> Image.Image:
    """A disc in a frame, with edges in every direction; of the model's size."""
    width, height = bundle.card.width, bundle.card.height
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 4, width * 5 // 8, height * 7 // 8), fill="white")
    draw.rectangle((width // 2, height // 8, width * 7 // 8, height // 2), outline="white", width=max(1, width // 64))
    return image
