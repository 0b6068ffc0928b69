"""What the first step of an image is given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stepforge.runtime.arrays import Float32
from stepforge.runtime.bundle import Size
from stepforge.runtime.bundle.scheduler import SchedulerCard
from stepforge.runtime.engine.noise import Generator
from stepforge.runtime.engine.state import Leg
from stepforge.runtime.engine.trajectory import Start, Waypoint
from stepforge.runtime.plan.sampling.schedules import alphas_cumprod

Encode = Callable[[Float32, str], Float32]  # picture in [-1, 1], [3, H, W], and stage -> moments of its VAE, [2C, h, w]


def from_noise(leg: Leg, shape: tuple[int, int, int], seed: int) -> Start:
    """Text to image: noise at the plan's first level. shape: of the latents, [C, h, w]."""
    generator = Generator(seed)
    return Start(leg.plan.init_noise * generator.normal(shape), generator)


def from_picture(leg: Leg, image: Waypoint, encode: Encode) -> Start:
    """Super-resolution: noise, and the smaller image that the network reads beside it.

    The order of draws is that of diffusers' pipeline of the stage's kind.
    """
    card, upscale = leg.card, leg.upscale
    assert card is not None
    assert card.model is not None
    assert upscale is not None
    generator = image.generator if upscale.seed is None else Generator(upscale.seed + image.index)
    shape = card.model.latent_shape(leg.size)
    if card.kind == "x2":
        latents = image.latents
        if not leg.reads_latents:
            assert image.picture is not None
            latents = card.model.scaling_factor * drawn(encode(image.picture, leg.stage), generator)
        assert latents is not None
        low = latents.repeat(2, axis=1).repeat(2, axis=2)
        return Start(leg.plan.init_noise * generator.normal(shape), generator, concat=low)
    assert image.picture is not None
    assert card.noising is not None
    level = card.noise_level if upscale.noise_level is None else upscale.noise_level
    if card.kind == "pixel":
        x = leg.plan.init_noise * generator.normal(shape)
        low = noised(resized(np.clip(image.picture, -1, 1), leg.size), card.noising, level, generator)
        return Start(x, generator, concat=low, inputs={"class_labels": np.asarray(level, np.float32)})
    low = noised(np.clip(image.picture, -1, 1), card.noising, level, generator)
    x = leg.plan.init_noise * generator.normal(shape)
    return Start(x, generator, concat=low, inputs={"class_labels": np.asarray(level, np.int64)})


def noised(picture: Float32, noising: SchedulerCard, level: int, generator: Generator) -> Float32:
    """A picture with fresh noise of a level: √ᾱ·picture + √(1 − ᾱ)·z."""
    bar = float(alphas_cumprod(noising)[level])
    z = generator.normal(picture.shape)
    return np.float32(bar**0.5) * picture + np.float32((1 - bar) ** 0.5) * z


def resized(picture: Float32, size: Size) -> Float32:
    """A picture, [C, h, w], in another size: bilinear, corners on corners, as torch's interpolate(align_corners=True)."""
    for axis, side in ((1, size.height), (2, size.width)):
        last = picture.shape[axis] - 1
        place = np.arange(side, dtype=np.float32) * np.float32(last / max(side - 1, 1))
        low = np.minimum(place.astype(np.int64), last)
        high = np.minimum(low + 1, last)
        share = (place - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(3)])
        picture = np.take(picture, low, axis) * (np.float32(1) - share) + np.take(picture, high, axis) * share
    return picture


def drawn(moments: Float32, generator: Generator) -> Float32:
    """Latents, [C, h, w], drawn from the means and log variances that a VAE encoder makes, [2C, h, w]."""
    mean, log_variance = np.split(moments, 2)
    latents: Float32 = mean + np.exp(0.5 * np.clip(log_variance, -30, 20)) * generator.normal(mean.shape)
    return latents
