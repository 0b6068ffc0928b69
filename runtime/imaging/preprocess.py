"""Image inputs, checked at the door, and the hints that are made of them for ControlNets.

    read_hint(source)                       a path, bytes, a PIL image or an array -> an RGB picture
    to_hint(picture, width, height)         a picture -> what a hint encoder reads, float32 [3, height, width] in 0..1
    hint_of(source, text, width, height)    both, with a preprocessor between, such as "canny(100, 200)+crop"

A preprocessor draws after the picture has been resized, so that edges are one pixel wide. How a picture of other
proportions is resized (in brackets: A1111's words; diffusers' `resize_mode`):

    stretch   as if proportions did not matter; the default ("Just Resize"; "default")
    crop      until it covers all, what juts out is cut off ("Crop and Resize"; "crop")
    fill      until it fits in, around it the median colour of its border ("Resize and Fill"; diffusers smears the edges)

Pictures with transparency are laid on black, because hints are light on black: what is transparent was not drawn.
Pillow would show the colours hidden there.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from stepforge.runtime.errors import RequestError
from stepforge.runtime.grammar import number, read_call, shown, split

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SIDE = (
    4096  # pixels; as request.MAX_SIDE, which cannot be imported here: requests check their hints with this module
)
MAX_CROP = 4 * MAX_SIDE  # pixels a side of a picture that is to be cropped; a long thin one would fill the memory
RESIZES = ("stretch", "crop", "fill")
GRAMMAR = "none, canny(100, 200) or silhouette(32), then +stretch, +crop or +fill"
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
WITHOUT_ALPHA = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV")
LANCZOS = Image.Resampling.LANCZOS  # diffusers' filter


def read_hint(source: str | Path | bytes | Image.Image | NDArray[Any]) -> Image.Image:
    """An RGB picture, upright by its EXIF tag, at most MAX_SIDE pixels a side.

    Files are PNG, JPEG or WebP by content, whatever their name. Arrays are uint8 or floats in 0..1, [h, w, 3] or [h, w].
    Raises RequestError for anything else, before a large file is decoded.
    """
    return _on_black(_read(source))


def to_hint(image: Image.Image, width: int, height: int) -> NDArray[np.float32]:
    """float32 [3, height, width] in 0..1: what diffusers' VaeImageProcessor for control images makes of the picture."""
    return _to_array(_resized(image, width, height, "stretch"))


def hint_of(source: Any, preprocessor: str, width: int, height: int) -> NDArray[np.float32]:
    """The hint that a preprocessor draws from an image, [3, height, width] in 0..1. Raises RequestError."""
    recipe = parse(preprocessor)
    entry = PREPROCESSORS[recipe.name]
    image = _read(source)
    image = _resized(image if entry.reads_alpha else _on_black(image), width, height, recipe.resize)
    return _to_array(entry.draw(image, **recipe.numbers))


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
    numbers: Mapping[str, float]  # its numbers by name, and their defaults; where there are two, the first is not above
    largest: float = 0.0  # that a number may be
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

    name: str
    numbers: Mapping[str, float]
    resize: str


def parse(text: str) -> Recipe:
    """Raises RequestError with the grammar."""
    name, numbers, resize = "", {}, ""
    try:
        for part in split(text, "+"):
            if part in RESIZES and not resize:
                resize = part
                continue
            call = read_call(part)
            given = part if call is None else call.name
            if name or resize or given not in PREPROCESSORS:
                raise ValueError(
                    f"{shown(part)} is {'a second one' if given in (*PREPROCESSORS, *RESIZES) else 'unknown'}"
                )
            name, entry = given, PREPROCESSORS[given]
            named = {} if call is None else call.bind(tuple(entry.numbers), needed=False)
            numbers = dict(entry.numbers) | {key: number(value) for key, value in named.items()}
            values = list(numbers.values())
            if any(not 0 <= value <= entry.largest for value in values) or values != sorted(values):
                limits = " <= ".join(("0", *numbers, f"{entry.largest:g}"))
                raise ValueError(f"the numbers of {name} must be {limits}")
    except (ValueError, AttributeError, TypeError) as error:
        raise RequestError(f"preprocessor {shown(text)}: {error}; give {GRAMMAR}") from error
    return Recipe(name or "none", numbers, resize or RESIZES[0])


# Reading


def _read(source: Any) -> Image.Image:
    """The picture, upright, RGB or, if some of it is transparent, RGBA."""
    if isinstance(source, np.ndarray):
        return _from_array(source)
    what = "the image"
    try:
        if isinstance(source, Image.Image):
            return _decoded(source, what)
        if isinstance(source, bytes | bytearray | memoryview):
            file: Any = io.BytesIO(source)
        elif isinstance(source, str | Path):
            what = f"image {' '.join(str(source).split())[:200]}"
            file = Path(source)
            if not file.is_file():
                raise RequestError(f"{what} is not a file; give a PNG, JPEG or WebP file")
        else:
            raise RequestError(
                f"the image is of type {type(source).__name__}; give a path, bytes, a PIL image or an array"
            )
        with Image.open(file, formats=FORMATS) as image:
            return _decoded(image, what)
    except UnidentifiedImageError as error:
        raise RequestError(f"{what} is not a PNG, JPEG or WebP image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{what} is too large; at most {MAX_SIDE} pixels a side are read") from error
    except RequestError:
        raise
    except Exception as error:  # Pillow raises whatever a damaged file runs into
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = text.splitlines()[0][:200]
        raise RequestError(f"{what} cannot be read: {reason}") from error


def _decoded(image: Image.Image, what: str) -> Image.Image:
    _check_size(what, *image.size)
    if (frames := getattr(image, "n_frames", 1)) != 1:
        raise RequestError(f"{what} has {frames} frames; give a still image")
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BITS:  # Pillow would clip them; depth maps are often such
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in WITH_ALPHA or (image.mode in WITHOUT_ALPHA and "transparency" in image.info):
        image = image.convert("RGBA")
        return image.convert("RGB") if image.getchannel("A").getextrema() == (255, 255) else image
    if image.mode not in WITHOUT_ALPHA:
        raise RequestError(f"{what} has pixels of mode {image.mode}; give 8 bits a channel, or grey of 16 bits")
    return image.convert("RGB")


def _from_array(array: NDArray[Any]) -> Image.Image:
    shape = list(array.shape)
    if len(shape) not in (2, 3) or shape[2:] not in ([], [3]):
        raise RequestError(f"the image is an array of shape {shape}; give [height, width, 3] or [height, width]")
    _check_size("the image", shape[1], shape[0])
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # not so for NaN either
            raise RequestError("the image is an array of floats that are not all from 0 to 1")
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise RequestError(f"the image is an array of {array.dtype}; give uint8, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _check_size(what: str, width: int, height: int) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise RequestError(f"{what} has {width}×{height} pixels; a side has 1 to {MAX_SIDE}")


# Pixels


def _on_black(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")


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
