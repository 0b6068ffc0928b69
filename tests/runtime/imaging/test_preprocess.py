"""Image inputs against diffusers' image processor, Pillow and OpenCV; a refusal for each wrong one."""

from __future__ import annotations

import io
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stepforge.runtime import request
from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.preprocess import MAX_SIDE, PREPROCESSORS, hint_of, parse, read_hint, to_hint


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
        read_hint(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def diffusers_hint(image: Image.Image, width: int, height: int, how: str = "default") -> np.ndarray:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False)
    return processor.preprocess(image, height, width, resize_mode=how)[0].numpy()


# Sizes


@pytest.mark.parametrize("size", [(64, 64), (16, 24), (40, 32), (128, 8), (512, 768)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_hints_are_those_of_diffusers(mode: str, size: tuple[int, int]) -> None:
    image = picture(mode=mode)
    hint = to_hint(image, *size)
    assert hint.dtype == np.float32
    assert hint.flags.c_contiguous
    np.testing.assert_array_equal(hint, diffusers_hint(image, *size))


@pytest.mark.parametrize("size", [(64, 64), (16, 24), (136, 8), (24, 160)], ids=str)
@pytest.mark.parametrize("given", [(37, 29), (29, 37), (40, 40), (200, 31), (12, 18)], ids=str)
def test_crop_is_that_of_diffusers(given: tuple[int, int], size: tuple[int, int]) -> None:
    image = picture(*given)
    np.testing.assert_array_equal(hint_of(image, "crop", *size), diffusers_hint(image, *size, "crop"))


@pytest.mark.parametrize("size", [(64, 64), (16, 24), (136, 8), (24, 160)], ids=str)
@pytest.mark.parametrize("given", [(37, 29), (29, 37), (40, 40), (12, 18)], ids=str)
def test_fill_places_as_diffusers_does(given: tuple[int, int], size: tuple[int, int]) -> None:
    """The picture is where diffusers puts it; what diffusers smears is the median colour of the border."""
    image = picture(*given)
    border = np.ones((given[1], given[0]), bool)
    border[1:-1, 1:-1] = False
    median = np.median(np.asarray(image)[border], axis=0)
    ours, theirs = hint_of(image, "fill", *size), diffusers_hint(image, *size, "fill")
    filled = np.abs(ours * 255 - median[:, None, None]).max(axis=0) < 1
    scale = min(size[0] / given[0], size[1] / given[1])
    inside = int(given[0] * scale) * int(given[1] * scale)
    assert filled.sum() >= size[0] * size[1] - inside - max(size)
    np.testing.assert_array_equal(ours[:, ~filled], theirs[:, ~filled])
    # noise may meet the median by chance, whole rows do not
    assert (~filled).sum() > 0.8 * inside - max(size)


def test_ways_to_resize_agree_on_equal_proportions() -> None:
    image = picture(40, 60)
    stretched, cropped, filled = (hint_of(image, f"none+{how}", 80, 120) for how in ("stretch", "crop", "fill"))
    np.testing.assert_array_equal(stretched, cropped)
    np.testing.assert_array_equal(stretched, filled)
    np.testing.assert_array_equal(stretched, to_hint(image, 80, 120))


def test_long_thin_pictures() -> None:
    """Cropped they would be 2 million pixels wide first."""
    thin = Image.new("RGB", (4096, 1), "white")
    assert hint_of(thin, "fill", 64, 64).shape == (3, 64, 64)
    assert hint_of(thin, "none", 64, 64).min() == 1
    with pytest.raises(RequestError, match=r"4096×1 pixels, too long and thin to be cropped to 64×64"):
        hint_of(thin, "crop", 64, 64)


# Reading


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_files_by_content(tmp_path: Path, kind: str) -> None:
    data = encoded(picture(), kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    for name in ("image.png", "image.dat", "image"):
        (tmp_path / name).write_bytes(data)
        same(read_hint(tmp_path / name), expected)
        same(read_hint(str(tmp_path / name)), expected)
    same(read_hint(data), expected)
    same(read_hint(Image.open(io.BytesIO(data))), expected)


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
        np.testing.assert_array_equal(np.asarray(read_hint(source)), TURNS[orientation](stored))


def test_transparency_is_black() -> None:
    """The hidden colour, here red, is not seen."""
    expected = Image.new("RGB", (8, 8))
    expected.paste((10, 200, 30), (0, 0, 8, 4))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((10, 200, 30, 255), (0, 0, 8, 4))
    same(read_hint(clear), expected)
    same(read_hint(encoded(clear)), expected)
    same(read_hint(encoded(clear, "WEBP", lossless=True, exact=True)), expected)
    keyed = Image.new("RGB", (8, 8), (255, 0, 0))
    keyed.paste((10, 200, 30), (0, 0, 8, 4))
    same(read_hint(encoded(keyed, transparency=(255, 0, 0))), expected)
    palette = keyed.quantize(2)
    data = encoded(palette, transparency=palette.getpixel((0, 7)))
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert np.asarray(read_hint(data))[4:].max() == 0
    grey = Image.new("LA", (2, 1), (200, 128))
    same(read_hint(grey), Image.new("RGB", (2, 1), (100,) * 3))


def test_opaque_alpha_is_none() -> None:
    image = picture()
    image.putalpha(255)
    same(read_hint(image), picture())


def test_sixteen_bit_grey() -> None:
    """Depth maps; Pillow would clip them to white."""
    depth = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    grey = np.rint(depth / 257).astype(np.uint8)
    data = encoded(Image.fromarray(depth))
    assert Image.open(io.BytesIO(data)).mode.startswith("I;16")
    for source in (data, Image.fromarray(depth)):
        np.testing.assert_array_equal(np.asarray(read_hint(source))[..., 0], grey)


def test_arrays() -> None:
    pixels = np.asarray(picture())
    same(read_hint(pixels), picture())
    same(read_hint(pixels[::-1, ::2]), Image.fromarray(np.ascontiguousarray(pixels[::-1, ::2])))
    for dtype in (np.float16, np.float32, np.float64):
        same(read_hint((pixels / 255).astype(dtype)), picture())
    grey = pixels[..., 0]
    same(read_hint(grey), Image.fromarray(grey).convert("RGB"))
    same(read_hint(grey / 255), Image.fromarray(grey).convert("RGB"))


# Refusals


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
    assert read_hint(encoded(Image.new("L", (MAX_SIDE, 2)))).size == (MAX_SIDE, 2)
    assert MAX_SIDE == request.MAX_SIDE


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
                assert read_hint(bytes(spoiled)).mode == "RGB"
            except RequestError as error:
                refused += 1
                lines.add(len(str(error).splitlines()))
    assert refused > 60
    assert lines == {1}


# Preprocessors


def square(size: int = 64, low: int = 16, high: int = 48) -> Image.Image:
    image = Image.new("RGB", (size, size), (0, 90, 180))
    ImageDraw.Draw(image).rectangle((low, low, high - 1, high - 1), (250, 120, 10))
    return image


def test_none_is_the_picture() -> None:
    for image in (picture(), picture(mode="RGBA")):
        np.testing.assert_array_equal(hint_of(image, "none", 64, 48), to_hint(read_hint(image), 64, 48))


@pytest.mark.parametrize(("text", "low", "high"), [("canny", 100, 200), ("canny(40, 90)", 40, 90)])
def test_canny(text: str, low: int, high: int) -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    image = picture(96, 64).resize((192, 128))  # smooth noise: edges of all strengths
    hint = hint_of(image, text, 192, 128)
    expected = cv2.Canny(np.asarray(image), low, high)
    assert 0 < expected.mean() < 255
    np.testing.assert_array_equal(hint, np.repeat(expected[None] / np.float32(255), 3, axis=0))


def test_canny_draws_white_on_black_after_resizing() -> None:
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    hint = hint_of(square(), "canny", 256, 256)
    assert set(np.unique(hint)) == {0.0, 1.0}
    rows, columns = np.nonzero(hint[0])
    for places in (rows, columns):
        assert places.min() in range(61, 67)
        assert places.max() in range(189, 195)
    inside = hint[0, 68:188, 68:188]
    assert not inside.any()
    assert np.all(hint[0, 128].sum() == 2)  # one pixel on either side, though the picture was enlarged four times


def test_canny_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RequestError, match=r"canny needs OpenCV; pip install 'stepforge\[control\]'"):
        hint_of(square(), "canny", 64, 64)


def test_silhouette_of_transparency() -> None:
    image = picture(64, 64, "RGBA")
    alpha = np.asarray(image)[..., 3] / np.float32(255)
    np.testing.assert_array_equal(hint_of(image, "silhouette", 64, 64), np.repeat(alpha[None], 3, axis=0))
    # the colours under it do not matter, and it is resized as a picture of its own
    expected = image.getchannel("A").resize((24, 40), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(hint_of(image, "silhouette", 24, 40)[0], np.asarray(expected) / np.float32(255))


def test_silhouette_of_a_plain_ground() -> None:
    expected = np.zeros((64, 64), np.float32)
    expected[16:48, 16:48] = 1
    for source in (square(), encoded(square(), "JPEG", quality=90, subsampling=0)):
        hint = hint_of(source, "silhouette", 64, 64)
        np.testing.assert_array_equal(hint, np.stack([expected] * 3))
    enlarged = hint_of(square(), "silhouette", 256, 256)
    assert set(np.unique(enlarged)) == {0.0, 1.0}
    assert abs(enlarged.mean() - 0.25) < 0.02


def test_silhouette_threshold() -> None:
    image = Image.new("RGB", (32, 32), (100, 100, 100))
    image.paste((100, 140, 100), (8, 8, 24, 24))
    assert hint_of(image, "silhouette", 32, 32).mean() == 0.25
    assert hint_of(image, "silhouette(39)", 32, 32).mean() == 0.25
    assert hint_of(image, "silhouette(40)", 32, 32).max() == 0


def test_fill_adds_no_ink() -> None:
    """The padding has the colour of the border, or is transparent as the border is."""
    clear = Image.new("RGBA", (32, 16), (255, 0, 0, 0))
    clear.paste((1, 2, 3, 255), (12, 4, 20, 12))
    plain = square(64).crop((0, 8, 64, 56))
    for image in (clear, plain):
        hint = hint_of(image, "silhouette+fill", 64, 64)
        assert hint[:, :8].max() == hint[:, -8:].max() == 0
        assert hint.max() == 1


def test_fill_adds_no_edges() -> None:
    pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
    hint = hint_of(square(64).crop((0, 8, 64, 56)), "canny+fill", 64, 64)
    assert hint[:, :9].max() == hint[:, -9:].max() == 0
    assert hint.max() == 1


# Grammar


@pytest.mark.parametrize(
    ("text", "name", "numbers", "resize"),
    [
        ("none", "none", {}, "stretch"),
        ("canny", "canny", {"low": 100, "high": 200}, "stretch"),
        ("canny(50,150)", "canny", {"low": 50, "high": 150}, "stretch"),
        (" canny ( 50 , 150 ) + crop ", "canny", {"low": 50, "high": 150}, "crop"),
        ("canny(high=300)", "canny", {"low": 100, "high": 300}, "stretch"),
        ("silhouette", "silhouette", {"threshold": 32}, "stretch"),
        ("silhouette(8)+fill", "silhouette", {"threshold": 8}, "fill"),
        ("none()", "none", {}, "stretch"),
        ("crop", "none", {}, "crop"),
        ("none+stretch", "none", {}, "stretch"),
    ],
)
def test_grammar(text: str, name: str, numbers: dict[str, float], resize: str) -> None:
    recipe = parse(text)
    assert (recipe.name, recipe.numbers, recipe.resize) == (name, numbers, resize)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is unknown"),
        ("depth", "'depth' is unknown"),
        ("canny+silhouette", "'silhouette' is a second one"),
        ("crop+fill", "'fill' is a second one"),
        ("crop+canny", "'canny' is a second one"),
        ("canny(200, 100)", "the numbers of canny must be 0 <= low <= high <= 2040"),
        ("canny(-1, 100)", "0 <= low"),
        ("canny(1, 3000)", "high <= 2040"),
        ("canny(1, 2, 3)", "canny takes low, high"),
        ("canny(1, size=3)", "not size"),
        ("canny(nan, 200)", "'nan' is not a number"),
        ("canny(1", "brackets do not match"),
        ("silhouette(255)", "0 <= threshold <= 254"),
        ("none(1)", "none takes no arguments"),
        ("crop(1)", "'crop(1)' is"),
        (None, "preprocessor None"),
        (7, "preprocessor 7"),
        ("x" * 1000, "is unknown"),
    ],
)
def test_wrong_preprocessors(text: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=re.escape(reason)) as caught:
        parse(text)
    assert str(caught.value).endswith("give none, canny(100, 200) or silhouette(32), then +stretch, +crop or +fill")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_defaults_are_allowed() -> None:
    for name in PREPROCESSORS:
        assert parse(name).numbers == PREPROCESSORS[name].numbers
