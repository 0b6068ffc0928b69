"""Write a graph whose chosen layers multiply 8-bit integers: QuantizeLinear and DequantizeLinear (QDQ) before their products.

    y = DQ(Q(x; s, z)) · DQ(Q(W; s_c))

Activations are uint8 with one scale and zero point a tensor, weights int8 with one scale an output channel and no zero point:
what the integer kernels of x86 multiply. Engines fuse the pair into an integer product; one that does not still computes the
same numbers, in float. Weights stay as they are in the bundle's one weights file, so that every graph reads the same; engines
fold Q(W) when they load. A value that several layers read is quantised once; a LoRA bank's shrink, residual additions and
whatever else reads it get the value itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from stepforge.export.graph.bank import LAYERS, PREFIXES
from stepforge.runtime.arrays import Float32

# Integer weights span -63..63. Without VNNI, x86 adds two products of 8 bits in 16 (vpmaddubsw), which saturates from
# 2·255·65 on: weights of 8 bits then triple the error (docs/quantization.md); 7 bits cost 5 % of it, on every processor.
WEIGHT_STEPS = 63
ACTIVATION_STEPS = 255


@dataclass(frozen=True, slots=True)
class Layer:
    """A product with constant weights."""

    path: str  # module's, as a bank names it
    node: ir.Node
    axis: int  # axis of the weight's output channels

    @property
    def value(self) -> ir.Value:
        """What it multiplies."""
        return _given(self.node, 0)

    @property
    def weight(self) -> ir.Value:
        return _given(self.node, 1)


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest and largest value of an activation that its integers tell apart; 0 lies between."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        return (self.high - self.low) / ACTIVATION_STEPS

    @property
    def zero_point(self) -> int:
        return round(-self.low / self.scale)


def layers(model: ir.Model) -> Iterator[Layer]:
    """Linear layers and convolutions, in the graph's order; grouped convolutions (a bank's taps) are none of them."""
    for node in model.graph:
        weight = node.inputs[1] if node.op_type in LAYERS and len(node.inputs) > 1 else None
        if weight is None or not weight.is_initializer() or not weight.name or not weight.name.endswith(".weight"):
            continue
        if node.op_type == "Conv" and "group" in node.attributes and node.attributes["group"].value != 1:
            continue
        path = weight.name.removesuffix(".weight")
        for prefix in PREFIXES:
            path = path.removeprefix(prefix)
        columns = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _flag(node, "transB"))
        yield Layer(path, node, 1 if columns else 0)


def write_quantized(graph: Path, out: Path, ranges: Mapping[str, Range], chosen: Collection[str]) -> None:
    """The graph with the layers of these paths in integers; what each reads has its range in `ranges`, by path."""
    model = ir.load(graph)
    _Rewrite(model, ranges).run(chosen)
    ir.save(model, out)


def simulation(graph: Path, ranges: Mapping[str, Range]) -> tuple[ir.Model, tuple[str, ...]]:
    """The graph with an input `switches`, bool [layers], that says which layers are quantised, and their paths.

    It computes what quantised graphs do; one opened graph serves every choice of layers.
    """
    model = ir.load(graph)
    paths = tuple(layer.path for layer in layers(model) if layer.path in ranges)
    _Rewrite(model, ranges, switched=True).run(paths)
    return model, paths


class _Rewrite:
    """One graph's rewriting. switched: each layer chooses between what it read and its quantised form at run time."""

    def __init__(self, model: ir.Model, ranges: Mapping[str, Range], *, switched: bool = False) -> None:
        self.graph, self.ranges = model.graph, ranges
        self.layers = list(layers(model))
        self.values: dict[str, ir.Value] = {}
        self.switches: ir.Value | None = None
        if switched:
            self.switches = ir.val("switches", ir.DataType.BOOL, ["layers"])
            self.graph.inputs.append(self.switches)

    def run(self, chosen: Collection[str]) -> None:
        number = 0
        for layer in self.layers:
            if layer.path not in chosen:
                continue
            node, range_ = layer.node, self.ranges[layer.path]
            activation = np.asarray(range_.scale), np.asarray(range_.zero_point, np.uint8)
            scales = weight_scales(layer.weight, layer.axis)
            weight = scales, np.zeros(len(scales), np.int8)
            quantised = (
                self.quantised(layer.value, *activation, None, node),
                self.quantised(layer.weight, *weight, layer.axis, node),
            )
            for index, (plain, value) in enumerate(zip((layer.value, layer.weight), quantised, strict=True)):
                node.replace_input_with(
                    index, value if self.switches is None else self.switch(number, plain, value, node)
                )
            number += 1

    def quantised(
        self, value: ir.Value, scale: NDArray[Any], zero: NDArray[Any], axis: int | None, before: ir.Node
    ) -> ir.Value:
        assert value.name
        if value.name not in self.values:
            dtype = np.float32 if value.dtype is None else value.dtype.numpy()
            name = f"{value.name}.int8"
            constants = [self.constant(f"{name}.scale", scale.astype(dtype)), self.constant(f"{name}.zero", zero)]
            attributes = None if axis is None else {"axis": axis}
            quantise = ir.node("QuantizeLinear", [value, *constants], attributes)
            back = ir.node("DequantizeLinear", [quantise.outputs[0], *constants], attributes)
            quantise.outputs[0].name, back.outputs[0].name = name, f"{name}.back"
            self.graph.insert_before(before, [quantise, back])
            self.values[value.name] = back.outputs[0]
        return self.values[value.name]

    def switch(self, number: int, plain: ir.Value, quantised: ir.Value, before: ir.Node) -> ir.Value:
        index = self.constant(f"switch.{number}", np.asarray(number, np.int64))
        gather = ir.node("Gather", [self.switches, index], {"axis": 0})
        where = ir.node("Where", [gather.outputs[0], quantised, plain])
        gather.outputs[0].name, where.outputs[0].name = f"{plain.name}.switch.{number}", f"{plain.name}.chosen.{number}"
        self.graph.insert_before(before, [gather, where])
        return where.outputs[0]

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        if name not in self.graph.initializers:
            self.graph.initializers.add(ir.val(name, const_value=ir.tensor(array, name=name)))
        return self.graph.initializers[name]


def weight_scales(weight: ir.Value, axis: int) -> Float32:
    """One a channel; 1 where a channel is all zeros."""
    assert weight.const_value is not None
    array = np.asarray(weight.const_value.numpy(), np.float32)
    peaks = np.abs(array).max(axis=tuple(i for i in range(array.ndim) if i != axis))
    return np.where(peaks > 0, peaks / WEIGHT_STEPS, 1).astype(np.float32)


def _flag(node: ir.Node, name: str) -> int:
    return int(node.attributes[name].value) if name in node.attributes else 0


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
