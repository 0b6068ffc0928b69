"""The command line as a user meets it: exit codes, one-line errors, files, JSON."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from stepforge.runtime.cli.main import main
from stepforge.runtime.imaging.png import read_metadata


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_generate_writes_images_that_say_how_they_were_made(tmp_path, capsys):
    out = tmp_path / "cat.png"
    assert run("generate", "fake", "a cat", "-o", out, "--steps", 3, "--seed", 5, "--width", 64, "--height", 32) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).size == (64, 32)
    notes = read_metadata(out)
    assert notes["stepforge"]["prompt"] == "a cat"
    assert notes["stepforge"]["seed"] == 5
    assert notes["parameters"].startswith("a cat\n")
    assert "Steps: 3" in notes["parameters"]


def test_generate_many(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n")
    out = tmp_path / "out"
    sheet = tmp_path / "sheet.png"
    code = run("generate", "fake", "--prompts", prompts, "-o", out, "-n", 2, "--images", 2, "--sheet", sheet, "--json")
    assert code == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == ["one", "two"]
    assert len(list(out.iterdir())) == 4
    assert rows[0]["stats"]["rows"]["unet"] == 2 * 2 * 2
    assert sheet.exists()


def test_plan_and_info_speak_json(capsys):
    assert run("plan", "fake", "-n", 3, "--guidance", "7,1,0", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [step["guidance"] for step in plan["steps"]] == [7.0, 1.0, 0.0]
    assert plan["rows"] == 4
    assert run("plan", "fake", "-n", 3) == 0
    assert "3 network evaluations, 6 denoiser rows" in capsys.readouterr().out
    assert run("info", "fake", "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["family"] == "sd1"


def test_plan_shows_which_evaluations_reuse(tiny_sd1_control_bundle, capsys):
    options = ["-n", 4, "--sampler", "ddim", "--reuse", "deepcache(2)+tgate(0.5)"]
    assert run("plan", tiny_sd1_control_bundle, *options, "--json") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["denoiser"] for step in steps] == ["unet", "unet.deepcache", "unet.tgate", "unet.deepcache"]
    assert run("plan", "fake", *options) == 2
    assert "no variant 'deepcache'; export it with --reuse deepcache" in capsys.readouterr().err


def test_generate_with_controls(tiny_sd1_control_bundle, tmp_path, capsys):
    """Options for all prompts, then JSON lines with controls of their own, whose images lie beside the file."""
    hint = Image.new("RGB", (40, 40), "white")
    (tmp_path / "lines").mkdir()
    hint.save(tmp_path / "hint.png")
    hint.resize((20, 20)).save(tmp_path / "lines" / "other.png")
    options = ["-n", 4, "--sampler", "ddim", "--backend", "onnxruntime", "--precision", "fp32", "--json"]
    control = ["--control", f"a={tmp_path / 'hint.png'}:0.5", "--control-window", "0..0.5"]
    code = run("generate", tiny_sd1_control_bundle, "a cat", "-o", tmp_path / "one.png", *control, *options)
    assert code == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["stats"]["rows"]["control/a"] == 2 * 2
    (noted,) = read_metadata(tmp_path / "one.png")["stepforge"]["controls"]
    assert (noted["name"], noted["scale"], noted["end"]) == ("a", 0.5, 0.5)

    lines = [
        {"prompt": "a cat", "controls": [{"name": "b", "image": "other.png", "guess_mode": True}]},
        {"prompt": "a cat"},
        {"prompt": "a cat", "controls": [], "reuse": "deepcache(2)"},
    ]
    file = tmp_path / "lines" / "requests.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    assert run("generate", tiny_sd1_control_bundle, "--requests", file, "-o", out, *control, *options) == 0
    rows = [row["stats"]["rows"] for row in json.loads(capsys.readouterr().out)]
    assert [(r.get("control/a", 0), r.get("control/b", 0)) for r in rows] == [(0, 4), (4, 0), (0, 0)]
    assert rows[2]["unet.deepcache"] == 4

    file.write_text(json.dumps({"prompt": "a cat", "controls": [{"name": "a", "image": "nowhere.png"}]}))
    assert run("generate", tiny_sd1_control_bundle, "--requests", file, "-o", tmp_path / "none", *options) == 2
    error = capsys.readouterr().err
    assert "nowhere.png" in error
    assert error.count("\n") == 1


def test_doctor(capsys, tiny_sd1_bundle, tmp_path):
    assert run("doctor", tiny_sd1_bundle) == 0
    assert "loads all 3 networks" in capsys.readouterr().out
    assert run("doctor", tmp_path) == 1
    assert "FAIL bundle" in capsys.readouterr().out


ERRORS = {
    "unknown option": (["generate", "fake", "x", "--stps", "3"], 2, "No such option: --stps"),
    "unknown command": (["genrate"], 2, "No such command 'genrate'"),
    "no prompt": (["generate", "fake"], 2, "give either PROMPT arguments, --prompts FILE or --requests FILE"),
    "bad number": (["generate", "fake", "x", "--steps", "many"], 2, "should be a valid integer"),
    "bad sampler": (["generate", "fake", "x", "--sampler", "magic"], 2, "choose one of ddim"),
    "bad guidance": (["generate", "fake", "x", "--guidance", "much"], 2, "give a number such as 7.5"),
    "bad timesteps": (["generate", "fake", "x", "--timesteps", "a,b"], 2, "is not a list of numbers"),
    "no bundle": (["generate", "nowhere", "x"], 1, "is not a bundle"),
    "bad backend": (["generate", "nowhere", "x", "--backend", "magic"], 1, "is not a bundle"),
    "several images in one file": (["generate", "fake", "x", "y", "-o", "z.png"], 2, "give a folder"),
    "no model": (["export", "nowhere", "-o", "b"], 1, "does not exist"),
    "bad reuse": (["plan", "fake", "--reuse", "deepcache"], 2, "give deepcache(INTERVAL)"),
    "reuse without a variant": (["generate", "fake", "x", "--reuse", "tgate(0.5)"], 2, "export it with --reuse tgate"),
    "bad control": (["generate", "fake", "x", "--control", "a"], 2, "give NAME=IMAGE or NAME=IMAGE:SCALE"),
    "bad window": (["generate", "fake", "x", "--control-window", "half"], 2, "give two fractions of the steps"),
    "no ControlNets": (["generate", "fake", "x", "--control", "a=b.png"], 2, "exported without any"),
    "bad size": (["generate", "fake", "x", "--width", "65"], 2, "needs a multiple of 8"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, code, message = ERRORS[case]
    assert run(*arguments) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("stepforge: ")


def test_existing_files_are_refused_before_work(tmp_path, capsys):
    out = tmp_path / "x.png"
    out.write_text("mine")
    assert run("generate", "fake", "x", "-o", out) == 2
    assert "exists; choose another --out or give --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert run("generate", "fake", "x", "-o", out, "-n", 1, "--overwrite") == 0
    assert Image.open(out).format == "PNG"


def test_the_installed_command_runs():
    output = subprocess.check_output([sys.executable, "-m", "stepforge.runtime", "--help"], text=True)
    for command in ("export", "verify", "generate", "plan", "info", "doctor"):
        assert command in output
