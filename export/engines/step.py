"""The parts of a step that are no network, as graphs for TensorRT: what rows read, and where predictions and residuals go.

    select  rows of a table                        table [N, E], rows [R] -> out [R, E]
    look    a number of each row's own step        table [P, S], owners [R], step [P] -> out [R]
    spread  a ControlNet's residuals, added up     total [R, E], own [M, E], map [R], -1 where a row has none -> out [R, E]
    update  guidance and update, the equation of kernels/update.py:
            p = Σ_j guidance[image, k, j] · prediction[sources[n, j]];  x_{k+1} = Σ keep·x + Σ gain·p + noise·z

They know no model: one set of plans serves every bundle, latent size and residual. What has the weight 0 is not read, so that
it cannot leak. Images whose plan is done, such as the spare one that rows of padding belong to, are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stepforge.runtime.backends.tensorrt.plans import Profile, Shapes
from stepforge.runtime.backends.tensorrt.step import NUM_P, NUM_X

F, N = TensorProto.FLOAT, TensorProto.INT64
MOST_ROWS, MOST_PLACES, MOST_STEPS = 64, 257, 1001
MOST_LATENT, MOST_WIDTH = 1 << 19, 1 << 23  # elements of a latent, and of a row of anything else
W = NUM_X + NUM_P


class _Graph:
    """Nodes in order; every call names its result."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: str, out: str = "", **attributes: int) -> str:
        name = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def number(self, *values: int | float, shape: tuple[int, ...] = (), dtype: type = np.int64) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, dtype).reshape(shape), name))
        return name

    def axis(self, value: str, *axes: int) -> str:
        return self("Unsqueeze", value, self.number(*axes, shape=(len(axes),)))

    def pair(self, first: str, second: str) -> str:
        """[n] and [n] to indices [n, 2]."""
        return self("Concat", self.axis(first, 1), self.axis(second, 1), axis=1)

    def times(self, weight: str, value: str, zero: str) -> str:
        """weight · value, and 0 where the weight is 0 whatever the value."""
        return self("Where", self("Equal", weight, zero), zero, self("Mul", weight, value))

    def modulo(self, value: str, by: int) -> str:
        divisor = self.number(by)
        return self("Sub", value, self("Mul", self("Div", value, divisor), divisor))


def _select(g: _Graph) -> None:
    g("Gather", "table", "rows", out="out", axis=0)


def _look(g: _Graph) -> None:
    steps = g("Gather", g("Shape", "table"), g.number(1), axis=0)
    at = g("Min", g("Gather", "step", "owners", axis=0), g("Sub", steps, g.number(1)))
    g("GatherND", "table", g.pair("owners", at), out="out")


def _spread(g: _Graph) -> None:
    zero = g.number(0)
    rows = g("Gather", "own", g("Max", "map", zero), axis=0)
    has = g.axis(g("Less", "map", zero), 1)
    g("Add", "total", g("Where", has, g.number(0.0, dtype=np.float32), rows), out="out")


def _update(g: _Graph) -> None:
    zero, one = g.number(0.0, dtype=np.float32), g.number(1)
    k = g("Gather", "step", "places", axis=0)
    steps = g("Gather", g("Shape", "table"), one, axis=0)
    live = g("Less", k, steps)
    now = g("Min", k, g("Sub", steps, one))
    at = g.pair("places", now)
    weights, row = g("GatherND", "guidance", at), g("GatherND", "table", at)

    def column(value: str, index: int) -> str:
        return g("Gather", value, g.number(index), axis=1)

    parts = [
        g.times(g.axis(column(weights, j), 1), g("Gather", "prediction", column("sources", j), axis=0), zero)
        for j in range(2)
    ]
    guided = g("Add", *parts)
    ring, slots = g("Gather", "state", "places", axis=0), g.number(*range(W), shape=(1, W))

    def put(ring: str, slot: str, value: str) -> str:
        """value [n, E] in the slot [n] of the rings [n, W, E]."""
        return g("Where", g.axis(g("Equal", slots, g.axis(slot, 1)), 2), g.axis(value, 1), ring)

    ring_p = put(ring, g("Add", g.modulo(k, NUM_P), g.number(NUM_X)), guided)
    coefficients = g("Gather", row, g.number(*range(W), shape=(W,)), axis=1)
    sums = g("ReduceSum", g.times(g.axis(coefficients, 2), ring_p, zero), g.number(1, shape=(1,)), keepdims=0)
    latent = g("Add", sums, g.times(g.axis(column(row, W), 1), g("Gather", "z", "places", axis=0), zero))
    following = g("Add", k, one)
    ring_x = put(ring_p, g.modulo(following, NUM_X), latent)
    scale = g.axis(g("GatherND", "scale_in", g.pair("places", g("Add", now, one))), 1)
    index, moves = g.axis("places", 1), g.axis(live, 1)
    g("ScatterND", "state", index, g("Where", g.axis(live, 1, 2), ring_x, ring), out="new_state")
    sample = g("Where", moves, g("Mul", latent, scale), g("Gather", "sample", "places", axis=0))
    g("ScatterND", "sample", index, sample, out="new_sample")
    g("ScatterND", "step", index, g("Where", live, following, k), out="new_step")


R, P, S, E = (1, 2, MOST_ROWS), (2, 9, MOST_PLACES), (1, 64, MOST_STEPS), (16, 1 << 16, MOST_LATENT)
WIDE = (1, 1 << 18, MOST_WIDTH)
SIGNATURES: dict[str, Any] = {  # name -> inputs and outputs: type, and each size or its limits
    "select": ({"table": (F, (R, WIDE)), "rows": (N, (R,))}, {"out": F}, _select),
    "look": ({"table": (F, (P, S)), "owners": (N, (R,)), "step": (N, (P,))}, {"out": F}, _look),
    "spread": ({"total": (F, (R, WIDE)), "own": (F, (R, WIDE)), "map": (N, (R,))}, {"out": F}, _spread),
    "update": (
        {
            "prediction": (F, (R, E)), "sources": (N, (R, 2)), "places": (N, (R,)), "guidance": (F, (P, S, 2)),
            "table": (F, (P, S, W + 1)), "scale_in": (F, (P, S)), "step": (N, (P,)), "state": (F, (P, W, E)),
            "z": (F, (P, E)), "sample": (F, (P, E)),
        },
        {"new_state": F, "new_sample": F, "new_step": N}, _update,
    ),
}  # fmt: skip


def shapes(name: str) -> Profile:
    """What one of the graphs is built for."""

    def at(sizes: Sequence[Any], place: int) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else size[place] for size in sizes)

    return {n: Shapes(*(at(sizes, place) for place in range(3))) for n, (_, sizes) in SIGNATURES[name][0].items()}


def write(name: str, path: Path) -> None:
    """Write one of the graphs."""
    inputs, outputs, body = SIGNATURES[name]
    graph = _Graph()
    body(graph)

    def value(title: str, kind: int, sizes: Sequence[Any]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(title, kind, [size if isinstance(size, int) else None for size in sizes])

    ranks = {"new_state": 3, "new_sample": 2, "new_step": 1, "out": 1 if name == "look" else 2}
    model = helper.make_model(
        helper.make_graph(
            graph.nodes, name, [value(n, kind, sizes) for n, (kind, sizes) in inputs.items()],
            [value(n, kind, [None] * ranks[n]) for n, kind in outputs.items()], graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )  # fmt: skip
    onnx.checker.check_model(model)
    onnx.save(model, path)
