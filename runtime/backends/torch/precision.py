"""What each network computes in, and a program in that precision on a device: the last step before it runs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from stepforge.runtime.backends import ALWAYS_FP32, WIDE_VAE
from stepforge.runtime.backends.torch.program import Node, Program

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WAVES = ("Sin", "Cos")
# operand that the operators of layers with LoRA take in fp32
STRENGTH = {"Strengths": 1, "LowrankLinear": 6, "LowrankGeglu": 6, "LowrankConv": 6, "PeftLinear": 6, "PeftConv": 6}
ONNX_FP16 = 10


def computed_in(role: str, family: str, precision: str, *, exact: bool) -> Any:
    """The type of a network in a backend of that precision. A decoder that fp16 cannot hold runs in bf16, which has the
    range of fp32 at the speed of fp16; in the exact tier in fp32, as in diffusers. Its encoder overflows as well; it runs
    once a request, in fp32."""
    if role in ALWAYS_FP32:
        return torch.float32
    if precision == "fp16" and role in ("vae_encoder", "vae_decoder") and family in WIDE_VAE:
        return torch.float32 if exact or role == "vae_encoder" else torch.bfloat16
    return DTYPES[precision]


def no_tf32() -> None:
    """The switches that both of PyTorch's interfaces know, so that reading either of them afterwards is no error."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def lower(program: Program, dtype: Any, device: Any, banks: Collection[str] = ()) -> None:
    """Compute in `dtype`. Timesteps and sizes, up to and with their sines, stay in fp32: bf16 knows no 999. So do
    inputs until they have been scaled by a number, as the VAE's latents are.

    A graph that was exported in fp16 says itself what stays in fp32; its other values get `dtype`. banks: inputs that
    have the type already.
    """
    floats = {name: value for name, value in program.constants.items() if isinstance(value, torch.Tensor)}
    is_half = any(value.dtype == torch.float16 for value in floats.values())
    wide = set(floats) if is_half else _wide(program)
    for name, value in floats.items():
        kept = not value.is_floating_point() or (name in wide and value.dtype != torch.float16)
        program.constants[name] = value.to(device) if kept else value.to(device).to(dtype)
    if is_half:
        program.nodes = [_retyped(node, dtype) for node in program.nodes]
    elif dtype != torch.float32:
        _cast(program, dtype, wide, wide | (program.floats - set(banks)))


def _ends_wide(program: Program, node: Node) -> bool:
    """Whether a node computes in fp32 and hands on in the program's type."""
    if node.op != "Mul" or node.inputs[0] not in program.inputs:
        return node.op in WAVES
    factor = program.constants.get(node.inputs[1])
    return isinstance(factor, torch.Tensor) and factor.numel() == 1


def _wide(program: Program) -> set[str]:
    wide = {name for node in program.nodes if _ends_wide(program, node) for name in node.inputs}
    for node in reversed(program.nodes):
        if wide.intersection(node.outputs):
            wide.update(node.inputs)
    return wide


def _retyped(node: Node, dtype: Any) -> Node:
    if node.op == "Cast" and node.attributes["to"] == ONNX_FP16:
        return Node("Cast", node.inputs, node.outputs, {"to": dtype})
    return node


def _cast(program: Program, dtype: Any, wide: set[str], fp32: Collection[str]) -> None:
    """Cast what is fp32 for the nodes that are not wide themselves."""
    low: dict[str, str] = {}
    nodes = []
    for node in program.nodes:
        if _ends_wide(program, node):
            nodes.append(Node(node.op, node.inputs, node.outputs, {**node.attributes, "to": dtype}))
            continue
        if wide.intersection(node.outputs):
            nodes.append(node)
            continue
        operands = list(node.inputs)
        for at, name in enumerate(operands):
            if name not in fp32 or at == STRENGTH.get(node.op):
                continue
            if name not in low:
                low[name] = f"{name} as {dtype}"
                nodes.append(Node("Cast", (name,), (low[name],), {"to": dtype}))
            operands[at] = low[name]
        nodes.append(Node(node.op, tuple(operands), node.outputs, node.attributes))
    program.nodes = nodes
    program.sweep()
