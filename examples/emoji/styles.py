"""Two looks, as filters of the emoji: `thermal` (a heat camera) and `poster` (red and navy print on cream).

A filter takes the ink, RGBA at twice the training size, and returns the picture, uint8 [64, 64, 3]. Both replace the
background: night blue and cream, whatever colour the caption names.

Chosen by what the demo model can draw. Through its autoencoder, pencil lines turn grey and 4-pixel blocks turn soft. Neon
tubes along the edges survive it, but a LoRA of 19,200 training pictures drew the outline and scribbled the inside: it can
move colours and tones, not redraw a shape as lines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from data import EMOJI_SIZE, SIZE, emoji, glyph
from PIL import Image, ImageFilter

CANVAS = 2 * SIZE
HEAT = np.array([[12, 8, 60], [70, 16, 140], [190, 30, 130], [245, 96, 50], [255, 190, 50], [255, 252, 220]])
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


def opacity(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.getchannel("A"), np.float32) / 255


def finish(picture: np.ndarray) -> np.ndarray:
    """float [128, 128, 3] -> uint8 [64, 64, 3]."""
    large = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    return np.asarray(large.resize((SIZE, SIZE), Image.Resampling.BOX))


def thermal(picture: Image.Image) -> np.ndarray:
    """A heat camera's picture: bright parts hot, dark parts cool, a cold background."""
    shape = over(picture, "white", median=5).filter(ImageFilter.GaussianBlur(1)).convert("L")
    grey = np.asarray(shape, np.float32) / 255
    heat = (0.18 + 0.82 * grey**1.4) * opacity(picture)
    levels = np.linspace(0, 1, len(HEAT))
    return finish(np.stack([np.interp(heat, levels, HEAT[:, channel]) for channel in range(3)], -1))


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


STYLES: dict[str, Callable[[Image.Image], np.ndarray]] = {"thermal": thermal, "poster": poster}


@cache
def stylised(style: str) -> np.ndarray:
    """Every emoji in the style, in the order of `emoji()`, uint8 [n, 64, 64, 3]."""
    return np.stack([STYLES[style](ink(row.code_point)) for row in emoji()])
