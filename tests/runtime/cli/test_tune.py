"""`stepforge tune`: the preset that it stores is what `--plan` runs."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stepforge import Request, load
from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.bundle import Component, read, sha256, write_manifest

SIZE = 64


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, signatures):
    """The fake model as a bundle on disk, for the fake backend: its graphs are empty files."""
    folder, fake = tmp_path_factory.mktemp("bundles") / "fake", fake_bundle(SIZE)
    folder.mkdir()
    (folder / "fake_tokenizer.json").write_bytes((fake.path / "fake_tokenizer.json").read_bytes())
    (folder / "model.onnx").touch()
    files = {file.name: (file.stat().st_size, sha256(file)) for file in folder.iterdir()}
    components = {
        key: Component("model.onnx", *signatures[key.role])
        for key in fake.components
        if key.role in signatures and not key.stage
    }
    write_manifest(replace(fake, path=folder, components=components, files=files, stages={}))
    return folder


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\n\nthree\n")
    return file


def test_the_stored_preset_is_what_plan_runs(run, bundle, prompts, tmp_path, capsys):
    plot = tmp_path / "frontier.png"
    options = ("-n", 10, "-g", 3, "--limit", 0.2, "--budget", 60, "--backend", "fake", "--name", "quick")
    assert run("tune", bundle, "--prompts", prompts, *options, "--plot", plot, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["rows"] < 20
    assert found["chosen"]["distance"] <= 0.2
    assert Image.open(plot).size == (640, 400)
    preset = read(bundle).presets["quick"]
    assert (preset.guidance, preset.reuse) == (found["chosen"]["guidance"], "")
    assert preset.found["rows"] == found["chosen"]["rows"]
    assert preset.found["rows_full"] == 20
    assert preset.found["prompts"] == 3
    with load(bundle, backend="fake") as engine:
        result = engine.generate(Request(prompt="four", steps=10, preset="quick"))
        same = engine.generate(Request(prompt="four", steps=10, guidance=preset.guidance))
    assert result.stats.rows["unet"] == preset.found["rows"]
    np.testing.assert_array_equal(result.latents, same.latents)
    assert (
        run("generate", bundle, "four", "-n", 10, "--plan", "quick", "--backend", "fake", "-o", tmp_path / "a.png") == 0
    )


def test_a_limit_that_nothing_meets(run, bundle, prompts, capsys):
    code = run("tune", bundle, "--prompts", prompts, "-n", 10, "--limit", 1e-9, "--budget", 60, "--backend", "fake",
               "--name", "never")  # fmt: skip
    assert code == 1
    assert "no cheaper plan stays within 1e-09; raise --limit or --budget" in capsys.readouterr().err
    assert "never" not in read(bundle).presets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", "0"), "--limit is 0; a distance lies between 0 and 1"),
        (("--budget", "5"), "a budget of 5 images is too small for these prompts; give at least 27"),
        (("--parts", "guidance,magic"), "magic cannot be tuned; choose from guidance, tgate, deepcache, control"),
        (("--parts", "deepcache"), "deepcache cannot be tuned: export the bundle with --reuse deepcache"),
        (("--parts", "control"), "control cannot be tuned: the request has no ControlNet"),
        (("--guidance", "1"), "tune starts from one guidance weight other than 0 and 1, not 1.0"),
        (("--name", "a/b"), "preset name 'a/b' is not allowed"),
        (("--plot", "out.jpg"), "--plot out.jpg does not end in .png"),
    ],
)
def test_refusals(refuse, bundle, prompts, options, message):
    assert message in refuse(2, "tune", bundle, "--prompts", prompts, "-n", 4, "--backend", "fake", *options)


def test_the_test_model_keeps_no_presets(refuse, prompts):
    assert "has no files" in refuse(2, "tune", "fake", "--prompts", prompts)


def test_what_would_fail_after_the_search_is_refused_before(refuse, bundle, prompts, monkeypatch):
    command = ("tune", bundle, "--prompts", prompts, "--backend", "fake")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'stepforge[plot]'" in refuse(2, *command, "--plot", "a.png")
    monkeypatch.setattr("os.access", lambda _, mode, **__: mode != os.W_OK)
    assert "cannot be written to, and the preset is stored in it" in refuse(2, *command)
