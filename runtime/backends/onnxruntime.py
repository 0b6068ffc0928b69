"""ONNX Runtime on the CPU, fp32 or int8."""

from __future__ import annotations

import re

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, loading, reason, running
from stepforge.runtime.backends.graph_file import checked_graph
from stepforge.runtime.backends.signature import Signature
from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.errors import BackendError

PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:\s*)?")


def why(error: Exception) -> str:
    """One line of ONNX Runtime's message, without its status code and the path that the caller names anyway."""
    found = reason(error)
    return PREFIX.sub("", found) or found


class OnnxRuntime:
    """Uses a component's graph derived for ONNX Runtime where the bundle has one, else the standard graph."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, *, precision: str, threads: int) -> None:
        if precision == "bf16":
            raise BackendError("onnxruntime has no bf16 kernels for a CPU; use precision fp32, or backend openvino")
        self._bundle = bundle
        self.precision = "fp32" if precision == "auto" else precision
        self.versions = {"onnxruntime": onnxruntime.__version__}
        self._threads = threads

    def bank_dtype(self, component: ComponentId) -> type[np.float32]:
        return np.float32

    def open(self, component: ComponentId, banks: Arrays | None = None) -> _Graph:
        entry = self._bundle.components[component]
        graph = entry.graph_for(self.name, self.precision)
        path = checked_graph(self._bundle, component, graph).path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # what fails is raised, and told once
        # patterns are reused between equal shapes only; rows and sizes vary from tick to tick
        options.enable_mem_pattern = False
        with loading("onnxruntime", graph, why):
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            return _Graph(session, component, banks or {}, self._bundle)


class _Graph:
    def __init__(
        self, session: onnxruntime.InferenceSession, component: ComponentId, banks: Arrays, bundle: Bundle
    ) -> None:
        self._component, self._signature = component, Signature(bundle, component)
        self._session = session
        self._outputs = [tensor.name for tensor in bundle.components[component].outputs]
        # views of the banks' memory, made once: a UNet has some 500 of them
        self._banks = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in banks.items()}
        self._arrays = banks  # the views do not keep their memory alive

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        with running("onnxruntime", self._component, why):
            values = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
                for name, array in inputs.items()
            }
            results = self._session.run_with_ort_values(self._outputs, {**values, **self._banks})
            found = {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}
        self._signature.check(inputs, found)
        return found
