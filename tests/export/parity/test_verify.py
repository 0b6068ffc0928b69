"""`verify` passes what is right and fails what is wrong, on tiny models of every family."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from stepforge.export.parity.measures import MAX_PSNR, psnr, relative_error
from stepforge.export.parity.verify import _versions, verify
from stepforge.runtime.backends.openvino import core
from stepforge.runtime.bundle import read, sha256, write_manifest
from stepforge.runtime.cli.main import main
from stepforge.runtime.errors import BackendError, CheckpointError, RequestError


@pytest.mark.slow
# one family in the whole suite, where tests of graphs and engines compare all
@pytest.mark.parametrize("family", ["sd1", *(pytest.param(name, marks=pytest.mark.long) for name in ("sd2v", "sdxl"))])
def test_every_family_passes(family, request, tmp_path):
    """fp32 on both engines: latents within 1e-4 of diffusers' pipeline, image PSNR at least 60 dB."""
    model = request.getfixturevalue(f"tiny_{family}")
    bundle = copy(request.getfixturevalue(f"tiny_{family}_bundle"), tmp_path)
    verdict = verify(bundle, model, precisions=["fp32"], prompts=["a cat and a dog"], steps=8)
    assert verdict["passed"], [check for check in verdict["checks"] if not check["passed"]]
    levels = {check["level"] for check in verdict["checks"]}
    assert levels == {"setting", "component", "step", "trajectory", "image"}
    assert {check["backend"] for check in verdict["checks"]} == {"openvino", "onnxruntime"}
    assert read(bundle).verdict == json.loads(json.dumps(verdict))


@pytest.mark.slow
def test_bf16_passes_its_own_limits(tiny_sd1, tiny_sd1_bundle, tmp_path):
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no native bf16")
    bundle = copy(tiny_sd1_bundle, tmp_path)
    verdict = verify(bundle, tiny_sd1, backends=["openvino"], precisions=["bf16"], prompts=["a cat"], steps=8)
    assert verdict["passed"], verdict["checks"]


def test_a_damaged_graph_fails(tiny_sd1, tiny_sd1_bundle, tmp_path, capsys):
    """One weight matrix of the denoiser is scaled by 1.05; hashes are made right again."""
    bundle = copy(tiny_sd1_bundle, tmp_path)
    data = bundle / "denoiser/unet/model.onnx.data"
    weights = np.fromfile(data, np.float32)
    weights[len(weights) // 2 :] *= 1.05
    weights.tofile(data)
    opened = read(bundle, check=False)
    files = {name: (size, sha256(bundle / name)) for name, (size, _) in opened.files.items()}
    write_manifest(replace(opened, files=files))
    arguments = ["verify", bundle, tiny_sd1, "--backend", "openvino", "--precision", "fp32", "-n", 4, "--prompt", "cat"]
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    assert exit.value.code == 1
    assert "FAIL openvino" in capsys.readouterr().out
    assert read(bundle).verdict["passed"] is False


def test_other_weights_are_refused(tiny_sd1_bundle, tiny_sd2v):
    with pytest.raises(CheckpointError, match="was exported from other weights"):
        verify(tiny_sd1_bundle, tiny_sd2v)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": -1},
        {"steps": 10**6},
        {"guidance": float("nan")},
        {"seed": -1},
        {"prompts": ["a" * 200_000]},
    ],
)
def test_settings_are_refused_before_anything_is_read(options):
    with pytest.raises(RequestError) as error:
        verify("nothing", "nowhere", **options)
    assert "\n" not in str(error.value)


def test_other_parts_are_refused_before_anything_is_drawn(tiny_sd1, tiny_sd1_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("stepforge.export.parity.verify.load_pipeline", None)
    for options, text in (
        ({"upscalers": {"x": tmp_path}}, "has no stage 'x'"),
        ({"experts": {"x": tmp_path}}, "are none"),
        ({"backends": ["onnxruntime", "onxruntime"]}, "'onxruntime' is unknown"),  # not merely left out
        ({"precisions": ["fp32", "fp23"]}, "'fp23' is unknown"),
        ({"precisions": ["fp32", "int8"]}, "has no int8 networks"),
    ):
        with pytest.raises((CheckpointError, BackendError), match=text):
            verify(tiny_sd1_bundle, tiny_sd1, **options)


def test_engines_that_are_not_installed_have_no_version(monkeypatch):
    monkeypatch.setattr("stepforge.export.parity.verify.LIBRARIES", ("torch", "no-such-package"))
    assert set(_versions()) == {"torch"}


def test_measures():
    image = np.zeros((4, 4, 3), np.uint8)
    assert psnr(image, image) == MAX_PSNR
    assert psnr(image, image + np.uint8(1)) == pytest.approx(20 * np.log10(255))
    assert relative_error(np.array([1.0, 2.0]), np.array([1.0, 1.0])) == pytest.approx(1 / np.sqrt(2))
    assert relative_error(np.array([np.nan]), np.array([1.0])) == np.inf


def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "bundle")
