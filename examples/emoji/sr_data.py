"""Training pairs of the SR network: a 64-px picture and the 128-px picture that `interpolate` makes room for.

The layout upsamples its input bilinearly with align_corners=True: pixel y of 128 shows what lies at y·63/127 of the 64-px
picture. Both pictures are resampled (Lanczos) from one canvas, on which the font's bitmap stands unscaled, at those places;
pixel centres at 2y+0.5 would ask of a convolution a shift that grows from the centre to ±0.5 px at the rim.

Held out of all SR training: every eighth emoji of the demo's vocabulary, in Unicode order. The autoencoder and the base
model have seen them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from data import BACKGROUNDS, EMOJI_SIZE, emoji, glyph
from PIL import Image, ImageFilter
from train_vae import all_code_points

LOW, HIGH = 64, 128

HELD_OUT: tuple[int, ...] = tuple(sorted(row.code_point for row in emoji())[::8])

DOWN = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.HAMMING)


def training_points() -> list[int]:
    """All emoji of the font but the held out, those of the demo's vocabulary three times."""
    ours = [row.code_point for row in emoji()]
    return [point for point in (*all_code_points(), *ours, *ours) if point not in HELD_OUT]


def canvas(
    code_point: int, background: Sequence[int], longest: float = EMOJI_SIZE, shift: tuple[float, float] = (0.0, 0.0)
) -> Image.Image:
    """The unscaled bitmap on a square that becomes 64 px wide; `longest` and `shift` in 64-px pixels."""
    ink = glyph(code_point)
    side = round(max(ink.size) * LOW / longest)
    corner = [round((side - size) / 2 + offset * side / LOW) for size, offset in zip(ink.size, shift, strict=True)]
    picture = Image.new("RGB", (side, side), tuple(background))
    rgba = ink.convert("RGBA")
    picture.paste(rgba, tuple(corner), rgba)
    return picture


def pair(picture: Image.Image, down: Image.Resampling = Image.Resampling.LANCZOS) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [64, 64, 3] and its target [128, 128, 3] from one canvas."""
    pitch = picture.width / LOW
    step = pitch * (LOW - 1) / (HIGH - 1)
    start = (pitch - step) / 2
    box = (start, start, start + step * HIGH, start + step * HIGH)
    low = picture.resize((LOW, LOW), down)
    return np.asarray(low), np.asarray(picture.resize((HIGH, HIGH), Image.Resampling.LANCZOS, box=box))


def random_colour(random: np.random.RandomState) -> tuple[int, int, int]:
    if random.rand() < 0.5:
        return list(BACKGROUNDS.values())[random.randint(len(BACKGROUNDS))]
    red, green, blue = random.randint(0, 256, 3).tolist()
    return red, green, blue


def random_pair(points: Sequence[int], random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """An augmented pair; some of the 64-px pictures are softened."""
    picture = canvas(
        points[random.randint(len(points))],
        random_colour(random),
        longest=random.uniform(46, 60),
        shift=tuple(random.uniform(-3, 3, 2)),
    )
    low, high = pair(picture, DOWN[random.randint(len(DOWN))])
    if random.rand() < 0.15:
        low = np.asarray(Image.fromarray(low).filter(ImageFilter.GaussianBlur(random.uniform(0.2, 0.9))))
    if random.rand() < 0.5:
        low, high = low[:, ::-1], high[:, ::-1]
    return low, high
