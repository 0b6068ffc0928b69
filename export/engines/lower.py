"""A graph in the precision of its plan: TensorRT's strongly typed networks compute in the types that the graph states.

    fp32  the graph as it is; one that was exported in fp16 with its weights in fp32
    fp16, bf16
          weights and activations in that type; norms in fp32 between casts, since their statistics are sums over thousands
          of values; timesteps and sizes in fp32 up to and with their sines, since bf16 knows no 999; softmax in the type of
          its attention, whose fused kernels sum in fp32

Inputs and outputs stay float32 and int64 as the manifest states them, but for LoRA banks, which take the type itself: as
float32 all their slots would be converted in every call.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from stepforge.runtime.backends.tensorrt.plans import Weight

TYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
         ir.DataType.FLOAT: np.dtype(np.float32)}  # fmt: skip
WORDS = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16",
         ir.DataType.INT64: "int64", ir.DataType.INT32: "int32"}  # fmt: skip
NORMS = ("InstanceNormalization", "LayerNormalization")
WAVES = ("Sin", "Cos")
# operands that are float32 whatever the others are: sizes, and weights of norms
KEPT_INPUTS = {"Resize": (1, 2), "InstanceNormalization": (1, 2), "LayerNormalization": (1, 2)}
GRAPH, DATA = "lowered.onnx", "lowered.onnx.data"


def lowered(graph: Path, precision: str, banks: Collection[str], folder: Path) -> Path:
    """The graph in that precision: the file itself where nothing changes, else a copy in `folder` with weights of its own."""
    model = ir.load(graph)
    half = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT16]
    wanted = TYPES[precision]
    if precision == "fp32" and not half:
        return graph
    if half:
        _retype(model, wanted)
    else:
        _Lowering(model, _types(graph), wanted, banks).run()
    if precision != "fp32":
        _norms_in_fp32(model, wanted)
    _type_banks(model, banks, wanted)
    ir.save(model, folder / GRAPH, external_data=DATA, size_threshold_bytes=1024)
    return folder / GRAPH


def _types(graph: Path) -> dict[str, int]:
    """Type of every value, by ONNX's inference, which needs no weights."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(graph, load_external_data=False))
    found = {value.name: value.type.tensor_type.elem_type for value in (*proto.graph.value_info, *proto.graph.input,
                                                                         *proto.graph.output)}  # fmt: skip
    return found | {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


def _cast(value: ir.Value, to: ir.DataType) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))], name=f"{value.name}_{to.name.lower()}")
    node.outputs[0].name = node.name
    return node


def _converted(value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    """An initializer of another type, converted when it is written."""
    assert value.const_value is not None
    tensor = value.const_value

    def made() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype(NUMPY[to]), name=name)

    lazy = ir.LazyTensor(made, dtype=to, shape=ir.Shape(tensor.shape.numpy()), name=name)
    return ir.Value(name=name, const_value=lazy, type=ir.TensorType(to), shape=ir.Shape(tensor.shape.numpy()))


class _Lowering:
    """A float32 graph to `to`."""

    def __init__(self, model: ir.Model, types: dict[str, int], to: ir.DataType, banks: Collection[str]) -> None:
        self._graph, self._types, self._to, self._banks = model.graph, types, to, frozenset(banks)
        self._low: dict[str, ir.Value] = {}
        self._wide = self._upstream()

    def run(self) -> None:
        for node in list(self._graph):
            if self._ends(node):  # what it reads is wide, what it gives is not
                self._hand_on(node)
                continue
            if any(value.name in self._wide for value in node.outputs):
                continue
            if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
                if self._is_float(node.inputs[0]):
                    node.replace_input_with(0, self._lower(node, node.inputs[0]))
                node.attributes["to"] = ir.AttrInt64("to", int(self._to))
                continue
            for at, value in enumerate(node.inputs):
                if value is not None and self._is_float(value) and at not in KEPT_INPUTS.get(node.op_type, ()):
                    node.replace_input_with(at, self._lower(node, value))
        for at, value in enumerate(self._graph.outputs):
            producer = value.producer()
            if producer is None or not self._is_float(value) or value.name in self._wide or self._ends(producer):
                continue
            name = value.name
            cast = _cast(value, ir.DataType.FLOAT)
            value.name, cast.outputs[0].name = f"{name}_{self._to.name.lower()}", name
            cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            value.type = ir.TensorType(self._to)  # stated in the file, since it was an output
            self._graph.append(cast)
            self._graph.outputs[at] = cast.outputs[0]
            self._types[value.name or ""] = ir.DataType.FLOAT  # type that inference gave the output; norms ask for it

    def _is_float(self, value: ir.Value | None) -> bool:
        return value is not None and self._types.get(value.name or "") == ir.DataType.FLOAT

    def _ends(self, node: ir.Node) -> bool:
        """Whether a node computes in fp32 and hands on in the graph's type: sines, and inputs scaled by one number."""
        if node.op_type in WAVES:
            return True
        if node.op_type != "Mul" or node.inputs[0] is None or not node.inputs[0].is_graph_input():
            return False
        factor = node.inputs[1]
        return factor is not None and factor.const_value is not None and factor.const_value.size == 1

    def _upstream(self) -> set[str]:
        """Floats that sines are computed from."""
        wide = {value.name for node in self._graph if self._ends(node) for value in node.inputs if value is not None}
        for node in reversed(self._graph):
            if any(value.name in wide for value in node.outputs):
                wide |= {value.name for value in node.inputs if value is not None}
        return {name for name in wide if name}

    def _hand_on(self, node: ir.Node) -> None:
        value = node.outputs[0]
        cast = _cast(value, self._to)
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        self._graph.insert_after(node, cast)

    def _lower(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """The value in the graph's type: inner values have it already, inputs and wide ones are cast, weights converted."""
        name = value.name or ""
        is_weight = value.is_initializer()
        if not (is_weight or value.is_graph_input() or name in self._wide) or name in self._banks:
            return value
        if name not in self._low:
            if is_weight:
                self._low[name] = self._weight(value, name)
            else:
                cast = _cast(value, self._to)
                producer = value.producer()
                if producer is None:
                    self._graph.insert_before(self._graph[0], cast)
                else:
                    self._graph.insert_after(producer, cast)
                self._low[name] = cast.outputs[0]
        return self._low[name]

    def _weight(self, value: ir.Value, name: str) -> ir.Value:
        made = _converted(value, self._to, f"{name}.{self._to.name.lower()}" if name in self._wide else name)
        if name not in self._wide:
            value.replace_all_uses_with(made)
            self._graph.initializers.pop(name)
        self._graph.initializers.add(made)
        self._types[made.name or ""] = ir.DataType.FLOAT
        return made


def _retype(model: ir.Model, to: ir.DataType) -> None:
    """A graph that was exported in fp16 says itself what stays in fp32; its 16-bit values get `to`."""
    if to == ir.DataType.FLOAT16:
        return
    for name, value in list(model.graph.initializers.items()):
        if value.dtype == ir.DataType.FLOAT16:
            made = _converted(value, to, name)
            value.replace_all_uses_with(made)
            model.graph.initializers.pop(name)
            model.graph.initializers.add(made)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", int(to))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT16:
                value.type = ir.TensorType(to)


def _norms_in_fp32(model: ir.Model, to: ir.DataType) -> None:
    """Casts around every norm that is not between such casts already."""
    wide: dict[str, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type not in NORMS or (source := node.inputs[0]) is None:
            continue
        producer = source.producer()
        if (
            producer is not None
            and producer.op_type == "Cast"
            and producer.attributes["to"].as_int() == ir.DataType.FLOAT
        ):
            continue
        for at, value in enumerate(node.inputs):
            if value is None:
                continue
            name = value.name or ""
            if at and value.is_initializer():
                if value.dtype == ir.DataType.FLOAT:
                    continue
                if name not in wide:
                    wide[name] = _converted(value, ir.DataType.FLOAT, f"{name}.float")
                    model.graph.initializers.add(wide[name])
                node.replace_input_with(at, wide[name])
            else:
                cast = _cast(value, ir.DataType.FLOAT)
                cast.outputs[0].name = cast.name = f"{name}_before_{node.name}"
                model.graph.insert_before(node, cast)
                node.replace_input_with(at, cast.outputs[0])
        result = node.outputs[0]
        cast = _cast(result, to)
        result.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, result)
        model.graph.insert_after(node, cast)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        model.graph.initializers.pop(name)


def _type_banks(model: ir.Model, banks: Collection[str], to: ir.DataType) -> None:
    """Banks as inputs of the type. A cast of what was gathered of them changes nothing any more."""
    for value in model.graph.inputs:
        if value.name in banks:
            value.type = ir.TensorType(to)


def weight_table(graph: Path, final: Path, bundle: Path, inline: Path) -> dict[str, Weight]:
    """Where each weight of the graph that was parsed (`final`) comes from: a file of the bundle, or `inline`, which is
    written here with those that stand in the graph itself."""
    origins = {tensor.name: tensor for tensor in onnx.load(graph, load_external_data=False).graph.initializer}
    found, kept = {}, {}
    for name, value in ir.load(final).graph.initializers.items():
        assert value.const_value is not None
        tensor = value.const_value
        origin = origins[next(n for n in (name, name.rpartition(".")[0]) if n in origins)]
        wanted = WORDS.get(tensor.dtype)
        if wanted is None:  # masks and the like are no weights
            continue
        shape = tuple(tensor.shape.numpy())
        if origin.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in origin.external_data}
            file = (graph.parent / place["location"]).relative_to(bundle).as_posix()
            stored = WORDS[ir.DataType(origin.data_type)]
            found[name] = Weight(file, int(place.get("offset", 0)), shape, stored, wanted)
        else:
            kept[name] = tensor.numpy()
            if wanted == "bfloat16":  # npz knows no bfloat16
                kept[name] = kept[name].view(np.uint16)
            found[name] = Weight("", 0, shape, wanted, wanted)
    np.savez(inline, **kept)  # type: ignore[arg-type]
    return found
