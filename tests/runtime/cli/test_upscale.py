"""`stepforge upscale`, and the stages of generate, plan and info, on the fake model."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from stepforge.runtime.cli.main import run
from stepforge.runtime.imaging.png import read_metadata


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (32, 16), "teal").save(path)
    return path


def test_pictures_are_enlarged_by_a_chain_and_say_so(photo, tmp_path, capsys):
    out = tmp_path / "out"
    stages = ["--sr", "x4", "--sr", "nearest"]
    assert run(["upscale", "fake", str(photo), str(photo), *stages, "-o", str(out), "--seed", "3"]) == 0
    paths = capsys.readouterr().out.split()
    assert [Image.open(path).size for path in paths] == [(256, 128)] * 2
    told = read_metadata(paths[0])["stepforge"]
    assert told["upscale"] == [
        {"name": "x4", "evaluations": 50, "given_image": True},
        {"name": "nearest", "evaluations": 0, "given_image": False},
    ]
    one = ["--sr", "x4", "--sr-steps", "2", "--noise-level", "7", "--json", "-o", str(tmp_path / "one.png")]
    assert run(["upscale", "fake", str(photo), *one]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["image"] == str(photo)
    assert row["stats"]["rows"]["x4/unet"] == 4


def test_generate_plan_and_info_know_stages(tmp_path, capsys):
    small = ["--width", "64", "--height", "64", "--steps", "2"]
    sheet = ["--sheet", str(tmp_path / "sheet.png"), "-o", str(tmp_path / "a.png")]
    assert run(["generate", "fake", "a cat", *small, "--sr", "x2", "--sr-steps", "2", *sheet]) == 0
    assert Image.open(tmp_path / "a.png").size == (128, 128)
    assert Image.open(tmp_path / "sheet.png").width >= 128
    capsys.readouterr()
    assert run(["plan", "fake", "--steps", "2", "--sr", "x2", "--sr", "nearest", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(stage["stage"], len(stage["steps"])) for stage in plan["stages"]] == [("x2", 50), ("nearest", 0)]
    assert plan["stages"][0]["steps"][0]["denoiser"] == "x2/unet"
    assert run(["plan", "fake", "--steps", "2", "--sr", "nearest"]) == 0
    assert "one pass of a feed-forward network" in capsys.readouterr().out
    assert run(["info", "fake"]) == 0
    assert "stage x4: kind x4, scale 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--sr NAME is needed: the bundle has x4, x2, nearest; name one"),
        (["--sr", "x9"], "no super-resolution stage 'x9'"),
        (["--sr-steps", "3"], "--sr NAME is needed"),
        (["--sr", "nearest", "--sr-steps", "3"], "takes no steps"),
    ],
)
def test_refusals(photo, tmp_path, capsys, arguments, told):
    assert run(["upscale", "fake", str(photo), "-o", str(tmp_path / "o"), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_options_of_stages_need_a_stage(capsys):
    assert run(["generate", "fake", "a cat", "--noise-level", "3"]) == 2
    assert "--noise-level needs --sr NAME" in capsys.readouterr().err
