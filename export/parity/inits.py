"""The authority for images to start from: diffusers' img2img and inpainting pipelines over the networks of a loaded one."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw

from stepforge.export.parity.recorder import Call, as_array
from stepforge.runtime.bundle import VAE_ENCODER, Bundle
from stepforge.runtime.errors import RequestError
from stepforge.runtime.plan.compile import compile_plan
from stepforge.runtime.request import Init, Request

STRENGTH = 0.5


def drawn_mask(image: Image.Image) -> Image.Image:
    """A mask of a picture's size, its lower right part white."""
    width, height = image.size
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).rectangle((width // 3, height // 3, width, height), fill=255)
    return mask


def whole_init(image: Image.Image) -> Init:
    """What an inpainting model is given where a text-to-image model is given nothing."""
    return Init(image=image, mask=drawn_mask(image))


def inits_of(bundle: Bundle, image: Image.Image, steps: int) -> tuple[list[Init], list[str]]:
    """What the bundle can start from with its own sampler, of an image and one with a mask; and a line for what it cannot."""
    found: list[Init] = []
    left: list[str] = []
    if VAE_ENCODER not in bundle.components:
        return found, left
    masked = Init(image=image, mask=drawn_mask(image), strength=STRENGTH)
    for init in (masked,) if bundle.reads_mask else (Init(image=image, strength=STRENGTH), masked):
        try:
            compile_plan(Request(prompt="", init=init, steps=steps), bundle.scheduler, blends=not bundle.reads_mask)
            found.append(init)
        except RequestError as error:
            what = "from an image" if init.mask is None else "inpainting"
            left.append(f"{what}: not compared, the engine refuses it with the model's own sampler: {error}")
    return found, left


def init_pipeline(pipeline: Any, init: Init) -> Any:
    """diffusers' pipeline for an init image over the networks of another."""
    xl = hasattr(pipeline, "text_encoder_2")
    if not isinstance(size := pipeline.unet.config.sample_size, int | None):
        # constructors of these pipelines compare it with a number; sizes are given with each call
        pipeline.unet.register_to_config(sample_size=max(size))
    kind = f"StableDiffusion{'XL' * xl}{'Img2Img' if init.mask is None else 'Inpaint'}Pipeline"
    options: dict[str, Any] = {"requires_safety_checker": False}
    if xl:
        zeros = pipeline.config.force_zeros_for_empty_prompt
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    made = getattr(diffusers, kind)(**pipeline.components, **options)
    made.set_progress_bar_config(disable=True)
    return made


def init_options(init: Init, image: Image.Image, bundle: Bundle) -> dict[str, Any]:
    """Arguments of such a pipeline. image: the init's."""
    if init.mask is None:
        return {"image": image, "strength": init.strength}
    size = {"width": bundle.card.width, "height": bundle.card.height}
    return {"image": image, "mask_image": drawn_mask(image), "strength": init.strength, **size}


def encoder_call(pipeline: Any, image: Image.Image) -> Call:
    """The VAE encoder on a picture."""
    pixels = torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)
    with torch.no_grad():
        moments = pipeline.vae.encode(pixels).latent_dist.parameters
    return Call(VAE_ENCODER, VAE_ENCODER.label, {"pixels": as_array(pixels)}, {"moments": as_array(moments)})
