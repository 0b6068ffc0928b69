"""The bundle's format and its refusals, on a bundle written by hand."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepforge.runtime.bundle import (
    MANIFEST,
    TEXT_ENCODERS,
    UNET,
    ComponentId,
    ExpertCard,
    Preset,
    read,
    write_manifest,
)
from stepforge.runtime.errors import BundleError


@pytest.fixture
def path(hand_written_bundle: Path) -> Path:
    return hand_written_bundle


def test_what_is_written_is_read(path):
    bundle = read(path)
    preset = Preset(guidance=(3.0, 1.0), reuse="tgate(0.5)", control_end=0.5, found={"rows": 3})
    changed = replace(bundle, presets={"fast": preset, "plain": Preset()}, verdict={"passed": True, "summary": "all"})
    write_manifest(changed)
    assert read(path) == changed
    assert read(path).digest == bundle.digest
    assert bundle.digest is bundle.digest  # computed once: it takes 55 ms on the manifest of a large model


def test_a_component_has_a_role_a_name_and_a_variant(path):
    """The manifest states them, whatever its folders are called; an older format is to be exported again."""
    bundle = read(path)
    assert bundle.denoisers == (UNET,)
    assert bundle.text_encoders == (TEXT_ENCODERS[0],)
    edit(path, lambda m: m["components"].append({**m["components"][1], "name": "refiner"}))
    with pytest.raises(BundleError, match="component 'denoiser/refiner' belongs to no entry of experts"):
        read(path)
    edit(path, lambda m: m["experts"].update(refiner=asdict(ExpertCard("timesteps", 0.8, 1.0))))
    edit(path, lambda m: m["components"].append({**m["components"][1], "variant": "deepcache"}))
    bundle, refiner = read(path), ComponentId("denoiser", "refiner")
    assert bundle.components[refiner].graph == "denoiser/unet/model.onnx"
    assert bundle.denoisers == (UNET, refiner)
    assert (bundle.variants(UNET), bundle.variants(refiner)) == (("deepcache",), ())
    deep = replace(UNET, variant="deepcache")
    assert (deep.whole, str(deep), deep.label) == (UNET, "denoiser/unet.deepcache", "unet.deepcache")
    for older in (1, 2, 3, 4):
        edit(path, lambda m, older=older: m.update(format=older))
        with pytest.raises(BundleError, match=f"has bundle format {older}; this version reads 5: export it again"):
            read(path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 239), flip=st.integers(1, 255))
def test_any_flipped_byte_is_found(path, position, flip):
    file = path / "denoiser/unet/model.onnx"
    original = file.read_bytes()
    damaged = bytearray(original)
    damaged[position % len(damaged)] ^= flip
    file.write_bytes(damaged)
    with pytest.raises(BundleError, match="does not match its sha256"):
        read(path)
    file.write_bytes(original)


def edit(path: Path, change) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def rewrite(path: Path, old: str, new: str) -> None:
    text = (path / MANIFEST).read_text()
    assert old in text
    (path / MANIFEST).write_text(text.replace(old, new))


REFUSED = {
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "is not a bundle: it has no bundle.json"),
    "not JSON": (lambda p: (p / MANIFEST).write_text("{"), "is damaged"),
    "other format": (
        lambda p: edit(p, lambda m: m.update(format=1)),
        "has bundle format 1; this version reads 5: export it again",
    ),
    "field missing": (lambda p: edit(p, lambda m: m.pop("model")), "is damaged"),
    "field unknown": (lambda p: edit(p, lambda m: m["model"].update(extra=1)), "is damaged"),
    "other family": (lambda p: edit(p, lambda m: m["model"].update(family="sd9")), "known: sd1, sd2, sdxl"),
    "control without networks": (
        lambda p: edit(p, lambda m: m["controls"].update(canny={"global_pool": False})),
        "has no component 'control/canny/hint'",
    ),
    "no denoiser": (lambda p: edit(p, lambda m: m["components"].pop(1)), "has no component 'denoiser/unet'"),
    "no decoder": (lambda p: edit(p, lambda m: m["components"].pop(2)), "has no component 'vae_decoder'"),
    "no text encoder": (lambda p: edit(p, lambda m: m["components"].pop(0)), "has no component 'text_encoder'"),
    "unknown role": (
        lambda p: edit(p, lambda m: m["components"][1].update(role="painter")),
        "role is 'painter'; known: text_encoder",
    ),
    "component twice": (
        lambda p: edit(p, lambda m: m["components"].append(m["components"][1])),
        "has the component 'denoiser/unet' twice",
    ),
    "variant of nothing": (
        lambda p: edit(p, lambda m: m["components"][1].update(variant="tgate")),
        "has no component 'denoiser/unet'",
    ),
    "component named as a path": (
        lambda p: edit(p, lambda m: m["components"][1].update(name="../unet")),
        "components\\[1\\].name is '../unet', which is not a name",
    ),
    "a key twice": (
        lambda p: (p / MANIFEST).write_text('{"format": 4, "format": 4}'),
        "is damaged: the key 'format' is given twice",
    ),
    "a number that is none": (lambda p: rewrite(p, '"scaling_factor": 1.0', '"scaling_factor": NaN'), "contains NaN"),
    "an infinite number": (
        lambda p: rewrite(p, '"scaling_factor": 1.0', '"scaling_factor": 1e999'),
        "the largest float",
    ),
    "a long number": (
        lambda p: rewrite(p, '"scaling_factor": 1.0', '"scaling_factor": ' + "1" * 5000),
        "of 5000 digits",
    ),
    "nested without end": (lambda p: (p / MANIFEST).write_text("[" * 100_000), "nests deeper than 32 levels"),
    "no UTF-8": (lambda p: (p / MANIFEST).write_bytes(b"\xff{}"), "is not UTF-8 text"),
    "half a character": (lambda p: edit(p, lambda m: m["source"].update(kind="\ud800")), "half of a surrogate pair"),
    "a list": (lambda p: (p / MANIFEST).write_text("[]"), "it must be an object"),
    "a manifest of megabytes": (lambda p: os.truncate(p / MANIFEST, 1 << 30), "is larger than 32 MiB"),
    "a linked manifest": (
        lambda p: ((p / MANIFEST).rename(p / "x"), (p / MANIFEST).symlink_to("x")),
        "is a link; a bundle holds plain files only",
    ),
    "a list for an object": (
        lambda p: edit(p, lambda m: m.update(controls=[])),
        "controls is \\[\\]; it must be an object",
    ),
    "a text for a size": (
        lambda p: edit(p, lambda m: m["model"].update(width="64")),
        "model.width is '64'; it must be a whole",
    ),
    "true for a size": (
        lambda p: edit(p, lambda m: m["model"].update(width=True)),
        "model.width is True; it must be a whole",
    ),
    "an absurd size": (lambda p: edit(p, lambda m: m["model"].update(width=10**9)), "from 1 to 65536 is possible"),
    "an unknown precision": (
        lambda p: edit(p, lambda m: m.update(precision="fp4")),
        "precision is 'fp4'; known: fp32, fp16",
    ),
    "a scheduler of another kind": (
        lambda p: edit(p, lambda m: m["scheduler"].update(beta_start="a")),
        "is damaged: scheduler: ",
    ),
    "a verdict without summary": (
        lambda p: edit(p, lambda m: m.update(verdict={"passed": True})),
        "verdict.summary is None",
    ),
    "a decoder of four channels": (
        lambda p: edit(p, lambda m: m["components"][2]["outputs"][0].update(shape=["rows", 4, "8*height", "8*width"])),
        "its output 'pixels' is float32 \\[rows, 4, 8\\*height, 8\\*width\\]; it must be float32 \\[rows, 3, ",
    ),
    "a decoder of another scale": (
        lambda p: edit(p, lambda m: m["components"][2]["outputs"][0].update(shape=["rows", 3, "height", "width"])),
        "it must be float32 \\[rows, 3, 8\\*height, 8\\*width\\]",
    ),
    "a text encoder of another width": (
        lambda p: edit(p, lambda m: m["components"][0]["outputs"][0].update(shape=["rows", 77, 17])),
        "its input 'encoder_hidden_states' is float32 \\[rows, tokens, 16\\]; it must be float32 \\[rows, tokens, 17\\]",
    ),
    "an input that nobody gives": (
        lambda p: edit(p, lambda m: m["components"][1]["inputs"][0].update(name="x")),
        "the input 'x', which no network of",
    ),
    "a bank of no layers": (
        lambda p: edit(p, lambda m: m["components"][1].update(bank={"slots": 3, "rank": 4, "shared": {"a": ["a"]}})),
        "its bank names 'a' for layers that are not in its modules",
    ),
    "a text encoder too few": (lambda p: edit(p, lambda m: m["model"].update(family="sdxl")), "1 elements; sdxl has 2"),
    "a FIFO": (lambda p: os.mkfifo(p / "x"), "contains x, which is no plain file"),
    "bad preset": (
        lambda p: edit(p, lambda m: m["presets"].update(a={"reuse": 3})),
        "preset.reuse is 3; it must be text",
    ),
    "file missing": (lambda p: (p / "tokenizer/tokenizer.json").unlink(), "lacks tokenizer/tokenizer.json"),
    "file unknown": (lambda p: (p / "run.py").write_text(""), "does not list: run.py"),
    "file longer": (lambda p: (p / "tokenizer/tokenizer.json").write_text("x"), "has 1 bytes"),
    "link": (lambda p: os.symlink("/etc/hostname", p / "x"), "contains the link x"),
    "path upwards": (
        lambda p: edit(p, lambda m: m["components"][1].update(graph="../../etc/passwd")),
        "not a plain relative path",
    ),
    "graph not listed": (
        lambda p: edit(p, lambda m: m["components"][1].update(graph="other.onnx")),
        "does not list it under files",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_bundle_is_refused_in_one_line(path, name):
    damage, message = REFUSED[name]
    damage(path)
    with pytest.raises(BundleError, match=message) as caught:
        read(path)
    assert str(caught.value).isprintable()
