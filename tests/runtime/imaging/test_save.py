"""Where a result's images go, and what each of them says of itself."""

import numpy as np
import pytest
from PIL import Image

from stepforge import Request, RequestError, load
from stepforge.runtime.imaging.png import read_metadata
from stepforge.runtime.imaging.save import image_paths

TWO = [(0, 7), (1, 8)]
PATHS = {
    "a file": ("cat.png", [(0, 7)], ["cat.png"]),
    "upper case": ("cat.PNG", [(0, 7)], ["cat.PNG"]),
    "a folder": ("out", TWO, ["out/00000-7.png", "out/00001-8.png"]),
    "a folder with a dot": ("run-1.5", [(3, 7)], ["run-1.5/00003-7.png"]),
    "a pattern": ("a/{seed}.png", TWO, ["a/7.png", "a/8.png"]),
    "a pattern with format codes": ("{index:03d}_{seed:x}.png", TWO, ["000_7.png", "001_8.png"]),
}
REFUSED = {
    "another format": ("cat.jpg", TWO[:1], "only PNG is written"),
    "one name for two": ("cat.png", TWO, "is one file, but there are 2 images; give a folder, or a name with {index}"),
    "a pattern that gives one name": ("{seed}.png", [(0, 7), (1, 7)], "gives several images one name"),
    "an unknown field": ("{prompt}.png", TWO, "{index} and {seed} may stand in it"),
    "an open bracket": ("{index.png", TWO, "{index} and {seed} may stand in it"),
    "a wrong format code": ("{index:s}.png", TWO, "{index} and {seed} may stand in it"),
    "a pattern of another format": ("{index}.webp", TWO, "only PNG is written"),
    "a pattern without a format": ("{index}", TWO, "only PNG is written"),
}


@pytest.mark.parametrize(("out", "images", "expected"), PATHS.values(), ids=PATHS)
def test_paths(out, images, expected):
    assert [str(path) for path in image_paths(out, images)] == expected


@pytest.mark.parametrize(("out", "images", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_paths(out, images, reason):
    with pytest.raises(RequestError) as caught:
        image_paths(out, images)
    assert reason in str(caught.value)


@pytest.fixture(scope="module")
def result():
    with load("fake") as engine:
        return engine.generate(Request(prompt="a cat", steps=2, seed=7, images=2, width=64, height=64))


def test_save_writes_every_image_with_what_draws_it_again(result, tmp_path):
    paths = result.save(tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["00000-7.png", "00001-8.png"]
    for path, image, seed in zip(paths, result.images, result.seeds, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(image))
        noted = read_metadata(path)["stepforge"]
        assert (noted["prompt"], noted["seed"], noted["steps"]) == ("a cat", seed, 2)
    (bare,) = {len(read_metadata(path)) for path in result.save(tmp_path / "{seed}.png", metadata=False)}
    assert bare == 0


def test_save_writes_nothing_if_a_name_is_taken(result, tmp_path):
    (tmp_path / "8.png").write_text("mine")
    with pytest.raises(RequestError, match=r"8\.png exists; choose another name or allow overwriting"):
        result.save(tmp_path / "{seed}.png")
    assert [path.name for path in tmp_path.iterdir()] == ["8.png"]
    result.save(tmp_path / "{seed}.png", overwrite=True)
    assert Image.open(tmp_path / "8.png").format == "PNG"
