"""Plans on a GPU: `make test-gpu` with tensorrt, tensorrt-rtx or onnxruntime-gpu installed. Builds what it runs."""

import time
from importlib.util import find_spec

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from stepforge import Request, load
from stepforge.export.engines.build import Order, build_plans
from stepforge.runtime.backends import open_backend
from stepforge.runtime.backends.gpu import first_gpu
from stepforge.runtime.backends.tensorrt.library import LIBRARIES, BuildOptions
from stepforge.runtime.backends.tensorrt.profiles import Use
from stepforge.runtime.bundle import UNET, read
from stepforge.runtime.errors import BackendError

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(first_gpu() is None, reason="there is no NVIDIA GPU")]
# ‖ours − CPU in fp32‖ / ‖CPU in fp32‖ of a denoiser call, as in the torch backend's tests
LIMITS = {"fp32": 1e-4, "fp16": 4e-3, "bf16": 3e-2}
ASK = {"prompt": "cat", "steps": 3, "guidance": 3.0, "width": 64, "height": 64}
PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CASES = [
    *((name, precision, "") for name in LIBRARIES for precision in LIMITS),
    *(("tensorrt", precision, "plugin") for precision in ("fp16", "bf16")),
    *((name, "fp32", "") for name in ("onnxruntime-cuda", "onnxruntime-tensorrt")),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(filter(None, case)))
def opened(request, tmp_path, monkeypatch):
    """A bundle with banks, its backend and precision, with plans where the backend wants some."""
    name, precision, with_plugin = request.param
    monkeypatch.setenv("STEPFORGE_PLANS", str(tmp_path / "plans"))
    monkeypatch.setenv("STEPFORGE_ROWS", "1..11")
    monkeypatch.setenv("STEPFORGE_SIZE", "64..128")
    if name in LIBRARIES and find_spec(LIBRARIES[name].package) is None:
        pytest.skip(f"{name} is not installed")
    bundle = read(request.getfixturevalue("tiny_sd1_banks"))
    if name in LIBRARIES:
        options = BuildOptions(lora_plugin=bool(with_plugin))
        order = Order(name, precision, Use.parse(bundle, ("1..2", "3..8"), "64..128"), options)
        assert all(built.is_new for built in build_plans(bundle, order))
    try:
        open_backend(name, bundle, precision=precision)
    except BackendError as error:
        pytest.skip(str(error))
    return bundle, name, precision


def banks(bundle, dtype):
    """Small adapters in all slots but the first, as a backend wants them."""
    random = np.random.RandomState(1)
    found = {}
    for tensor in bundle.components[UNET].inputs:
        if ".lora_" in tensor.name:
            values = (random.standard_normal(tensor.shape) * 0.05).astype(np.float32)
            values[0] = 0
            found[tensor.name] = values.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype == np.uint16 else values
    return found


def call(rows, side=32):
    random = np.random.RandomState(rows)
    return {
        "sample": random.standard_normal((rows, 4, side, side)).astype(np.float32),
        "timestep": np.linspace(999, 1, rows).astype(np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, 32)).astype(np.float32),
        "adapter": np.arange(rows) % 3,
        "adapter_strength": np.linspace(0.5, 1.5, rows).astype(np.float32).reshape(rows, 1, 1),
    }


def test_calls_agree_with_the_cpu_and_repeat(opened):
    """Every bucket and two sizes; the same call again is bit-equal after others, by the recorded graph."""
    bundle, name, precision = opened
    backend, reference = open_backend(name, bundle, precision=precision), open_backend("onnxruntime", bundle)
    graph, exact = (one.open(UNET, banks(bundle, one.bank_dtype(UNET))) for one in (backend, reference))
    first = {}
    for rows, side in ((2, 32), (3, 32), (1, 64), (8, 32), (11, 32)):
        mine, wanted = (np.array(g(call(rows, side))["prediction"]) for g in (graph, exact))
        assert np.linalg.norm(mine - wanted) <= LIMITS[precision] * np.linalg.norm(wanted), (rows, side)
        first[rows, side] = mine
    for (rows, side), mine in first.items():
        assert np.array_equal(graph(call(rows, side))["prediction"], mine), (rows, side)


def test_adapters_come_and_go(opened, tmp_path):
    """A to B and back to A gives the first image bit for bit. Printed: seconds of the first image, of one without a swap, of
    two with one."""
    bundle, name, precision = opened
    random = np.random.RandomState(2)
    for adapter in "ab":
        pair = {f"{PATH}.lora_A.weight": (4, 32), f"{PATH}.lora_B.weight": (32, 4)}
        pair = {key: random.standard_normal(shape).astype(np.float32) for key, shape in pair.items()}
        save_file(pair, tmp_path / f"{adapter}.safetensors")
    with load(bundle.path, backend=name, precision=precision) as engine:
        for adapter in "ab":
            engine.adapters.load(adapter, tmp_path / f"{adapter}.safetensors")
        found = []
        for adapter in "aaba":
            started = time.perf_counter()
            found.append(engine.generate(Request(**ASK, adapters={adapter: 1.0})).latents)
            print(f"{name} {precision}: {adapter} {time.perf_counter() - started:.3f} s")
        plain = engine.generate(Request(**ASK)).latents
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[3])
    assert not np.allclose(found[0], found[2])
    assert not np.allclose(found[0], plain)
