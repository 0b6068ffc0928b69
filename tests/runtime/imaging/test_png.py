"""Pixels against diffusers' VaeImageProcessor; PNG files against the PNG layout and A1111's text."""

import errno
import json
import os
import struct
import threading
import zlib

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stepforge.runtime.errors import GenerationError, RequestError
from stepforge.runtime.imaging.png import read_metadata, save_png, to_pil, to_uint8

METADATA = {
    "prompt": "a cat, (best:1.2)\nsecond line",
    "negative": "blurry",
    "steps": 20,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "guidance": 7.5,
    "seed": 42,
    "width": 64,
    "height": 48,
    "model": "emoji",
    "versions": {"numpy": "2"},
}
# the layout that A1111's create_infotext writes
A1111 = (
    "a cat, (best:1.2)\nsecond line\n"
    "Negative prompt: blurry\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 64x48, Model: emoji"
)


def picture(width=64, height=48, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def png_chunks(path):
    """(type, data) of every chunk, with its checksum verified."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, found = 8, []
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        body = data[position + 4 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length) == (zlib.crc32(body),)
        found.append((body[:4], body[4:]))
        position += 12 + length
    return found


def assert_equals_diffusers(decoded):
    theirs = VaeImageProcessor().postprocess(torch.from_numpy(decoded), output_type="pil")
    pixels = to_uint8(decoded)
    assert pixels.dtype == np.uint8
    for ours, expected in zip(to_pil(pixels), theirs, strict=True):
        assert ours.mode == expected.mode
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_random_pixels_equal_diffusers():
    assert_equals_diffusers(np.random.default_rng(0).normal(0, 0.7, (2, 3, 40, 56)).astype(np.float32))


def test_rounding_boundaries_equal_diffusers():
    """Every value half-way between two bytes, and its neighbours on both sides."""
    half = ((np.arange(255) + 0.5) / 255 * 2 - 1).astype(np.float32)
    values = np.concatenate([half, np.nextafter(half, np.float32(-2)), np.nextafter(half, np.float32(2))])
    edges = np.float32([-1, 1, -1.0000001, 1.0000001, 0, -0.0, 1e30, -1e30, np.inf, -np.inf, 1e-40])
    assert_equals_diffusers(np.resize(np.concatenate([values, edges]), (1, 3, 16, 17)))


def test_nan_pixels_are_refused():
    decoded = np.zeros((1, 3, 8, 8), np.float32)
    decoded[0, 1, 2, 3] = np.nan
    with pytest.raises(GenerationError, match="NaN"):
        to_uint8(decoded)


def test_png_round_trip(tmp_path):
    path = tmp_path / "cat.png"
    save_png(picture(), path, METADATA)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))
    assert read_metadata(path) == {"parameters": A1111, "stepforge": METADATA}
    assert [entry.name for entry in tmp_path.iterdir()] == ["cat.png"]


def test_latin_text_is_a_text_chunk_before_the_pixels(tmp_path):
    save_png(picture(), tmp_path / "cat.png", METADATA)
    kinds = png_chunks(tmp_path / "cat.png")
    assert (b"tEXt", b"parameters\0" + A1111.encode("latin-1")) in kinds
    order = [kind for kind, _ in kinds]
    assert order.index(b"tEXt") < order.index(b"IDAT")


def test_other_text_is_an_international_chunk(tmp_path):
    save_png(picture(), tmp_path / "cat.png", {"prompt": "猫 🙂", "steps": 1})
    assert (b"iTXt", b"parameters\0\0\0\0\0" + "猫 🙂\nSteps: 1".encode()) in png_chunks(tmp_path / "cat.png")
    assert read_metadata(tmp_path / "cat.png")["stepforge"]["prompt"] == "猫 🙂"


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200))
def test_any_prompt_survives(tmp_path_factory, prompt):
    path = tmp_path_factory.mktemp("any") / "cat.png"
    save_png(picture(2, 2), path, {"prompt": prompt, "seed": 2**64 - 1})
    found = read_metadata(path)
    assert found["stepforge"] == {"prompt": prompt, "seed": 2**64 - 1}
    assert found["parameters"] == f"{prompt}\nSeed: 18446744073709551615"


A1111_CASES = {
    "no negative": ({"prompt": "a", "negative": "", "steps": 4}, "a\nSteps: 4"),
    "guidance by step": ({"prompt": "a", "steps": 2, "guidance": (7.5, 1.0)}, "a\nSteps: 2"),
    "whole guidance": ({"prompt": "a", "guidance": 7.0}, "a\nCFG scale: 7"),
    "unknown sampler": ({"prompt": "a", "sampler": "mine"}, "a\nSampler: mine"),
    "separators are quoted": ({"prompt": "a", "model": 'big, "bad": 2'}, 'a\nModel: "big, \\"bad\\": 2"'),
}


@pytest.mark.parametrize(("metadata", "expected"), A1111_CASES.values(), ids=A1111_CASES)
def test_a1111_text(tmp_path, metadata, expected):
    save_png(picture(), tmp_path / "cat.png", metadata)
    assert read_metadata(tmp_path / "cat.png")["parameters"] == expected


def test_no_metadata_writes_none(tmp_path):
    save_png(picture(), tmp_path / "cat.png")
    assert read_metadata(tmp_path / "cat.png") == {}
    assert {kind for kind, _ in png_chunks(tmp_path / "cat.png")} == {b"IHDR", b"IDAT", b"IEND"}


def test_file_mode_follows_the_umask(tmp_path):
    umask = os.umask(0o027)
    try:
        save_png(picture(), tmp_path / "cat.png")
    finally:
        os.umask(umask)
    assert (tmp_path / "cat.png").stat().st_mode & 0o777 == 0o640


def test_existing_file_is_kept_unless_asked(tmp_path):
    path = tmp_path / "cat.png"
    save_png(picture(seed=1), path)
    before = path.read_bytes()
    with pytest.raises(RequestError, match="exists"):
        save_png(picture(seed=2), path)
    assert path.read_bytes() == before
    save_png(picture(seed=2), path, overwrite=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("overwrite", [False, True])
def test_failure_leaves_nothing_behind(tmp_path, monkeypatch, overwrite):
    path = tmp_path / "cat.png"
    if overwrite:
        save_png(picture(seed=1), path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(picture(seed=2), path, overwrite=overwrite)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_a_reader_never_sees_part_of_a_file(tmp_path, monkeypatch):
    path = tmp_path / "cat.png"
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    save_png(picture(), path)
    assert seen == [False]
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.read_bytes() == before))
    save_png(picture(seed=3), path, overwrite=True)
    assert seen == [False, True]


def test_one_of_two_writers_wins(tmp_path, monkeypatch):
    path, both, outcomes = tmp_path / "cat.png", threading.Barrier(2, timeout=30), []
    monkeypatch.setattr(os, "fsync", lambda _: both.wait())

    def write(seed):
        try:
            save_png(picture(seed=seed), path)
            outcomes.append(seed)
        except RequestError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert f"{path} exists; choose another name or allow overwriting" in outcomes
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(seed=winner)))
    assert len(list(tmp_path.iterdir())) == 1


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    save_png(picture(), tmp_path / "cat.png", METADATA)
    assert read_metadata(tmp_path / "cat.png")["stepforge"] == METADATA
    assert len(list(tmp_path.iterdir())) == 1


def test_names_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name, reason in {"cat.jpg": "only PNG", "no/cat.png": "not a folder", "folder.png": "is a folder"}.items():
        with pytest.raises(RequestError, match=reason):
            save_png(picture(), tmp_path / name, overwrite=True)


@pytest.mark.parametrize("metadata", [{"prompt": "\ud800"}, {"model": object()}], ids=["surrogate", "not JSON"])
def test_metadata_that_cannot_be_written_is_refused(tmp_path, metadata):
    with pytest.raises(RequestError, match="metadata cannot be written"):
        save_png(picture(), tmp_path / "cat.png", metadata)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_png_are_refused(tmp_path):
    picture().save(tmp_path / "jpeg.png", "JPEG")
    (tmp_path / "text.png").write_text("hello")
    save_png(picture(), tmp_path / "whole.png", METADATA)
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    for name in ("jpeg.png", "text.png", "torn.png", "missing.png"):
        with pytest.raises(RequestError, match="cannot be read as a PNG"):
            read_metadata(tmp_path / name)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000], ids=["torn", "a list", "deep"])
def test_changed_json_is_refused(tmp_path, text):
    save_png(picture(), tmp_path / "cat.png", {"prompt": "a"})
    data = (tmp_path / "cat.png").read_bytes()
    old = b"tEXtstepforge\0" + json.dumps({"prompt": "a"}).encode()
    new = b"tEXtstepforge\0" + text.encode()
    framed = [struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in (old, new)]
    assert data.count(framed[0]) == 1
    (tmp_path / "cat.png").write_bytes(data.replace(*framed))
    with pytest.raises(RequestError, match="not a JSON object"):
        read_metadata(tmp_path / "cat.png")
