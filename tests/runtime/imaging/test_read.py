"""Image inputs against Pillow and the EXIF standard; a refusal for each wrong one."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.read import MAX_SIDE, on_black, read_image


def read(source: Any) -> Image.Image:
    return on_black(read_image(source))


def picture(width: int = 37, height: int = 29, mode: str = "RGB") -> Image.Image:
    """Noise, the hardest picture for a resampling filter."""
    draw = np.random.default_rng(width * height)
    image = Image.fromarray(draw.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(one: Image.Image, other: Image.Image) -> None:
    assert one.mode == other.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def refuse(text: str, source: Any) -> None:
    with pytest.raises(RequestError, match=re.escape(text)) as caught:
        read(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_files_by_content(tmp_path: Path, kind: str) -> None:
    data = encoded(picture(), kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    for name in ("image.png", "image.dat", "image"):
        (tmp_path / name).write_bytes(data)
        same(read(tmp_path / name), expected)
        same(read(str(tmp_path / name)), expected)
    same(read(data), expected)
    same(read(Image.open(io.BytesIO(data))), expected)


TURNS = {  # EXIF 2.32, tag 274: what to do with the stored pixels to see the picture
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a),
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = encoded(picture(), kind, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(np.asarray(read(source)), TURNS[orientation](stored))


def test_transparency_is_black() -> None:
    """The hidden colour, here red, is not seen."""
    expected = Image.new("RGB", (8, 8))
    expected.paste((10, 200, 30), (0, 0, 8, 4))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((10, 200, 30, 255), (0, 0, 8, 4))
    same(read(clear), expected)
    same(read(encoded(clear)), expected)
    same(read(encoded(clear, "WEBP", lossless=True, exact=True)), expected)
    keyed = Image.new("RGB", (8, 8), (255, 0, 0))
    keyed.paste((10, 200, 30), (0, 0, 8, 4))
    same(read(encoded(keyed, transparency=(255, 0, 0))), expected)
    palette = keyed.quantize(2)
    data = encoded(palette, transparency=palette.getpixel((0, 7)))
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert np.asarray(read(data))[4:].max() == 0
    grey = Image.new("LA", (2, 1), (200, 128))
    same(read(grey), Image.new("RGB", (2, 1), (100,) * 3))


def test_opaque_alpha_is_none() -> None:
    image = picture()
    image.putalpha(255)
    same(read(image), picture())


def test_sixteen_bit_grey() -> None:
    """Depth maps; Pillow would clip them to white."""
    depth = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    grey = np.rint(depth / 257).astype(np.uint8)
    data = encoded(Image.fromarray(depth))
    assert Image.open(io.BytesIO(data)).mode.startswith("I;16")
    for source in (data, Image.fromarray(depth)):
        np.testing.assert_array_equal(np.asarray(read(source))[..., 0], grey)


def test_arrays() -> None:
    pixels = np.asarray(picture())
    same(read(pixels), picture())
    same(read(pixels[::-1, ::2]), Image.fromarray(np.ascontiguousarray(pixels[::-1, ::2])))
    for dtype in (np.float16, np.float32, np.float64):
        same(read((pixels / 255).astype(dtype)), picture())
    grey = pixels[..., 0]
    same(read(grey), Image.fromarray(grey).convert("RGB"))
    same(read(grey / 255), Image.fromarray(grey).convert("RGB"))


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((4, 4, 4), np.uint8), "shape [4, 4, 4]; give [height, width, 3] or [height, width]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape [1, 4, 4, 3]"),
        (np.zeros(4, np.uint8), "shape [4]"),
        (np.zeros((), np.uint8), "shape []"),
        (np.zeros((4, 4), np.int64), "array of int64; give uint8, or floats from 0 to 1"),
        (np.zeros((4, 4), bool), "array of bool"),
        (np.zeros((4, 4), object), "array of object"),
        (np.full((4, 4), 255.0), "not all from 0 to 1"),
        (np.full((4, 4), -0.01), "not all from 0 to 1"),
        (np.full((4, 4), np.nan), "not all from 0 to 1"),
        (np.zeros((0, 4)), "4×0 pixels"),
        (np.zeros((1, 4097), np.uint8), "4097×1 pixels; a side has 1 to 4096"),
    ],
    ids=repr,
)
def test_wrong_arrays(array: np.ndarray, text: str) -> None:
    refuse(text, array)


def test_wrong_sources(tmp_path: Path) -> None:
    refuse("nothing.png is not a file", tmp_path / "nothing.png")
    refuse("is not a file", tmp_path)
    refuse("is not a file", "https://example.org/image.png")
    refuse("image", "data:image/png;base64," + "A" * 10_000)
    refuse("of type NoneType; give a path, bytes, a PIL image or an array", None)
    refuse("of type list", [1, 2])
    refuse("is not a PNG, JPEG or WebP image", b"")
    refuse("is not a PNG, JPEG or WebP image", b"some text")


def test_git_lfs_pointers_are_named(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "image.png").write_bytes(pointer)
    for source in (tmp_path / "image.png", str(tmp_path / "image.png"), pointer):
        refuse("is a Git LFS pointer, not the image; run `git lfs pull`", source)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats(tmp_path: Path, kind: str) -> None:
    (tmp_path / "image.png").write_bytes(encoded(picture(), kind))
    refuse("image.png is not a PNG, JPEG or WebP image", tmp_path / "image.png")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_several_frames(kind: str) -> None:
    """MPO: two JPEG pictures in one file, for stereo cameras."""
    frames = [picture(), picture().rotate(180)]
    refuse("has 2 frames; give a still image", encoded(frames[0], kind, save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated(kind: str) -> None:
    data = encoded(picture(), kind)
    refuse("cannot be read", data[: len(data) // 2])


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("size", [(MAX_SIDE + 1, 8), (8, MAX_SIDE + 1), (10_000, 10_000), (100_000, 100_000)], ids=str)
def test_too_large(size: tuple[int, int]) -> None:
    """A header is enough to be refused: nothing is decoded."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    refuse("pixels a side are read" if size[0] > 5000 else "a side has 1 to 4096", data)


def test_largest() -> None:
    assert read(encoded(Image.new("L", (MAX_SIDE, 2)))).size == (MAX_SIDE, 2)


def test_pixels_of_another_kind() -> None:
    refuse("pixels of mode F", Image.new("F", (4, 4)))
    refuse("pixels of mode I", Image.new("I", (4, 4)))


def test_damaged_files_are_refused_in_words() -> None:
    """Whatever bytes are wrong: a picture or a RequestError."""
    draw = np.random.default_rng(0)
    refused, lines = 0, set()
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(picture(), kind)
        for _ in range(60):
            spoiled = bytearray(data)
            for place in draw.integers(0, len(data), 4):
                spoiled[place] = draw.integers(0, 256)
            try:
                assert read(bytes(spoiled)).mode == "RGB"
            except RequestError as error:
                refused += 1
                lines.add(len(str(error).splitlines()))
    assert refused > 60
    assert lines == {1}
