"""Images that requests start from: read, resized and encoded once while they are remembered, by the digest of their files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import Bundle, Size
from stepforge.runtime.engine.conditions.hints import image_digest
from stepforge.runtime.engine.noise import Generator
from stepforge.runtime.engine.starts import drawn
from stepforge.runtime.engine.state import Leg
from stepforge.runtime.engine.trajectory import Known, Start
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.masks import latent_mask, sized_mask, sized_picture
from stepforge.runtime.request import Init

CACHED_BYTES = 64 << 20  # moments and masks, LRU

Encode = Callable[[Float32, str], Float32]  # picture in [-1, 1], [3, H, W], and stage -> moments of its VAE, [2C, h, w]


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """An image as a model reads it. Moments are the means and log variances of latents, before scaling."""

    moments: Float32  # [2C, h, w]
    masked: Float32 | None = None  # moments of the image whose masked part is grey
    mask: Float32 | None = None  # 1 where the image is drawn anew, [1, h, w]
    digests: tuple[str, ...] = ()  # sha256 of the image's file or pixels, and of the mask's

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.moments, self.masked, self.mask) if array is not None)


class Inits:
    """Encoded images. Only the engine's thread calls it."""

    def __init__(self, bundle: Bundle) -> None:
        self._card = bundle.card
        self._cache: OrderedDict[tuple[str, str, Size], Given] = OrderedDict()

    def __call__(self, init: Init, size: Size, encode: Encode) -> tuple[Given, int]:
        """The image in a size, and how often the VAE encoder ran for it. Raises RequestError for images that cannot be
        read."""
        key = image_digest(init.image), "" if init.mask is None else image_digest(init.mask), size
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key], 0
        picture = sized_picture(init.image, size.width, size.height)
        digests = tuple(digest for digest in key[:2] if digest)
        given, runs = Given(encode(picture, ""), digests=digests), 1
        if init.mask is not None:
            mask = sized_mask(init.mask, size.width, size.height)
            small = latent_mask(mask, self._card.vae_scale)
            if not small.any():
                raise RequestError(
                    f"the mask is so small that it falls between latents of {self._card.vae_scale} pixels; draw it larger"
                )
            masked = encode(picture * (mask < 0.5), "")
            given, runs = Given(given.moments, masked, small, digests), 2
        self._cache[key] = given
        while sum(each.nbytes for each in self._cache.values()) > CACHED_BYTES and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return given, runs


def from_init(leg: Leg, given: Given, init: Init, seed: int, *, scaling: float, reads_mask: bool) -> Start:
    """Image to image and inpainting; the order of draws is that of diffusers' pipelines.

    scaling: latents = scaling · the VAE's. reads_mask: the network reads mask and masked image beside the latents.
    """
    generator, plan = Generator(seed), leg.plan
    is_drawn_anew = init.mask is not None and plan.start == 0.0
    y = None
    if not (reads_mask and is_drawn_anew):
        y = np.float32(scaling) * drawn(given.moments, generator)
    channels, *sides = given.moments.shape
    noise = generator.normal((channels // 2, *sides))
    x = np.float32(plan.init_noise) * noise
    if y is not None and plan.start:
        x = np.float32(plan.start) * y + x
    if given.mask is None or given.masked is None:
        return Start(x, generator)
    masked = np.float32(scaling) * drawn(given.masked, generator)  # drawn by 4-channel models too, which do not read it
    if reads_mask:
        return Start(x, generator, concat=np.concatenate([given.mask, masked]))
    assert y is not None
    return Start(x, generator, known=Known(given.mask, y, noise))
