"""`stepforge generate`: what it writes, what it reports, and what is left when something fails."""

import errno
import json
import os
import resource

import pytest
from PIL import Image

from stepforge.runtime.backends.fake import Decoder
from stepforge.runtime.imaging.png import read_metadata

SMALL = ("-n", 2, "--width", 64, "--height", 64)


def test_generate_writes_images_that_say_how_they_were_made(run, tmp_path, capsys):
    out = tmp_path / "cat.png"
    assert run("generate", "fake", "a cat", "-o", out, "--steps", 3, "--seed", 5, "--width", 64, "--height", 32) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).size == (64, 32)
    notes = read_metadata(out)
    assert notes["stepforge"]["prompt"] == "a cat"
    assert notes["stepforge"]["seed"] == 5
    assert notes["parameters"].startswith("a cat\n")
    assert "Steps: 3" in notes["parameters"]


def test_generate_many(run, tmp_path, capsys):
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


def test_existing_files_are_refused_before_work(run, refuse, tmp_path):
    out = tmp_path / "x.png"
    out.write_text("mine")
    assert "exists; choose another --out or give --overwrite" in refuse(2, "generate", "fake", "x", "-o", out)
    assert out.read_text() == "mine"
    assert run("generate", "fake", "x", "-o", out, "-n", 1, "--overwrite") == 0
    assert Image.open(out).format == "PNG"


def test_generate_with_controls(run, tiny_sd1_control_bundle, tmp_path, capsys):
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


def test_patterns_name_the_files(run, tmp_path, capsys):
    code = run("generate", "fake", "x", "y", "--images", 2, "-o", tmp_path / "a/{index}_{seed:03d}.png", *SMALL)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "0_000.png", "0_001.png", "1_000.png", "1_001.png"
    ]  # fmt: skip


@pytest.fixture
def third_fails(monkeypatch):
    """The third image that is decoded runs into a defect of its decoder."""
    whole, calls = Decoder.__call__, []

    def decode(self, inputs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no such kernel")
        return whole(self, inputs)

    monkeypatch.setattr(Decoder, "__call__", decode)


@pytest.mark.parametrize("prompts", [("x",), ("v", "w", "x", "y", "z")], ids=["one prompt", "five prompts"])
def test_a_failure_loses_no_other_image(run, tmp_path, capsys, third_fails, prompts):
    """Whether the images belong to one prompt or to several."""
    images = 5 // len(prompts)
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    code = run("generate", "fake", *prompts, "--images", images, "-o", out, "--sheet", sheet, "--json", *SMALL)
    assert code == 1
    found = capsys.readouterr()
    written = {str(path) for path in out.iterdir()}
    assert len(written) == 4
    rows = json.loads(found.out)
    assert {file for row in rows for file in row["files"]} == written
    assert sum(len(row["seeds"]) for row in rows) == 4
    (error,) = [error for row in rows for error in row.get("errors", ())]
    assert "the decoder failed: RuntimeError: no such kernel" in error
    lines = found.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"stepforge: {out}")
    assert lines[0].endswith(f"png: {error}")
    assert lines[1] == "stepforge: 4 of 5 images are written"
    assert Image.open(sheet).size[0] > 128


def test_all_requests_are_checked_before_one_is_drawn(refuse, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "x", "width": width}) for width in (64, 64, 65)))
    assert "width is 65" in refuse(2, "generate", "fake", "--requests", file, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_ends_the_work(start, tmp_path):
    """By a limit to the size of files: the trial before the work passes, an image does not."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    process = start("generate", "fake", *"abcdef", "-o", tmp_path / "out", "-n", 1, preexec_fn=limit)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output == ""
    lines = error.splitlines()
    assert lines[0].endswith("00000-0.png: cannot be written: File too large")
    assert lines[-1] == "stepforge: 0 of 6 images are written"
    assert all(line.startswith("stepforge: ") for line in lines)
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_taken_meanwhile_costs_that_image_only(run, tmp_path, capsys, monkeypatch):
    out, fsync = tmp_path / "out", os.fsync

    def taken(descriptor):
        fsync(descriptor)
        if not (out / "00001-0.png").exists() and (out / "00000-0.png").exists():
            (out / "00001-0.png").write_text("theirs")

    monkeypatch.setattr(os, "fsync", taken)
    assert run("generate", "fake", "x", "y", "z", "-o", out, *SMALL) == 1
    assert "00001-0.png exists" in capsys.readouterr().err
    assert (out / "00001-0.png").read_text() == "theirs"
    assert len(list(out.iterdir())) == 3


def test_a_sheet_that_cannot_be_written_costs_no_image(run, tmp_path, capsys, monkeypatch):
    out, fsync = tmp_path / "out", os.fsync

    def full(descriptor):
        if len(list(out.glob("*-0.png"))) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert run("generate", "fake", "x", "y", "-o", out, "--sheet", tmp_path / "s.png", *SMALL) == 1
    found = capsys.readouterr()
    assert found.err == f"stepforge: {tmp_path / 's.png'}: cannot be written: No space left on device\n"
    assert len(found.out.splitlines()) == len(list(out.iterdir())) == 2


def test_a_sheet_that_is_too_large_is_refused_before_work(refuse, tmp_path):
    options = ("--images", 64, "--width", 4096, "--height", 4096, "--sheet", tmp_path / "s.png")
    assert "at most 80000000 pixels" in refuse(2, "generate", "fake", "x", "-o", tmp_path / "out", *options)
