"""What torch.onnx and onnxscript spend most of an export on, and what it does not need. Graphs are the same without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_impls import get_fast_op_impls
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputSpec
from torch.fx import proxy
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion

aten = torch.ops.aten
CHECKS = (aten._assert_scalar.default, aten._assert_tensor_metadata.default)  # torch.onnx removes them
CASTS = {aten.to.dtype: 2, aten.to.device: 3}  # arguments, of which the type is the last
# Operators that torch.onnx translates as they are
TRANSLATED = frozenset(
    (
        aten.add.Tensor, aten.alias.default, aten.arange.default, aten.arange.start, aten.argmax.default,
        aten.avg_pool2d.default,
        aten.cat.default, aten.chunk.default, aten.concat.default, aten.contiguous.default, aten.conv2d.default,
        aten.cos.default, aten.div.Tensor, aten.dropout.default, aten.embedding.default, aten.eq.Scalar, aten.exp.default,
        aten.expand.default, aten.flatten.using_ints, aten.gelu.default, aten.group_norm.default, aten.index.Tensor,
        aten.layer_norm.default, aten.leaky_relu.default, aten.linear.default, aten.matmul.default, aten.mean.dim,
        aten.mul.Tensor, aten.permute.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
        aten.pow.Tensor_Scalar, aten.prelu.default, aten.reshape.default, aten.rsqrt.default,
        aten.scaled_dot_product_attention.default, aten.select.int, aten.sigmoid.default, aten.silu.default,
        aten.sin.default, aten.slice.Tensor, aten.softmax.int, aten.sub.Tensor, aten.sym_size.int, aten.tanh.default,
        aten.transpose.int, aten.unflatten.int, aten.unsqueeze.default,
        aten.upsample_nearest2d.vec, aten.view.default,
    )
)  # fmt: skip


@contextmanager
def lean() -> Iterator[None]:
    """Inside the block torch.onnx reads its translations once in a process, decomposes nothing that it translates anyhow and
    runs no operator again whose types agree, and notes no lines of source; torch remembers no shapes; onnxscript's optimizer is
    linear and tries its rules where they may fit."""
    with (
        rules_at_their_operators(), registry_once(), casts_in_place(),
        promotions_where_types_differ(), norms_by_shape(), shapes_forgotten(), no_stack_traces(),
    ):  # fmt: skip
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[Any]:
    """Another attribute inside the block; gives the one that it hides."""
    own, whole = vars(owner).get(name), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield whole
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


@contextmanager
def registry_once() -> Iterator[None]:
    """torch.onnx (2.13) parses the source of its 1,800 translations at every export, a second for each."""
    with replaced(ONNXRegistry, "from_torchlib", staticmethod(_registry)):
        yield


_whole_registry: Callable[..., ONNXRegistry] = ONNXRegistry.from_torchlib


@cache
def _registry(opset_version: int) -> ONNXRegistry:
    return _whole_registry(opset_version)


@contextmanager
def casts_in_place() -> Iterator[None]:
    """torch.onnx (2.13) traces a program twice more, with sizes as symbols, to decompose operators that it cannot translate.
    Of those, most diffusion networks have `aten.to` only, and VAE encoders a padding: inside the block these are replaced where
    they stand, and programs with others are decomposed as ever. Of a UNet's export this takes a third."""
    whole = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, *given: Any, **options: Any) -> ExportedProgram:
        return program if casts_replaced(program) else whole(program, *given, **options)

    with replaced(ExportedProgram, "run_decompositions", run):
        yield


def casts_replaced(program: ExportedProgram) -> bool:
    """Replace each `aten.to` by a cast, or by nothing, and constant paddings by their operator; False, and nothing is changed,
    if other operators need more."""
    graph = program.graph
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(node.op == "get_attr" for node in graph.nodes) or not all(_is_plain(node) for node in calls):
        return False
    for node in calls:
        if node.target in CHECKS:
            graph.erase_node(node)
        elif node.target is aten.pad.default:
            node.target, node.args = aten.constant_pad_nd.default, (*node.args[:2], 0.0)
        elif node.target in CASTS:
            value, dtype = node.args[0], node.args[-1]
            if value.meta["val"].dtype == dtype:
                node.replace_all_uses_with(value)
                _rename(program.graph_signature.output_specs, node.name, value.name)
                graph.erase_node(node)
            else:
                node.target, node.args, node.kwargs = aten._to_copy.default, (value,), {"dtype": dtype}
    graph.eliminate_dead_code()
    return True


def _is_plain(node: Any) -> bool:
    if node.target in CASTS:
        return len(node.args) == CASTS[node.target] and not node.kwargs
    if node.target is aten.pad.default:  # with zeros, as `functional.pad` gives it
        return node.args[2:] in ((), ("constant",), ("constant", None), ("constant", 0.0)) and not node.kwargs
    return node.target in CHECKS or node.target in TRANSLATED or not isinstance(node.target, torch._ops.OperatorBase)


def _rename(specs: list[OutputSpec], old: str, new: str) -> None:
    for spec in specs:
        if spec.arg.name == old:
            spec.arg.name = new


@contextmanager
def promotions_where_types_differ() -> Iterator[None]:
    """torch.onnx (2.13) runs each operator a third time, to see which values it has to cast. What they are is known from the
    trace: inside the block only operators whose arguments are cast run again."""

    def run_node(interpreter: Any, node: Any) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return whole(interpreter, node)
        if rule := type_promotion.get_type_promotion_rule(node, interpreter.type_promotion_table):
            with interpreter._set_current_node(node):
                interpreter._maybe_promote_node(node, rule)
        return node.meta["val"]

    with replaced(type_promotion._TypePromotionInterpreter, "run_node", run_node) as whole:
        yield


@contextmanager
def rules_at_their_operators() -> Iterator[None]:
    """onnxscript (0.7) begins to match each rule at each node: 280,000 times for the graphs of a tiny model; the rule that
    makes a Split of two Slices lists the whole graph each time. Inside the block a rule with one output is tried only at nodes
    of the operator that gives it, which a match compares first, and that one at Slices.

    Rules live as long as the process and remember the graph of their last match, a network's weights with it; here they
    forget it."""
    from onnxscript.rewriter._rewrite_rule import RewriteRule
    from onnxscript.rewriter.rules.common import slice_split_rule

    def try_rewrite(rule: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        ends = rule._target_pattern.output_nodes
        last = ends[0].op_identifier() if len(ends) == 1 else None  # None where a pattern stands for several operators
        if last is not None and last[:2] != (node.domain, node.op_type):
            return None
        if rule is slice_split_rule and node.op_type != "Slice":
            return None
        try:
            return whole(rule, model, graph, node, **options)
        finally:
            rule._matcher._init_match(0)
            rule._matcher._graph = None

    with replaced(RewriteRule, "try_rewrite", try_rewrite) as whole:
        yield


@contextmanager
def norms_by_shape() -> Iterator[None]:
    """torch (2.13) finds the shape of a norm's output and of GELU's, which is their input's, by running their definitions on
    symbols."""

    def group_norm(mode: Any, x: Any, weight: Any, bias: Any, rows: Any, *size: Any) -> Any:
        groups = size[-2]  # after channels and pixels, before eps
        with mode:
            return torch.empty(x.shape, dtype=x.dtype), *(torch.empty((rows, groups), dtype=x.dtype) for _ in range(2))

    def layer_norm(mode: Any, x: Any, size: Any, *_: Any) -> Any:
        outer = (*x.shape[: x.ndim - len(size)], *(1 for _ in size))
        with mode:
            return torch.empty(x.shape, dtype=x.dtype), *(torch.empty(outer, dtype=x.dtype) for _ in range(2))

    def gelu(mode: Any, x: Any, **_: Any) -> Any:
        with mode:
            return torch.empty_like(x)

    ours = {aten.native_group_norm: group_norm, aten.native_layer_norm: layer_norm, aten.gelu: gelu}
    known = get_fast_op_impls()
    known.update({operator.default: shape for operator, shape in ours.items()})
    try:
        yield
    finally:
        for operator in ours:
            del known[operator.default]


@contextmanager
def shapes_forgotten() -> Iterator[None]:
    """torch (2.13) remembers the shapes of operators' results; where sizes are symbols it takes longer to compare and to
    rebuild what it remembers than to find it out again: a quarter of a tiny UNet's trace."""
    import torch._dynamo.config as config

    with config.patch(fake_tensor_cache_enabled=False):
        yield


class _NoTrace:
    """In place of torch's traceback of a node, which `passes.clean` would remove from the graph."""

    @classmethod
    def extract(cls) -> _NoTrace:
        return cls()

    def summary(self) -> None:
        return None


@contextmanager
def no_stack_traces() -> Iterator[None]:
    """torch (2.13) notes for each node the lines of source that made it."""
    with replaced(proxy, "CapturedTraceback", _NoTrace):
        yield
