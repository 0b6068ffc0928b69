"""Image inputs, checked at the door."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from stepforge.runtime.arrays import Float32
from stepforge.runtime.errors import RequestError
from stepforge.runtime.files import is_lfs_pointer, printable

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SIDE = 4096  # pixels, of images read and drawn: above this one latent's attention exceeds any memory we know of
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values for pictures that are stored on their side
WITHOUT_ALPHA = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV")


@dataclass(frozen=True, slots=True)
class Picture:
    """An upright RGB or RGBA picture as a value: immutable, compared by its pixels."""

    mode: str
    width: int
    height: int
    pixels: bytes = field(repr=False)

    @classmethod
    def of(cls, source: Image.Image | NDArray[Any]) -> Picture:
        """A copy, checked and converted as `read_image` does."""
        image = read_image(source)
        return cls(image.mode, image.width, image.height, image.tobytes())


def read_image(source: str | Path | bytes | Picture | Image.Image | NDArray[Any]) -> Image.Image:
    """Upright by its EXIF tag, at most MAX_SIDE pixels a side; RGB or, where some of it is transparent, RGBA.

    Files are PNG, JPEG or WebP by content, whatever their name. Arrays are uint8 or floats in 0..1, [h, w, 3] or [h, w].
    Raises RequestError for anything else, before a large file is decoded.
    """
    if isinstance(source, np.ndarray):
        _check_array(source)
        return _from_array(source)
    if isinstance(source, Picture):
        return Image.frombytes(source.mode, (source.width, source.height), source.pixels)
    with _opened(source) as image:
        return _decoded(image)


def read_picture(source: str | Path | bytes | Picture | Image.Image | NDArray[Any]) -> Float32:
    """An image as decoders make them: RGB in [-1, 1], float32 [3, height, width]; transparent parts on black.

    Raises RequestError as `read_image`."""
    values = np.asarray(on_black(read_image(source)), np.float32) / np.float32(255)
    return np.ascontiguousarray((np.float32(2) * values - np.float32(1)).transpose(2, 0, 1))


def image_size(source: Any) -> tuple[int, int]:
    """Width and height of the upright image, from its header. Raises RequestError as `check_image`."""
    if isinstance(source, Picture):
        return source.width, source.height
    if isinstance(source, np.ndarray):
        _check_array(source)
        return source.shape[1], source.shape[0]
    with _opened(source) as image:
        turned = image.getexif().get(ORIENTATION, 1) in SIDEWAYS
        return (image.height, image.width) if turned else (image.width, image.height)


def check_image(source: object) -> None:
    """Raise RequestError for what `read_image` refuses by its type, its header or its size; nothing is decoded."""
    if isinstance(source, np.ndarray):
        _check_array(source)
    elif not isinstance(source, Picture):
        with _opened(source):
            pass


def on_black(image: Image.Image) -> Image.Image:
    """RGB. Hints are light on black: what is transparent was not drawn (Pillow would show the colours hidden there)."""
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """An image whose header is read and allowed. Whatever Pillow runs into becomes RequestError."""
    what = f"image {printable(source)}" if isinstance(source, str | Path) else "the image"
    try:
        if isinstance(source, Image.Image):
            _check_header(source, what)
            yield source
        else:
            with Image.open(_file(source, what), formats=FORMATS) as image:
                _check_header(image, what)
                yield image
    except UnidentifiedImageError as error:
        if is_lfs_pointer(source if isinstance(source, str | Path) else bytes(source)):
            raise RequestError(f"{what} is a Git LFS pointer, not the image; run `git lfs pull`") from error
        raise RequestError(f"{what} is not a PNG, JPEG or WebP image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{what} is too large; at most {MAX_SIDE} pixels a side are read") from error
    except (RequestError, MemoryError):
        raise
    except Exception as error:  # Pillow raises whatever a damaged file runs into
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RequestError(f"{what} cannot be read: {printable(text)}") from error


def _file(source: Any, what: str) -> Any:
    """What Pillow opens: a path or a stream of bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if not isinstance(source, str | Path):
        raise RequestError(f"the image is of type {type(source).__name__}; give a path, bytes, a PIL image or an array")
    file = Path(source)
    if not file.is_file():
        raise RequestError(f"{what} is not a file; give a PNG, JPEG or WebP file")
    return file


def _check_header(image: Image.Image, what: str) -> None:
    _check_size(what, *image.size)
    if (frames := getattr(image, "n_frames", 1)) != 1:
        raise RequestError(f"{what} has {frames} frames; give a still image")
    if image.mode not in (*SIXTEEN_BITS, *WITH_ALPHA, *WITHOUT_ALPHA):
        raise RequestError(f"{what} has pixels of mode {image.mode}; give 8 bits a channel, or grey of 16 bits")


def _decoded(image: Image.Image) -> Image.Image:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in SIXTEEN_BITS:  # Pillow would clip them; depth maps are often such
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in WITH_ALPHA or (image.mode in WITHOUT_ALPHA and "transparency" in image.info):
        image = image.convert("RGBA")
        return image.convert("RGB") if image.getchannel("A").getextrema() == (255, 255) else image
    return image.convert("RGB")


def _check_array(array: NDArray[Any]) -> None:
    shape = list(array.shape)
    if len(shape) not in (2, 3) or shape[2:] not in ([], [3]):
        raise RequestError(f"the image is an array of shape {shape}; give [height, width, 3] or [height, width]")
    _check_size("the image", shape[1], shape[0])
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # not so for NaN either
            raise RequestError("the image is an array of floats that are not all from 0 to 1")
    elif array.dtype != np.uint8:
        raise RequestError(f"the image is an array of {array.dtype}; give uint8, or floats from 0 to 1")


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.dtype != np.uint8:
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _check_size(what: str, width: int, height: int) -> None:
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise RequestError(f"{what} has {width}×{height} pixels; a side has 1 to {MAX_SIDE}")
