"""Graphs that are refused before an engine sees them, and outputs that are not what the manifest states."""

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stepforge.runtime.backends import open_backend
from stepforge.runtime.backends.graph_file import checked_graph
from stepforge.runtime.backends.signature import Signature
from stepforge.runtime.bundle import MANIFEST, UNET, VAE_DECODER, Bundle, ControlCard, Tensor, read, sha256
from stepforge.runtime.bundle.format import Component, ComponentId
from stepforge.runtime.errors import BackendError

BACKENDS = ("openvino", "onnxruntime", "torch")


@pytest.fixture
def bundle(tiny_sd1_bundle: Path, tmp_path: Path) -> Bundle:
    return read(shutil.copytree(tiny_sd1_bundle, tmp_path / "bundle"))


def rewritten(bundle: Bundle, key: ComponentId, change) -> Bundle:
    """With another graph in place of a component's graphs, and the hash of it."""
    entry, files = bundle.components[key], dict(bundle.files)
    for name in (entry.graph, *entry.derived.values()):
        model = onnx.load(bundle.file(name), load_external_data=False)
        change(model)
        bundle.file(name).write_bytes(model.SerializeToString())
        files[name] = (bundle.file(name).stat().st_size, sha256(bundle.file(name)))
    return replace(bundle, files=files)


def external(**values: str):
    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
        for entry in tensor.external_data:
            entry.value = values.get(entry.key, entry.value)

    return change


def loop(model: onnx.ModelProto) -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])], "body",
        [helper.make_tensor_value_info(*one) for one in (("i", 7, []), ("c", 9, []), ("v", 1, None))],
        [helper.make_tensor_value_info("c2", 9, []), helper.make_tensor_value_info("v2", 1, None)],
    )  # fmt: skip
    last = model.graph.node[-1]
    model.graph.node.append(helper.make_node("Loop", ["", "", "inner"], [last.output[0]], body=body))
    last.output[0] = "inner"


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def weight(array: np.ndarray, **fields: object):
    def change(model: onnx.ModelProto) -> None:
        tensor = numpy_helper.from_array(array, "further")
        for name, value in fields.items():
            if name == "dims":
                tensor.dims[:] = value
            else:
                setattr(tensor, name, value)
        model.graph.initializer.append(tensor)

    return change


def first(op: str, **attributes: object):
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == op)
        for name, value in attributes.items():
            for old in [attribute for attribute in node.attribute if attribute.name == name]:
                node.attribute.remove(old)
            node.attribute.append(helper.make_attribute(name, value))

    return change


REFUSED = {
    "a path upwards": (external(location="../model.onnx.data"), "lies in '../model.onnx.data', which is no listed file"),
    "an absolute path": (external(location="/etc/passwd"), "lies in '/etc/passwd'"),
    "another file": (external(location=MANIFEST), "lies in 'bundle.json'"),
    "beyond the end": (external(offset="999999999"), "has .* bytes; 'model.onnx.data' gives"),
    "before the start": (external(offset="-4"), "has the offset '-4'"),
    "another length": (external(length="4"), "gives 4 at"),
    "a loop": (loop, "an attribute of operator 'Loop' is a graph"),
    "a cycle": (cycle, "which nothing before it gives"),
    "another operator": (lambda m: setattr(m.graph.node[0], "op_type", "EPContext"), "operator 'EPContext' is none"),
    "another domain": (lambda m: setattr(m.graph.node[0], "domain", "x"), "operator 'x.* is none that bundles have"),
    "a function": (lambda m: m.functions.append(onnx.FunctionProto(name="f")), "functions"),
    "another opset": (lambda m: setattr(m.opset_import[0], "version", 9), "version 9 of the operators ''"),
    "no graph": (lambda m: m.ClearField("graph"), "it holds 0 graphs"),
    "an input more": (
        lambda m: m.graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])),
        "has the input 'x', which the manifest does not state",
    ),
    "no output": (lambda m: m.graph.ClearField("output"), "it has no output 'pixels'"),
    "a shape of petabytes": (weight(np.zeros(1), dims=[1 << 50]), "has the impossible shape"),
    "a negative shape": (weight(np.zeros(1), dims=[-1, -1]), "has the impossible shape"),
    "less than its shape": (weight(np.zeros(1), dims=[2]), "has 8 bytes, its shape 16"),
    "a string weight": (weight(np.zeros(1), data_type=TensorProto.STRING), "has the type 8"),
    "a large number": (weight(np.array([1 << 40])), "has the number 1099511627776"),
    "stride 0": (first("Conv", strides=[0, 1]), "has 'strides' \\[0, 1\\]; from 1 to 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_graph_is_refused_in_one_line(bundle, name):
    change, message = REFUSED[name]
    changed = rewritten(bundle, VAE_DECODER, change)
    with pytest.raises(BackendError, match=message) as caught:
        checked_graph(changed, VAE_DECODER, changed.components[VAE_DECODER].graph)
    assert str(caught.value).isprintable()


def test_exports_pass(tiny_sd1_control_bundle, tiny_sdxl_bundle):
    for path in (tiny_sd1_control_bundle, tiny_sdxl_bundle):
        found = read(path)
        for key, entry in found.components.items():
            for graph in (entry.graph, *entry.derived.values()):
                assert checked_graph(found, key, graph).path == path / graph


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_check_before_they_parse(bundle, backend):
    changed = rewritten(bundle, UNET, external(location="/etc/passwd"))
    with pytest.raises(BackendError, match="lies in '/etc/passwd', which is no listed file beside the graph"):
        open_backend(backend, changed, precision="fp32").open(UNET)


def fewer_channels(model: onnx.ModelProto) -> None:
    """The decoder gives the first of its three channels only."""
    last = model.graph.node[-1]
    for name, value in (("start", 0), ("end", 1), ("axis", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    model.graph.node.append(helper.make_node("Slice", ["whole", "start", "end", "axis"], [last.output[0]]))
    last.output[0] = "whole"
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_of_another_shape_is_an_error(bundle, backend):
    changed = rewritten(bundle, VAE_DECODER, fewer_channels)
    graph = open_backend(backend, changed, precision="fp32").open(VAE_DECODER)
    message = r"vae_decoder gave pixels of shape \[1, 1, 16, 24\]; the bundle states \[1, 3, 16, 24\]"
    with pytest.raises(BackendError, match=message):
        graph({"latents": np.zeros((1, 4, 8, 12), np.float32)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_engine_raises_in_a_call_is_one_line(bundle, backend):
    graph = open_backend(backend, bundle, precision="fp32").open(VAE_DECODER)
    with pytest.raises(BackendError, match=f"{backend} cannot run vae_decoder: .") as caught:
        graph({"latents": np.zeros((1, 5, 8, 12), np.float32)})
    assert str(caught.value).isprintable()


def seven_wide(model: onnx.ModelProto) -> None:
    """Pixels in a shape that has not as many numbers, seen in a call only: a zero in the target is the size that is there."""
    last = model.graph.node[-1]
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 3, 1, 7]), "target"))
    model.graph.node.append(helper.make_node("Reshape", ["whole", "target"], [last.output[0]]))
    last.output[0] = "whole"


def beyond_its_memory(model: onnx.ModelProto) -> None:
    """A mean over fifty numbers for each that a weight has is added to the pixels: shapes that are fixed."""
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 1 and tensor.data_type == 1)
    last = model.graph.node[-1]
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 50]), "target"))
    model.graph.node.extend((
        helper.make_node("Reshape", [weight.name, "target"], ["long"]),
        helper.make_node("ReduceMean", ["long"], ["mean"], keepdims=0),
        helper.make_node("Add", ["whole", "mean"], [last.output[0]]),
    ))  # fmt: skip
    last.output[0] = "whole"


@pytest.mark.parametrize("change", [seven_wide, beyond_its_memory])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reshapes_that_do_not_fit_are_errors_and_leave_the_engine_sound(bundle, backend, change):
    """OpenVINO 2026.4.1 alone ends the process in the second network, or reads what lies behind the weight."""
    latents = {"latents": np.zeros((1, 4, 8, 12), np.float32)}
    sound = Path(shutil.copytree(bundle.path, bundle.path.parent / "sound"))
    with pytest.raises(BackendError, match=f"{backend} cannot (load|run) .*vae_decoder.*: .") as caught:
        open_backend(backend, rewritten(bundle, VAE_DECODER, change), precision="fp32").open(VAE_DECODER)(latents)
    assert str(caught.value).isprintable()
    del caught  # the network goes with its traceback
    gc.collect()
    pixels = open_backend(backend, read(sound), precision="fp32").open(VAE_DECODER)(latents)["pixels"]
    assert pixels.shape == (1, 3, 16, 24)
    assert np.isfinite(pixels).all()


def test_a_signature_binds_sizes_by_the_inputs():
    rows = ("rows", 32, "height/2", "width/2")
    key = ComponentId("control_residuals", "edge")
    entry = Component(
        "", (Tensor("sample", "float32", ("rows", 4, "height", "width")),), (Tensor("r", "float32", rows),)
    )
    pair = {name: replace_bundle(key, entry, pooled) for name, pooled in (("plain", False), ("pooled", True))}
    inputs = {"sample": np.zeros((3, 4, 16, 8), np.float32)}
    good = {"plain": (3, 32, 8, 4), "pooled": (3, 32, 1, 1)}
    for name, signature in pair.items():
        for shape in ((3, 32, 8, 4), (3, 32, 1, 1), (3, 31, 8, 4), (1, 32, 8, 4), (3, 32, 8), (3, 32, 8, 5)):
            outputs = {"r": np.zeros(shape, np.float32)}
            if shape == good[name]:
                signature.check(inputs, outputs)
            else:
                with pytest.raises(BackendError, match="control/edge/residuals gave r of shape"):
                    signature.check(inputs, outputs)
    with pytest.raises(BackendError, match="gave no r"):
        pair["plain"].check(inputs, {})
    with pytest.raises(BackendError, match="gave r as float64"):
        pair["plain"].check(inputs, {"r": np.zeros(good["plain"])})


def replace_bundle(key: ComponentId, entry: Component, pooled: bool) -> Signature:
    from stepforge.runtime.backends.fake import fake_bundle

    return Signature(
        replace(fake_bundle(), components={key: entry}, controls={key.name: ControlCard(global_pool=pooled)}), key
    )
