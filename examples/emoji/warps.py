"""Emoji pulled into other silhouettes: the training pairs of the demo ControlNet.

A shape is a closed curve given by its radius at 256 angles about an inner point (anticlockwise from +x, y up, any unit);
it is filled, and star-convex by construction. An emoji's ink is pulled into a shape along the rays: the pixel at radius r
and angle theta shows the ink at r * source(theta) / target(theta), where `source` is the ink's own outline about its
centroid. Then the whole is stretched, placed and composited on a plain background.

`FAMILIES` are the shapes of training, `HELD_OUT_SHAPES` those that it never sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from data import BACKGROUNDS, EMOJI_SIZE, SIZE, emoji, glyph
from PIL import Image

ANGLES = 256
THETA = np.arange(ANGLES) * 2 * np.pi / ANGLES
RAYS = np.stack([np.cos(THETA), np.sin(THETA)], -1)
SHEET = 144  # pixels of a source sheet; the font's glyphs are at most 136 wide
MARGIN = 2  # pixels kept free at the picture's edge

Random = np.random.RandomState


def polygon(points: np.ndarray | list[tuple[float, float]]) -> np.ndarray:
    """Radii of a polygon [n, 2] that is star-convex about the origin."""
    start = np.asarray(points, float)
    edge = np.roll(start, -1, 0) - start
    # origin + radius * ray == start + along * edge
    determinant = RAYS[:, :1] * edge[:, 1] - RAYS[:, 1:] * edge[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        radius = (start[:, 0] * edge[:, 1] - start[:, 1] * edge[:, 0]) / determinant
        along = (start[:, 0] * RAYS[:, 1:] - start[:, 1] * RAYS[:, :1]) / determinant
    hit = (radius > 0) & (along > -1e-9) & (along < 1 + 1e-9)
    return np.where(hit, radius, 0).max(1)


def disc(x: float, y: float, radius: float) -> np.ndarray:
    """Radii of a disc; 0 where a ray misses it."""
    middle = RAYS @ [x, y]
    inside = radius**2 - (x * x + y * y - middle**2)
    return np.where(inside > 0, middle + np.sqrt(np.maximum(inside, 0)), 0).clip(0)


def smooth(radii: np.ndarray, bins: float) -> np.ndarray:
    """Gaussian of `bins` angles, around the circle."""
    frequency = np.fft.rfftfreq(ANGLES)
    return np.fft.irfft(np.fft.rfft(radii) * np.exp(-2 * (np.pi * bins * frequency) ** 2), ANGLES)


def superellipse(power: float) -> np.ndarray:
    """1 is a diamond, 2 a circle, large ones a square."""
    return (np.abs(RAYS) ** power).sum(1) ** (-1 / power)


def star(points: int, depth: float) -> np.ndarray:
    """Pointing up; inner radius `depth` of the outer one. cos(pi / points) makes it a regular polygon."""
    angles = np.pi / 2 + np.arange(2 * points) * np.pi / points
    radii = np.where(np.arange(2 * points) % 2, depth, 1.0)
    return polygon(np.stack([np.cos(angles), np.sin(angles)], -1) * radii[:, None])


def heart(width: float = 1.0) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return polygon(np.stack([16 * width * np.sin(t) ** 3, y], -1))


def blob(random: Random) -> np.ndarray:
    """A circle with a few random low waves."""
    waves = np.arange(1, 7)
    height = random.normal(size=6) * 0.32 / waves
    return np.exp((height[:, None] * np.cos(waves[:, None] * THETA + random.uniform(0, 2 * np.pi, (6, 1)))).sum(0))


def flower(petals: int, depth: float) -> np.ndarray:
    return 1 + depth * np.cos(petals * (THETA - np.pi / 2))


def gear(teeth: int) -> np.ndarray:
    return 1 + 0.16 * np.tanh(4 * np.cos(teeth * (THETA - np.pi / 2)))


def other_emoji(random: Random) -> np.ndarray:
    return smooth(outlines()[0][random.randint(len(emoji()))], 4)


FAMILIES: dict[str, Callable[[Random], np.ndarray]] = {
    "emoji": other_emoji,
    "superellipse": lambda random: superellipse(np.exp(random.uniform(np.log(0.8), np.log(6)))),
    "star": lambda random: star(random.randint(3, 9), random.uniform(0.45, 0.9)),
    "heart": lambda random: heart(random.uniform(0.8, 1.2)),
    "blob": blob,
    "flower": lambda random: flower(random.randint(3, 8), random.uniform(0.1, 0.3)),
}
CROSS = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1), (-3, 1), (-1, 1), (-1, 3)]
ARROW = [(0, 3), (3, 0), (1.3, 0), (1.3, -3), (-1.3, -3), (-1.3, 0), (-3, 0)]
SHIELD = [(-2.6, 2.6), (2.6, 2.6), (2.6, 0), (2.1, -1.4), (1.2, -2.5), (0, -3.3), (-1.2, -2.5), (-2.1, -1.4), (-2.6, 0)]
HOURGLASS = [(-2.2, 3), (2.2, 3), (0.9, 0), (2.2, -3), (-2.2, -3), (-0.9, 0)]
HELD_OUT_SHAPES: dict[str, np.ndarray] = {
    "cross": polygon(CROSS),
    "arrow": polygon(ARROW),
    "shield": polygon(SHIELD),
    "hourglass": polygon(HOURGLASS),
    "gear": gear(7),
    "bubble": np.maximum(superellipse(3.2) * 2.4, polygon([(1, 1), (-1, 1), (-1.9, -3.7)])),
    "bone": np.max([disc(x, y, 1.2) for x in (-2.6, 2.6) for y in (-0.8, 0.8)] + [superellipse(6) * 1.2], 0),
}


@cache
def sheets() -> torch.Tensor:
    """The ink of every emoji in the middle of a transparent sheet, premultiplied RGBA, uint8 [n, 4, 144, 144]."""
    out = []
    for row in emoji():
        ink = glyph(row.code_point)
        sheet = Image.new("RGBa", (SHEET, SHEET))
        sheet.paste(ink, ((SHEET - ink.width) // 2, (SHEET - ink.height) // 2))
        out.append(np.asarray(sheet).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(out))


@cache
def outlines() -> tuple[np.ndarray, np.ndarray]:
    """Outermost ink along each ray, [n, 256], and the centroids (x, y), [n, 2], in pixels of the sheet.

    A ray that meets less ink than a third of the longest gets that third: the warp divides by the target's radius.
    """
    radii, centres = [], []
    steps = np.arange(0, SHEET, 0.5)
    for alpha in sheets()[:, 3].numpy():
        rows, columns = np.nonzero(alpha > 127)
        x, y = columns.mean(), rows.mean()
        along = np.rint(x + RAYS[:, :1] * steps).astype(int), np.rint(y - RAYS[:, 1:] * steps).astype(int)
        on_sheet = (along[0] >= 0) & (along[0] < SHEET) & (along[1] >= 0) & (along[1] < SHEET)
        ink = on_sheet & (alpha[along[1].clip(0, SHEET - 1), along[0].clip(0, SHEET - 1)] > 127)
        outer = (ink * steps).max(1)
        radii.append(smooth(outer.clip(outer.max() / 3), 5))
        centres.append((x, y))
    return np.stack(radii), np.array(centres)


@dataclass(frozen=True, slots=True)
class Warp:
    """One emoji in one shape. `target` None keeps the emoji's own outline."""

    emoji: int
    target: np.ndarray | None = None
    aspect: float = 1.0  # width is multiplied by its root, height divided
    tilt: float = 0.0  # of the ink, radians anticlockwise
    longest: float = EMOJI_SIZE  # pixels
    place: tuple[float, float] = (0.0, 0.0)  # -1..1: from one edge of the picture to the other


def resample(radii: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Radii [n, 256] at angles [n, ...] in radians, linear between the table's."""
    position = (angle / (2 * np.pi) * ANGLES).flatten(1)
    below = position.floor()
    index = below.long() % ANGLES
    low, high = radii.gather(1, index), radii.gather(1, (index + 1) % ANGLES)
    return (low + (high - low) * (position - below)).view(angle.shape)


def halve(fine: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(fine, 2)


def warp(rows: list[Warp]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ink [n, 4, 64, 64], premultiplied RGBA in 0..1, and the shapes it was pulled into, filled, [n, 64, 64] in 0..1.

    The smoothed outline leaves thin spikes outside the shape; they are cut off.
    """
    pick = [row.emoji for row in rows]
    own, centres = (torch.tensor(table[pick], dtype=torch.float32) for table in outlines())
    tilt = torch.tensor([row.tilt for row in rows], dtype=torch.float32).view(-1, 1)
    angles = torch.tensor(THETA, dtype=torch.float32)
    tilted = resample(own, angles - tilt)
    target = torch.stack(
        [t if row.target is None else torch.tensor(row.target).float() for row, t in zip(rows, tilted, strict=True)]
    )
    stretch = torch.tensor([[row.aspect**0.5, -(row.aspect**-0.5)] for row in rows])[:, None]  # y down from here on
    curve = target[..., None] * torch.tensor(RAYS).float() * stretch
    low, high = curve.amin(1), curve.amax(1)
    scale = torch.tensor([row.longest for row in rows]) / (high - low).amax(1)
    free = SIZE / 2 - MARGIN - (high - low) * scale[:, None] / 2
    middle = SIZE / 2 + torch.tensor([row.place for row in rows]) * free.clamp(min=0)
    origin = middle - (low + high) / 2 * scale[:, None]

    line = (torch.arange(2 * SIZE) + 0.5) / 2
    pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    x, y = ((pixels - origin[:, None, None]) / (scale[:, None, None] * stretch)[:, None]).unbind(-1)  # y up again
    radius, angle = torch.hypot(x, y), torch.atan2(y, x)
    outer = resample(target, angle)
    reach = radius * resample(own, angle - tilt[..., None]) / outer
    from_angle = angle - tilt[..., None]
    offset = torch.stack([reach * from_angle.cos(), -reach * from_angle.sin()], -1)
    grid = (centres[:, None, None] + 0.5 + offset) / SHEET * 2 - 1
    ink = torch.nn.functional.grid_sample(sheets()[pick].float() / 255, grid, align_corners=False)
    inside = (radius < outer).float()[:, None]
    pulled = torch.tensor([row.target is not None for row in rows]).view(-1, 1, 1, 1)
    return halve(torch.where(pulled, ink * inside, ink)), halve(inside)[:, 0]


def composite(ink: torch.Tensor, backgrounds: list[str]) -> np.ndarray:
    """uint8 [n, 64, 64, 3]."""
    colours = torch.tensor([BACKGROUNDS[name] for name in backgrounds])[:, :, None, None]
    picture = ink[:, :3] * 255 + colours * (1 - ink[:, 3:])
    return picture.permute(0, 2, 3, 1).round().clamp(0, 255).byte().numpy()


def silhouette(ink: torch.Tensor) -> torch.Tensor:
    """Where the ink is opaque, [n, 64, 64] in 0..1."""
    return ink[:, 3].clamp(0, 1)


def draw_warp(index: int, random: Random) -> Warp:
    """A random one for training: a tenth plain, a quarter only moved and stretched, the others in another shape."""
    kind = random.rand()
    if kind < 0.1:
        return Warp(index)
    target = None
    if kind > 0.35:
        family = list(FAMILIES)[random.choice(len(FAMILIES), p=[0.3, 0.2, 0.15, 0.08, 0.2, 0.07])]
        target = FAMILIES[family](random)
        turn = ANGLES if family in ("superellipse", "blob", "flower", "star") else 30
        target = np.roll(target, random.randint(-turn // 2, turn // 2 + 1))
    return Warp(
        index,
        target,
        aspect=float(np.exp(random.uniform(-0.7, 0.7))),
        tilt=float(random.normal() * 0.15),
        longest=float(random.uniform(36, 60)),
        place=(float(random.uniform(-1, 1)), float(random.uniform(-1, 1))),
    )


# The demo's hints, and the shapes of the measurement: a name, radii, width over height.
TRAINED_SHAPES: dict[str, tuple[np.ndarray, float]] = {
    "heart": (heart(), 1.0),
    "star": (star(5, 0.5), 1.0),
    "circle": (superellipse(2), 1.0),
    "tall": (superellipse(3), 0.5),
    "wide": (superellipse(3), 2.0),
    "blob": (blob(Random(9)), 1.0),
}
UNSEEN_SHAPES = {name: (radii, 1.0) for name, radii in HELD_OUT_SHAPES.items()}


def plain_hint(shape: tuple[np.ndarray, float]) -> np.ndarray:
    """White on black, uint8 [64, 64, 3]."""
    filled = warp([Warp(0, shape[0], aspect=shape[1])])[1][0]
    return (filled * 255).round().byte().numpy()[..., None].repeat(3, -1)


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent / "control/hints"
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*TRAINED_SHAPES, "arrow", "shield"):
        Image.fromarray(plain_hint((TRAINED_SHAPES | UNSEEN_SHAPES)[name])).save(folder / f"{name}.png")
