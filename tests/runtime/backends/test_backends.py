"""One contract for every backend, on exported tiny models."""

import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from stepforge import Request, load
from stepforge.runtime.backends import (
    BACKENDS,
    available_threads,
    choose,
    gpu,
    onnxruntime,
    open_backend,
    openvino,
    reason,
    runnable,
)
from stepforge.runtime.backends.tensorrt.library import LIBRARIES, BuildOptions
from stepforge.runtime.backends.tensorrt.profiles import Use
from stepforge.runtime.bundle import UNET, ComponentId, read
from stepforge.runtime.errors import BackendError

REAL = ("openvino", "onnxruntime", "torch", "torch-exact")
PROVIDERS = {"onnxruntime-cuda": "CUDAExecutionProvider", "onnxruntime-tensorrt": "TensorrtExecutionProvider"}


def absent(name: str) -> str:
    """Why a GPU backend cannot be tried here; empty if it can."""
    if gpu.first_gpu() is None:
        return "there is no NVIDIA GPU"
    if name in LIBRARIES:
        return "" if find_spec(LIBRARIES[name].package) else f"{name} is not installed"
    return "" if PROVIDERS[name] in onnxruntime.onnxruntime.get_available_providers() else f"no {PROVIDERS[name]}"


ON_GPU = [
    pytest.param(name, marks=[pytest.mark.gpu, pytest.mark.skipif(bool(absent(name)), reason=absent(name) or "-")])
    for name in (*LIBRARIES, *PROVIDERS)
]


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """ready(backend, bundle): builds what the backend wants built."""
    monkeypatch.setenv("STEPFORGE_PLANS", str(tmp_path / "plans"))
    monkeypatch.setenv("STEPFORGE_SIZE", "32..128")

    def prepare(backend, bundle):
        if backend in LIBRARIES:
            from stepforge.export.engines.build import Order, build_plans

            use = Use.parse(read(bundle), ("1..8",), "32..128")
            list(build_plans(read(bundle), Order(backend, "fp32", use, BuildOptions())))

    return prepare


def denoiser_inputs(rows: int, height: int, width: int) -> dict[str, np.ndarray]:
    random = np.random.RandomState(rows)
    return {
        "sample": random.standard_normal((rows, 4, height, width)).astype(np.float32),
        "timestep": np.linspace(0, 999, rows).astype(np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, 32)).astype(np.float32),
    }


@pytest.mark.parametrize("backend", [*REAL, *ON_GPU])
def test_rows_are_independent(tiny_sd1_bundle, ready, backend):
    """A row's prediction does not depend on its neighbours: within 1e-5, summation order may change with the rows."""
    ready(backend, tiny_sd1_bundle)
    graph = open_backend(backend, read(tiny_sd1_bundle), precision="fp32").open(UNET)
    inputs = denoiser_inputs(3, 16, 24)
    together = np.array(graph(inputs)["prediction"])
    for row in range(3):
        alone = graph({name: value[row : row + 1] for name, value in inputs.items()})["prediction"]
        np.testing.assert_allclose(alone[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", [*REAL, *ON_GPU])
def test_a_repeated_call_is_bit_equal(tiny_sd1_bundle, ready, backend):
    ready(backend, tiny_sd1_bundle)
    graph = open_backend(backend, read(tiny_sd1_bundle), precision="fp32").open(UNET)
    inputs = denoiser_inputs(2, 16, 16)
    first = np.array(graph(inputs)["prediction"])
    graph(denoiser_inputs(3, 32, 16))
    assert np.array_equal(first, graph(inputs)["prediction"])


MIXED = [
    Request(prompt="cat", sampler="ddim", steps=4, guidance=3.0, seed=1),
    Request(prompt="dog", sampler="euler_a", steps=3, guidance=1.0, seed=2),
    Request(prompt="cat dog", sampler="dpmpp_2m", steps=5, guidance=7.5, seed=3, negative="dog"),
    Request(prompt="a (cat:1.3), " * 40, sampler="unipc", steps=4, guidance=5.0, seed=4),
    Request(prompt="cat", sampler="pndm", steps=4, guidance=2.0, seed=5, width=48, height=24),
]


@pytest.mark.parametrize("backend", [*REAL[:3], pytest.param(REAL[3], marks=pytest.mark.slow), *ON_GPU])
def test_batch_mates_do_not_change_an_image(tiny_sd1_bundle, ready, backend):
    ready(backend, tiny_sd1_bundle)
    with load(tiny_sd1_bundle, backend=backend, precision="fp32") as engine:
        alone = [engine.generate(request) for request in MIXED]
        together = engine.generate(MIXED)
    for a, b in zip(alone, together, strict=True):
        error = np.linalg.norm(a.latents - b.latents) / np.linalg.norm(a.latents)
        assert error <= 1e-5, a.request


@pytest.mark.parametrize("others", [REAL[1:], *ON_GPU])
def test_backends_agree(tiny_sd1_bundle, ready, others):
    results = []
    for backend in (REAL[0], *((others,) if isinstance(others, str) else others)):
        ready(backend, tiny_sd1_bundle)
        with load(tiny_sd1_bundle, backend=backend, precision="fp32") as engine:
            results.append(engine.generate(MIXED[0]).latents)
    for other in results[1:]:
        assert np.linalg.norm(results[0] - other) <= 1e-4 * np.linalg.norm(results[0])


@pytest.mark.parametrize("family", [pytest.param("sd2v", marks=pytest.mark.long), "sdxl"])
def test_every_family_generates(family, request):
    with load(request.getfixturevalue(f"tiny_{family}_bundle"), precision="fp32") as engine:
        result = engine.generate(Request(prompt="cat", steps=3))
    assert result.images[0].size == (32, 32)
    assert result.stats.rows["unet"] == 6


H100 = gpu.Gpu("NVIDIA H100", (9, 0))


def test_auto_says_what_it_chose_and_why_not_the_better_ones(tiny_sd1_bundle, monkeypatch, caplog):
    bundle = read(tiny_sd1_bundle)
    monkeypatch.setattr(gpu, "first_gpu", lambda: None)
    chosen = choose(bundle, precision="fp32")
    assert str(chosen) == "openvino fp32 (not torch: no NVIDIA GPU)"
    assert chosen.backend.name == "openvino"
    monkeypatch.setitem(BACKENDS, "openvino", "stepforge_not_installed:OpenVino")
    with caplog.at_level("INFO", "stepforge.runtime.backends"):
        assert open_backend("auto", bundle).name == "onnxruntime"
    why = "backend 'openvino' needs the package stepforge_not_installed; pip install stepforge_not_installed"
    assert caplog.messages == [f"backend auto is onnxruntime fp32 (not torch: no NVIDIA GPU; not openvino: {why})"]
    with pytest.raises(
        BackendError, match=r"no backend can run here: torch: .*; openvino: .* does not compute in fp16"
    ):
        open_backend("auto", bundle, precision="fp16")
    assert available_threads() >= 1


def test_a_reason_is_never_empty():
    assert [reason(error) for error in (RuntimeError(), RuntimeError("\n\n"), RuntimeError("\n a\nb\n"))] == [
        "RuntimeError", "RuntimeError", "a",
    ]  # fmt: skip
    assert reason(RuntimeError("a\nb\n\n"), -1) == "b"
    assert reason(RuntimeError("load failed:\n\n in node n:\nbad type\nx")) == "load failed: in node n: bad type"
    assert reason(RuntimeError("a\nfailed:\n"), -1) == "failed"
    code = "[ONNXRuntimeError] : 1 : FAIL : "
    cases = [code + "Load model from /a b/m.onnx failed:Type Error: x", code + "Load model from m failed:\nx", code, ""]
    assert [onnxruntime.why(RuntimeError(text)) for text in cases] == [
        "Type Error: x",
        "x",
        "[ONNXRuntimeError] : 1 : FAIL",
        "RuntimeError",
    ]
    node = "While validating ONNX node '<Node(Add): n>': Check 'x' failed at b.cpp:3:"
    long = f"Exception from a.cpp:8:\n-- Add-20:\n{node}\nTypes differ.\n\nSummary:"
    assert openvino.why(RuntimeError(long)) == "Add n: Types differ."
    assert openvino.why(RuntimeError("\n")) == "RuntimeError"


@pytest.mark.parametrize(
    ("found", "version", "missing", "name", "why"),
    [
        (H100, "2.13.0", "", "torch", "NVIDIA H100, sm_90"),
        (H100, "2.13.0+cpu", "", "openvino", "NVIDIA H100, sm_90, but this torch is built for the CPU"),
        (H100, "2.13.0", "triton", "openvino", "triton is not installed"),
        (gpu.Gpu("Tesla T4", (7, 5)), "2.13.0", "", "openvino", "Tesla T4, sm_75 is older than sm_80"),
    ],
)
def test_auto_takes_torch_on_a_gpu(monkeypatch, found, version, missing, name, why):
    monkeypatch.setattr(gpu, "first_gpu", lambda: found)
    monkeypatch.setattr(gpu, "version", lambda package: version)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda package: None if package == missing else object())
    assert runnable()[0] == name
    assert why in gpu.torch_on_gpu()[1]


NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **handle) { *handle = (void *)7; return i > 1 ? 6 : 0; }
int nvmlDeviceGetName(void *handle, char *name, unsigned length) { strcpy(name, "Pretended"); return handle != (void *)7; }
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) { *major = 8; *minor = 9; return 0; }
"""


def test_a_gpu_is_found_by_its_driver(monkeypatch, tmp_path):
    """Against a driver library of our own, so that the calls' signatures run where there is no driver."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "nvml.c").write_text(NVML, "utf-8")
    library = tmp_path / "nvml.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    monkeypatch.setattr(gpu, "NVML", str(library))
    for visible, found in ((None, True), ("1", True), ("GPU-af3", True), ("2", False), ("", False), ("-1", False)):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu.first_gpu() == (gpu.Gpu("Pretended", (8, 9)) if found else None)
    monkeypatch.setattr(gpu, "NVML", str(tmp_path / "none.so"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu.first_gpu() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "magic"}, "choose one of auto, openvino, onnxruntime, onnxruntime-cuda, .*, tensorrt-rtx, fake"),
        ({"precision": "fp64"}, "choose one of auto, fp32, bf16, fp16"),
        ({"backend": "onnxruntime", "precision": "bf16"}, "onnxruntime has no bf16 kernels"),
        ({"backend": "openvino", "precision": "fp16"}, "'openvino' does not compute in fp16; use fp32 or bf16"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 100_000}, "threads is 100000; it must be a whole number from 1 to"),
        ({"threads": True}, "threads is True"),
        ({"threads": 1.5}, "threads is 1.5"),
    ],
)
def test_refusals(tiny_sd1_bundle, options, message):
    with pytest.raises(BackendError, match=message):
        load(tiny_sd1_bundle, **options)


def test_a_missing_library_is_named(tiny_sd1_bundle, monkeypatch):
    monkeypatch.setitem(BACKENDS, "openvino", "stepforge_not_installed:OpenVino")
    with pytest.raises(BackendError, match="pip install stepforge_not_installed"):
        load(tiny_sd1_bundle, backend="openvino")


@pytest.mark.parametrize("backend", REAL)
def test_a_graph_that_is_no_graph_is_one_line(tiny_sd1_bundle, tmp_path, backend):
    import shutil
    from dataclasses import replace

    folder = tmp_path / "bundle"
    shutil.copytree(tiny_sd1_bundle, folder)
    bundle = read(folder)
    component = bundle.components[UNET]
    for graph in (component.graph, *component.derived.values()):
        (folder / graph).write_bytes(b"not a graph")
    with pytest.raises(BackendError, match="is no graph of denoiser/unet: it is not a protobuf message") as caught:
        open_backend(backend, replace(bundle), precision="fp32").open(UNET)
    assert "\n" not in str(caught.value)


def test_the_cache_keeps_precisions_apart(tiny_sd1_control_bundle, tmp_path, monkeypatch):
    """OpenVINO itself takes what it compiled for f32 out of its cache for bf16; the results were NaN, or the process ended."""
    monkeypatch.setenv("STEPFORGE_CACHE", str(tmp_path))
    bundle = read(tiny_sd1_control_bundle)
    random = np.random.RandomState(0)
    inputs = {**denoiser_inputs(2, 32, 32), "hint": random.standard_normal((2, 32, 32, 32)).astype(np.float32)}
    inputs["scale"] = np.ones((2, 5), np.float32)
    found = {}
    for precision in ("fp32", "bf16"):
        try:
            graph = open_backend("openvino", bundle, precision=precision).open(ComponentId("control_residuals", "a"))
        except BackendError:
            pytest.skip("this processor has no native bf16")
        found[precision] = {name: np.array(value) for name, value in graph(inputs).items()}
    for name, exact in found["fp32"].items():
        error = np.linalg.norm(found["bf16"][name] - exact) / np.linalg.norm(exact)
        assert 0 < error <= 5e-2, name  # export.parity's limit of a component in bf16


@pytest.mark.slow
def test_memory_reaches_a_plateau_over_many_shapes(tiny_sd1_bundle):
    """72 latent sizes, one call each: the last 24 may not take half of what the first 24 took (all of it without a bound)."""
    code = """
import sys
import numpy as np
from pathlib import Path
from stepforge.runtime.backends import open_backend
from stepforge.runtime.bundle import UNET, read

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

graph = open_backend("openvino", read(sys.argv[1]), precision="fp32", threads=1).open(UNET)
found = []
for height in range(8, 32, 2):
    for width in range(8, 20, 2):
        graph({"sample": np.ones((1, 4, height, width), np.float32), "timestep": np.ones(1, np.float32),
               "encoder_hidden_states": np.ones((1, 77, 32), np.float32)})
        found.append(resident())
print(found[23] - found[0], found[71] - found[47])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_sd1_bundle)], capture_output=True, text=True, check=True
    )
    first, last = map(int, done.stdout.split())
    assert last < first / 2
