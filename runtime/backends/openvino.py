"""OpenVINO on the CPU: fp32, bf16 or int8, dynamic shapes, compiled networks cached between processes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from stepforge.runtime.backends import ALWAYS_FP32, Arrays, loading, message, reason, running
from stepforge.runtime.backends.compile_cache import CompileCache
from stepforge.runtime.backends.graph_file import checked_graph
from stepforge.runtime.backends.mapped import released
from stepforge.runtime.backends.signature import Signature
from stepforge.runtime.bundle import INT8, Bundle, ComponentId
from stepforge.runtime.checks import shown
from stepforge.runtime.errors import BackendError

PRECISION_HINT = {"fp32": "f32", "bf16": "bf16"}
# OpenVINO keeps what it made for each shape in an LRU cache for each kind of primitive, of 5000 entries by default: with
# requests of many sizes its memory grows without end that anybody sees (benchmarks/soak_shapes.py). Equal
# layers share an entry, so that as many entries as a network has products keep several of its shapes ready.
LEAST_ENTRIES = 32
# Weights are packed when a shape is first run. Shapes remembered as run; beyond that all are forgotten.
MOST_SHAPES = 1024
NODE = re.compile(r"<Node\((\w+)\): ([^>\n]*)>")  # as OpenVINO's ONNX reader names the node that it refuses


@cache
def core() -> openvino.Core:
    """The only Core of the process, never let go of.

    OpenVINO's CPU plugin replaces the signal stack of the thread that loads it (for AMX), and unmaps it when its Core goes.
    If that happens in another thread, or while a second Core lives, the stack stays set: the next signal that Python handles
    (Ctrl-C) then ends the process with SIGSEGV (2026.4.1, tests/runtime/backends/test_exit.py).
    """
    return openvino.Core()


def why(error: Exception) -> str:
    """One line of OpenVINO's message, which is dozens: the last of its first paragraph, and the node if it names one."""
    first = message(error).strip().split("\n\n")[0]
    node = NODE.search(first)
    found = reason(RuntimeError(first), -1)
    return found if node is None else f"{node[1]} {node[2]}: {found}"


def check_reshapes(network: openvino.Model) -> None:
    """Raises ValueError for a Reshape between fixed shapes of different counts.

    OpenVINO 2026.4.1 checks counts at compilation, but not where zeros in the target stand for the input's own sizes: the
    output then continues into memory that is not its own. Shapes that are not fixed are checked in every call.
    """
    for node in network.get_ops():
        if node.get_type_name() == "Reshape":
            given, made = node.input(0).get_partial_shape(), node.output(0).get_partial_shape()
            if given.is_static and made.is_static and math.prod(given.to_shape()) != math.prod(made.to_shape()):
                raise ValueError(f"Reshape makes {shown(list(made.to_shape()))} of {shown(list(given.to_shape()))}")


class OpenVino:
    """`precision="auto"` is bf16 where the processor computes it natively, else fp32; so is what "int8" leaves in float."""

    name = "openvino"

    def __init__(self, bundle: Bundle, *, precision: str, threads: int) -> None:
        self._bundle = bundle
        has_bf16 = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        native = "bf16" if has_bf16 else "fp32"
        if precision == "auto":
            precision = native
        if precision == "bf16" and not has_bf16:
            raise BackendError("this processor has no native bf16; use precision fp32")
        self.precision = precision
        self._float = native if precision == INT8 else precision
        self.versions = {"openvino": openvino.get_version().split("-")[0]}
        self._threads = threads
        self._cache = CompileCache(f"openvino-{self.versions['openvino']}")

    def bank_dtype(self, component: ComponentId) -> type[np.float32] | type[np.uint16]:
        return np.uint16 if self._precision_of(component) == "bf16" else np.float32

    def _precision_of(self, component: ComponentId) -> str:
        """What a component's floats are."""
        return "fp32" if component.role in ALWAYS_FP32 else self._float

    def open(self, component: ComponentId, banks: Arrays | None = None) -> _Graph:
        entry = self._bundle.components[component]
        precision = self._precision_of(component)
        graph = entry.graph_for(self.name, self.precision)
        path, products = checked_graph(self._bundle, component, graph)
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": PRECISION_HINT[precision],
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "CPU_RUNTIME_CACHE_CAPACITY": max(LEAST_ENTRIES, products),
        }
        files = [folder for folder in (self._bundle.path, self._cache.path) if folder is not None]
        with loading("openvino", graph, why), released(files):
            # The key has the precision: OpenVINO takes a network compiled for f32 out of its cache for bf16 (2026.4.1,
            # LOADED_FROM_CACHE on the first bf16 compilation), whose results are then NaN, or the process ends. It has the
            # path and its time because OpenVINO's own has.
            key = self._bundle.digest, str(component), path.resolve(), path.stat().st_mtime_ns, sorted(config.items())
            with self._cache.folder(*key, sorted(banks or ())) as folder:
                if folder is None or not any(folder.iterdir()):  # what is kept was checked before
                    check_reshapes(core().read_model(path))
                if folder is not None:
                    config["CACHE_DIR"] = str(folder)
                network = self._with_bf16_inputs(path, banks) if banks and precision == "bf16" else path
                compiled = core().compile_model(network, "CPU", config)
            return _Graph(compiled, component, [t.name for t in entry.outputs], banks or {}, self._bundle, files)

    @staticmethod
    def _with_bf16_inputs(graph: Path, names: Iterable[str]) -> openvino.Model:
        """Float32 banks would be converted as a whole in every call, all slots of them."""
        steps = openvino.preprocess.PrePostProcessor(core().read_model(graph))
        for name in names:
            steps.input(name).tensor().set_element_type(openvino.Type.bf16)
        return steps.build()


class _Graph:
    def __init__(
        self,
        compiled: Any,
        component: ComponentId,
        outputs: list[str],
        banks: Arrays,
        bundle: Bundle,
        files: Sequence[Path],
    ) -> None:
        self._component, self._signature = component, Signature(bundle, component)
        self._files = files  # folders whose files the library has mapped
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()  # input shapes of each call that has been run
        self._request = compiled.create_infer_request()
        self._outputs = outputs
        self._banks = banks  # their memory is shared, not copied
        for name, array in banks.items():
            if array.dtype == np.uint16:
                tensor = openvino.Tensor(array, openvino.Shape(list(array.shape)), openvino.Type.bf16)
            else:
                tensor = openvino.Tensor(array, shared_memory=True)
            self._request.set_tensor(name, tensor)

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        # Not `infer`: OpenVINO 2026.4.1 loses its exceptions where shapes do not fit, gives empty outputs, and the next network
        # then reads freed memory. Outputs are views of the request's own tensors, valid until the next call.
        shapes = tuple(array.shape for array in inputs.values())
        with (
            running("openvino", self._component, why),
            nullcontext() if shapes in self._shapes else released(self._files),
        ):
            self._request.start_async(dict(inputs), share_inputs=True)
            self._request.wait()
            found = {name: self._request.get_tensor(name).data for name in self._outputs}
        if len(self._shapes) == MOST_SHAPES:
            self._shapes.clear()
        self._shapes.add(shapes)
        self._signature.check(inputs, found)
        return found
