"""A component's ONNX graph as a plain program: nodes over named values, which passes rewrite and `run` executes.

Two kinds of values: tensors, and whole numbers that live on the host as NumPy arrays (shapes, and arithmetic on them). So
nothing in a program waits for a device, and one recording of a CUDA graph holds for one set of input shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import torch

from stepforge.runtime.backends import reason
from stepforge.runtime.errors import BackendError

HOST_FLOATS = {"Resize": (1, 2)}  # operands that are numbers for the host, although they are not whole


@dataclass(frozen=True, slots=True)
class Node:
    op: str  # an operator of ONNX, or one that a pass makes; see ops.OPS
    inputs: tuple[str, ...]  # "" for an operand that is left out
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Program:
    """Nodes in an order in which they can run."""

    nodes: list[Node]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Any]  # torch.Tensor, or np.ndarray for the host
    floats: frozenset[str] = frozenset()  # inputs that are not whole numbers
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of the inputs; 0 for what varies
    wide: dict[str, str] = field(default_factory=dict)  # input [W | B] of a wide layer -> its constant W

    def weight(self, name: str) -> Any:
        """The weight of a layer, whether it is a constant or has columns behind it."""
        return self.constants[self.wide.get(name, name)]

    def producers(self) -> dict[str, Node]:
        return {name: node for node in self.nodes for name in node.outputs}

    def uses(self) -> Counter[str]:
        """How often each value is read, by nodes or by the caller."""
        return Counter([*(name for node in self.nodes for name in node.inputs), *self.outputs])

    def rewrite(self, *matches: Callable[[Node], Node | None]) -> bool:
        """Put match(node) in a node's place where it is not None, then remove what nobody reads any more.

        Several matches go over all nodes one after the other.
        """
        changed = False
        for match in matches:
            for index, node in enumerate(self.nodes):
                new = match(node)
                if new is not None:
                    self.nodes[index] = new
                    changed = True
        if changed:
            self.sweep()
        return changed

    def sweep(self) -> None:
        """Remove nodes and constants that no output needs."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]
        needed.update(self.wide.get(name, name) for name in tuple(needed))
        self.constants = {name: value for name, value in self.constants.items() if name in needed}


def read(graph: Path) -> Program:
    """Read a graph file; weights outside it are mapped, not copied. Raises BackendError if it is not one."""
    try:
        model = onnx.load(str(graph), load_external_data=False)
        # strictly: torch would promote operands of two types, which no other engine takes
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # protobuf and onnx raise classes of their own
        raise BackendError(f"torch cannot load {graph.name}: {reason(error)}") from error
    if not model.graph.node:
        raise BackendError(f"torch cannot load {graph.name}: it holds no graph")
    nodes = [_node(node, graph) for node in model.graph.node]
    on_host = {name for node in nodes for at in HOST_FLOATS.get(node.op, ()) for name in node.inputs[at : at + 1]}
    constants: dict[str, Any] = {}
    for tensor in model.graph.initializer:
        array = _array(tensor, graph)
        whole = array.dtype.kind in "iu"
        constants[tensor.name] = array if whole or tensor.name in on_host else torch.from_numpy(array)
    given = [value for value in model.graph.input if value.name not in constants]
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return Program(
        nodes,
        tuple(value.name for value in given),
        tuple(value.name for value in model.graph.output),
        constants,
        frozenset(value.name for value in given if value.type.tensor_type.elem_type in floats),
        {value.name: tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim) for value in given},
    )


def _node(node: onnx.NodeProto, graph: Path) -> Node:
    if node.domain not in ("", "ai.onnx"):
        raise BackendError(
            f"torch cannot load {graph.name}: operator {node.domain}.{node.op_type} is not standard ONNX"
        )
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    attributes = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    attributes = {name: tuple(v) if isinstance(v, list) else v for name, v in attributes.items()}
    return Node(node.op_type, tuple(node.input), tuple(node.output), attributes)


def _array(tensor: onnx.TensorProto, graph: Path) -> np.ndarray[Any, Any]:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.array(onnx.numpy_helper.to_array(tensor))
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if Path(entries["location"]).name != entries["location"]:
        raise BackendError(f"torch cannot load {graph.name}: its weights are in {entries['location']!r}, not beside it")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    # "c": torch wants memory that it may write to, and nobody does
    return np.memmap(
        graph.with_name(entries["location"]), dtype, "c", int(entries.get("offset", 0)), tuple(tensor.dims)
    )


def run_passes(program: Program, passes: Iterable[Callable[[Program], bool]]) -> None:
    for rewrite in passes:
        rewrite(program)
