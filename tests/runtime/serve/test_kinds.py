"""Jobs of every kind: all that `generate` and `upscale` can be asked for, in manifests and as options of the command."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stepforge
from stepforge import Request
from stepforge.runtime.imaging.png import read_metadata

SMALL = {"steps": 2, "width": 64, "height": 64}
X4 = {"name": "x4", "steps": 2, "noise_level": 5}
KINDS = {
    "init": {"init": {"image": "photo.png", "strength": 0.5}, "width": None, "height": None},
    "inpainting": {"init": {"image": "photo.png", "mask": "mask.png", "overlay": True}, "guidance": 3},
    "stage": {"upscale": X4},
    "chain": {"upscale": ["nearest", X4], "images": 2},
    "latents": {"upscale": {"name": "x2", "steps": 2}},
    "given": {"prompt": "", "upscale": [{"name": "nearest", "image": "photo.png"}]},
    "given, drawn": {"prompt": "teal", "upscale": [{**X4, "image": "photo.png"}]},
    "experts": {"experts": "base@0..1"},
    "micro": {"micro": {"crop": [0, 8]}},
    "two curves": {"guidance": "linear(1..5)", "guider": "rescale(0.7)", "sampler": "dpmpp_2m", "schedule": "karras"},
}


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.linear_gradient("L").resize((48, 32)).convert("RGB").save(tmp_path / "photo.png")
    mask = Image.new("L", (48, 32))
    mask.paste(255, (0, 0, 24, 32))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "photo.png"


def placed(value, folder: Path):
    """Fields of a job as `Request` has them, whose pictures are paths."""
    if isinstance(value, dict):
        return {key: folder / one if key in ("image", "mask") else placed(one, folder) for key, one in value.items()}
    return [placed(one, folder) for one in value] if isinstance(value, list) else value


def test_jobs_ask_for_all_that_requests_have(photo, batch, jobs, tmp_path):
    """Pixels are those of the engine, and the sidecar says what was asked."""
    given = [{"prompt": "a cat", "seed": index, **fields} for index, fields in enumerate(KINDS.values())]
    code, report, errors = batch(jobs(*given))
    assert (code, errors) == (0, [])
    assert report["images"] == len(KINDS) + 1
    lines = [json.loads(line) for line in (tmp_path / "out/images.jsonl").read_text().splitlines()]
    with stepforge.load("fake") as engine:
        for index, job in enumerate(given):
            result = engine.generate(Request(**placed({**SMALL, **job}, tmp_path)))
            told = [line for line in lines if line["line"] == index + 1]
            for line, image in zip(told, result.images, strict=True):
                with Image.open(tmp_path / "out" / line["file"]) as found:
                    assert (found.size, found.tobytes()) == (image.size, image.tobytes()), job
    assert [stage["name"] for stage in lines[3]["upscale"]] == ["nearest", "x4"]
    assert lines[0]["init"]["strength"] == 0.5


def test_options_of_the_command_are_those_of_generate(photo, batch, jobs, tmp_path, files):
    """What the options say is as if each job that leaves it out said it; another picture is another batch."""
    plain = jobs(
        *({"prompt": f"a (cat:1.3) {i}", "seed": i} for i in range(3)), {"prompt": "own", "seed": 9, "upscale": "x2"}
    )
    said = {
        "init": {"image": "photo.png", "strength": 0.5}, "images": 2, "prompt_syntax": "plain", "negative": "dog",
        "experts": "base", "micro": {"crop": [0, 8]}, "guidance": 3, "eta": 0.5,
    }  # fmt: skip
    options = [
        "--init", photo, "--strength", 0.5, "--sr", "x4", "--sr-steps", 2, "--noise-level", 5, "--images", 2,
        "--prompt-syntax", "plain", "--negative", "dog", "--experts", "base", "--micro", "crop=0,8", "-g", 3,
        "--eta", 0.5,
    ]  # fmt: skip
    texts = [json.loads(line) for line in plain.read_text().splitlines()]
    code, report, errors = batch(plain, *options)
    assert (code, report["images"], errors) == (0, 8, [])
    seconds = [{**said, "upscale": X4, **job} for job in texts]
    batch(jobs(*seconds, name="said.jsonl"), out="said")
    assert images(files(tmp_path / "out")) == images(files(tmp_path / "said"))
    assert batch(plain, *options)[1]["resumed"] == 4
    Image.new("RGB", (48, 32), "red").save(photo)
    assert "other options (init)" in batch(plain, *options)[2][0]
    for wrong, told in (
        (["--strength", 0.5], "--strength needs --init"),
        (["--noise-level", 3], "--noise-level needs --sr NAME"),
        (["--init", tmp_path / "none.png"], "cannot be read"),
        (["--limit-memory", "1.5G"], "Invalid value for '--limit-memory': '1.5G'; write bytes"),
        (["--plan", "fast", "-g", 2], "leave --guidance out"),
        (["--plan", "fast"], "no preset 'fast'"),  # once, not for every job
        (["--sr", "x9"], "no super-resolution stage 'x9'"),
        (["--images", 0], "images is 0"),
    ):
        code, _, errors = batch(plain, *wrong, out="b")
        assert (code, len(errors)) == (2, 1)
        assert told in errors[0]


def images(found: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in found.items() if name.endswith(".png")}


@pytest.mark.slow
def test_networks_with_controls_and_adapters(tiny_sd1_control_bundle, photo, batch, tmp_path):
    """A bundle of networks: ControlNets by line and by option, each with its hint's digest in the sidecar."""
    jobs = tmp_path / "jobs.jsonl"
    control = {"name": "a", "image": "photo.png", "scale": 0.7}
    lines = [{"prompt": "a cat", "seed": 1, "controls": [control]}, {"prompt": "a cat", "seed": 1}]
    jobs.write_text("".join(json.dumps({"steps": 2, **line}) + "\n" for line in lines))
    option = ["--control", f"a={photo}:0.7", "--precision", "fp32", "--max-rows", 2]
    code, _, errors = batch(jobs, *option, bundle=tiny_sd1_control_bundle)
    assert (code, errors) == (0, [])
    first, second = (tmp_path / f"out/0000000{index}.png" for index in range(2))
    assert first.read_bytes() == second.read_bytes()
    assert len(read_metadata(first)["stepforge"]["controls"][0]["hint_sha256"]) == 64
    code, report, errors = batch(
        jobs, *option, "--layout", "webdataset", out="b", bundle=tiny_sd1_control_bundle
    )  # fmt: skip
    assert (code, report["images"], errors) == (0, 2, [])


@pytest.mark.slow
def test_same_seeds_on_networks_whose_roundings_depend_on_the_rows_of_a_call(tiny_sd1_bundle, batch, tmp_path):
    """Other calls, orders and resume points move a value by the last bits of fp32, so by one of 255 levels at most where it
    lies between two; with one image a call (`--max-rows 2`) files are the same byte for byte."""
    given = [{"prompt": f"cat {i}", "seed": i, "steps": 2 + i % 3} for i in range(5)]
    folders = {}
    for name, order, rows in (("one", 1, 2), ("other", -1, 2), ("many", 1, 8), ("five", -1, 5)):
        manifest = tmp_path / f"{name}.jsonl"
        manifest.write_text("".join(json.dumps(job) + "\n" for job in given[::order]))
        arguments = (manifest, "--precision", "fp32", "--max-rows", rows, "--no-metadata")
        code, _, errors = batch(*arguments, out=name, bundle=tiny_sd1_bundle)
        assert (code, errors) == (0, [])
        folders[name] = [path.read_bytes() for path in sorted((tmp_path / name).glob("*.png"))][::order]
    assert folders["one"] == folders["other"]
    for name in ("many", "five"):
        for ours, theirs in zip(folders["one"], folders[name], strict=True):
            pixels = (np.asarray(Image.open(io.BytesIO(data)), np.int16) for data in (ours, theirs))
            assert np.abs(next(pixels) - next(pixels)).max() <= 1
