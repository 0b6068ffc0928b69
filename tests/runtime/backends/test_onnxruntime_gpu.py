"""ONNX Runtime's GPU backends, with the CPU's provider in the place of CUDA's: binding, banks, and what is read back."""

from dataclasses import dataclass

import numpy as np
import onnxruntime
import pytest

from stepforge.runtime.backends import Banks, open_backend
from stepforge.runtime.backends import onnxruntime_gpu as gpu
from stepforge.runtime.bundle import UNET, read
from stepforge.runtime.errors import BackendError


@dataclass(frozen=True)
class NoOptions:
    """The CPU's provider has none."""


@dataclass(frozen=True)
class Device:
    device_id: int = 0


class OnCpu(gpu.OnnxRuntimeCuda):
    provider, device, options = "CPUExecutionProvider", "cpu", NoOptions()

    def _options(self, component):
        return self.options


def call(rows, side):
    random = np.random.RandomState(rows)
    return {
        "sample": random.standard_normal((rows, 4, side, side)).astype(np.float32),
        "timestep": np.linspace(999, 1, rows).astype(np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, 32)).astype(np.float32),
        "adapter": np.ones(rows, np.int64),
        "adapter_strength": np.ones((rows, 1, 1), np.float32),
    }


def test_bound_calls_are_those_of_the_cpu_backend(tiny_sd1_banks):
    """Sizes that change, and banks that are written between calls; on the CPU a bound bank is the array itself, so that what a
    write without a version does is not seen here."""
    bundle = read(tiny_sd1_banks)
    random = np.random.RandomState(0)
    shapes = {t.name: t.shape for t in bundle.components[UNET].inputs if ".lora_" in t.name}
    banks = Banks({n: np.zeros(s, np.float32) for n, s in shapes.items()}, np.zeros(4, np.int64))
    bound = OnCpu(bundle, precision="auto", threads=1).open(UNET, banks)
    plain = open_backend("onnxruntime", bundle, threads=1).open(UNET, dict(banks))
    for rows, side in ((2, 16), (3, 32), (2, 16)):
        wanted = np.array(plain(call(rows, side))["prediction"])
        assert np.array_equal(bound(call(rows, side))["prediction"], wanted)
    for array in banks.values():
        array[1] = random.standard_normal(array[1].shape) * 0.1
    banks.versions[1] += 1
    found = np.array(bound(call(2, 16))["prediction"])
    assert not np.allclose(found, wanted)
    assert np.array_equal(found, plain(call(2, 16))["prediction"])


def test_what_the_session_is_not_is_an_error(tiny_sd1_bundle, monkeypatch):
    bundle = read(tiny_sd1_bundle)
    for name in ("onnxruntime-cuda", "onnxruntime-tensorrt"):
        with pytest.raises(
            BackendError, match=r"has no \w+ExecutionProvider; pip uninstall onnxruntime, then pip install"
        ):
            open_backend(name, bundle)
    with pytest.raises(BackendError, match="computes in the type of the bundle's weights, fp32; export it in fp16"):
        OnCpu(bundle, precision="fp16", threads=1)
    opened = OnCpu(bundle, precision="auto", threads=1)
    monkeypatch.setattr(OnCpu, "options", Device())
    with pytest.raises(BackendError, match="has not taken device_id=0"):
        opened.open(UNET)
    monkeypatch.setattr(OnCpu, "options", NoOptions())

    class Cuda(gpu.OnnxRuntimeCuda):
        """ONNX Runtime takes the CPU for CUDA without a word, as it does where CUDA's libraries are missing."""

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: session(path, options, ["CPUExecutionProvider"]),
    )
    with pytest.raises(BackendError, match="has fallen back from CUDAExecutionProvider to CPUExecutionProvider"):
        Cuda(bundle, precision="auto", threads=1).open(UNET)


@pytest.fixture
def with_tensorrt(monkeypatch, tmp_path):
    """ONNX Runtime as if it had TensorRT's provider."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path))


@pytest.mark.usefixtures("with_tensorrt")
def test_tensorrts_shapes_follow_from_the_declared_use(tiny_sd1_control_bundle, monkeypatch):
    """Every dynamic input in each of the three lists, residuals from none to full; another use is another folder of engines."""
    bundle = read(tiny_sd1_control_bundle)
    folders = set()
    for rows, size, sample in (
        ("", "", ["1x4x16x16", "8x4x16x16", "8x4x16x16"]),
        ("1..4", "32..64", ["1x4x16x16", "4x4x16x16", "4x4x32x32"]),
    ):
        monkeypatch.setenv("STEPFORGE_ROWS", rows)
        monkeypatch.setenv("STEPFORGE_SIZE", size)
        opened = gpu.OnnxRuntimeTensorRt(bundle, precision="auto", threads=1)
        options = opened._options(UNET)
        stated = [dict(part.split(":") for part in getattr(options, f"trt_profile_{which}_shapes").split(","))
                  for which in ("min", "opt", "max")]  # fmt: skip
        dynamic = {t.name for t in bundle.components[UNET].inputs if any(isinstance(s, str) for s in t.shape)}
        assert all(one.keys() == dynamic for one in stated)
        assert [one["sample"] for one in stated] == sample
        assert stated[0]["residual_0"] == "1x32x1x1"
        assert stated[2]["residual_0"] == sample[2].replace("x4x", "x32x")
        taken = gpu.texts(options)
        assert (taken["trt_engine_cache_enable"], taken["device_id"]) == ("1", "0")
        assert not set(taken.values()) & {"", "True", "False"}
        folders.add(options.trt_engine_cache_path)
        inputs = {name: np.zeros(list(map(int, shape.split("x"))), np.float32) for name, shape in stated[2].items()}
        opened.check_shapes(UNET, inputs)
        with pytest.raises(
            BackendError, match=r"with sample of \[1, 4, 16, 16\] to .*, not \[9, 4, 8, 8\]; STEPFORGE_ROWS and"
        ):
            opened.check_shapes(UNET, {"sample": np.zeros((9, 4, 8, 8), np.float32)})
    assert len(folders) == 2
    monkeypatch.setenv("STEPFORGE_CACHE", "")
    assert gpu.texts(opened._options(UNET)).get("trt_engine_cache_path") is None
    monkeypatch.setenv("STEPFORGE_ROWS", "4..1")
    with pytest.raises(BackendError, match=r"STEPFORGE_ROWS '4\.\.1' is not understood"):
        gpu.OnnxRuntimeTensorRt(bundle, precision="auto", threads=1)


def test_heavy_operators_on_the_cpu_are_an_error(tiny_sd1_bundle):
    opened = OnCpu(read(tiny_sd1_bundle), precision="auto", threads=1)

    class Part:
        ep_name = "CPUExecutionProvider"

        def __init__(self, *kinds):
            self.kinds = kinds

        def get_nodes(self):
            return [type("Node", (), {"op_type": kind}) for kind in self.kinds]

    class Session:
        def __init__(self, *kinds):
            self.part = Part(*kinds)

        def get_providers(self):
            return ["CUDAExecutionProvider"]

        def get_provider_options(self):
            return {}

        def get_provider_graph_assignment_info(self):
            return [self.part]

    opened.provider = "CUDAExecutionProvider"
    opened._check(Session("Shape", "Gather", "Concat"), {})
    with pytest.raises(BackendError, match="would run Conv, MatMul on the CPU"):
        opened._check(Session("Shape", "MatMul", "Conv"), {})
