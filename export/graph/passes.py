"""Rewrites of exported graphs. Each takes a model and returns whether it changed it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"  # modules from the outermost to the innermost, then the operator


def clean(model: ir.Model) -> bool:
    """Remove what torch.onnx notes for debugging: stack traces with paths of this machine, module names, doc strings."""
    changed = _forget(model)
    for graph in _graphs(model):
        changed |= _forget(graph)
        for value in (*graph.inputs, *graph.initializers.values()):
            changed |= _forget(value)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            changed |= _forget(node)
            for value in node.outputs:
                changed |= _forget(value)
    return changed


def name_weights(model: ir.Model) -> bool:
    """Give linear weights their module's name back: torch.onnx stores them transposed, [in, out], under val_125.

    Reads what `clean` removes.
    """
    changed = False
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer() or SCOPES not in node.metadata_props:
            continue
        module = ast.literal_eval(node.metadata_props[SCOPES])[-2]
        if (name := f"{module}.weight") not in model.graph.initializers:
            weight.name = name
            changed = True
    return changed


def forget_shapes(model: ir.Model) -> bool:
    """Remove the shapes of inner values: engines infer them again, and they name torch's own symbols (s39*s94)."""
    changed = False
    for graph in _graphs(model):
        ends = set(graph.outputs)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            for value in node.outputs:
                if value not in ends and (value.shape is not None or value.type is not None):
                    value.shape = value.type = None
                    changed = True
    return changed


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    for function in model.functions.values():
        yield function.graph


def _forget(thing: ir.Model | ir.Graph | ir.Node | ir.Value) -> bool:
    changed = bool(thing.metadata_props or thing.doc_string)
    thing.metadata_props.clear()
    thing.doc_string = None
    return changed
