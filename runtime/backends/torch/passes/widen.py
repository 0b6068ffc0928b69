"""Linear layers with LoRA as wide products, y = [x | S]·[W | B]ᵀ: `Widen` makes [x | S], `Linear` multiplies.

W lies in a buffer with spare columns, which hold the B of the adapters that are in use (`wide`). The layers of one x that the
packing pass has stacked, and the projections of the time embedding, are slices of one product with blocks of columns each.
LayerNorm, GEGLU and group norm that one `Widen` alone reads run inside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepforge.runtime.backends.torch.passes.biases import on_one_device
from stepforge.runtime.backends.torch.program import Node, Program

TO_PIXELS = (0, 2, 3, 1)
STRENGTHS = "strength of columns"  # value [rows, L]


@dataclass(frozen=True, slots=True)
class WideLayer:
    """Names of a layer's operands. widths: rows of W of each slice; a, b: the views of its banks, one or one a slice."""

    weight: str  # constant [N, K]
    wide: str  # input: [N, K + slices · L]
    down: str  # value: [rows, slices · L, K], with strengths
    stack: str  # input: the A of all layers of as many slices and as deep [n, slices · L, K]
    a: tuple[str, ...]
    b: tuple[str, ...]
    widths: tuple[int, ...]
    conv: bool = False  # then wide is [N + L, C, k, k], and down and stack are of B: [rows, L, N], [n, L, N]


def widen_layers(program: Program) -> list[WideLayer]:
    """Layers with LoRA to Widen and Linear, or WideConv, which also takes the 1×1 on a concatenation."""
    groups = _time_groups(program)
    joined = {node.outputs[0] for node in program.nodes if node.op == "Concat"}
    layers: list[WideLayer] = []
    nodes: list[Node] = []
    done: set[str] = set()
    for node in program.nodes:
        if node.outputs[0] in done:
            continue
        if node.op == "LowrankConv" and _is_product(program, node) and node.inputs[0] not in joined:
            layer, made = _linear(program, [_flat(program, node)], "Pointwise")
        elif node.op == "LowrankConv":
            layer, made = _conv(program, node)
        elif node.op == "LowrankLinear" and len(node.inputs) == 7:
            group = groups.get(node.outputs[0], [node])
            layer, made = _linear(program, group, "Linear")
            done.update(each.outputs[0] for each in group)
        else:
            nodes.append(node)
            continue
        layers.append(layer)
        nodes += made
        program.wide[layer.wide] = layer.weight
    if layers:
        program.nodes = [*_strengths(layers), *nodes]
        stacks = dict.fromkeys(layer.stack for layer in layers)
        program.inputs = (*program.inputs, "adapter_columns", *(layer.wide for layer in layers), *stacks)
    return layers


def _conv(program: Program, node: Node) -> tuple[WideLayer, list[Node]]:
    weight = node.inputs[1]
    width = program.constants[weight].shape[0]
    layer = WideLayer(
        weight,
        f"wide {weight}",
        f"B of {weight}",
        f"B of {width}",
        node.inputs[3:4],
        node.inputs[4:5],
        (width,),
        conv=True,
    )
    operands = (node.inputs[0], layer.wide, layer.down, "", "", *[name for name in node.inputs[2:3] if name])
    settings = {"stride": node.attributes["stride"], "pad": node.attributes["pad"]}
    return layer, [Node("WideConv", operands, node.outputs, settings)]


def _flat(program: Program, node: Node) -> Node:
    """A 1×1 convolution with its weight as a matrix."""
    flat = f"{node.inputs[1]}.2d"
    program.constants[flat] = program.constants[node.inputs[1]].flatten(1)
    return Node(node.op, (node.inputs[0], flat, *node.inputs[2:]), node.outputs)


def _linear(program: Program, group: list[Node], op: str) -> tuple[WideLayer, list[Node]]:
    """One layer, or several of one x as slices of one product; op: what multiplies."""
    constants, node = program.constants, group[0]
    weight, bias = node.inputs[1], node.inputs[2]
    widths = [constants[each.inputs[1]].shape[0] for each in group]
    if len(group) > 1:
        weight, bias = (f"all of {name}" for name in (weight, bias))
        constants[weight] = torch.cat([constants[each.inputs[1]] for each in group])
        constants[bias] = torch.cat(on_one_device(*(constants[each.inputs[2]] for each in group)))
    else:
        slices = node.attributes.get("slices", 1)
        widths = [widths[0] // slices] * slices
    layer = WideLayer(
        weight, f"wide {weight}", f"columns of {weight}", f"A of {len(widths)} × {constants[weight].shape[1]}",
        tuple(each.inputs[3] for each in group), tuple(each.inputs[4] for each in group), tuple(widths),
    )  # fmt: skip
    rows = f"{node.inputs[0]} wide for {weight}"
    operands = (rows, layer.wide, bias) if bias else (rows, layer.wide)
    made = [Node("Widen", (node.inputs[0], layer.down, "", "", ""), (rows,))]
    if len(group) == 1:
        return layer, [*made, Node(op, operands, node.outputs)]
    whole = f"all of {node.outputs[0]}"
    made.append(Node(op, operands, (whole,)))
    start = 0
    for each, width in zip(group, widths, strict=True):
        made.append(Node("Columns", (whole,), each.outputs, {"start": start, "end": start + width}))
        start += width
    return layer, made


def _strengths(layers: list[WideLayer]) -> list[Node]:
    """What makes the A (of convolutions the B) of each layer, with the strengths of the rows in it."""
    scaled: dict[str, Node] = {}
    for layer in layers:
        if layer.stack not in scaled:
            members = tuple(each.down for each in layers if each.stack == layer.stack)
            settings = {"slices": len(layer.widths)}
            scaled[layer.stack] = Node("ScaledColumns", (layer.stack, STRENGTHS), members, settings)
    return [Node("Strengths", ("adapter_columns", "adapter_strength"), (STRENGTHS,)), *scaled.values()]


def _is_product(program: Program, node: Node) -> bool:
    """Whether a convolution is a product over pixels."""
    plain = (node.attributes["stride"], node.attributes["pad"]) == (1, 0)
    return plain and tuple(program.constants[node.inputs[1]].shape[2:]) == (1, 1)


def _time_groups(program: Program) -> dict[str, list[Node]]:
    """LowrankLinear of one vector [rows, K] that are added to images, by their results."""
    readers: dict[str, list[Node]] = {}
    for node in program.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    found: dict[str, list[Node]] = {}
    for node in program.nodes:
        if node.op == "LowrankLinear" and node.inputs[2]:
            (reader,) = readers[node.outputs[0]] if len(readers.get(node.outputs[0], [])) == 1 else (None,)
            if reader is not None and reader.op == "Unsqueeze":
                found.setdefault(node.inputs[0], []).append(node)
    return {node.outputs[0]: group for group in found.values() if len(group) > 1 for node in group}


def fuse_widen(program: Program) -> bool:
    """LayerNorm, GEGLU and group norm inside the Widen that alone reads them."""
    made, uses = program.producers(), program.uses()

    def match(node: Node) -> Node | None:
        before = made.get(node.inputs[0]) if node.op == "Widen" else None
        if before is None or uses[node.inputs[0]] != 1 or node.inputs[2]:
            return None
        if before.op == "LayerNorm":
            x, weight, bias, pre = before.inputs
            operands = (x, node.inputs[1], weight, bias, pre)
            return Node("Widen", operands, node.outputs, {"epsilon": before.attributes["epsilon"]})
        if before.op == "Geglu":
            return Node("Widen", (before.inputs[0], *node.inputs[1:]), node.outputs, {"gate": True})
        return None

    return any([program.rewrite(match), _norms_of_images(program)])


def _norms_of_images(program: Program) -> bool:
    """Widen of a group norm's image, or of its tokens, in the norm's place, whose sum others may read at once."""
    made, uses = program.producers(), program.uses()
    found: dict[str, Node] = {}  # result of a norm -> what takes its place
    for node in program.nodes:
        if node.op != "Widen" or any(node.inputs[2:]) or node.attributes.get("gate"):
            continue
        name, views = node.inputs[0], []
        while uses[name] == 1 and name in made and made[name].op in ("Reshape", "Transpose"):
            views.append(made[name])
            name = made[name].inputs[0]
        norm = made.get(name)
        if norm is None or norm.op != "Norm" or uses[name] != 1:
            continue
        is_tokens = [view.op for view in views] == ["Reshape", "Transpose"] and views[1].attributes["perm"] == TO_PIXELS
        if views and not is_tokens:
            continue
        outputs = (*node.outputs, *norm.outputs[1:])
        settings = {**norm.attributes, "tokens": is_tokens}
        found[name] = Node("WidenNorm", (*norm.inputs, node.inputs[1]), outputs, settings)
    widened = {node.outputs[0] for node in found.values()}
    program.nodes = [
        found.get(node.outputs[0], node)
        for node in program.nodes
        if node.op != "Widen" or node.outputs[0] not in widened
    ]
    program.sweep()
    return bool(found)
