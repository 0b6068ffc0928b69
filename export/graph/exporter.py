"""What torch.onnx and onnxscript spend most of an export on, and what it does not need. Graphs are the same without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputSpec

aten = torch.ops.aten
CHECKS = (aten._assert_scalar.default, aten._assert_tensor_metadata.default)  # torch.onnx removes them
# Operators that torch.onnx translates as they are
TRANSLATED = frozenset(
    (
        aten.add.Tensor, aten.alias.default, aten.arange.start, aten.cat.default, aten.chunk.default,
        aten.concat.default, aten.contiguous.default, aten.conv2d.default, aten.cos.default, aten.div.Tensor,
        aten.dropout.default, aten.embedding.default, aten.exp.default, aten.expand.default,
        aten.flatten.using_ints, aten.gelu.default, aten.group_norm.default, aten.layer_norm.default,
        aten.linear.default, aten.mul.Tensor, aten.permute.default, aten.reshape.default,
        aten.scaled_dot_product_attention.default, aten.select.int, aten.sigmoid.default, aten.silu.default,
        aten.sin.default, aten.slice.Tensor, aten.sym_size.int, aten.transpose.int, aten.unsqueeze.default,
        aten.upsample_nearest2d.vec, aten.view.default,
    )
)  # fmt: skip


@contextmanager
def lean() -> Iterator[None]:
    """Inside the block torch.onnx decomposes nothing that it translates anyhow, and onnxscript's optimizer is linear."""
    with slice_rule_at_slices(), casts_in_place():
        yield


@contextmanager
def casts_in_place() -> Iterator[None]:
    """torch.onnx (2.13) traces a program twice more, with sizes as symbols, to decompose operators that it cannot translate.
    Of those, most diffusion networks have `aten.to` only: inside the block it is replaced where it stands, and programs with
    others are decomposed as ever. Of a UNet's export this takes a third."""
    whole = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, *given: Any, **options: Any) -> ExportedProgram:
        return program if casts_replaced(program) else whole(program, *given, **options)

    ExportedProgram.run_decompositions = run
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = whole


def casts_replaced(program: ExportedProgram) -> bool:
    """Replace each `aten.to` by a cast, or by nothing; False, and nothing is changed, if other operators need more."""
    graph = program.graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(node.op == "get_attr" for node in graph.nodes) or not all(_is_plain(node) for node in calls):
        return False
    for node in calls:
        if node.target in CHECKS:
            graph.erase_node(node)
        elif node.target is aten.to.dtype:
            value, dtype = node.args
            if value.meta["val"].dtype == dtype:
                node.replace_all_uses_with(value)
                _rename(program.graph_signature.output_specs, node.name, value.name)
                graph.erase_node(node)
            else:
                node.target, node.args, node.kwargs = aten._to_copy.default, (value,), {"dtype": dtype}
    graph.eliminate_dead_code()
    return True


def _is_plain(node: Any) -> bool:
    if node.target is aten.to.dtype:
        return len(node.args) == 2 and not node.kwargs
    return node.target in CHECKS or node.target in TRANSLATED or not isinstance(node.target, torch._ops.OperatorBase)


def _rename(specs: list[OutputSpec], old: str, new: str) -> None:
    for spec in specs:
        if spec.arg.name == old:
            spec.arg.name = new


@contextmanager
def slice_rule_at_slices() -> Iterator[None]:
    """onnxscript's optimizer (0.7) lists the whole graph at every node, to see whether two Slices are a Split: the square of
    its nodes. Inside the block it does so at Slices only."""
    from onnxscript.rewriter.rules.common import slice_split_rule as rule

    whole = rule.try_rewrite
    rule.try_rewrite = lambda model, graph, node, **options: (
        whole(model, graph, node, **options) if node.op_type == "Slice" else None
    )
    try:
        yield
    finally:
        del rule.try_rewrite  # the class's own shows again
