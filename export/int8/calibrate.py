"""What the networks of a bundle read on their own trajectories, and the ranges of the activations inside them.

The engine draws prompts as it always does, in fp32, and what it feeds the networks is kept: latents at every noise level,
conditional and unconditional rows, residuals where a ControlNet runs. ONNX Runtime then computes each network on them with
the smallest and the largest value of each activation as outputs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from stepforge.export.int8.rewrite import Range, layers, simulation
from stepforge.export.parity.measures import relative_error
from stepforge.runtime.arrays import Float32
from stepforge.runtime.backends import Arrays, Backend, Graph, available_threads
from stepforge.runtime.bundle import Bundle, Component, ComponentId, Role
from stepforge.runtime.engine import Engine
from stepforge.runtime.request import Request

MOST_CALLS = 40  # kept of each network, as many of each noise level; of more levels one each


class Recorder:
    """A backend that keeps what networks of some roles are given. room: calls of each noise level."""

    def __init__(self, inner: Backend, roles: Collection[Role], room: int) -> None:
        self.name, self.precision, self.versions = inner.name, inner.precision, inner.versions
        self.calls: defaultdict[ComponentId, list[Arrays]] = defaultdict(list)
        self._inner, self._roles, self._room = inner, roles, room

    def bank_dtype(self, component: ComponentId) -> Any:
        return self._inner.bank_dtype(component)

    def open(self, component: ComponentId, banks: Arrays | None = None) -> Graph:
        graph = self._inner.open(component, banks)
        return _Kept(graph, self.calls[component], self._room) if component.role in self._roles else graph


class _Kept:
    """A graph whose inputs are kept: of each noise level the first calls, later ones in the place of any of them, so that all
    are as likely (reservoir sampling)."""

    def __init__(self, graph: Graph, calls: list[Arrays], room: int) -> None:
        self._graph, self._calls, self._room = graph, calls, room
        self._random = np.random.default_rng(0)
        self._seen: Counter[float] = Counter()
        self._places: defaultdict[float, list[int]] = defaultdict(list)  # noise level -> indices of its calls

    def __call__(self, inputs: Arrays) -> dict[str, Float32]:
        level = float(inputs["timestep"].max())
        self._seen[level] += 1
        places = self._places[level]
        if len(places) < self._room:
            places.append(len(self._calls))
            self._calls.append({})
            at = len(places) - 1
        else:
            at = int(self._random.integers(self._seen[level]))
        if at < self._room:
            self._calls[places[at]] = {name: np.array(value) for name, value in inputs.items()}
        return self._graph(inputs)


def record(
    bundle: Bundle, backend: Backend, requests: Sequence[Request], roles: Collection[Role]
) -> Mapping[ComponentId, list[Arrays]]:
    """Inputs of every network of these roles while the engine serves the requests."""
    recorder = Recorder(backend, roles, max(1, MOST_CALLS // max(request.steps for request in requests)))
    with Engine(bundle, recorder) as engine:
        engine.generate(list(requests))
    return recorder.calls


@dataclass(frozen=True, slots=True)
class Measured:
    """Of each layer, by path."""

    ranges: Mapping[str, NDArray[np.float32]]  # [calls, 2]: smallest and largest value that it reads
    work: Mapping[str, float]  # multiplications of all calls

    def static(self) -> dict[str, Range]:
        """One range for all noise levels: an engine's integers are fixed when it loads."""
        return {
            path: Range(min(0.0, float(found[:, 0].min())), max(1e-6, float(found[:, 1].max())))
            for path, found in self.ranges.items()
        }


def measure(graph: Path, entry: Component, calls: Sequence[Arrays]) -> Measured:
    """Run a network on the calls. A scratch file appears beside the graph, where its weights are, and goes."""
    model = ir.load(graph)
    found = list(layers(model))
    names: dict[str, None] = {}
    for layer in found:
        value = layer.value
        if value.name in names:
            continue
        names[value.name or ""] = None
        for kind in ("ReduceMin", "ReduceMax", "Size"):
            attributes = {"keepdims": 0} if kind != "Size" else None
            node = ir.node(kind, [value], attributes)
            output = node.outputs[0]
            output.name, output.shape = f"{value.name}.{kind}", ir.Shape([])
            output.type = ir.TensorType(ir.DataType.INT64 if kind == "Size" else ir.DataType.FLOAT)
            model.graph.append(node)
            model.graph.outputs.append(output)
    session = _session(model, graph)
    given = zero_banks(entry)
    outputs = [f"{name}.{kind}" for name in names for kind in ("ReduceMin", "ReduceMax", "Size")]
    results = np.array([session.run(outputs, {**call, **given}) for call in calls], np.float64)
    table = {name: results[:, 3 * i : 3 * i + 3] for i, name in enumerate(names)}
    work = {}
    for layer in found:
        assert layer.weight.shape is not None
        size = layer.weight.shape.numpy()
        inputs = size[1] if layer.axis == 0 else size[0]
        stride = max(layer.node.attributes["strides"].value) if "strides" in layer.node.attributes else 1
        positions = float(table[layer.value.name or ""][:, 2].sum()) / inputs / stride**2
        work[layer.path] = positions * float(np.prod(size))
    ranges = {layer.path: table[layer.value.name or ""][:, :2].astype(np.float32) for layer in found}
    return Measured(ranges, work)


class Simulation:
    """A network with any of its layers quantised, against itself in float: errors of its outputs on calls."""

    def __init__(self, graph: Path, entry: Component, ranges: Mapping[str, Range], calls: Sequence[Arrays]) -> None:
        model, self.paths = simulation(graph, ranges)
        self._session = _session(model, graph)
        self._calls = [{**call, **zero_banks(entry)} for call in calls]
        self._outputs = [t.name for t in entry.outputs if t.name.startswith(("prediction", "residual_", "pixels"))]
        self._expected = [self._run(np.zeros(len(self.paths), np.bool_), call) for call in self._calls]

    def errors(self, switches: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Relative L2 error of each call's outputs, all together."""
        pairs = zip(self._calls, self._expected, strict=True)
        return np.array([relative_error(self._run(switches, call), expected) for call, expected in pairs])

    def _run(self, switches: NDArray[np.bool_], call: Arrays) -> Float32:
        results = self._session.run(self._outputs, {**call, "switches": switches})
        return np.concatenate([np.asarray(result, np.float32).ravel() for result in results])


def zero_banks(entry: Component) -> dict[str, NDArray[Any]]:
    """Banks without an adapter."""
    return {
        tensor.name: np.zeros([int(size) for size in tensor.shape], np.float32)
        for tensor in entry.inputs
        if ".lora_" in tensor.name
    }


def _session(model: ir.Model, graph: Path) -> onnxruntime.InferenceSession:
    """A graph operator by operator: ONNX Runtime then multiplies no integers, whatever the processor does with them, and holds
    no second copy of the weights, packed or dequantised."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.intra_op_num_threads = available_threads()
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    scratch = graph.with_name(f"scratch.{graph.name}")
    ir.save(model, scratch)
    try:
        return onnxruntime.InferenceSession(scratch, options, providers=["CPUExecutionProvider"])
    finally:
        scratch.unlink()
