"""Two looks, as filters of the emoji: `neon` (glowing tubes in the dark) and `poster` (red and navy print on cream).

A filter takes the ink, RGBA at twice the training size, and returns the picture, uint8 [64, 64, 3]. Both replace the
background: neon is on near-black, the poster on cream, whatever colour the caption names.

Chosen by what the demo autoencoder can show: of four looks tried, pencil and pixel art came out of it as grey and as
blurred emoji (lines of one pixel, edges off its 4-pixel grid are what it drops), these two did not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from data import EMOJI_SIZE, SIZE, emoji, glyph
from PIL import Image, ImageFilter

CANVAS = 2 * SIZE
NIGHT, ICE = np.array([16.0, 10, 40]), np.array([0.25, 0.75, 1.0])  # ICE is the tube of what has no colour of its own
CREAM, RED, NAVY = np.array([250.0, 232, 200]), np.array([222.0, 62, 48]), np.array([24.0, 40, 84])

# Emoji that no style adapter sees in training: a third, fixed.
HELD_OUT = frozenset(np.random.RandomState(1).permutation(len(emoji()))[: len(emoji()) // 3].tolist())


def ink(code_point: int) -> Image.Image:
    """The emoji centred on a transparent canvas, RGBA [128, 128]."""
    picture = glyph(code_point)
    scale = 2 * EMOJI_SIZE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    canvas = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
    corner = tuple((CANVAS - side) // 2 for side in size)
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS).convert("RGBA"), corner)
    return canvas


def over(picture: Image.Image, colour: str, *, median: int, times: int = 1) -> Image.Image:
    """The ink on a plain colour, details smaller than the median filter removed."""
    plain = Image.new("RGBA", picture.size, colour)
    plain.alpha_composite(picture)
    plain = plain.convert("RGB")
    for _ in range(times):
        plain = plain.filter(ImageFilter.MedianFilter(median))
    return plain


def blurred(values: np.ndarray, radius: float) -> np.ndarray:
    """Gaussian blur of values in 0..1."""
    eight_bit = Image.fromarray((values.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(eight_bit.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def opacity(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.getchannel("A"), np.float32) / 255


def finish(picture: np.ndarray) -> np.ndarray:
    """float [128, 128, 3] -> uint8 [64, 64, 3]."""
    large = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    return np.asarray(large.resize((SIZE, SIZE), Image.Resampling.BOX))


def neon(picture: Image.Image) -> np.ndarray:
    """Tubes along the outline and the strongest inner edges, in the emoji's own colours, saturated, with a glow."""
    shape = over(picture, "black", median=7, times=2)
    levels = np.asarray(shape.filter(ImageFilter.GaussianBlur(1.4)), np.float32)
    steepness = np.max([np.hypot(*np.gradient(levels[..., channel])) for channel in range(3)], axis=0)
    solid = blurred(opacity(picture), 2.4)
    edges = np.maximum(((steepness - 14) / 16).clip(0, 1), (4 * solid * (1 - solid)) ** 1.5)
    tubes = np.asarray(Image.fromarray((edges * 255).astype(np.uint8)).filter(ImageFilter.MaxFilter(3)), np.float32)
    tubes /= 255
    colour = np.asarray(shape.filter(ImageFilter.GaussianBlur(4)), np.float32)
    colour = colour - 0.85 * colour.min(-1, keepdims=True) + 1e-3
    strength = (colour.max(-1, keepdims=True) / 60).clip(0, 1)
    colour = strength * colour / colour.max(-1, keepdims=True) + (1 - strength) * ICE
    light = (tubes + 0.45 * blurred(tubes, 4))[..., None] * colour + 0.15 * tubes[..., None] ** 3
    return finish(NIGHT + 255 * light)


def threshold(values: np.ndarray) -> int:
    """The level that splits 0..255 values into the two groups of least spread (Otsu 1979)."""
    counts = np.bincount(values.astype(np.int64), minlength=256).astype(np.float64)
    below, total = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = below * above * (total / below - (total[-1] - total) / above) ** 2
    return int(np.nan_to_num(spread).argmax()) + 1


def poster(picture: Image.Image) -> np.ndarray:
    """The emoji's light parts red, its dark parts navy, on cream."""
    shape = over(picture, "white", median=5, times=2).filter(ImageFilter.GaussianBlur(0.8)).convert("L")
    grey, solid = np.asarray(shape, np.float32), opacity(picture)
    level = np.clip(threshold(grey[solid > 0.5]), 100, 175)  # the limits keep the same colour on the same side
    light = ((grey - level) / 6 + 0.5).clip(0, 1)[..., None]
    cover = ((solid - 0.5) * 3 + 0.5).clip(0, 1)[..., None]
    return finish(CREAM + (NAVY + (RED - NAVY) * light - CREAM) * cover)


STYLES: dict[str, Callable[[Image.Image], np.ndarray]] = {"neon": neon, "poster": poster}


@cache
def stylised(style: str) -> np.ndarray:
    """Every emoji in the style, in the order of `emoji()`, uint8 [n, 64, 64, 3]."""
    return np.stack([STYLES[style](ink(row.code_point)) for row in emoji()])
