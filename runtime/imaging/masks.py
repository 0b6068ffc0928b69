"""Given images and masks as image-to-image pipelines read them; diffusers, image_processor.py, VaeImageProcessor.preprocess."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from stepforge.runtime.arrays import Float32
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.read import on_black, read_image


def sized_picture(source: Any, width: int, height: int) -> Float32:
    """An image in a size, in [-1, 1], [3, height, width]; transparent parts on black. Raises RequestError as `read_image`."""
    values = np.asarray(_sized(source, width, height), np.float32) / np.float32(255)
    return np.ascontiguousarray((np.float32(2) * values - np.float32(1)).transpose(2, 0, 1))


def sized_mask(source: Any, width: int, height: int) -> Float32:
    """What a mask has drawn anew, 1 from mid grey on, else 0: [1, height, width]. Raises RequestError if that is nothing."""
    grey = np.asarray(_sized(source, width, height).convert("L"), np.float32) / np.float32(255)
    mask = (grey >= np.float32(0.5)).astype(np.float32)[None]
    if not mask.any():
        raise RequestError("the mask is black everywhere, so that nothing would be drawn; its white is drawn anew")
    return mask


def latent_mask(mask: Float32, scale: int) -> Float32:
    """A mask at a latent's size: of each square the pixel top left, as torch's nearest interpolation takes it."""
    return np.ascontiguousarray(mask[:, ::scale, ::scale])


def _sized(source: Any, width: int, height: int) -> Image.Image:
    image = on_black(read_image(source))
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
