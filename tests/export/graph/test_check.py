"""What export wrote and an engine refuses is found before it is published, in one line that names component and reason."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stepforge.export.graph import check
from stepforge.runtime.backends.fake import fake_bundle
from stepforge.runtime.bundle import UNET, VAE_DECODER, Bundle, Component, Tensor, read
from stepforge.runtime.errors import CheckpointError

AXES = ("rows", 4)


def bundle_of(folder: Path, *nodes: onnx.NodeProto, weights: tuple[onnx.TensorProto, ...] = ()) -> Bundle:
    """A bundle whose denoiser is a graph x -> y of these nodes."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, AXES)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("rows", "width"))
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("strange", 1)]
    graph = helper.make_graph(nodes, "g", [x], [y], initializer=weights)
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), folder / "model.onnx")
    entry = Component("model.onnx", (Tensor("x", "float32", AXES),), (Tensor("y", "float32", ("rows", "width")),))
    return replace(fake_bundle(), path=folder, components={UNET: entry})


CLASH = (  # as SDXL's fp16 text and fp32 size embeddings met
    helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
    helper.make_node("Concat", ["half", "x"], ["both"], "text_and_time", axis=1),
    helper.make_node("Cast", ["both"], ["y"], to=TensorProto.FLOAT),
)


@pytest.mark.parametrize("opens", [check.check_typing, *check.ENGINES.values()], ids=lambda opens: opens.__name__)
def test_each_finds_two_types_in_one_operator(tmp_path, opens):
    with pytest.raises(Exception, match=r"(?i)inconsistent|bound to different types") as caught:
        opens(bundle_of(tmp_path, *CLASH).file("model.onnx"))
    assert "\n" not in str(caught.value)


def test_the_component_and_the_reason_are_named(tmp_path, capfd):
    with pytest.raises(
        CheckpointError, match=r"^the exported denoiser/unet does not load: onnx refuses model.onnx: .*Concat"
    ) as caught:
        check.open_graphs(bundle_of(tmp_path, *CLASH))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_operators_that_one_engine_lacks(tmp_path):
    """onnx's checker knows nothing of other domains; the engines do."""
    bundle = bundle_of(tmp_path, helper.make_node("Mystery", ["x"], ["y"], domain="strange"))
    for engine, opens in check.ENGINES.items():
        with pytest.raises(Exception, match="Mystery"):
            opens(bundle.file("model.onnx"))
        with pytest.raises(CheckpointError, match=f"{engine} refuses model.onnx"):
            check._attempt(UNET, "model.onnx", engine, opens, bundle.file("model.onnx"))


def test_signature_is_the_manifests(tmp_path):
    bundle = bundle_of(tmp_path, helper.make_node("Sigmoid", ["x"], ["y"]))
    check.open_graphs(bundle)
    entry = bundle.components[UNET]
    for change in (
        {"inputs": ()},
        {"outputs": (Tensor("z", "float32", AXES),)},
        {"inputs": (Tensor("x", "int64", AXES),)},
    ):
        with pytest.raises(CheckpointError, match=r"its (in|out)puts are not the manifest's: [xyz]"):
            check.open_graphs(replace(bundle, components={UNET: replace(entry, **change)}))


def test_weights_lie_in_their_file(tiny_sd1_bundle, tmp_path):
    copy = Path(shutil.copytree(tiny_sd1_bundle, tmp_path / "bundle"))
    bundle = read(copy, check=False)
    bundle = replace(bundle, components={VAE_DECODER: bundle.components[VAE_DECODER]})
    check.open_graphs(bundle)
    data = copy / "vae_decoder/model.onnx.data"
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"ends at byte \d+ of model.onnx.data, which has \d+"):
        check.open_graphs(bundle)


def test_a_weight_shorter_than_its_shape(tmp_path):
    weight = numpy_helper.from_array(np.zeros((4, 4), np.float32), "w")
    bundle = bundle_of(tmp_path, helper.make_node("MatMul", ["x", "w"], ["y"]), weights=(weight,))
    model = onnx.load(bundle.file("model.onnx"))
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "w.data", offset=0, length=32)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    (tmp_path / "w.data").write_bytes(bytes(64))
    bundle.file("model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="w has 64 bytes, of which 32 are stored"):
        check.open_graphs(bundle)
