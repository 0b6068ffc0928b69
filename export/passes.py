"""Rewrites of exported graphs. Each takes a model and returns whether it changed it."""

from __future__ import annotations

import onnx_ir as ir


def clean(model: ir.Model, *, keep_shapes: bool) -> bool:
    """Remove what torch.onnx notes for debugging: stack traces with paths of this machine, module names, doc strings.

    keep_shapes: leave the inferred shapes of inner values, which fusions need and engines infer for themselves. They
    name torch's symbols (s39, s94), whose numbers differ from one export to the next.
    """
    changed = _forget(model)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        ends = {id(value) for value in (*graph.inputs, *graph.outputs)}
        values = [*graph.inputs, *graph.initializers.values()]
        changed |= _forget(graph)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            changed |= _forget(node)
            values += node.outputs
        for value in values:
            changed |= _forget(value)
            if not keep_shapes and id(value) not in ends and value.producer() is not None and value.shape is not None:
                value.shape = value.type = None
                changed = True
    return changed


def _forget(thing: ir.Model | ir.Graph | ir.Node | ir.Value) -> bool:
    changed = bool(thing.metadata_props or thing.doc_string)
    thing.metadata_props.clear()
    thing.doc_string = None
    return changed
