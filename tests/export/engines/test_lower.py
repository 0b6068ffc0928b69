"""Graphs in the precision of their plan, run by PyTorch operator by operator in the types that they state."""

import collections

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from stepforge.export.engines.lower import lowered, weight_table
from stepforge.runtime.backends.torch.program import read as read_program
from stepforge.runtime.backends.torch.run import Runner
from stepforge.runtime.bundle import UNET, VAE_DECODER, read

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIMIT = {"bf16": 5e-2, "fp16": 5e-3, "fp32": 1e-6}  # relative, as export.parity allows a component in these types


def inputs_of(bundle, component, rows=2):
    random = np.random.RandomState(0)
    sizes = {"rows": rows, "height": 16, "width": 16, "tokens": 77}
    given = {}
    for tensor in bundle.components[component].inputs:
        shape = [size if isinstance(size, int) else sizes.get(size, 1) for size in tensor.shape]
        values = random.standard_normal(shape).astype(np.float32)
        if tensor.name == "adapter":
            given[tensor.name] = torch.tensor([1, 0])
        elif tensor.name == "timestep":
            given[tensor.name] = torch.tensor([999.0, 20.0])
        else:
            given[tensor.name] = torch.from_numpy(values * (0.1 if ".lora_" in tensor.name else 1.0))
    return given


def output(graph, given, precision, banks):
    cast = {name: value.to(TYPES[precision]) if name in banks else value for name, value in given.items()}
    if precision == "bf16":  # ONNX has convolutions in bf16 from opset 22 on; the parser of TensorRT takes them in any
        model = onnx.load(graph, load_external_data=False)
        model.opset_import[0].version = 22
        graph = graph.with_name("read.onnx")
        onnx.save(model, graph)
    found = Runner(read_program(graph))(cast)
    return next(iter(found.values()))


@pytest.fixture
def bfloat16_arrays(monkeypatch):
    """torch takes arrays of ml_dtypes, which the backend never meets: bundles hold no bf16."""
    whole = torch.from_numpy

    def from_numpy(array):
        if array.dtype == ml_dtypes.bfloat16:
            return whole(array.view(np.int16)).view(torch.bfloat16)
        return whole(array)

    monkeypatch.setattr(torch, "from_numpy", from_numpy)


@pytest.mark.usefixtures("bfloat16_arrays")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stored", ["fp32", pytest.param("fp16", marks=[pytest.mark.slow, pytest.mark.long])])
@torch.inference_mode()
def test_lowered_graphs_compute_the_same(tiny_full, tmp_path, stored, precision):
    bundle = read(tiny_full("sd1", stored))
    for component in (UNET, VAE_DECODER):
        entry = bundle.components[component]
        banks = [t.name for t in entry.inputs if ".lora_" in t.name]
        given = inputs_of(bundle, component)
        graph = bundle.file(entry.graph)
        folders = [tmp_path / f"{component.role}-{name}" for name in (precision, "fp32")]
        for folder in folders:
            folder.mkdir()
        low = lowered(graph, precision, banks, folders[0])
        exact = lowered(graph, "fp32", banks, folders[1])
        assert (exact == graph) == (stored == "fp32")
        found, wanted = (output(g, given, p, banks) for g, p in ((low, precision), (exact, "fp32")))
        assert found.dtype == torch.float32, "outputs keep the type that the bundle states"
        assert 0 < (found - wanted).norm() / wanted.norm() <= LIMIT[precision]
        check_types(low, precision, banks)
        check_weights(bundle, graph, low, precision, folders[0] / "inline.npz")


def check_types(graph, precision, banks):
    """Products in the type, norms in fp32, and of inputs the banks alone in the type."""
    model = onnx.shape_inference.infer_shapes(onnx.load(graph, load_external_data=False), strict_mode=True)
    wanted = {"bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}[precision]
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    kinds = collections.defaultdict(collections.Counter)
    for node in model.graph.node:
        kinds[node.op_type][types[node.output[0]]] += 1
    for op in ("Conv", "MatMul", "Softmax"):
        assert set(kinds[op]) <= {wanted}, op
    for op in ("InstanceNormalization", "LayerNormalization"):
        assert set(kinds[op]) <= {onnx.TensorProto.FLOAT}, op
    for value in model.graph.input:
        kind = value.type.tensor_type.elem_type
        assert kind == (wanted if value.name in banks else kind)
        assert value.name in banks or kind in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)


def check_weights(bundle, graph, low, precision, inline):
    """The table of a plan without weights gives back what the graph that was parsed holds."""
    import onnx_ir

    kinds = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "int64": np.int64,
             "int32": np.int32}  # fmt: skip
    table = weight_table(graph, low, bundle.path, inline)
    kept = np.load(inline)
    for name, value in onnx_ir.load(low).graph.initializers.items():
        if name not in table:
            continue
        weight = table[name]
        if weight.file:
            stored = np.fromfile(
                bundle.file(weight.file), kinds[weight.stored], int(np.prod(weight.shape)), "", weight.offset
            )
            mine = stored.astype(kinds[weight.wanted])
        else:
            mine = np.ascontiguousarray(kept[name]).view(kinds[weight.wanted])
        assert mine.tobytes() == value.const_value.numpy().tobytes(), name
