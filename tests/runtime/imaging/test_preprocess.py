"""Hints against diffusers' image processor and OpenCV; a refusal for each wrong preprocessor."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stepforge.runtime.errors import RequestError
from stepforge.runtime.imaging.preprocess import PREPROCESSORS, Recipe, hint_of
from stepforge.runtime.imaging.read import on_black, read_image


def picture(width: int = 37, height: int = 29, mode: str = "RGB") -> Image.Image:
    """Noise, the hardest picture for a resampling filter."""
    draw = np.random.default_rng(width * height)
    image = Image.fromarray(draw.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def diffusers_hint(image: Image.Image, width: int, height: int, how: str = "default") -> np.ndarray:
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False)
    return processor.preprocess(image, height, width, resize_mode=how)[0].numpy()


# Sizes


@pytest.mark.parametrize("size", [(64, 64), (16, 24), (40, 32), (128, 8), (512, 768)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_hints_are_those_of_diffusers(mode: str, size: tuple[int, int]) -> None:
    """As after diffusers' `load_image`, which converts to RGB before anything is resized."""
    image = picture(mode=mode)
    hint = hint_of(image, "none", *size)
    assert hint.dtype == np.float32
    assert hint.flags.c_contiguous
    np.testing.assert_array_equal(hint, diffusers_hint(image.convert("RGB"), *size))


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
    np.testing.assert_array_equal(stretched, hint_of(image, "none", 80, 120))


def test_long_thin_pictures() -> None:
    """Cropped they would be 2 million pixels wide first."""
    thin = Image.new("RGB", (4096, 1), "white")
    assert hint_of(thin, "fill", 64, 64).shape == (3, 64, 64)
    assert hint_of(thin, "none", 64, 64).min() == 1
    with pytest.raises(RequestError, match=r"4096×1 pixels, too long and thin to be cropped to 64×64"):
        hint_of(thin, "crop", 64, 64)


# Preprocessors


def square(size: int = 64, low: int = 16, high: int = 48) -> Image.Image:
    image = Image.new("RGB", (size, size), (0, 90, 180))
    ImageDraw.Draw(image).rectangle((low, low, high - 1, high - 1), (250, 120, 10))
    return image


def test_none_is_the_picture() -> None:
    for image in (picture(), picture(mode="RGBA")):
        seen = on_black(read_image(image))
        np.testing.assert_array_equal(hint_of(image, Recipe.parse("none"), 64, 48), diffusers_hint(seen, 64, 48))


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
        ("none", "none", [], "stretch"),
        ("canny", "canny", [100, 200], "stretch"),
        ("canny(50,150)", "canny", [50, 150], "stretch"),
        (" canny ( 50 , 150 ) + crop ", "canny", [50, 150], "crop"),
        ("canny(high=300)", "canny", [100, 300], "stretch"),
        ("silhouette", "silhouette", [32], "stretch"),
        ("silhouette(8)+fill", "silhouette", [8], "fill"),
        ("none()", "none", [], "stretch"),
        ("crop", "none", [], "crop"),
        ("none+stretch", "none", [], "stretch"),
    ],
)
def test_grammar(text: str, name: str, numbers: list[float], resize: str) -> None:
    recipe = Recipe.parse(text)
    assert (recipe.name, list(recipe.numbers), recipe.resize) == (name, numbers, resize)
    assert hash(recipe) == hash(Recipe.parse(text))


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
        Recipe.parse(text)
    assert str(caught.value).endswith("give none, canny(100, 200) or silhouette(32), then +stretch, +crop or +fill")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_defaults_are_allowed() -> None:
    for name in PREPROCESSORS:
        assert Recipe.parse(name).numbers == tuple(PREPROCESSORS[name].numbers.values())
