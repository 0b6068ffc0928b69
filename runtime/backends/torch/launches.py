"""Launches of a program on CUDA, by kind, counted from its nodes: one recorded step is as many kernels."""

from __future__ import annotations

from collections import Counter

from stepforge.runtime.backends.torch.program import Node, Program

VIEWS = ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Columns", "Identity", "Shape", "Range")
KINDS = {
    "Linear": "product", "Pointwise": "product", "Shift": "product",
    "Accumulate": "product", "MatMul": "product", "Gemm": "product",
    "Conv": "convolution", "WideConv": "convolution", "Attention": "attention", "LayerNorm": "layer norm", "Geglu": "GEGLU",
    "Sum": "sum of images",
    "Strengths": "strengths",
    "ScaledColumns": "strengths",
    "Sin": "timestep", "Cos": "timestep", "Silu": "time embedding", "Add": "addition", "Mul": "multiplication",
    "Concat": "concatenation", "Resize": "upsampling", "Cast": "cast", "Gather": "gather",
    "LayerNormalization": "PyTorch's layer norm", "Gelu": "PyTorch's GELU",
}  # fmt: skip


def count(program: Program, pixels: dict[str, int] | None = None) -> Counter[str]:
    """Launches by kind. pixels: of the image that a norm reads, by its result; norms of few pixels are one launch, not two."""
    found: Counter[str] = Counter()
    hosts = on_host(program)
    for node in program.nodes:
        if node.op in VIEWS or set(node.outputs) <= hosts:
            continue
        if node.op in ("Norm", "WidenNorm", "GroupNormSilu"):
            found["group norm"] += norm_launches(program, node, (pixels or {}).get(node.outputs[0], 0))
            found["shrink"] += node.op == "WidenNorm"
            continue
        if node.op == "Widen":
            found["layer norm" if node.inputs[2] else "GEGLU" if node.attributes.get("gate") else "copy"] += 1
            found["shrink"] += 1
            continue
        if node.op == "WideConv" and node.inputs[3]:
            found["product"] += 2  # one for each source
        else:
            found[KINDS.get(node.op, node.op)] += 1
        found["adapter of a convolution"] += node.op == "WideConv"
        bias = {"Conv": 2, "Accumulate": 3, "WideConv": 5}.get(node.op)
        if bias is not None and len(node.inputs) > bias and node.inputs[bias]:
            found["bias"] += 1
    return found


def norm_launches(program: Program, node: Node, pixels: int) -> int:
    from stepforge.kernels.dispatch.tiles import WHOLE_NORM

    lanes = program.constants[node.inputs[1]].shape[0] // node.attributes["groups"]
    lanes2 = 1 << (lanes - 1).bit_length()
    return 1 if pixels and (1 << (pixels - 1).bit_length()) * lanes2 <= WHOLE_NORM else 2


def on_host(program: Program) -> set[str]:
    """Values that are whole numbers of the host: shapes, and what is made of them and of host constants alone."""
    import numpy as np

    known = {name for name, value in program.constants.items() if isinstance(value, np.ndarray)}
    for node in program.nodes:
        if node.op == "Shape" or (node.inputs and all(name in known or not name for name in node.inputs)):
            known.update(node.outputs)
    return known
