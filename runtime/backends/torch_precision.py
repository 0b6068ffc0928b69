"""A program in another precision, on a device: the last step before it runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from stepforge.runtime.backends.torch_graph import Node, Program

WAVES = ("Sin", "Cos")
STRENGTH = {"LowrankLinear": 6, "LowrankConv": 6}  # operand that the fused operators take in fp32
ONNX_FP16, ONNX_FP32 = 10, 1


def lower(program: Program, dtype: Any, device: Any, banks: Collection[str] = ()) -> None:
    """Compute in `dtype`. Timesteps and sizes, up to and with their sines, stay in fp32: bf16 knows no 999.

    A graph that was exported in fp16 says itself what stays in fp32; its other values get `dtype`. banks: inputs that
    have the type already.
    """
    floats = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    is_half = any(value.dtype == torch.float16 for value in floats.values())
    wide = set(floats) if is_half else _before_waves(program)
    for name, value in floats.items():
        if not value.is_floating_point() or (name in wide and value.dtype != torch.float16):
            program.constants[name] = value.to(device)
        else:
            program.constants[name] = value.to(device).to(dtype)
    if is_half:
        program.nodes = [_retyped(node, dtype) for node in program.nodes]
    elif dtype != torch.float32:
        _cast_inputs(program, dtype, [n for n in program.inputs if n in program.floats and n not in wide | set(banks)])


def _before_waves(program: Program) -> set[str]:
    wide = {name for node in program.nodes if node.op in WAVES for name in node.inputs}
    for node in reversed(program.nodes):
        if wide.intersection(node.outputs):
            wide.update(node.inputs)
    return wide


def _retyped(node: Node, dtype: Any) -> Node:
    if node.op == "Cast" and node.attributes["to"] == ONNX_FP16:
        return Node("Cast", node.inputs, node.outputs, {"to": dtype})
    return node


def _cast_inputs(program: Program, dtype: Any, inputs: list[str]) -> None:
    low = {name: f"{name} as {dtype}" for name in inputs}
    casts = [Node("Cast", (name,), (new,), {"to": dtype}) for name, new in low.items()]
    nodes = []
    for node in program.nodes:
        kept = STRENGTH.get(node.op)
        operands = tuple(n if at == kept else low.get(n, n) for at, n in enumerate(node.inputs))
        settings = {**node.attributes, "to": dtype} if node.op in WAVES else node.attributes
        nodes.append(Node(node.op, operands, node.outputs, settings))
    program.nodes = [*casts, *nodes]
    program.sweep()
