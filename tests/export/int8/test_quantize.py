"""INT8 graphs: their arithmetic against integers in NumPy, and what must hold of a quantised bundle."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
from PIL import Image
from safetensors.numpy import save_file

from stepforge import Request, load
from stepforge.export.int8 import calibrate, quantize
from stepforge.export.int8.choose import choose
from stepforge.export.int8.quantize import Calibration, quantize_bundle
from stepforge.export.int8.rewrite import Range, simulation, weight_scales, write_quantized
from stepforge.export.parity.measures import relative_error
from stepforge.export.parity.verify import LIMITS
from stepforge.runtime.backends import choose as choose_backend
from stepforge.runtime.backends import open_backend
from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.bundle import UNET, Bundle, ComponentId, read
from stepforge.runtime.cli.main import main
from stepforge.runtime.errors import BackendError, CheckpointError, RequestError

pytestmark = pytest.mark.slow  # the quick lane has three minutes

SIZE = {"width": 64, "height": 64}  # twice the model's own: more places for few integers
CALIBRATION = Calibration(("a cat",), steps=2, **SIZE)
ENGINES = ("openvino", "onnxruntime")


@pytest.fixture(scope="module")
def quantised(tiny_sd1_control_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two ControlNets, DeepCache, T-GATE and LoRA banks; all their layers in integers."""
    out = tmp_path_factory.mktemp("int8") / "tiny-sd1"
    return quantize_bundle(tiny_sd1_control_bundle, CALIBRATION, out=out, limit=1.0)[0]


@pytest.fixture(scope="module")
def adapter(quantised: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    random, tensors = np.random.RandomState(5), {}
    for module in quantised.components[UNET].modules:
        if module.kind == "linear" and "transformer_blocks" in module.path:
            key = f"lora_unet_{module.path.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = random.standard_normal((4, module.shape[1])).astype(np.float32) * 0.3
            tensors[f"{key}.lora_up.weight"] = random.standard_normal((module.shape[0], 4)).astype(np.float32) * 0.3
    file = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    save_file(tensors, file)
    return file


def write_graph(folder: Path) -> dict[str, np.ndarray]:
    """x -> 3x3 convolution with padding -> rows of channels -> linear layer; returns the weights."""
    random = np.random.RandomState(0)
    weights = {"conv.weight": random.standard_normal((5, 3, 3, 3)), "linear.weight": random.standard_normal((5, 7))}
    weights = {
        name: (value * 10 ** random.uniform(-2, 1, value.shape[-1])).astype(np.float32)
        for name, value in weights.items()
    }
    nodes = [
        onnx.helper.make_node("Conv", ["x", "conv.weight"], ["c"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]),
        onnx.helper.make_node("MatMul", ["t", "linear.weight"], ["y"]),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", [2, 3, 4, 4]), ("y", [2, 4, 4, 7]))
    ]
    graph = onnx.helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()]
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        folder / "g.onnx",
    )
    return weights


def integers(x: np.ndarray, range_: Range) -> np.ndarray:
    """What an activation's integers stand for, less the zero point."""
    q = np.rint(x.astype(np.float32) / np.float32(range_.scale)) + range_.zero_point
    return np.clip(q, 0, 255).astype(np.int64) - range_.zero_point


def test_products_are_those_of_integers(tmp_path):
    """Each layer alone and both, on every engine and in the simulation; values beyond the range saturate."""
    weights = write_graph(tmp_path)
    ranges = {"conv": Range(-1.5, 2.5), "linear": Range(-20.0, 30.0)}
    steps = np.random.RandomState(1).randint(-130, 190, (2, 3, 4, 4))  # from below the range to above it
    offsets = np.random.RandomState(2).uniform(-0.4, 0.4, steps.shape)  # engines round halves each in its own way
    x = ((steps + offsets) * ranges["conv"].scale).astype(np.float32)
    scales = {
        name: weight_scales(ir.val("w", const_value=ir.tensor(weights[f"{name}.weight"])), axis)
        for name, axis in (("conv", 0), ("linear", 1))
    }
    assert [len(value) for value in scales.values()] == [5, 7]

    def expected(chosen):
        q = integers(x, ranges["conv"]) if "conv" in chosen else x.astype(np.float64)
        w = weights["conv.weight"].astype(np.float64)
        factor = np.ones(5)
        if "conv" in chosen:
            w = np.rint(w / scales["conv"][:, None, None, None])
            assert np.abs(w).max() == 63
            factor = scales["conv"].astype(np.float64) * ranges["conv"].scale
        padded = np.pad(q, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        y = np.einsum("nchwij,ocij->nhwo", windows, w) * factor
        if "linear" not in chosen:
            return y @ weights["linear.weight"].astype(np.float64)
        w = np.rint(weights["linear.weight"] / scales["linear"])
        return (integers(y, ranges["linear"]) @ w) * scales["linear"].astype(np.float64) * ranges["linear"].scale

    model, paths = simulation(tmp_path / "g.onnx", ranges)
    assert paths == ("conv", "linear")
    ir.save(model, tmp_path / "s.onnx")
    simulated = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    for chosen in ((), ("conv",), ("linear",), ("conv", "linear")):
        write_quantized(tmp_path / "g.onnx", tmp_path / "q.onnx", ranges, chosen)
        onnx.checker.check_model(tmp_path / "q.onnx", full_check=True)
        wanted = expected(chosen)
        results = {
            "onnxruntime": onnxruntime.InferenceSession(tmp_path / "q.onnx").run(None, {"x": x})[0],
            "openvino": openvino.Core().compile_model(tmp_path / "q.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
                {"x": x}
            )[0],
            "simulation": simulated.run(None, {"x": x, "switches": np.array([name in chosen for name in paths])})[0],
        }
        for name, found in results.items():
            # fp32 sums; the second layer may round a value in the middle of two integers the other way: a step of 0.2
            limit = 5e-3 if chosen == ("conv", "linear") else 1e-3 if chosen == ("linear",) else 1e-5
            assert relative_error(found, wanted) < limit, (name, chosen)


def test_choice_gives_up_what_costs_most(tmp_path):
    """Errors whose squares add up: the fewest groups go, the most sensitive for their work first."""
    paths = ("a.resnets.0.conv1", "a.resnets.0.conv2", "b.ff.net", "c", "tiny")
    work = dict(zip(paths, (30.0, 30.0, 30.0, 10.0, 0.01), strict=True))
    alone = np.array([1e-2, 1e-2, 3e-2, 2e-2, 9e-1])

    def errors(switches):
        return np.array([1.0, 0.5]) * np.sqrt((alone**2 * switches).sum())

    found = choose(paths, work, errors, 2.5e-2)
    assert found is not None
    assert found.paths == {"a.resnets.0.conv1", "a.resnets.0.conv2"}
    assert [group.name for group in found.kept] == ["c", "b.ff.net", "tiny"]
    assert found.error == pytest.approx(np.sqrt(2) * 1e-2)
    assert choose(paths, work, errors, 1e-3) is None
    everything = choose(paths, work, errors, 1.0)
    assert everything is not None
    assert [group.name for group in everything.kept] == ["tiny"]


def test_graphs_share_weights(quantised, tiny_sd1_control_bundle):
    """Every network and variant of the two roles has integers for each engine; nothing else of the bundle changes."""
    before = read(tiny_sd1_control_bundle)
    for key, entry in quantised.components.items():
        assert entry.has_int8 == (key.role in ("denoiser", "control_residuals")), key
        own = {"int8", *(f"int8-{name}" for name in before.components[key].derived)} if entry.has_int8 else set()
        assert entry.derived.keys() - before.components[key].derived.keys() == own
    assert {name: entry for name, entry in quantised.files.items() if "int8" not in name} == before.files
    assert all(name.endswith(".int8.onnx") for name in quantised.files.keys() - before.files.keys())
    kinds = [node.op_type for node in ir.load(quantised.file(quantised.components[UNET].derived["int8"])).graph]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") > 10
    assert read(quantised.path).source["int8"].keys() == {"denoiser/unet", "control/a/residuals", "control/b/residuals"}


@pytest.mark.long  # a calibration of its own
def test_a_quantised_bundle_again_replaces_its_own_graphs(quantised):
    assert quantize_bundle(quantised.path, CALIBRATION, limit=1.0)[0].digest == quantised.digest


HINT = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (1, 64, 3)))
COMMON = {"prompt": "a cat", "steps": 4, "sampler": "ddim", **SIZE}
REQUESTS = [
    Request(**COMMON),
    Request(**COMMON, adapters={"x": 1.0}),
    Request(**COMMON, controls={"name": "a", "image": HINT}),
    Request(**COMMON, controls={"name": "b", "image": HINT}, adapters={"x": 0.5}, seed=2),
    Request(**COMMON, reuse="deepcache(2)", controls={"name": "a", "image": HINT}),
    Request(**COMMON, reuse="tgate(0.5)"),
    Request(prompt="a dog", steps=3, sampler="dpmpp_2m", guidance=1.0, **SIZE),
]


@pytest.fixture(scope="module")
def floats(quantised: Bundle, adapter: Path) -> list[np.ndarray]:
    """Images of `REQUESTS` in fp32, of one engine for both: engines agree in fp32 to LIMITS["fp32"], far below int8's."""
    with load(quantised.path, backend="onnxruntime", precision="fp32", threads=1) as engine:
        engine.adapters.load("x", adapter)
        return [np.asarray(engine.generate(request).images[0]) for request in REQUESTS]


# both engines' products above; whole batches in the suite on the one that is chosen on CPUs
@pytest.mark.parametrize("name", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.long)])
def test_requests_of_a_batch_are_their_single_runs(quantised, adapter, floats, name):
    """LoRA, ControlNet, reuse and other samplers in one batch; an adapter that comes and goes leaves no trace."""
    with load(quantised.path, backend=name, precision="int8", threads=1) as engine:
        assert engine.backend.precision == "int8"
        engine.adapters.load("x", adapter)
        together = [np.asarray(result.images[0], np.float64) for result in engine.generate(REQUESTS)]
        alone = [np.asarray(engine.generate(request).images[0], np.float64) for request in REQUESTS]
        after = np.asarray(engine.generate(REQUESTS[0]).images[0])
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a - b).max() <= 2
    assert np.array_equal(after, alone[0])
    for other in alone[1:6]:
        assert np.abs(other - alone[0]).max() > 2
    for ours, exact in zip(alone, floats, strict=True):
        assert relative_error(ours, exact) < LIMITS["int8"].trajectory


@pytest.mark.parametrize("limit", [-1.0, float("nan"), 2.0])
def test_limits_are_refused_before_anything_is_read(limit):
    with pytest.raises(RequestError, match="give a relative error above 0, at most 1"):
        quantize_bundle("nowhere", CALIBRATION, limit=limit)


def test_refusals(quantised, tiny_sd1_bundle, tmp_path, monkeypatch):
    plain = read(tiny_sd1_bundle)
    for name in ("auto", *ENGINES):
        with pytest.raises(BackendError, match="has no int8 networks; `stepforge quantize` makes them"):
            open_backend(name, plain, precision="int8")
    with pytest.raises(BackendError, match="'torch' does not compute in int8; use one of openvino, onnxruntime"):
        open_backend("torch", quantised, precision="int8")
    assert choose_backend(quantised).backend.precision in ("fp32", "bf16")  # approximate, so never unasked
    half = replace(plain, precision="fp16")
    monkeypatch.setattr(quantize, "read", lambda path: half)
    with pytest.raises(CheckpointError, match="has weights in fp16"):
        quantize_bundle(plain.path, CALIBRATION, out=tmp_path / "x")
    monkeypatch.setattr(quantize, "read", lambda path: plain)
    monkeypatch.setattr(quantize, "choose", lambda *arguments: None)
    with pytest.raises(CheckpointError, match="keeps an error of 1e-09 in int8"):
        quantize_bundle(plain.path, CALIBRATION, out=tmp_path / "x", limit=1e-9)
    assert not list(tmp_path.iterdir())
    without = replace(
        quantised,
        components={
            **quantised.components,
            ComponentId("denoiser", "unet"): replace(quantised.components[UNET], derived={}),
        },
    )
    assert (
        open_backend("openvino", without, precision="int8").open(UNET, None) is not None
    )  # float where a network has none


def test_export_quantizes_what_it_wrote(tmp_path, monkeypatch, capsys):
    """`export --quantize int8` calibrates on the prompts given; the bundle it tells of is the quantised one."""
    from stepforge.export import build

    prompts, asked, made = tmp_path / "prompts.txt", [], fake_bundle()
    prompts.write_text("a cat\na dog\n")
    monkeypatch.setattr(build, "export_bundle", lambda model, out, **options: made)
    monkeypatch.setattr(quantize, "quantize_bundle", lambda *given, **options: (asked.append(given), (made, {}))[1])
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        main(["export", "model", "-o", str(out), "--quantize", "int8", "--calibrate", str(prompts)])
    [(path, calibration)] = asked
    assert (path, list(calibration.prompts)) == (out, ["a cat", "a dog"])
    assert made.digest[:16] in capsys.readouterr().out


def test_calls_of_every_noise_level_are_kept() -> None:
    """As many of each, of early and late batches, in memory that more prompts do not grow."""
    bare = SimpleNamespace(name="x", precision="fp32", versions={}, open=lambda *_: lambda inputs: {})
    recorder = calibrate.Recorder(bare, ("denoiser",), room=5)
    graph = recorder.open(UNET)
    for batch in range(200):
        for step in range(8):
            graph({"timestep": np.array([7.0 - step, 0.0]), "sample": np.array([batch])})
    calls = recorder.calls[UNET]
    assert Counter(float(call["timestep"].max()) for call in calls) == {float(level): 5 for level in range(8)}
    batches = [int(call["sample"][0]) for call in calls]
    assert min(batches) < 50 < 150 < max(batches)
