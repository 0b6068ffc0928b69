"""Passes that turn the LoRA terms of `export/graph/bank.py` into operators of whole layers, and the banks' layout for those.

linear       Linear(x, W, b) + MatMul(MatMul(x, A[slot])·strength, B[slot]); layers of one x share A, side by side
convolution  Conv(x, W, b) + B[slot] Conv(A[slot] x)·strength, its taps shifted and added by a one-hot convolution
vector       [rows, in], such as the time embedding's: in the fast tier it stays as it is, too small to gain

The fast tier has the kernels' operators, LowrankLinear and LowrankConv; the exact one PEFT's, PeftLinear and PeftConv.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from stepforge.runtime.backends.torch.program import Node, Program

HIGHEST_RANK = 128  # highest rank of the kernels; banks of more stay plain products


@dataclass(frozen=True, slots=True)
class View:
    """How an operand of a fused operator lies in a bank: ranks `first` to `last`, and their axis in the result."""

    bank: str
    kind: (
        str  # "down" [slots, R, in], "up" [slots, out, R], "conv down" [slots, R, k, k, in], "conv up" [slots, out, R]
    )
    first: int
    last: int
    taps: int = 1

    @property
    def name(self) -> str:
        return f"{self.bank}[{self.first}:{self.last}] {self.kind}"

    def of(self, bank: Any) -> Any:
        """The view of one bank [slots, ...], or of some of its slots; shares its memory."""
        if self.kind == "conv up":
            return bank
        if self.kind == "conv down":
            side = round(self.taps**0.5)
            return bank.reshape(len(bank), -1, side, side, bank.shape[-1])
        if self.kind == "down":
            return bank[:, :, self.first : self.last].transpose(1, 2)
        return bank.transpose(1, 2)

    @property
    def parts(self) -> tuple[View, ...]:
        return (self,)


@dataclass(frozen=True, slots=True)
class Stack:
    """Views one behind the other along their second axis: the A or B of layers that run as one. A copy, not a view."""

    parts: tuple[View, ...]

    @property
    def name(self) -> str:
        return " + ".join(view.name for view in self.parts)


@dataclass(slots=True)
class LoraPasses:
    """The passes share the views that they make; these become inputs of the program. exact: for the exact tier."""

    exact: bool = False
    views: dict[str, View | Stack] = field(default_factory=dict)

    def fuse_linear_lora(self, program: Program) -> bool:
        made = program.producers()

        def match(node: Node) -> Node | None:
            layer, term = (made.get(name) for name in node.inputs) if node.op == "Add" else (None, None)
            is_vector = term is not None and term.op == "Squeeze"
            if term is not None and is_vector:
                term = made.get(term.inputs[0])
            if layer is None or term is None or layer.op != "Linear" or term.op != "MatMul":
                return None
            place, parts, scaled = 0, 1, made.get(term.inputs[0])
            if scaled is not None and scaled.op == "Split":
                place, parts = scaled.outputs.index(term.inputs[0]), len(scaled.outputs)
                scaled = made.get(scaled.inputs[0])
            shrink = made.get(scaled.inputs[0]) if scaled is not None and scaled.op == "Mul" else None
            if scaled is None or shrink is None or shrink.op != "MatMul":
                return None
            source = shrink.inputs[0]
            if is_vector and source in made and made[source].op == "Unsqueeze":
                source = made[source].inputs[0]
            if source != layer.inputs[0]:
                return None
            down, up = _bank(made, shrink.inputs[1]), _bank(made, term.inputs[1])
            if down is None or up is None:
                return None
            rank = program.shapes[down[0]][2] // parts
            if rank > HIGHEST_RANK and not self.exact:
                return None
            a = self._view(View(down[0], "down", place * rank, (place + 1) * rank))
            b = self._view(View(up[0], "up", 0, rank))
            operands = (*layer.inputs, "")[:3]
            strength = _before_cast(made, scaled.inputs[1])
            op = "PeftLinear" if self.exact else "LowrankLinear"
            return Node(op, (*operands, a, b, down[1], strength), node.outputs, {"rank": rank})

        return self._run(program, match)

    def fuse_conv_lora(self, program: Program) -> bool:
        made = program.producers()

        def match(node: Node) -> Node | None:
            layer, term = (made.get(name) for name in node.inputs) if node.op == "Add" else (None, None)
            if layer is None or term is None or layer.op != "Conv" or term.op != "Reshape":
                return None
            product = made.get(term.inputs[0])
            up = _bank(made, product.inputs[0]) if product is not None and product.op == "MatMul" else None
            scaled = made.get(product.inputs[1]) if product is not None and up is not None else None
            if scaled is None or up is None or scaled.op != "Mul":
                return None
            shrink, taps = made.get(scaled.inputs[0]), 1
            if shrink is not None and shrink.op == "Reshape":  # maps that the one-hot convolution made
                one_hot = made.get(shrink.inputs[0])
                maps = made.get(one_hot.inputs[0]) if one_hot is not None and one_hot.op == "Conv" else None
                shrink = made.get(maps.inputs[0]) if maps is not None and maps.op == "Reshape" else None
                taps = program.constants[_before_cast(made, one_hot.inputs[1])].shape[1] if one_hot is not None else 1
            down = _bank(made, shrink.inputs[0]) if shrink is not None and shrink.op == "MatMul" else None
            source = made.get(shrink.inputs[1]) if shrink is not None and down is not None else None
            if source is None or down is None or source.op != "Reshape" or source.inputs[0] != layer.inputs[0]:
                return None
            rank = program.shapes[up[0]][2]
            stride, pads = layer.attributes.get("strides", (1, 1)), layer.attributes.get("pads", (0, 0, 0, 0))
            square = len(set(stride)) == 1 and len(set(pads)) == 1 and set(layer.attributes["dilations"]) == {1}
            if (rank > HIGHEST_RANK and not self.exact) or not square or layer.attributes.get("group", 1) != 1:
                return None
            a = self._view(View(down[0], "conv down", 0, rank, taps))
            b = self._view(View(up[0], "conv up", 0, rank))
            operands = (*layer.inputs, "")[:3]
            strength = _before_cast(made, scaled.inputs[1])
            settings = {"rank": rank, "stride": stride[0], "pad": pads[0]}
            op = "PeftConv" if self.exact else "LowrankConv"
            return Node(op, (*operands, a, b, down[1], strength), node.outputs, settings)

        return self._run(program, match)

    def stack(self, program: Program, names: Iterable[str]) -> str:
        """Inputs of a program that become one; returns its name."""
        names = tuple(names)
        name = self._view(Stack(tuple(part for old in names for part in self.views.pop(old).parts)))
        program.inputs = (*(old for old in program.inputs if old not in names), name)
        return name

    def _view(self, view: View | Stack) -> str:
        self.views[view.name] = view
        return view.name

    def _run(self, program: Program, match: Any) -> bool:
        changed = program.rewrite(match)
        new = tuple(name for name in self.views if name not in program.inputs)
        program.inputs = (*program.inputs, *new)
        return changed


def fuse_residual(program: Program) -> bool:
    """What is added to a LowrankLinear, where nothing else reads that: its operand, for the kernel's epilogue."""
    made, uses = program.producers(), program.uses()

    def match(node: Node) -> Node | None:
        for at, name in enumerate(node.inputs) if node.op == "Add" else ():
            layer = made.get(name)
            if layer is not None and layer.op == "LowrankLinear" and len(layer.inputs) == 7 and uses[name] == 1:
                return Node(layer.op, (*layer.inputs, node.inputs[1 - at]), node.outputs, layer.attributes)
        return None

    return program.rewrite(match)


def fuse_lowrank_geglu(program: Program) -> bool:
    """A LowrankLinear that Geglu alone reads, with it in its epilogue."""
    made, uses = program.producers(), program.uses()

    def match(node: Node) -> Node | None:
        layer = made.get(node.inputs[0]) if node.op == "Geglu" else None
        if layer is None or layer.op != "LowrankLinear" or len(layer.inputs) != 7 or uses[layer.outputs[0]] != 1:
            return None
        return Node("LowrankGeglu", layer.inputs, node.outputs, layer.attributes)

    return program.rewrite(match)


def drop_lora(program: Program, banks: Container[str]) -> bool:
    """Leave out all LoRA terms: each Add of a value and of what comes from a bank."""
    changed = False
    terms: set[str] = set()
    same: dict[str, str] = {}  # an Add's result -> its other operand
    nodes = []
    for node in program.nodes:
        operands = tuple(same.get(name, name) for name in node.inputs)
        if node.op == "Add" and operands[1] in terms and operands[0] not in terms:
            changed = True
            if node.outputs[0] in program.outputs:
                nodes.append(Node("Identity", operands[:1], node.outputs))
            else:
                same[node.outputs[0]] = operands[0]
            continue
        if any(name in banks or name in terms for name in operands):
            terms.update(node.outputs)
        nodes.append(Node(node.op, operands, node.outputs, node.attributes))
    program.nodes = nodes
    program.sweep()
    return changed


def _bank(made: dict[str, Node], name: str) -> tuple[str, str] | None:
    """(bank, adapter) of what each row's slot holds."""
    node = made.get(_before_cast(made, name))
    return (node.inputs[0], node.inputs[1]) if node is not None and node.op == "Gather" else None


def _before_cast(made: dict[str, Node], name: str) -> str:
    node = made.get(name)
    return node.inputs[0] if node is not None and node.op == "Cast" else name
