"""Hints for ControlNets: what a preprocessor such as "canny(100, 200)+crop" draws from an image.

A preprocessor draws after the picture has been resized, so that edges are one pixel wide. How a picture of other
proportions is resized (in brackets: A1111's words; diffusers' `resize_mode`):

    stretch   as if proportions did not matter; the default ("Just Resize"; "default")
    crop      until it covers all, what juts out is cut off ("Crop and Resize"; "crop")
    fill      until it fits in, around it the median colour of its border ("Resize and Fill"; diffusers smears the edges)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stepforge.runtime.checks import clipped, shown
from stepforge.runtime.errors import RequestError
from stepforge.runtime.grammar import number, plain, read_call, split, text_of
from stepforge.runtime.imaging.read import MAX_SIDE, on_black, read_image

MAX_CROP = 4 * MAX_SIDE  # pixels a side of a picture that is to be cropped; a long thin one would fill the memory
RESIZES = ("stretch", "crop", "fill")
GRAMMAR = "none, canny(100, 200) or silhouette(32), then +stretch, +crop or +fill"
LANCZOS = Image.Resampling.LANCZOS  # diffusers' filter


def hint_of(source: Any, preprocessor: str | Recipe, width: int, height: int) -> NDArray[np.float32]:
    """What a hint encoder reads, [3, height, width] in 0..1, drawn from an image (see `read_image`).

    The preprocessor "none" gives what diffusers' VaeImageProcessor for control images makes of it. Raises RequestError.
    """
    recipe = Recipe.parse(preprocessor)
    entry = PREPROCESSORS[recipe.name]
    image = read_image(source)
    image = _resized(image if entry.reads_alpha else on_black(image), width, height, recipe.resize)
    return _to_array(entry.draw(image, *recipe.numbers))


# Preprocessors: a resized picture, RGB or with transparency RGBA, to a picture


def _none(image: Image.Image) -> Image.Image:
    return image


def _canny(image: Image.Image, low: float, high: float) -> Image.Image:
    """White edges on black: Canny 1986 as OpenCV has it, on the strongest of the three channels, 3×3 Sobel, L1 norm."""
    try:
        import cv2  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise RequestError("the preprocessor canny needs OpenCV; pip install 'stepforge[control]'") from error
    return Image.fromarray(np.asarray(cv2.Canny(np.array(image), low, high), np.uint8)).convert("RGB")


def _silhouette(image: Image.Image, threshold: float) -> Image.Image:
    """White ink on black: the alpha channel of a picture that has one, in its shades.

    Else white where some channel is more than `threshold` (of 255) from its median along the border of the picture.
    """
    if image.mode == "RGBA":
        return image.getchannel("A").convert("RGB")
    pixels = np.asarray(image)
    ink = np.abs(pixels - _border(pixels)).max(axis=2) > threshold
    return Image.fromarray((ink * 255).astype(np.uint8)).convert("RGB")


@dataclass(frozen=True, slots=True)
class Preprocessor:
    """One way to draw a hint."""

    draw: Callable[..., Image.Image]
    numbers: Mapping[str, float]  # defaults by name, in the order of the call; they must not fall
    largest: float = 0.0  # upper limit of its numbers
    reads_alpha: bool = False


PREPROCESSORS: dict[str, Preprocessor] = {
    "none": Preprocessor(_none, {}),
    # the L1 norm of a gradient of bytes under 3×3 Sobel filters is at most 2 · 4 · 255
    "canny": Preprocessor(_canny, {"low": 100.0, "high": 200.0}, 2040.0),
    # 32: above Lanczos' ringing beside full contrast (9 %, 23 of 255) and the noise of JPEG
    "silhouette": Preprocessor(_silhouette, {"threshold": 32.0}, 254.0, reads_alpha=True),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A preprocessor with its numbers, and how pictures are resized for it."""

    name: str = "none"  # in PREPROCESSORS
    numbers: tuple[float, ...] = ()
    resize: str = "stretch"  # in RESIZES

    @classmethod
    def parse(cls, text: Recipe | str) -> Recipe:
        """Raises RequestError with the grammar."""
        if isinstance(text, Recipe):
            return text
        try:
            return cls._parse(text_of(text))
        except ValueError as error:
            raise RequestError(f"preprocessor {shown(text)}: {clipped(error)}; give {GRAMMAR}") from None

    @classmethod
    def _parse(cls, text: str) -> Recipe:
        name, resize = "", ""
        numbers: tuple[float, ...] = ()
        for part in split(text, "+"):
            if part in RESIZES and not resize:
                resize = part
                continue
            call = read_call(part)
            given = part if call is None else call.name
            if name or resize or given not in PREPROCESSORS:
                known = given in (*PREPROCESSORS, *RESIZES)
                raise ValueError(f"{shown(part)} is {'a second one' if known else 'unknown'}")
            name, entry = given, PREPROCESSORS[given]
            named = {} if call is None else call.bind(tuple(entry.numbers), needed=False)
            numbers = tuple(number(named[key]) if key in named else value for key, value in entry.numbers.items())
            if list(numbers) != sorted(numbers) or any(not 0 <= value <= entry.largest for value in numbers):
                limits = " <= ".join(("0", *entry.numbers, f"{entry.largest:g}"))
                raise ValueError(f"the numbers of {name} must be {limits}")
        return cls(name or "none", numbers, resize or RESIZES[0])

    def __str__(self) -> str:
        """Canonical text: `Recipe.parse` gives an equal recipe."""
        numbers = f"({', '.join(map(plain, self.numbers))})" if self.numbers else ""
        resize = f"+{self.resize}" if self.resize != RESIZES[0] else ""
        return f"{self.name}{numbers}{resize}"


# Pixels


def _border(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Median of each channel of [h, w, channels] along the four sides."""
    sides = (pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1])
    return np.asarray(np.median(np.concatenate(sides), axis=0), np.float64)


def _resized(image: Image.Image, width: int, height: int, how: str) -> Image.Image:
    """Sizes and offsets of crop and fill are rounded as in diffusers' VaeImageProcessor."""
    wider = image.width * height > width * image.height  # than what it is to become
    if how == "stretch":
        return image.resize((width, height), LANCZOS)
    if wider == (how == "crop"):
        size = (max(1, image.width * height // image.height), height)
    else:
        size = (width, max(1, image.height * width // image.width))
    if max(size) > MAX_CROP:
        raise RequestError(
            f"the image has {image.width}×{image.height} pixels, too long and thin to be cropped to {width}×{height}; "
            "use +stretch or +fill"
        )
    resized = image.resize(size, LANCZOS)
    background = tuple(int(value) for value in _border(np.asarray(image)))
    canvas = Image.new(image.mode, (width, height), background)
    canvas.paste(resized, (width // 2 - size[0] // 2, height // 2 - size[1] // 2))
    return canvas


def _to_array(image: Image.Image) -> NDArray[np.float32]:
    return np.ascontiguousarray((np.array(image.convert("RGB")).astype(np.float32) / 255.0).transpose(2, 0, 1))
