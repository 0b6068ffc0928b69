"""The DreamBooth subject: a teal one-eyed creature with two yellow antennae, which the font does not have.

`python examples/emoji/subject.py` writes its five training pictures to adapters/subject/: different backgrounds, slightly
different poses. All else (the other five backgrounds, the upright pose on any of them) training never sees.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from data import BACKGROUNDS, SIZE
from PIL import Image, ImageDraw

CLASS = "alien"
NAME = f"sks {CLASS}"  # "sks" becomes the tokens "s" and "ks", which no caption has
TEAL, DEEP, BELLY = (20, 176, 168), (10, 122, 124), (150, 232, 214)
YELLOW, ORANGE, WHITE, IRIS, DARK = (255, 206, 40), (244, 120, 36), (255, 255, 255), (126, 62, 190), (28, 20, 44)
DRAWN = 512  # the drawing's own grid, reduced at the end


@dataclass(frozen=True, slots=True)
class Pose:
    tilt: float = 0.0  # degrees, counter-clockwise
    scale: float = 1.0
    look: tuple[float, float] = (0.0, 0.0)  # of the iris, -1 .. 1
    spread: float = 0.0  # of the antennae, in the drawing's pixels
    shift: tuple[float, float] = (0.0, 0.0)  # pixels of the training picture


# background of each training picture, and the pose in it
TRAINING: tuple[tuple[str, Pose], ...] = (
    ("white", Pose()),
    ("pink", Pose(tilt=8, look=(0.7, 0.0), spread=14)),
    ("yellow", Pose(scale=0.9, look=(-0.6, 0.3), spread=-10, shift=(0, 2))),
    ("blue", Pose(tilt=-7, scale=1.03, look=(0.0, -0.5))),
    ("black", Pose(tilt=3, scale=0.95, look=(-0.4, -0.4), spread=8, shift=(1, 0))),
)


def ink(pose: Pose = Pose(), *, size: int = 2 * SIZE) -> Image.Image:
    """The subject on a transparent canvas, RGBA [size, size]."""
    canvas = Image.new("RGBA", (DRAWN, DRAWN), (*DEEP, 0))
    draw = ImageDraw.Draw(canvas)

    def disc(x: float, y: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)

    for side in (-1, 1):
        tip = (256 + side * (112 + pose.spread), 74)
        draw.line(((256 + side * 62, 190), tip), fill=DEEP, width=24)
        disc(*tip, 38, 38, YELLOW)
        disc(256 + side * 88, 448, 66, 34, ORANGE)  # foot
        disc(256 + side * 176, 330, 40, 66, DEEP)  # arm
    disc(256, 300, 172, 166, DEEP)
    disc(256, 296, 160, 156, TEAL)
    disc(256, 396, 92, 48, BELLY)
    disc(256, 250, 94, 92, DARK)
    disc(256, 250, 82, 80, WHITE)
    x, y = 256 + 24 * pose.look[0], 250 + 24 * pose.look[1]
    disc(x, y, 56, 54, IRIS)
    disc(x, y, 25, 25, DARK)
    disc(x + 16, y - 16, 11, 11, WHITE)
    draw.chord((186, 318, 326, 400), 10, 170, fill=DARK)

    picture = canvas.convert("RGBa").rotate(pose.tilt, Image.Resampling.BICUBIC, center=(256, 300))
    side = max(1, round(size * pose.scale))
    picture = picture.resize((side, side), Image.Resampling.LANCZOS).convert("RGBA")
    placed = Image.new("RGBA", (size, size), (*DEEP, 0))
    placed.paste(picture, tuple(round((size - side) / 2 + shift * size / SIZE) for shift in pose.shift))
    return placed


def render(background: str, pose: Pose = Pose()) -> np.ndarray:
    """The subject on one of the demo's backgrounds, uint8 [64, 64, 3]."""
    picture = Image.new("RGBA", (4 * SIZE, 4 * SIZE), BACKGROUNDS[background])
    picture.alpha_composite(ink(pose, size=4 * SIZE))
    return np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))


def training_pictures() -> np.ndarray:
    """uint8 [5, 64, 64, 3]."""
    return np.stack([render(background, pose) for background, pose in TRAINING])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "adapters" / "subject")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for (background, _), picture in zip(TRAINING, training_pictures(), strict=True):
        Image.fromarray(picture).save(args.out / f"{background}.png")
