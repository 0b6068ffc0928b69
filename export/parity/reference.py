"""The authority: what diffusers' own pipeline, made by diffusers' own loaders, does with the same prompts and noise in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stepforge.export.models.controlnet import ControlSource
from stepforge.export.parity.control import control_pipeline, load_network
from stepforge.export.parity.inits import encoder_call, init_options, init_pipeline, inits_of, whole_init
from stepforge.export.parity.loaders import Loaded, quiet
from stepforge.export.parity.recorder import Call, control_calls, control_recorder, plain_calls, plain_recorder
from stepforge.export.parity.staging import reason
from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import TEXT_ENCODERS, VAE_ENCODER, Bundle, Size
from stepforge.runtime.errors import CheckpointError
from stepforge.runtime.request import Init


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
    """All that a bundle is compared with. Arrays only: the pipeline's memory is free before an engine opens."""

    plain: Mapping[str, Reference]  # run of each prompt
    again: Reference  # the first prompt with one thread
    controlled: Mapping[str, Reference]  # the first prompt with the drawn hint, by ControlNet
    given: Sequence[tuple[Init, Reference]]  # the first prompt from the drawn hint as an init image, and with a mask
    init: Init | None  # what all other runs start from: nothing, but for inpainting models
    hint: Image.Image
    calls: Sequence[Call]  # calls of networks, during the first prompt's runs
    size: Size | None  # the pipeline's own image size; None: its configs state none
    loader: str
    assumed: tuple[str, ...]


def run_references(
    loaded: Loaded,
    nets: Sequence[tuple[ControlSource, Path]],
    bundle: Bundle,
    settings: Settings,
    progress: Callable[[str], None],
) -> References:
    """Every prompt without, and the first with each ControlNet. Raises CheckpointError if diffusers cannot draw them."""
    pipeline, assumed = loaded.pipeline, list(loaded.assumed)

    def run(pipeline: Any, prompt: str, **more: Any) -> Reference:
        try:
            with quiet():
                return run_reference(pipeline, prompt, bundle, settings.steps, settings.guidance, settings.seed, **more)
        except Exception as error:  # a pipeline raises whatever its settings run into
            raise CheckpointError(f"diffusers' pipeline of the model does not draw: {reason(error)}") from error

    first, hint, size = settings.prompts[0], drawn_hint(bundle), own_size(pipeline)
    if size is None:
        assumed.append(f"image size {bundle.card.width}x{bundle.card.height}: the UNet's config states none")
    init = whole_init(hint) if bundle.reads_mask else None
    whole = {} if init is None else init_options(init, hint, bundle)
    plain, controlled = {}, {}
    for prompt in settings.prompts:
        progress(f"reference: {prompt!r}")
        with plain_recorder(pipeline) as recorder:
            plain[prompt] = run(pipeline, prompt, **whole)
        if prompt == first:
            calls = list(plain_calls(pipeline, recorder, plain[first].latents[-1]))
    progress("reference: spread")
    with threads(1):
        again = run(pipeline, first, **whole)
    given = []
    starts, left = inits_of(bundle, hint, settings.steps)
    assumed += left
    for start in starts:
        progress("reference: from an image" if start.mask is None else "reference: inpainting")
        given.append((start, run(init_pipeline(pipeline, start), first, **init_options(start, hint, bundle))))
    if VAE_ENCODER in bundle.components:
        calls.append(encoder_call(pipeline, hint))
    for net, path in nets:
        progress(f"reference: ControlNet {net.name}")
        network, lines = load_network(path, net, pipeline.unet)
        assumed += lines
        with control_recorder(network) as recorder:
            controlled[net.name] = run(control_pipeline(pipeline, network), first, image=hint)
        calls += control_calls(net.name, recorder)
    return References(plain, again, controlled, given, init, hint, calls, size, loaded.loader, tuple(assumed))


def inversion_prompts(pipeline: Any, prompts: Sequence[str]) -> tuple[str, ...]:
    """A prompt with the first textual inversion of several vectors that the model's tokenizers were saved with, unless one of
    the prompts has it: others do not show how it is read."""
    for key in TEXT_ENCODERS:
        tokenizer = getattr(pipeline, key.name.replace("text_encoder", "tokenizer"), None)
        added = getattr(tokenizer, "added_tokens_encoder", {})
        if found := [token for token in added if f"{token}_1" in added]:
            return () if any(token in prompt for token in found for prompt in prompts) else (f"a photo of {found[0]}",)
    return ()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def own_size(pipeline: Any) -> Size | None:
    """The size of images that a pipeline draws unless told otherwise, as diffusers computes it."""
    sample, scale = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    if isinstance(sample, int):
        return Size(sample * scale, sample * scale)
    if isinstance(sample, list | tuple) and len(sample) == 2:
        return Size(int(sample[1]) * scale, int(sample[0]) * scale)
    return None


def run_reference(
    pipeline: Any, prompt: str, bundle: Bundle, steps: int, guidance: float, seed: int, **more: Any
) -> Reference:
    """One image of the reference, with the latents after every step."""
    trajectory: list[Float32] = []

    def note(_: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        trajectory.append(values["latents"][0].float().numpy().copy())
        return {}

    size = {} if "strength" in more else {"width": bundle.card.width, "height": bundle.card.height}
    output = pipeline(
        prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=note,
        output_type="np",
        **size,
        **more,
    )
    return Reference(trajectory, (output.images[0] * 255).round().astype(np.uint8))


def drawn_hint(bundle: Bundle) -> Image.Image:
    """`drawn_picture` of the model's size."""
    return drawn_picture(bundle.card.width, bundle.card.height)


def drawn_picture(width: int, height: int) -> Image.Image:
    """A disc in a frame, with edges in every direction."""
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 4, width * 5 // 8, height * 7 // 8), fill="white")
    draw.rectangle((width // 2, height // 8, width * 7 // 8, height // 2), outline="white", width=max(1, width // 64))
    return image
