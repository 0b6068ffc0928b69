"""Give a graph LoRA banks as inputs: see `runtime.bundle.Bank` for the formula and the layout.

A rewrite of the finished graph, not of the network: layers are found by the names of their weights, so the standard graph
and the one derived for ONNX Runtime take the same banks. The low-rank term is added to the bare product of the layer,
where no fusion of the exporter or of an engine is cut.

A k×k convolution cannot have weights of its own in each row. Its shrink to r channels is one product to r·k·k maps, which
a depthwise-like convolution with constant one-hot taps shifts and adds; stride and padding are that convolution's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from stepforge.export.graph.passes import forget_shapes
from stepforge.runtime.bundle import Bank, Module, Tensor
from stepforge.runtime.errors import CheckpointError

LAYERS = ("MatMul", "Gemm", "Conv")
TARGETS = ("transformer", "all")  # which layers of a denoiser take adapters
PREFIXES = ("unet.", "model.", "text_model.")  # wrappers of trace.py, transformers before 5.6


def add_bank(
    graphs: Sequence[Path], modules: Iterable[Module], slots: int, rank: int
) -> tuple[Bank, tuple[Tensor, ...]]:
    """Rewrite the graph files in place; `slots` counts slot 0. Returns the bank and the inputs that the graphs now have.

    The first graph is the standard one; its sharing of inputs between layers holds for the others as well.
    """
    table = {module.path: module for module in modules if module.kind != "norm"}
    shared: dict[str, tuple[str, ...]] = {}
    tensors: tuple[Tensor, ...] = ()
    for path in graphs:
        model = ir.load(path)
        found = _layers(model, table)
        if not shared:
            shared = _shared(found)
        tensors = _Rewrite(model, found, table, shared, slots, rank).run()
        forget_shapes(model)
        ir.save(model, path)
    return Bank(slots, rank, shared), tensors


def used_modules(graph: Path, modules: Iterable[Module]) -> tuple[Module, ...]:
    """Modules whose weights the graph reads: SDXL's first text encoder has a last layer that nothing uses."""
    modules = tuple(modules)
    found = _layers(ir.load(graph), {module.path: module for module in modules})
    return tuple(module for module in modules if module.kind == "norm" or module.path in found)


def transformer_only(modules: Iterable[Module]) -> tuple[Module, ...]:
    """Layers that trainers change by default: linear and 1×1 layers of the transformers."""
    return tuple(module for module in modules if ".attentions." in module.path)


def _layers(model: ir.Model, table: Mapping[str, Module]) -> dict[str, ir.Node]:
    """Path of a module -> the node that multiplies by its weight, in the graph's order."""
    found = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in LAYERS and len(node.inputs) > 1 else None
        if weight is None or not weight.is_initializer() or weight.name is None:
            continue
        path = weight.name.removesuffix(".weight")
        for prefix in PREFIXES:
            path = path.removeprefix(prefix)
        if path in table:
            if path in found:
                raise CheckpointError(f"the network uses {path} twice; a LoRA bank needs one use of each layer")
            found[path] = node
    return found


def _shared(found: Mapping[str, ir.Node]) -> dict[str, tuple[str, ...]]:
    """Linear layers of one input, such as q, k and v, share their A: one product instead of three."""
    groups: dict[object, list[str]] = {}
    for path, node in found.items():
        groups.setdefault(node.inputs[0] if node.op_type == "MatMul" else path, []).append(path)
    return {paths[0]: tuple(paths) for paths in groups.values()}


class _Rewrite:
    """One graph's rewriting; new values are numbered."""

    def __init__(
        self,
        model: ir.Model,
        found: Mapping[str, ir.Node],
        table: Mapping[str, Module],
        shared: Mapping[str, tuple[str, ...]],
        slots: int,
        rank: int,
    ) -> None:
        self.graph, self.found, self.table, self.shared = model.graph, found, table, shared
        self.slots, self.rank = slots, rank
        self.numbers = itertools.count()
        self.constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self.tensors: list[Tensor] = []
        self.new: list[ir.Node] = []  # nodes that wait to be inserted

    def run(self) -> tuple[Tensor, ...]:
        self.adapter = self.input("adapter", "int64", ("rows",))
        strength = self.input("adapter_strength", "float32", ("rows", 1, 1))
        for paths in self.shared.values():
            nodes = [self.found[path] for path in paths]
            self.dtype = _dtype(nodes[0].inputs[1])
            self.strength = self.cast(strength)
            if nodes[0].op_type == "MatMul":
                self.linear(paths, nodes)
            elif nodes[0].op_type == "Gemm":
                self.vector(paths[0], nodes[0])
            else:
                self.convolution(paths[0], nodes[0])
        self.graph.sort()
        return tuple(self.tensors)

    def linear(self, paths: Sequence[str], nodes: Sequence[ir.Node]) -> None:
        x = nodes[0].inputs[0]
        inputs = self.table[paths[0]].shape[1]
        h = self.op("MatMul", x, self.bank(f"{paths[0]}.lora_A", (inputs, self.rank * len(paths))))
        h = self.op("Mul", h, self.strength)
        parts = self.split(h, len(paths))
        for path, node, part in zip(paths, nodes, parts, strict=True):
            assert node.inputs[0] is x, f"{path} no longer reads what {paths[0]} reads"
            b = self.bank(f"{path}.lora_B", (self.rank, self.table[path].shape[0]))
            self.add(node, self.op("MatMul", part, b))

    def vector(self, path: str, node: ir.Node) -> None:
        """A linear layer of one vector a row, [rows, in]."""
        outputs, inputs = self.table[path].shape
        axis = self.constant(np.array([1]))
        x = self.op("Unsqueeze", node.inputs[0], axis)
        h = self.op("Mul", self.op("MatMul", x, self.bank(f"{path}.lora_A", (inputs, self.rank))), self.strength)
        y = self.op("MatMul", h, self.bank(f"{path}.lora_B", (self.rank, outputs)))
        self.add(node, self.op("Squeeze", y, axis))

    def convolution(self, path: str, node: ir.Node) -> None:
        outputs, inputs, *kernel = self.table[path].shape
        taps = int(np.prod(kernel))
        x, flat = node.inputs[0], self.constant(np.array([0, 0, -1]))
        h = self.op("MatMul", self.bank(f"{path}.lora_A", (self.rank * taps, inputs)), self.op("Reshape", x, flat))
        if taps > 1 or _stride(node) != 1:
            size = self.op("Shape", x, start=2)
            maps = self.op("Concat", self.constant(np.array([0, self.rank * taps])), size, axis=0)
            one_hot = np.broadcast_to(
                np.eye(taps, dtype=np.float32).reshape(1, taps, *kernel), (self.rank, taps, *kernel)
            )
            given = node.attributes
            settings = {name: given[name].value for name in ("pads", "strides", "dilations") if name in given}
            h = self.op("Conv", self.op("Reshape", h, maps), self.cast(self.constant(np.ascontiguousarray(one_hot))),
                        group=self.rank, kernel_shape=kernel, **settings)  # fmt: skip
            h = self.op("Reshape", h, flat)
        h = self.op("Mul", h, self.strength)
        y = self.op("MatMul", self.bank(f"{path}.lora_B", (outputs, self.rank)), h)
        self.add(node, self.op("Reshape", y, self.op("Shape", node.outputs[0])))

    def add(self, node: ir.Node, term: ir.Value) -> None:
        """The layer's output plus the term, for everything that read the output so far."""
        output = node.outputs[0]
        own = {id(new) for new in self.new}
        readers = [use for use in output.uses() if id(use.node) not in own]
        total = self.op("Add", output, term)
        for use in readers:
            use.node.replace_input_with(use.idx, total)
        for index, result in enumerate(self.graph.outputs):
            if result is output:  # the last convolution, and what reuse variants take out
                total.name, output.name = output.name, f"{output.name}_without_lora"
                total.shape, total.type = output.shape, output.type
                self.graph.outputs[index] = total
        self.graph.insert_after(node, self.new)
        self.new = []

    def bank(self, name: str, shape: tuple[int, int]) -> ir.Value:
        """A bank of all slots, and of it what each row's slot holds."""
        return self.cast(self.op("Gather", self.input(name, "float32", (self.slots, *shape)), self.adapter, axis=0))

    def split(self, value: ir.Value, parts: int) -> list[ir.Value]:
        if parts == 1:
            return [value]
        node = ir.node("Split", [value], {"axis": -1, "num_outputs": parts}, num_outputs=parts)
        for output in node.outputs:
            output.name = f"lora_{next(self.numbers)}"
        self.new.append(node)
        return list(node.outputs)

    def cast(self, value: ir.Value) -> ir.Value:
        return value if self.dtype == ir.DataType.FLOAT else self.op("Cast", value, to=self.dtype.value)

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes or None)  # type: ignore[arg-type]
        node.outputs[0].name = f"lora_{next(self.numbers)}"
        self.new.append(node)
        return node.outputs[0]

    def input(self, name: str, dtype: Literal["float32", "int64"], shape: tuple[int | str, ...]) -> ir.Value:
        kind = ir.DataType.INT64 if dtype == "int64" else ir.DataType.FLOAT
        value = ir.val(name, kind, shape)
        self.graph.inputs.append(value)
        self.tensors.append(Tensor(name, dtype, shape))
        return value

    def constant(self, array: np.ndarray) -> ir.Value:
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self.constants:
            name = f"lora_constant_{len(self.constants)}"
            self.constants[key] = ir.val(name, const_value=ir.tensor(array, name=name))
            self.graph.initializers.add(self.constants[key])
        return self.constants[key]


def _stride(node: ir.Node) -> int:
    return max(node.attributes["strides"].value) if "strides" in node.attributes else 1


def _dtype(value: ir.Value | None) -> ir.DataType:
    assert value is not None
    assert value.dtype is not None
    return value.dtype
