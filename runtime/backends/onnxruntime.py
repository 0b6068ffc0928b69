"""ONNX Runtime on the CPU, fp32."""

from __future__ import annotations

import re

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, reason
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
        self.precision = "fp32"
        self.versions = {"onnxruntime": onnxruntime.__version__}
        self._threads = threads

    def bank_dtype(self, component: ComponentId) -> type[np.float32]:
        return np.float32

    def open(self, component: ComponentId, banks: Arrays | None = None) -> _Graph:
        entry = self._bundle.components[component]
        graph = entry.derived.get(self.name, entry.graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        # patterns are reused between equal shapes only; rows and sizes vary from tick to tick
        options.enable_mem_pattern = False
        try:
            session = onnxruntime.InferenceSession(
                self._bundle.file(graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises a class of its own per status code, all direct from Exception
            raise BackendError(f"onnxruntime cannot load {graph}: {why(error)}") from error
        return _Graph(session, banks or {})


class _Graph:
    def __init__(self, session: onnxruntime.InferenceSession, banks: Arrays) -> None:
        self._session = session
        self._outputs = [output.name for output in session.get_outputs()]
        # views of the banks' memory, made once: a UNet has some 500 of them
        self._banks = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in banks.items()}
        self._arrays = banks  # the views do not keep their memory alive

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()}
        results = self._session.run_with_ort_values(self._outputs, {**values, **self._banks})
        return {name: result.numpy() for name, result in zip(self._outputs, results, strict=True)}
