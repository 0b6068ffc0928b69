"""A tensor is written once: additions, concatenations and biases move into the kernels that read or write next.

product    x Wᵀ + r  runs in place on r (`Accumulate`), where nobody reads r afterwards
norm       reads [x + residual | other] + shift itself, and writes x's sum once if others read it (`Norm`)
bias       of a convolution or of an in-place product waits until a kernel takes it: a vector that LayerNorm adds to its
           rows, a norm's shift, a vector that the norm adds to the sum which it writes, another bias (through its weight)

For the fast tier: sums are rounded in other places than PyTorch's operators round them.
"""

from __future__ import annotations

from typing import Any

import torch

from stepforge.runtime.backends.torch.passes.biases import Biases, one_time_projection, readers_of
from stepforge.runtime.backends.torch.program import Node, Program

PRODUCTS = ("Linear", "Pointwise")
VIEWS = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Split", "Identity", "Columns")
OWNERS = (
    "Linear",
    "Pointwise",
    "Conv",
    "WideConv",
    "Norm",
    "LayerNorm",
    "Geglu",
    "Sum",
)  # their results are memory of their own
TO_IMAGE = (0, 3, 1, 2)
RAW = ("Conv", "WideConv", "LowrankConv")


def write_once(program: Program) -> bool:
    """All of it, in the order in which one pass prepares the next."""
    before = len(program.nodes)
    layer_norms(program)
    pointwise(program)
    images_of_tokens(program)
    two_sources(program)
    sums_of_norms(program)
    products_in_place(program)
    left_over_sums(program)
    Biases(program).resolve()
    one_time_projection(program)
    program.sweep()
    program.nodes = [kept(node) for node in program.nodes]
    return len(program.nodes) != before


def kept(node: Node) -> Node:
    """A norm with two results writes its sum."""
    return (
        Node(node.op, node.inputs, node.outputs, {**node.attributes, "keep": len(node.outputs) > 1})
        if node.op == "Norm"
        else node
    )


def layer_norms(program: Program) -> bool:
    """LayerNormalization of the last axis, to the kernel."""

    def match(node: Node) -> Node | None:
        if node.op != "LayerNormalization" or node.attributes.get("axis", -1) != -1 or len(node.inputs) != 3:
            return None
        return Node("LayerNorm", (*node.inputs, ""), node.outputs, {"epsilon": node.attributes.get("epsilon", 1e-5)})

    return program.rewrite(match)


def pointwise(program: Program) -> bool:
    """1×1 convolutions are products over pixels."""
    constants = program.constants

    def match(node: Node) -> Node | None:
        weight = constants.get(node.inputs[1]) if node.op == "Conv" else None
        if not isinstance(weight, torch.Tensor) or tuple(weight.shape[2:]) != (1, 1):
            return None
        plain = {"strides": (1, 1), "pads": (0, 0, 0, 0), "group": 1}
        if any(tuple_of(node.attributes.get(name, value)) != tuple_of(value) for name, value in plain.items()):
            return None
        name = f"{node.inputs[1]}.2d"
        constants[name] = weight.flatten(1)
        return Node("Pointwise", (node.inputs[0], name, *node.inputs[2:]), node.outputs)

    return program.rewrite(match)


def tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def images_of_tokens(program: Program) -> bool:
    """Linear, Reshape, Transpose to an image: the product over its pixels (SDXL's proj_out), so that sums meet as images."""
    made, uses = program.producers(), program.uses()
    nodes: list[Node] = []
    changed = False
    for node in program.nodes:
        is_image = node.op == "Transpose" and tuple(node.attributes["perm"]) == TO_IMAGE
        shaped = made.get(node.inputs[0]) if is_image else None
        layer = made.get(shaped.inputs[0]) if shaped is not None and shaped.op == "Reshape" else None
        if (
            layer is None
            or shaped is None
            or layer.op != "Linear"
            or uses[layer.outputs[0]] + uses[shaped.outputs[0]] != 2
        ):
            nodes.append(node)
            continue
        out, depth = program.weight(layer.inputs[1]).shape
        if out != depth:  # the sizes that Reshape is given are those of the result
            nodes.append(node)
            continue
        whole, image = f"{shaped.outputs[0]} before", f"{node.outputs[0]} before"
        tokens, product = layer.inputs[0], image
        widened = made.get(tokens)
        if layer.inputs[1] in program.wide:  # [x | S]: the columns of S are made of the image
            if widened is None or widened.op != "Widen" or any(widened.inputs[2:]) or widened.attributes.get("gate"):
                nodes.append(node)
                continue
            tokens, product = widened.inputs[0], f"{tokens} as an image"
        nodes += [
            Node("Reshape", (tokens, shaped.inputs[1]), (whole,), shaped.attributes),
            Node("Transpose", (whole,), (image,), node.attributes),
        ]
        if product != image:
            assert widened is not None
            nodes.append(Node("Widen", (image, *widened.inputs[1:]), (product,)))
        nodes.append(Node("Pointwise", (product, *layer.inputs[1:]), node.outputs))
        changed = True
    program.nodes = nodes
    program.sweep()
    return changed


def two_sources(program: Program) -> bool:
    """Concatenations along channels that norms and products over pixels read: these read both sources."""
    made, constants = program.producers(), program.constants
    readers = readers_of(program)
    parts: dict[str, tuple[str, str]] = {}
    delayed: dict[str, list[Node]] = {}  # an Add's result -> the two that take its place
    for node in program.nodes:
        joins = node.op == "Concat" and node.attributes["axis"] == 1 and len(node.inputs) == 2
        found = readers.get(node.outputs[0], [])
        if (
            joins
            and found
            and all(reader.op in ("GroupNormSilu", "Pointwise") or is_1x1(program, reader) for reader in found)
        ):
            widths = {width_of(program, made, name) for name in node.inputs}
            if None not in widths and node.outputs[0] not in program.outputs:
                parts[node.outputs[0]] = (node.inputs[0], node.inputs[1])
    nodes: list[Node] = []
    for node in program.nodes:
        sources = parts.get(node.inputs[0]) if node.op in ("GroupNormSilu", "Pointwise", "WideConv") else None
        if sources is None:
            nodes.append(node)
        elif node.op == "WideConv":
            operands = (sources[0], *node.inputs[1:3], sources[1], *node.inputs[4:])
            attributes = {**node.attributes, "first": width_of(program, made, sources[0])}
            nodes.append(Node("WideConv", operands, node.outputs, attributes))
        elif node.op == "GroupNormSilu":
            x, other = sources
            attributes = {**node.attributes, "first": width_of(program, made, x)}
            nodes.append(Node("Norm", (x, *node.inputs[1:], other, "", "", ""), node.outputs, attributes))
        else:
            first = width_of(program, made, sources[0])
            names = f"{node.inputs[1]}.first", f"{node.inputs[1]}.second"
            weight = constants[node.inputs[1]]
            constants[names[0]], constants[names[1]] = weight[:, :first].contiguous(), weight[:, first:].contiguous()
            half, rest = f"{node.outputs[0]}.first", f"{node.outputs[0]}.second"
            (reader,) = readers[node.outputs[0]] if len(readers[node.outputs[0]]) == 1 else (None,)
            nodes.append(Node("Pointwise", (sources[0], names[0], *node.inputs[2:]), (half,)))
            nodes.append(Node("Pointwise", (sources[1], names[1]), (rest,)))
            if reader is not None and reader.op == "Add":
                y = next(name for name in reader.inputs if name != node.outputs[0])
                inner = f"{node.outputs[0]} + {y}"
                later = [Node("Add", (half, y), (inner,)), Node("Add", (rest, inner), reader.outputs)]
                delayed[reader.outputs[0]] = later
            else:
                nodes.append(Node("Add", (rest, half), node.outputs))
    program.nodes = [new for node in nodes for new in delayed.pop(node.outputs[0], [node])]
    program.sweep()
    return bool(parts)


def is_1x1(program: Program, node: Node) -> bool:
    """Whether a convolution with adapters is a product over pixels."""
    plain = node.op == "WideConv" and (node.attributes["stride"], node.attributes["pad"]) == (1, 0)
    return plain and tuple(program.weight(node.inputs[1]).shape[2:]) == (1, 1)


def width_of(program: Program, made: dict[str, Node], name: str) -> int | None:
    """Channels of an image, from the weights that made it."""
    node = made.get(name)
    while node is not None:
        if node.op in ("Conv", "Pointwise", "Linear", "Accumulate", "WideConv", "LowrankConv", "LowrankLinear"):
            return int(program.weight(node.inputs[1]).shape[0])
        if node.op in ("Norm", "GroupNormSilu"):
            return int(program.constants[node.inputs[1]].shape[0])
        if node.op not in ("Add", "Transpose", "Reshape", "Resize", "Sum"):
            return None
        node = made.get(node.inputs[0]) or (made.get(node.inputs[1]) if node.op == "Add" else None)
    return None


def is_vector(program: Program, made: dict[str, Node], name: str) -> str | None:
    """The [rows, C] behind a value [rows, C, 1, 1]."""
    node, steps = made.get(name), 0
    while node is not None and node.op == "Unsqueeze":
        steps += len(program.constants[node.inputs[1]])
        name, node = node.inputs[0], made.get(node.inputs[0])
    return name if steps == 2 else None


def sums_of_norms(program: Program) -> bool:
    """The Add that a norm reads, where a convolution made one of its operands; the norm stands where the Add stood."""
    made, readers = program.producers(), readers_of(program)
    at = {name: index for index, node in enumerate(program.nodes) for name in node.outputs}
    uses = program.uses()
    gone: set[int] = set()
    taken: set[str] = set()  # sums that a norm makes
    put: dict[int, list[Node]] = {}  # behind the node of that index
    for index, node in enumerate(program.nodes):
        if node.op not in ("GroupNormSilu", "Norm"):
            continue
        other, first = (node.inputs[3], node.attributes["first"]) if node.op == "Norm" else ("", 0)
        attributes = {**node.attributes, "first": first}
        new = Node("Norm", (node.inputs[0], *node.inputs[1:3], other, "", "", ""), node.outputs, attributes)
        added = made.get(node.inputs[0])
        place = index
        if added is not None and added.op == "Add" and added.outputs[0] != other and added.outputs[0] not in taken:
            left, right = added.inputs
            vector = is_vector(program, made, right)
            alone = uses[added.outputs[0]] == 1
            left_made, right_made = made.get(left), made.get(right)
            if vector is not None and alone and not other:
                new = Node("Norm", (left, *new.inputs[1:4], vector, "", ""), node.outputs, attributes)
                gone.add(at[added.outputs[0]])
                taken.add(added.outputs[0])
            elif (
                left_made is not None and right_made is not None and vector is None
                and not any(side.op in PRODUCTS and uses[side.outputs[0]] == 1 for side in (left_made, right_made))
                and any(side.op in RAW and uses[side.outputs[0]] == 1 for side in (left_made, right_made))
            ):  # fmt: skip
                raw, residual = (left, right) if uses[left] == 1 and left_made.op in RAW else (right, left)
                outputs = node.outputs if alone else (*node.outputs, added.outputs[0])
                place = index if alone else max(at[added.outputs[0]], at.get(other, 0))
                others = [reader for reader in readers[added.outputs[0]] if reader is not node]
                if all(at[reader.outputs[0]] > place for reader in others):
                    new = Node("Norm", (raw, *new.inputs[1:4], "", residual, ""), outputs, attributes)
                    gone.add(at[added.outputs[0]])
                    taken.add(added.outputs[0])
                else:
                    place = index
        gone.add(index)
        put.setdefault(place, []).append(new)
        at.update(dict.fromkeys(new.outputs, place))
    program.nodes = [
        found for index, node in enumerate(program.nodes)
        for found in ([] if index in gone else [node]) + put.get(index, [])
    ]  # fmt: skip
    program.sweep()
    return bool(put)


class Memory:
    """Which values lie in one piece of memory, and where each is read."""

    def __init__(self, program: Program) -> None:
        self.nodes = program.nodes
        self.root: dict[str, str] = {}
        self.members: dict[str, list[str]] = {}
        self.reads: dict[str, list[int]] = {}
        self.owned: set[str] = set()
        for index, node in enumerate(self.nodes):
            for name in node.inputs:
                self.reads.setdefault(name, []).append(index)
            base = node.inputs[2] if node.op == "Accumulate" else node.inputs[0] if node.op in VIEWS else None
            for name in node.outputs:
                self._join(name, self.root.get(base, base) if base else name)
            if node.op in OWNERS:
                self.owned.update(node.outputs)

    def _join(self, name: str, root: str) -> None:
        self.root[name] = root
        self.members.setdefault(root, []).append(name)

    def last_read(self, name: str, views: bool = False) -> int:
        """Where the memory of a value is read for the last time."""
        found = -1
        for member in self.members.get(self.root.get(name, name), [name]):
            for index in self.reads.get(member, []):
                if views or self.nodes[index].op not in VIEWS:
                    found = max(found, index)
        return found


def products_in_place(program: Program) -> bool:
    """r + x Wᵀ, where the product has no other reader and r none afterwards."""
    changed = False
    index = 0
    while index < len(program.nodes):
        node = program.nodes[index]
        new = _in_place(program, index) if node.op == "Add" else None
        if new is not None:
            program.nodes[index] = new
            changed = True
        index += 1
    if changed:
        program.sweep()
    return changed


def _in_place(program: Program, index: int) -> Node | None:
    node = program.nodes[index]
    made, uses, memory = program.producers(), program.uses(), Memory(program)
    outputs = {memory.root.get(name, name) for name in program.outputs}
    for at, name in enumerate(node.inputs):
        layer, base = made.get(name), node.inputs[1 - at]
        if layer is None or layer.op not in PRODUCTS or uses[name] != 1 or base == name:
            continue
        root = memory.root.get(base, base)
        moved = memory.root.get(layer.inputs[0], layer.inputs[0])
        overwritten = any(
            other.op == "Accumulate" and memory.root.get(other.inputs[2]) == moved for other in program.nodes[:index]
        )
        if root not in memory.owned or root in outputs or moved == root or memory.last_read(base) > index:
            continue
        if overwritten and moved != root and memory.last_read(layer.inputs[0]) > index:
            continue
        width = program.weight(layer.inputs[1]).shape[0]
        if width_of(program, made, base) not in (None, width):
            continue
        return Node("Accumulate", (layer.inputs[0], layer.inputs[1], base, *layer.inputs[2:3]), node.outputs)
    return None


def left_over_sums(program: Program) -> bool:
    """x + residual of images, and nearest upsampling by 2 with the sum that it alone reads: one kernel."""
    made, uses = program.producers(), program.uses()
    is_image = {
        name
        for node in program.nodes
        if node.op in ("Conv", "WideConv", "Norm", "Pointwise", "Accumulate")
        for name in node.outputs
    }

    def add(node: Node) -> Node | None:
        if node.op != "Add" or not all(name in is_image for name in node.inputs):
            return None
        if not any(made[name].op in ("Conv", "WideConv") for name in node.inputs):
            return None
        is_image.add(node.outputs[0])
        return Node("Sum", (node.inputs[0], node.inputs[1], ""), node.outputs, {"scale": 1})

    def resize(node: Node) -> Node | None:
        sizes = _sizes(program, node) if node.op == "Resize" and node.inputs[0] in is_image else None
        if sizes is None:
            return None
        before = made[node.inputs[0]]
        if before.op == "Sum" and uses[node.inputs[0]] == 1:
            return Node("Sum", (*before.inputs[:3], sizes), node.outputs, {"scale": 2})
        return Node("Sum", (node.inputs[0], "", "", sizes), node.outputs, {"scale": 2})

    changed = program.rewrite(add)
    made.update(program.producers())
    return program.rewrite(resize) or changed


def _sizes(program: Program, node: Node) -> str | None:
    """The sizes that nearest upsampling is given, "" where it doubles, None for another resampling."""
    modes = [node.attributes.get(name) for name in ("mode", "nearest_mode", "coordinate_transformation_mode")]
    if modes != ["nearest", "floor", "asymmetric"]:
        return None
    operands = [*node.inputs, "", "", ""][:4]
    if operands[3]:
        return operands[3]
    scales = program.constants.get(operands[2])
    return "" if scales is not None and [float(value) for value in scales] == [1.0, 1.0, 2.0, 2.0] else None
