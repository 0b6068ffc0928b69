"""Memory of one call of a network, read off its graph: the most float32 values that live at one time.

A value lives from the operator that makes it to the last one that reads it; an operator by element writes over what it reads
last, as engines have it. Counted at three sizes, which tell values that grow with the positions of a picture from attention
scores, which grow with their square. What engines keep beside (packed weights, workspaces) is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from stepforge.runtime.bundle import Footprint, Role
from stepforge.runtime.errors import CheckpointError

TILED: tuple[Role, ...] = ("vae_encoder", "vae_decoder", "upscaler")
BY_ELEMENT = frozenset(
    ("Add", "Cast", "Clip", "Div", "LeakyRelu", "Mul", "PRelu", "Reshape", "Sigmoid", "Softmax", "Sub")
)
SIDES = (64, 128)  # height and width of what the network reads; multiples of what any reads
BYTES = 4
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def footprint(graph: Path, config: Any) -> Footprint:
    """Of a VAE's half or a feed-forward network. config: the VAE's, which says how large diffusers' tiles are.

    Raises CheckpointError if the size of a value cannot be told.
    """
    model = onnx.load(str(graph), load_external_data=False)
    small, large = (_sizes(model, side) for side in SIDES)
    rate = (SIDES[1] / SIDES[0]) ** 2
    linear, squared = {}, {}
    for name, size in small.items():
        growth = large[name] / size
        if growth > math.sqrt(rate) * rate:
            squared[name] = size / SIDES[0] ** 4
        elif growth > math.sqrt(rate):
            linear[name] = size / SIDES[0] ** 2
    tile = 0
    if sample := getattr(config, "sample_size", None):
        tile = int(sample if isinstance(sample, int) else sample[0])
        if "latents" in small:
            tile = int(tile / 2 ** (len(config.block_out_channels) - 1))
    return Footprint(BYTES * _peak(model, linear), BYTES * _peak(model, squared), tile)


def _sizes(model: onnx.ModelProto, side: int) -> dict[str, int]:
    """Numbers of elements of all float values, for one picture of this side."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name for tensor in copy.graph.initializer}
    for value in copy.graph.input:
        dims = value.type.tensor_type.shape.dim
        for axis, size in ((0, 1), (2, side), (3, side)):
            dims[axis].dim_value = size
    kept = [tensor for tensor in copy.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    outside = [tensor for tensor in copy.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    del copy.graph.initializer[:]
    # weights outside become inputs: inference needs their shapes, and would look for values in the working directory
    copy.graph.initializer.extend(kept)
    copy.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in outside)
    inferred = SymbolicShapeInference.infer_shapes(copy, auto_merge=True).graph  # onnx's own stops at computed shapes
    found: dict[str, int] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        if kind.elem_type not in FLOATS or value.name in weights:
            continue
        if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
            raise CheckpointError(f"the memory of the exported network cannot be told: {value.name} has no size")
        found[value.name] = math.prod(dim.dim_value for dim in kind.shape.dim)
    return found


def _peak(model: onnx.ModelProto, sizes: Mapping[str, float]) -> float:
    """Most that lives at one time."""
    nodes = model.graph.node
    last = {name: index for index, node in enumerate(nodes) for name in node.input}
    last |= {value.name: len(nodes) for value in model.graph.output}
    live = peak = sum(sizes.get(value.name, 0.0) for value in model.graph.input)
    for index, node in enumerate(nodes):
        made = sum(sizes.get(name, 0.0) for name in node.output)
        over = sum(sizes.get(name, 0.0) for name in set(node.input) if last[name] == index)
        peak = max(peak, live + made - (min(made, over) if node.op_type in BY_ELEMENT else 0.0))
        live += made - over
    return peak
