"""Rewrites of a program. Each says whether it changed anything. EXACT and FAST in `torch` list those of the two tiers.

exact   one PyTorch operator for each that diffusers and PEFT call, so it rounds where they round. On a CPU a network gives
        their bits, without an adapter and with one, in fp32 and in bf16, but for two things. The exporter folds the
        frequencies of timesteps' sines, one unit in the last place from PyTorch's. Several adapters together are one product
        of all their ranks, with their strengths in B. Layers with LoRA are in `peft`.
fast    the operators of `stepforge.kernels` besides: they compute in fp32 and round once, so results are nearer to fp32,
        and not equal to diffusers'. In fp32 only the order of sums differs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from stepforge.runtime.backends.torch.program import Node, Program


def fuse_attention(program: Program) -> bool:
    """softmax((q·c)(kᵀ·c) + mask) v, as torch.onnx writes it, to one operator."""
    made, constants = program.producers(), program.constants

    def match(node: Node) -> Node | None:
        weights = made.get(node.inputs[0]) if node.op == "MatMul" else None
        if weights is None or weights.op != "Softmax" or weights.attributes.get("axis", -1) != -1:
            return None
        scores, mask = made.get(weights.inputs[0]), ""
        if scores is not None and scores.op == "Add":
            mask, scores = scores.inputs[1], made.get(scores.inputs[0])
        if scores is None or scores.op != "MatMul":
            return None
        left, right = made.get(scores.inputs[0]), made.get(scores.inputs[1])
        if left is None or right is None or left.op != "Mul" or right.op != "Mul":
            return None
        factors: list[Any] = [constants.get(side.inputs[1]) for side in (left, right)]
        if any(not isinstance(factor, torch.Tensor) or factor.numel() != 1 for factor in factors):
            return None
        k = _untransposed(made, right.inputs[0])
        if k is None:
            return None
        scale = float(factors[0]) * float(factors[1])
        return Node("Attention", (left.inputs[0], k, node.inputs[1], mask), node.outputs, {"scale": scale})

    return program.rewrite(match)


def _untransposed(made: dict[str, Node], name: str) -> str | None:
    """The k of a kᵀ that is made through three dimensions: Reshape, Transpose, Reshape."""
    chain = []
    for op in ("Reshape", "Transpose", "Reshape"):
        node = made.get(name)
        if node is None or node.op != op:
            return None
        chain.append(node)
        name = node.inputs[0]
    return name if tuple(chain[1].attributes["perm"]) == (0, 2, 1) else None


def fuse_linear(program: Program) -> bool:
    """A product with a weight, and Gemm, to Linear with the weight as PyTorch has it: [out, in]."""
    constants = program.constants

    def match(node: Node) -> Node | None:
        weight = constants.get(node.inputs[1]) if node.op in ("MatMul", "Gemm") else None
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            return None
        if node.op == "Gemm":
            plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
            return Node("Linear", node.inputs, node.outputs) if dict(node.attributes) == plain else None
        name = f"{node.inputs[1]}.T"
        constants[name] = weight.T.contiguous()
        return Node("Linear", (node.inputs[0], name), node.outputs)

    return program.rewrite(match)


def add_bias(program: Program) -> bool:
    """The bias that is added to a Linear, or to a Linear plus its LoRA term, to the Linear itself, where PyTorch has it."""
    made, constants, uses = program.producers(), program.constants, program.uses()
    biased: dict[str, str] = {}  # output of a Linear -> its bias

    def match(node: Node) -> Node | None:
        bias = constants.get(node.inputs[1]) if node.op == "Add" else None
        if not isinstance(bias, torch.Tensor) or bias.ndim != 1:
            return None
        layer = made.get(node.inputs[0])
        if layer is not None and layer.op == "Linear" and len(layer.inputs) == 2 and uses[layer.outputs[0]] == 1:
            return Node("Linear", (*layer.inputs, node.inputs[1]), node.outputs)
        base = made.get(layer.inputs[0]) if layer is not None and layer.op == "Add" else None
        if layer is None or base is None or base.op != "Linear" or len(base.inputs) != 2:
            return None
        if uses[layer.outputs[0]] != 1 or uses[base.outputs[0]] != 1:
            return None
        biased[base.outputs[0]] = node.inputs[1]
        return Node("Add", layer.inputs, node.outputs)

    def give_bias(node: Node) -> Node | None:
        bias = biased.get(node.outputs[0])
        return Node(node.op, (*node.inputs, bias), node.outputs) if bias is not None else None

    return program.rewrite(match, give_bias)


def fuse_group_norm(program: Program) -> bool:
    """Reshape to groups, InstanceNormalization with weights of 1, Reshape back, scale and shift: GroupNorm."""
    made, constants = program.producers(), program.constants

    def match(node: Node) -> Node | None:
        scaled = made.get(node.inputs[0]) if node.op == "Add" else None
        back = made.get(scaled.inputs[0]) if scaled is not None and scaled.op == "Mul" else None
        norm = made.get(back.inputs[0]) if back is not None and back.op == "Reshape" else None
        grouped = made.get(norm.inputs[0]) if norm is not None and norm.op == "InstanceNormalization" else None
        if scaled is None or norm is None or grouped is None or grouped.op != "Reshape":
            return None
        ones, zeros = constants.get(norm.inputs[1]), constants.get(norm.inputs[2])
        weight, bias = constants.get(scaled.inputs[1]), constants.get(node.inputs[1])
        if ones is None or zeros is None or weight is None or bias is None:
            return None
        if bool((ones != 1).any()) or bool((zeros != 0).any()) or weight.numel() != max(weight.shape):
            return None
        names = tuple(f"{name}.channels" for name in (scaled.inputs[1], node.inputs[1]))
        for name, value in zip(names, (weight, bias), strict=True):
            constants[name] = value.reshape(-1)
        settings = {"groups": ones.numel(), "epsilon": norm.attributes["epsilon"]}
        return Node("GroupNorm", (grouped.inputs[0], *names), node.outputs, settings)

    return program.rewrite(match)


def fuse_silu(program: Program) -> bool:
    """x · sigmoid(x)"""
    made = program.producers()

    def match(node: Node) -> Node | None:
        gate = made.get(node.inputs[1]) if node.op == "Mul" else None
        if gate is None or gate.op != "Sigmoid" or gate.inputs[0] != node.inputs[0]:
            return None
        return Node("Silu", (node.inputs[0],), node.outputs)

    return program.rewrite(match)


def drop_added(program: Program, inputs: Iterable[str]) -> bool:
    """Leave out inputs that are added to something: each Add of a value and of one of them."""
    zeros = set(inputs)
    same: dict[str, str] = {}  # an Add's result -> its other operand
    nodes = []
    for node in program.nodes:
        operands = tuple(same.get(name, name) for name in node.inputs)
        if node.op == "Cast" and operands[0] in zeros:
            zeros.update(node.outputs)
        elif node.op == "Add" and sum(name in zeros for name in operands) == 1:
            same[node.outputs[0]] = next(name for name in operands if name not in zeros)
            continue
        nodes.append(Node(node.op, operands, node.outputs, node.attributes))
    program.nodes = nodes + [Node("Identity", (same[name],), (name,)) for name in program.outputs if name in same]
    program.sweep()
    return bool(same)


def copy_images(program: Program) -> bool:
    """Tokens that become images again are copied, as in diffusers: PyTorch's group norm sums other layouts in another order.

    For the CPU. On CUDA tensor cores want the layout that tokens have.
    """

    def match(node: Node) -> Node | None:
        if node.op != "Transpose" or tuple(node.attributes["perm"]) != (0, 3, 1, 2) or "copy" in node.attributes:
            return None
        return Node(node.op, node.inputs, node.outputs, {**node.attributes, "copy": True})

    return program.rewrite(match)


def fuse_norm_silu(program: Program) -> bool:
    """GroupNorm, with the Silu that alone reads it, to the kernel."""
    made, uses = program.producers(), program.uses()

    def with_silu(node: Node) -> Node | None:
        norm = made.get(node.inputs[0]) if node.op == "Silu" else None
        if norm is None or norm.op != "GroupNorm" or uses[norm.outputs[0]] != 1:
            return None
        return Node("GroupNormSilu", norm.inputs, node.outputs, {**norm.attributes, "silu": True})

    def without(node: Node) -> Node | None:
        if node.op != "GroupNorm":
            return None
        return Node("GroupNormSilu", node.inputs, node.outputs, {**node.attributes, "silu": False})

    changed = program.rewrite(with_silu)
    return program.rewrite(without) or changed


def fuse_geglu(program: Program) -> bool:
    """value · gelu(gate) of the two halves of one value."""
    made = program.producers()

    def match(node: Node) -> Node | None:
        gate = made.get(node.inputs[1]) if node.op == "Mul" else None
        if gate is None or gate.op != "Gelu" or gate.attributes.get("approximate", "none") != "none":
            return None
        halves = made.get(gate.inputs[0])
        if halves is None or halves.op != "Split" or halves.outputs != (node.inputs[0], gate.inputs[0]):
            return None
        if halves.attributes.get("axis") not in (-1, 2):  # the exporter splits [rows, tokens, 2·C]
            return None
        return Node("Geglu", halves.inputs[:1], node.outputs)

    return program.rewrite(match)
