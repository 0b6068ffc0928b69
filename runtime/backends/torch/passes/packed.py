"""Layers that read one x and meet in one attention run as one product, which is split again: q, k and v, or k and v.

The parts are views of the product, and so are the heads that attention reads. All cross-attentions read one prompt, and
one product could serve them all; but reuse variants have some of the blocks only, and would then hold weights of their own.
So do different groups with and without LoRA. An attention's own layers are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stepforge.runtime.backends.torch.lora import LoraPasses
from stepforge.runtime.backends.torch.program import Node, Program

LAYERS = ("Linear", "LowrankLinear")
ON_THE_WAY = ("Reshape", "Transpose", "Add")  # from a layer to attention; Add: of a LoRA term that is not fused


def pack_attention(program: Program, lora: LoraPasses) -> bool:
    """Linear and LowrankLinear of one x, width, slot and strength that one Attention reads, to one of `slices` and Split."""
    packed: dict[str, list[Node]] = {}  # output of a layer -> the layers that it runs with
    made = program.producers()
    for node in program.nodes:
        groups: dict[object, list[Node]] = {}
        for name in node.inputs[:3] if node.op == "Attention" else ():
            layer = _layer(made, name)
            if layer is not None and layer.outputs[0] not in packed:
                groups.setdefault(_common(program, layer), []).append(layer)
        packed |= {layer.outputs[0]: group for group in groups.values() if len(group) > 1 for layer in group}
    nodes: list[Node] = []
    done: set[str] = set()
    for node in program.nodes:
        group = packed.get(node.outputs[0])
        if group is None:
            nodes.append(node)
        elif node.outputs[0] not in done:  # the first of a group: all that they read is there
            nodes += _pack(program, lora, group)
            done.update(layer.outputs[0] for layer in group)
    program.nodes = nodes
    program.sweep()
    return bool(packed)


def _layer(made: dict[str, Node], name: str) -> Node | None:
    node = made.get(name)
    while node is not None and node.op in ON_THE_WAY:
        node = made.get(node.inputs[0])
    return node if node is not None and node.op in LAYERS else None


def _common(program: Program, layer: Node) -> object:
    """What layers of one group have in common."""
    has_bias = bool((*layer.inputs, "")[2])
    width = program.constants[layer.inputs[1]].shape
    return layer.op, layer.inputs[0], width, has_bias, layer.inputs[5:], layer.attributes.get("rank")


def _pack(program: Program, lora: LoraPasses, group: Sequence[Node]) -> list[Node]:
    first = group[0]
    weight, bias = (_stack_constants(program, [(*layer.inputs, "")[at] for layer in group]) for at in (1, 2))
    operands, attributes = [first.inputs[0], weight, bias], dict(first.attributes)
    if first.op == "LowrankLinear":
        operands += [lora.stack(program, [layer.inputs[at] for layer in group]) for at in (3, 4)]
        operands += first.inputs[5:]
        attributes["slices"] = len(group)
    outputs = tuple(layer.outputs[0] for layer in group)
    whole = " + ".join(outputs)
    return [
        Node(first.op, tuple(operands), (whole,), attributes),
        Node("Split", (whole,), outputs, {"axis": -1, "num_outputs": len(group)}),
    ]


def _stack_constants(program: Program, names: Sequence[str]) -> str:
    if not any(names):
        return ""
    name = " + ".join(names)
    program.constants[name] = torch.cat([program.constants[part] for part in names])
    return name
