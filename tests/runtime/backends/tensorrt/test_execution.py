"""The TensorRT backend against a stand-in (stub.py): the same images as ONNX Runtime, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
import stub

from stepforge import BackendError, Control, Request, load
from stepforge.runtime.backends import open_backend
from stepforge.runtime.backends.tensorrt import plans
from stepforge.runtime.bundle import UNET, read

pytestmark = pytest.mark.slow  # the quick lane has three minutes

ASK = {"prompt": "cat", "steps": 3, "sampler": "euler_a", "guidance": 3.0, "width": 32, "height": 32}


def hint(seed):
    return np.random.RandomState(seed).randint(0, 256, (64, 64, 3), np.uint8)


def test_images_are_those_of_onnxruntime(tiny_sd1_control_bundle, tmp_path, monkeypatch):
    """ControlNets on some rows, adapters that come and go, reuse variants, more rows than a profile holds: bit for bit what
    ONNX Runtime computes of the same rows, but for other row counts in a call, 1e-5."""
    opened = stub.install(monkeypatch, tmp_path)
    bundle = read(tiny_sd1_control_bundle)
    stub.build(bundle, rows=("1..2", "3..4"), size="32")
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    random = np.random.RandomState(2)
    for name in "ab":
        pair = {f"{path}.lora_A.weight": (4, 32), f"{path}.lora_B.weight": (32, 4)}
        pair = {key: random.standard_normal(shape).astype(np.float32) for key, shape in pair.items()}
        save_file(pair, tmp_path / f"{name}.safetensors")
    net = sorted(bundle.controls)[0]
    requests = [
        Request(**ASK),
        Request(**ASK, controls=(Control(name=net, image=hint(1)),)),
        Request(**ASK, seed=3, adapters={"a": 0.7}),
        Request(**ASK, seed=4, reuse="deepcache(2)"),
    ]
    found = {}
    for name in ("onnxruntime", "tensorrt-rtx"):
        with load(tiny_sd1_control_bundle, backend=name, precision="fp32") as engine:
            for adapter in "ab":
                engine.adapters.load(adapter, tmp_path / f"{adapter}.safetensors")
            swaps = [engine.generate(Request(**ASK, adapters={one: 1.0})).latents for one in "aba"]
            found[name] = swaps, [result.latents for result in engine.generate(requests)]
    swaps, together = found["tensorrt-rtx"]
    assert np.array_equal(swaps[0], swaps[2])
    assert not np.allclose(swaps[0], swaps[1])
    for a, b in zip((*swaps, *together), (*found["onnxruntime"][0], *found["onnxruntime"][1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)
    steps = opened[0]
    assert 0 < steps.recordings < 14
    assert steps.replays > steps.recordings


def test_rows_of_padding_and_growing_buffers_leave_no_trace(tiny_sd1_control_bundle, tmp_path, monkeypatch):
    """Three rows run as four; a larger call moves buffers and voids what was recorded with the old ones."""
    stub.install(monkeypatch, tmp_path)
    bundle = read(tiny_sd1_control_bundle)
    stub.build(bundle, rows=("1..4",), size="32..64")
    graph = open_backend("tensorrt-rtx", bundle, precision="fp32").open(UNET, zero_banks(bundle))
    reference = open_backend("onnxruntime", bundle).open(UNET, zero_banks(bundle))
    for rows, side in ((3, 16), (1, 16), (4, 32), (3, 16), (2, 32)):
        inputs = denoiser_inputs(bundle, rows, side)
        mine, other = graph(inputs), reference(inputs)
        for name, value in other.items():
            np.testing.assert_allclose(mine[name], value, rtol=0, atol=2e-5, err_msg=f"{name} {rows} {side}")
    with pytest.raises(
        BackendError, match=r"takes sample of \[1, 4, 16, 16\] to \[4, 4, 32, 32\], not \[1, 4, 40, 40\]"
    ):
        graph(denoiser_inputs(bundle, 1, 40))


def zero_banks(bundle):
    return {t.name: np.zeros(t.shape, np.float32) for t in bundle.components[UNET].inputs if ".lora_" in t.name}


def denoiser_inputs(bundle, rows, side):
    random = np.random.RandomState(rows)
    inputs = {
        "sample": random.standard_normal((rows, 4, side, side)).astype(np.float32),
        "timestep": np.linspace(1, 999, rows).astype(np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, 32)).astype(np.float32),
        "adapter": np.zeros(rows, np.int64),
        "adapter_strength": np.zeros((rows, 1, 1), np.float32),
    }
    for tensor in bundle.components[UNET].inputs:
        if tensor.name.startswith("residual_"):
            inputs[tensor.name] = np.zeros((1, tensor.shape[1], 1, 1), np.float32)
    return inputs


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": "1.6.0.1"}, "was built by tensorrt-rtx 1.6.0.1, and 1.7.1.116 is installed"),
        ({"targets": ("sm_86",)}, "was built for sm_86, and this is sm_89"),
        ({"gpu": "RTX 3090, sm_86, driver 1"}, "was built on RTX 3090, sm_86, driver 1, and this is Pretended, sm_89"),
        ({"library": "tensorrt"}, "was built by tensorrt, not by tensorrt-rtx"),
        ({"precision": "fp16"}, "computes in fp16"),
        ({"component_hash": "0" * 64}, "was built of other files"),
    ],
)
def test_foreign_and_stale_plans_are_not_loaded(tiny_sd1_bundle, tmp_path, monkeypatch, changes, why):
    stub.install(monkeypatch, tmp_path)
    bundle = read(tiny_sd1_bundle)
    stub.build(bundle, rows=("1..2",), **changes)
    with pytest.raises(
        BackendError, match=r"there is no plan of denoiser/unet in fp32.*run `stepforge build"
    ) as caught:
        open_backend("tensorrt-rtx", bundle, precision="fp32").open(UNET)
    assert why in str(caught.value)
    [plan] = plans.plans(bundle, UNET)
    assert plan.card.component == "denoiser/unet"


def test_damaged_plans_are_refused(tiny_sd1_bundle, tmp_path, monkeypatch):
    stub.install(monkeypatch, tmp_path)
    bundle = read(tiny_sd1_bundle)
    stub.build(bundle, rows=("1..2",))
    [plan] = plans.plans(bundle, UNET)
    file = plan.folder / plans.PLAN
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    opened = open_backend("tensorrt-rtx", bundle)
    assert opened.precision == "fp32"
    with pytest.raises(BackendError, match=r"engine.plan is damaged; build it again"):
        opened.open(UNET)
    card = plan.folder / plans.CARD
    card.write_text(card.read_text().replace('"profiles"', '"profile"'), "utf-8")
    [text] = plans.plans(bundle, UNET)
    assert text.startswith("key-0 is damaged: ")
    with pytest.raises(BackendError, match="key-0 is damaged"):
        open_backend("tensorrt-rtx", bundle)


def test_without_a_gpu_or_the_package_one_line_says_so(tiny_sd1_bundle, monkeypatch):
    from stepforge.runtime.backends import gpu
    from stepforge.runtime.backends.tensorrt import backend

    monkeypatch.setattr(gpu, "first_gpu", lambda: None)
    monkeypatch.setattr(backend, "first_gpu", lambda: None)
    for name in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(BackendError, match=rf"needs the package|{name} needs an NVIDIA GPU"):
            load(tiny_sd1_bundle, backend=name)
