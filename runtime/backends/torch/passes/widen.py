"""Linear layers with LoRA as wide products, y = [x | S]·[W | B]ᵀ: `Widen` makes [x | S], `Linear` multiplies.

W lies in a buffer with spare columns, which hold the B of the adapters that are in use (`wide`). The layers of one x that the
packing pass has stacked, and the projections of the time embedding, are slices of one product with blocks of columns each.
LayerNorm and GEGLU that one `Widen` alone reads run inside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stepforge.runtime.backends.torch.program import Node, Program

STRENGTHS = "strength of columns"  # value [rows, slices · L] of a number of slices


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
    """LowrankLinear to Widen and Linear."""
    layers: list[WideLayer] = []
    nodes: list[Node] = []
    groups = _time_groups(program)
    slices_used: dict[int, str] = {}
    done: set[str] = set()

    def strengths(slices: int) -> str:
        if slices not in slices_used:
            slices_used[slices] = f"{STRENGTHS} × {slices}"
        return slices_used[slices]

    joined = {node.outputs[0] for node in program.nodes if node.op == "Concat"}
    for node in program.nodes:
        pixels = node.op == "LowrankConv" and _is_product(program, node) and node.inputs[0] not in joined
        if node.op == "LowrankConv" and not pixels and program.constants[node.inputs[1]].shape[2] > 1:
            width = program.constants[node.inputs[1]].shape[0]
            weight = node.inputs[1]
            layer = WideLayer(weight, f"wide {weight}", f"B of {weight}", f"B of {width}", node.inputs[3:4], node.inputs[4:5],
                              (width,), conv=True)  # fmt: skip
            layers.append(layer)
            strengths(1)
            operands = (node.inputs[0], layer.wide, layer.down, *[name for name in node.inputs[2:3] if name])
            settings = {"stride": node.attributes["stride"], "pad": node.attributes["pad"]}
            nodes.append(Node("WideConv", operands, node.outputs, settings))
            continue
        if not pixels and (node.op != "LowrankLinear" or len(node.inputs) != 7):
            nodes.append(node)
            continue
        if pixels:
            flat = f"{node.inputs[1]}.2d"
            program.constants[flat] = program.constants[node.inputs[1]].flatten(1)
            node = Node(node.op, (node.inputs[0], flat, *node.inputs[2:]), node.outputs)
        if node.outputs[0] in done:
            continue
        group = groups.get(node.outputs[0], [node])
        weight, bias = node.inputs[1], node.inputs[2]
        widths = [program.constants[each.inputs[1]].shape[0] for each in group]
        slices = len(group)
        if len(group) > 1:
            weight, bias = (f"all of {name}" for name in (weight, bias))
            program.constants[weight] = torch.cat([program.constants[each.inputs[1]] for each in group])
            program.constants[bias] = torch.cat([program.constants[each.inputs[2]] for each in group])
        else:
            slices = node.attributes.get("slices", 1)
            widths = [widths[0] // slices] * slices
        depth = program.constants[weight].shape[1]
        layer = WideLayer(
            weight, f"wide {weight}", f"columns of {weight}", f"A of {slices} × {depth}",
            tuple(each.inputs[3] for each in group), tuple(each.inputs[4] for each in group), tuple(widths),
        )  # fmt: skip
        layers.append(layer)
        strengths(slices)
        rows = f"{node.inputs[0]} wide for {weight}"
        nodes.append(Node("Widen", (node.inputs[0], layer.down, "", "", ""), (rows,)))
        if len(group) == 1:
            op = "Pointwise" if pixels else "Linear"
            nodes.append(Node(op, (rows, layer.wide, bias) if bias else (rows, layer.wide), node.outputs))
            continue
        whole = f"all of {node.outputs[0]}"
        nodes.append(Node("Linear", (rows, layer.wide, bias), (whole,)))
        start = 0
        for each, width in zip(group, widths, strict=True):
            nodes.append(Node("Columns", (whole,), each.outputs, {"start": start, "end": start + width}))
            start += width
            done.add(each.outputs[0])
    first = [Node("Strengths", ("adapter_columns", "adapter_strength"), (name,), {"slices": slices})
             for slices, name in slices_used.items()]  # fmt: skip
    if not layers:
        return []
    strengths_of = {layer.stack: slices_used[len(layer.widths)] for layer in layers}
    for stack, strength in strengths_of.items():
        members = [layer.down for layer in layers if layer.stack == stack]
        first.append(Node("ScaledColumns", (stack, strength), tuple(members)))
    program.nodes = [*first, *nodes]
    program.inputs = (
        *program.inputs,
        "adapter_columns",
        *(layer.wide for layer in layers),
        *strengths_of,
    )
    for layer in layers:
        program.wide[layer.wide] = layer.weight
    return layers


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
    """LayerNorm and GEGLU inside the Widen that alone reads them."""
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

    return program.rewrite(match)
