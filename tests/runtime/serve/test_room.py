"""The room of a batch: what jobs are counted with, and that this is what they take."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from stepforge import Request
from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.bundle import VAE_DECODER, Component, Footprint
from stepforge.runtime.serve.room import Need, Room, counted


def test_jobs_are_counted_by_pictures_latents_and_calls(tmp_path):
    bundle = fake_bundle()
    mega = 1024 * 1024
    plain = counted(Request(prompt="", width=1024, height=1024, images=3), bundle, None)
    assert plain == Need(3, 3 * (12 * mega + 48 * 4 * 128 * 128), 24 * mega)
    large = counted(Request(prompt="", width=512, height=512, upscale=["x4", "nearest"]), bundle, None)
    assert large.held == 12 * 4096**2 + 48 * 4 * 512**2
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    given = counted(Request(prompt="", upscale={"name": "nearest", "image": tmp_path / "a.png"}), bundle, None)
    assert given == Need(1, 12 * 400 * 200 + 12 * 200 * 100, 24 * 400 * 200)
    started = counted(Request(prompt="", init={"image": tmp_path / "a.png"}), bundle, None)
    assert started == Need(1, 12 * 200 * 96 + 48 * 4 * 25 * 12 + 12 * 200 * 100, 24 * 200 * 96)
    heavy = {**bundle.components, VAE_DECODER: Component("", (), (), footprint=Footprint(1000.0, 0.5))}
    object.__setattr__(bundle, "components", heavy)
    call = 1000 * 128**2 + 128**4 // 2
    assert counted(Request(prompt="", width=1024, height=1024), bundle, None).call == call + 24 * mega
    assert counted(Request(prompt="", width=1024, height=1024), bundle, 1 << 20).call == (1 << 20) + 24 * mega


def test_jobs_wait_for_room_and_one_alone_always_has_it():
    room = Room(4, fake_bundle(), 1000)
    assert room.is_empty
    first = Need(9, 900, 0)
    assert room.fits(first)
    room.enter(first)
    assert not room.fits(Need(1))
    room.leave([first])
    room.enter(Need(1, 300, 200))
    assert room.fits(Need(1, 500, 200))
    assert not room.fits(Need(1, 500, 201))
    assert not room.fits(Need(4, 0, 0))


def test_limit_memory_refuses_what_cannot_fit_and_says_how_it_is_counted(batch, jobs):
    code, report, errors = batch(
        jobs({"prompt": "a"}, {"prompt": "b", "upscale": "nearest"}), "--limit-memory", "200000"
    )
    assert (code, report["done"], report["failed"]) == (1, 1, 1)
    assert (
        "line 2: the job is counted with 602112 bytes, 208896 of its pictures and 393216 of a network's call"
        in errors[0]
    )


@pytest.mark.slow
def test_limit_memory_is_what_a_batch_takes_beside_the_engine(tmp_path):
    """Peaks of whole processes: eight small pictures, and eight of 2048² with room for one."""
    mega, peaks = 1 << 20, {}
    manifest = tmp_path / "jobs.jsonl"
    for name, size, limit in (("small", 64, 1 << 40), ("limited", 2048, 170 * mega)):
        lines = ({"prompt": f"{i}", "steps": 1, "width": size, "height": size} for i in range(8))
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = [sys.executable, "-m", "stepforge.runtime", "batch", "fake", manifest, "-o", tmp_path / name]
        said = [*map(str, command), "--format", "jpeg", "--limit-memory", str(limit), "--json"]
        report = json.loads(subprocess.check_output(said))
        assert report["images"] == 8
        peaks[name] = report["peak_memory"]
    assert peaks["limited"] - peaks["small"] <= 170 * mega
