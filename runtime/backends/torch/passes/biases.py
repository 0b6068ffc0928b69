"""Biases that wait until a kernel takes them, and the projections of the time embedding as one product; see `sums`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepforge.runtime.backends.torch.program import Node, Program


def on_one_device(*values: Tensor) -> list[Tensor]:
    """Constants that meet; those without memory (benchmarks/network_model.py) make all so."""
    meta = any(value.device.type == "meta" for value in values)
    return [value.to("meta") if meta else value for value in values]


def readers_of(program: Program) -> dict[str, list[Node]]:
    found: dict[str, list[Node]] = {}
    for node in program.nodes:
        for name in node.inputs:
            found.setdefault(name, []).append(node)
    return found


class Biases:
    """Biases that wait: `pending` holds, by value, the vector that is still missing in it."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def resolve(self) -> None:
        self._into_written_sums()
        for index, node in enumerate(self.program.nodes):
            at = {"Conv": 2, "Accumulate": 3, "WideConv": 5}.get(node.op)
            if at is None or len(node.inputs) <= at or not node.inputs[at]:
                continue
            if not self._takes_all(node.outputs[0]):
                continue
            bias = node.inputs[at]
            self.program.nodes[index] = Node(node.op, node.inputs[:at], node.outputs, node.attributes)
            self._give(node.outputs[0], bias)
        self._into_written_sums()  # what came to them from the products before
        self._shifts_of_wide_convolutions()

    def _into_written_sums(self) -> None:
        """The bias of a product that runs in place on a sum which a norm has written: into that sum."""
        program = self.program
        for index, node in enumerate(program.nodes):
            if node.op != "Accumulate" or len(node.inputs) < 4 or not node.inputs[3]:
                continue
            place, writer = next(
                ((i, n) for i, n in enumerate(program.nodes) if n.op == "Norm" and node.inputs[2] in n.outputs[1:]),
                (-1, None),
            )
            if writer is None or program.uses()[node.inputs[2]] != 1:
                continue
            vector = self._sum(writer.inputs[6], node.inputs[3])
            program.nodes[place] = Node("Norm", (*writer.inputs[:6], vector), writer.outputs, writer.attributes)
            program.nodes[index] = Node(node.op, node.inputs[:3], node.outputs, node.attributes)

    def _readers(self, name: str) -> list[tuple[int, int, Node]]:
        return [
            (i, at, n) for i, n in enumerate(self.program.nodes) for at, each in enumerate(n.inputs) if each == name
        ]

    def _takes_all(self, name: str) -> bool:
        """Whether every reader of a value, and of what it hands on, can take a vector that is missing in it."""
        if name in self.program.outputs:
            return False
        return all(self._takes(at, node) for _, at, node in self._readers(name))

    def _takes(self, at: int, node: Node) -> bool:
        if node.op in ("Reshape", "Transpose") and at == 0:
            return self._takes_all(node.outputs[0])
        if node.op == "Accumulate":
            return at == 0 or (at == 2 and self._takes_all(node.outputs[0]))
        if node.op == "Norm":
            return at in (0, 3, 5) and self._shift_is_ours(node)
        if node.op == "WideConv":  # two sources: one pixel, so that a vector stays one
            return at in (0, 3) and bool(node.inputs[3])
        if node.op == "Sum":
            return at in (0, 1)
        return at == 0 and node.op in ("LayerNorm", "Linear", "Pointwise", "Widen", "Shape")

    def _shift_is_ours(self, node: Node) -> bool:
        shift = node.inputs[4]
        made, uses = self.program.producers(), self.program.uses()
        if not shift or shift in self.program.constants:
            return True
        while made[shift].op == "Add" and uses[shift] == 1:  # a LoRA term
            shift = made[shift].inputs[0]
        if uses[shift] != 1:
            return False
        layer = made[made[shift].inputs[0]] if made[shift].op == "Columns" else made[shift]
        return layer.op == "Linear" and len(layer.inputs) > 2 and bool(layer.inputs[2])

    def _give(self, name: str, vector: str) -> None:
        program, constants = self.program, self.program.constants
        for index, at, node in self._readers(name):
            operands = list(node.inputs)
            if node.op == "Shape":
                continue
            if node.op in ("Reshape", "Transpose"):
                self._give(node.outputs[0], vector)
                continue
            if node.op == "Accumulate" and at == 2:
                self._give(node.outputs[0], vector)
                continue
            if node.op in ("Linear", "Pointwise", "Accumulate"):
                place = 3 if node.op == "Accumulate" else 2
                weight, missing = on_one_device(program.weight(operands[1]), constants[vector])
                product = self._constant(weight.float() @ missing.float(), f"{operands[1]} of {vector}")
                operands += [""] * (place + 1 - len(operands))
                operands[place] = self._sum(operands[place], product)
            elif node.op == "Widen":
                operands[4] = self._sum(operands[4], vector)
            elif node.op == "LayerNorm":
                operands[3] = self._sum(operands[3], vector)
            elif node.op == "Sum":
                operands[2] = self._sum(operands[2], vector)
            elif node.op == "WideConv":
                channels = program.weight(operands[1]).shape[1]
                operands[4] = self._sum(
                    operands[4], self._among(vector, node.attributes["first"] if at else 0, channels)
                )
            else:
                self._into_shift(index, at, node, vector)
                continue
            program.nodes[index] = Node(node.op, tuple(operands), node.outputs, node.attributes)

    def _into_shift(self, index: int, at: int, node: Node, vector: str) -> None:
        program, constants = self.program, self.program.constants
        before = node.attributes["first"] if at == 3 else 0
        vector = self._among(vector, before, len(constants[node.inputs[1]]))
        shift = node.inputs[4]
        if not shift or shift in constants:
            old = constants[shift].flatten() if shift else None
            added = constants[vector]
            if old is not None:
                old, added = on_one_device(old, added)
            total = added if old is None else old.float() + added.float()
            name = self._constant(total.to(constants[vector].dtype)[None], f"{shift} + {vector} shift")
            operands = [*node.inputs[:4], name, *node.inputs[5:]]
            program.nodes[index] = Node(node.op, tuple(operands), node.outputs, node.attributes)
            return
        made = program.producers()
        while made[shift].op == "Add":
            shift = made[shift].inputs[0]
        layer = made[shift]
        if layer.op == "Columns":
            start, end = layer.attributes["start"], layer.attributes["end"]
            layer = made[layer.inputs[0]]
            biases, value = on_one_device(constants[layer.inputs[2]], constants[vector].flatten())
            whole = torch.zeros_like(biases)
            whole[start:end] = value
            vector = self._constant(whole, f"{vector} of columns from {start}")
        place = program.nodes.index(layer)
        biases = self._sum(layer.inputs[2], vector)
        program.nodes[place] = Node(
            layer.op, (*layer.inputs[:2], biases, *layer.inputs[3:]), layer.outputs, layer.attributes
        )

    def _among(self, vector: str, before: int, channels: int) -> str:
        """With zeros for the channels in front of it and behind."""
        value = self.program.constants[vector]
        rest = channels - before - len(value)
        if not before and not rest:
            return vector
        whole = torch.cat([value.new_zeros(before), value, value.new_zeros(rest)])
        return self._constant(whole, f"{vector} of {channels} from {before}")

    def _shifts_of_wide_convolutions(self) -> None:
        """What a vector that is missing in their sources comes to: it changes with the adapters alone."""
        nodes: list[Node] = []
        for node in self.program.nodes:
            if node.op == "WideConv" and node.inputs[4]:
                shift = f"{node.inputs[4]} by {node.inputs[1]}"
                nodes.append(Node("Shift", (node.inputs[4], node.inputs[1]), (shift,)))
                node = Node(node.op, (*node.inputs[:4], shift, *node.inputs[5:]), node.outputs, node.attributes)
            nodes.append(node)
        self.program.nodes = nodes

    def _sum(self, one: str, other: str) -> str:
        if not one:
            return other
        constants = self.program.constants
        first, second = on_one_device(constants[one], constants[other])
        value = first.float() + second.float()
        return self._constant(value.to(first.dtype), f"{one} + {other}")

    def _constant(self, value: Tensor, name: str) -> str:
        self.program.constants[name] = value
        return name


def one_time_projection(program: Program) -> bool:
    """The projections of the time embedding, which all read one vector, as one product: norms read its columns."""
    groups: dict[str, list[Node]] = {}
    readers, uses = readers_of(program), program.uses()
    for node in program.nodes:
        if node.op == "Linear" and len(node.inputs) == 3 and node.inputs[2] and uses[node.outputs[0]] == 1:
            (reader,) = readers.get(node.outputs[0], [None])
            if reader is not None and reader.op == "Norm" and reader.inputs[4] == node.outputs[0]:
                groups.setdefault(node.inputs[0], []).append(node)
    nodes: list[Node] = []
    stacked = {layer.outputs[0]: group for group in groups.values() if len(group) > 1 for layer in group}
    for node in program.nodes:
        group = stacked.get(node.outputs[0])
        if group is None:
            nodes.append(node)
        elif node is group[0]:
            nodes += _stacked(program, group)
    program.nodes = nodes
    program.sweep()
    return bool(stacked)


def _stacked(program: Program, group: Sequence[Node]) -> list[Node]:
    constants = program.constants
    names = []
    for at in (1, 2):
        name = f"all of {group[0].inputs[at]}"
        constants[name] = torch.cat(on_one_device(*(constants[layer.inputs[at]] for layer in group)))
        names.append(name)
    whole = f"all of {group[0].outputs[0]}"
    made = [Node("Linear", (group[0].inputs[0], *names), (whole,))]
    start = 0
    for layer in group:
        end = start + len(constants[layer.inputs[1]])
        made.append(Node("Columns", (whole,), layer.outputs, {"start": start, "end": end}))
        start = end
    return made
