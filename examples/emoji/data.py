"""The training pictures: Noto Color Emoji on plain coloured backgrounds, and their captions.

The font is Debian's `fonts-noto-color-emoji` (SIL Open Font License 1.1). Names are Unicode's, shortened where the
official one is not what a person would type.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only bitmap strike in the font
SIZE = 64  # pixels of a training picture
EMOJI_SIZE = 54  # longest side of the emoji inside it

# Softer than the emoji's own colours, so that a yellow heart on a yellow background is still a heart.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (24, 24, 28),
    "red": (214, 92, 92),
    "orange": (240, 170, 96),
    "yellow": (248, 232, 140),
    "green": (128, 196, 132),
    "blue": (112, 164, 224),
    "purple": (164, 124, 204),
    "pink": (246, 184, 208),
    "gray": (150, 150, 154),
}

CODE_POINTS: dict[str, str] = {
    "faces": """1F600 1F602 1F607 1F608 1F609 1F60D 1F60E 1F610 1F618 1F61D 1F621 1F62D 1F631 1F633 1F634 1F636 1F637
        1F643 1F911 1F912 1F913 1F915 1F916 1F917 1F920 1F921 1F922 1F923 1F929 1F92F 1F970 1F973 1F975 1F976 1F9D0
        1F47B 1F47D 1F47F 1F480 1F383 1F31E 1F4A9""",
    "animals": """1F431 1F436 1F42D 1F439 1F430 1F98A 1F43B 1F43C 1F428 1F42F 1F981 1F42E 1F437 1F438 1F435 1F414 1F427
        1F426 1F424 1F986 1F985 1F989 1F987 1F43A 1F434 1F984 1F41D 1F41B 1F98B 1F40C 1F41E 1F41C 1F577 1F982 1F422
        1F40D 1F98E 1F996 1F995 1F419 1F991 1F990 1F99E 1F980 1F421 1F420 1F41F 1F42C 1F433 1F988 1F40A 1F993 1F418
        1F42B 1F992 1F998 1F999 1F410 1F98C 1F413 1F99A 1F99C 1F9A2 1F9A9 1F994 1F43E 1F409 1F9A5""",
    "food": """1F34E 1F350 1F34A 1F34B 1F34C 1F349 1F347 1F353 1F352 1F351 1F34D 1F965 1F95D 1F345 1F951 1F346 1F955
        1F33D 1F336 1F966 1F9C4 1F9C5 1F344 1F95C 1F330 1F35E 1F950 1F956 1F968 1F95E 1F9C0 1F356 1F357 1F953 1F354
        1F35F 1F355 1F32D 1F96A 1F32E 1F95A 1F373 1F37F 1F359 1F363 1F364 1F366 1F369 1F36A 1F382 1F370 1F9C1 1F36B
        1F36D 1F36C 1F36F 1F95B 2615 1F377 1F378 1F37A""",
    "hearts": "2764 1F494 1F498 1F49D 1F496 1F49B 1F49A 1F499",
    "objects": """1F680 1F697 1F68C 1F6B2 2708 26F5 1F682 1F681 1F69C 1F3E0 1F3F0 26FA 1F334 1F335 1F332 1F337 1F339 1F33B
        1F340 1F341 1F30D 1F319 2B50 1F308 2601 26C4 2744 1F525 1F4A7 2602 26BD 1F3C0 1F3C8 1F3BE 1F3B8 1F3BA 1F3BB
        1F941 1F3A8 1F3C6 1F3AF 1F381 1F388 1F451 1F48E 1F48D 1F511 1F512 1F514 1F4A1 1F4F7 1F4BB 1F4FA 1F4DE 1F4DA
        270F 2702 1F528 1F4A3 1F9F8 1FA91 1F6AA 1F3A9 1F453 1F455 1F456 1F457 1F45F 1F460 1F384 1F56F 1F9F2 2693
        1FA82 1F6F8 1F9ED 1F4E6 2709""",
}

NAMES = {
    0x1F602: "tears of joy face",
    0x1F607: "halo face",
    0x1F608: "horns face",
    0x1F60D: "heart eyes face",
    0x1F60E: "sunglasses face",
    0x1F618: "kiss face",
    0x1F61D: "tongue face",
    0x1F631: "screaming face",
    0x1F636: "mouthless face",
    0x1F637: "medical mask face",
    0x1F911: "money face",
    0x1F912: "thermometer face",
    0x1F915: "bandage face",
    0x1F920: "cowboy face",
    0x1F923: "rolling laughing face",
    0x1F929: "star eyes face",
    0x1F92F: "exploding head face",
    0x1F970: "three hearts face",
    0x1F973: "party face",
    0x1F9D0: "monocle face",
    0x1F47D: "alien",
    0x1F4A9: "poo",
    0x1F424: "chick",
    0x1F42B: "camel",
    0x1F433: "whale",
    0x1F996: "tyrannosaurus",
    0x1F95D: "kiwi",
    0x1F33D: "corn",
    0x1F330: "chestnut",
    0x1F356: "meat",
    0x1F355: "pizza",
    0x1F373: "fried egg",
    0x1F95B: "milk",
    0x2615: "coffee",
    0x2764: "red heart",
    0x1F697: "car",
    0x1F682: "locomotive",
    0x1F3E0: "house",
    0x1F3F0: "castle",
    0x1F30D: "earth",
    0x2B50: "star",
    0x26C4: "snowman",
    0x1F3BE: "tennis racquet",
    0x1F3C0: "basketball",
    0x1F941: "drum",
    0x1F3AF: "target",
    0x1F381: "present",
    0x1F4A1: "light bulb",
    0x1F4BB: "computer",
    0x1F4DE: "telephone",
    0x2702: "scissors",
    0x1F45F: "sneaker",
    0x1F96A: "sandwich",
    0x1F992: "giraffe",
    0x1F993: "zebra",
}


@dataclass(frozen=True, slots=True)
class Emoji:
    code_point: int
    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Picture:
    """One (emoji, background) pair and whether training may see it."""

    emoji: int  # index into `emoji()`
    background: str
    held_out: bool

    @property
    def caption(self) -> str:
        return f"{emoji()[self.emoji].name} on a {self.background} background"


@cache
def emoji() -> tuple[Emoji, ...]:
    """The vocabulary of the demo model, in a fixed order."""
    rows = []
    for kind, codes in CODE_POINTS.items():
        for code in codes.split():
            point = int(code, 16)
            name = NAMES.get(point) or unicodedata.name(chr(point)).lower()
            rows.append(Emoji(point, name.removesuffix(" suit"), kind))
    names = [row.name for row in rows]
    assert len(set(names)) == len(names), "two emoji share a caption"
    return tuple(rows)


@cache
def pictures() -> tuple[Picture, ...]:
    """Every emoji on every background; a fixed pseudo-random tenth of the pairs is held out (one background each)."""
    colours = list(BACKGROUNDS)
    order = np.random.RandomState(0).randint(0, len(colours), size=len(emoji()))
    return tuple(
        Picture(index, colour, held_out=colours[order[index]] == colour)
        for index in range(len(emoji()))
        for colour in colours
    )


@cache
def glyph(code_point: int) -> Image.Image:
    """The emoji as premultiplied RGBA, cropped to its ink."""
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), chr(code_point), font=font, embedded_color=True)
    return canvas.crop(canvas.getbbox()).convert("RGBa")


def render(
    code_point: int,
    background: tuple[int, int, int],
    *,
    size: int = SIZE,
    longest: float = EMOJI_SIZE,
    shift: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """The emoji centred on a plain background, uint8 [size, size, 3]; `shift` is in pixels."""
    ink = glyph(code_point)
    scale = longest / max(ink.size)
    width, height = (max(1, round(side * scale)) for side in ink.size)
    ink = ink.resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGB", (size, size), background)
    corner = (round((size - width) / 2 + shift[0]), round((size - height) / 2 + shift[1]))
    canvas.paste(ink, corner, ink)
    return np.asarray(canvas)


@cache
def gallery() -> np.ndarray:
    """All pictures in the order of `pictures()`, uint8 [n, 64, 64, 3]."""
    points = [row.code_point for row in emoji()]
    return np.stack([render(points[p.emoji], BACKGROUNDS[p.background]) for p in pictures()])
