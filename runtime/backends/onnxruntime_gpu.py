"""ONNX Runtime on NVIDIA GPUs, by its CUDA and its TensorRT provider: IO binding, banks on the device, no silent fallback.

ONNX Runtime takes a provider that it cannot load for a reason to use the CPU, and an option that it does not know for nothing
at all. So here the provider, its options and the place of every heavy operator are read back from the session and compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, Banks, loading, running
from stepforge.runtime.backends.compile_cache import root
from stepforge.runtime.backends.gpu import driver, first_gpu
from stepforge.runtime.backends.graph_file import checked_graph
from stepforge.runtime.backends.onnxruntime import why
from stepforge.runtime.backends.signature import Signature
from stepforge.runtime.backends.tensorrt.plans import component_hash
from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.errors import BackendError

# Operators that may not run on the CPU beside a GPU; shapes and indices belong there.
HEAVY = frozenset(("Attention", "Conv", "Gemm", "InstanceNormalization", "LayerNormalization", "MatMul", "MultiHeadAttention",
                   "FusedMatMul", "FusedConv", "Softmax", "Resize", "SkipLayerNormalization"))  # fmt: skip
# Providers' options and why; values as ONNX Runtime reads them, all text.
CUDA = {
    "device_id": "0",
    "use_tf32": "0",  # fp32 means fp32
    "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE measures anew for each of many shapes
    "cudnn_conv_use_max_workspace": "1",
    "arena_extend_strategy": "kSameAsRequested",  # powers of two waste up to half of the memory
    "do_copy_in_default_stream": "1",
}
TENSORRT = {
    "device_id": "0",
    "trt_engine_cache_enable": "1",
    "trt_timing_cache_enable": "1",
    "trt_engine_cache_path": "",  # set to a folder of our key: the provider itself looks at nothing but the graph's name
    "trt_timing_cache_path": "",
}


class OnnxRuntimeCuda:
    """fp32 or fp16, as the bundle's weights are: ONNX Runtime runs the types that the graph states."""

    name = "onnxruntime-cuda"
    provider = "CUDAExecutionProvider"
    device = "cuda"
    options: Mapping[str, str] = CUDA

    def __init__(self, bundle: Bundle, *, precision: str, threads: int) -> None:
        if precision not in ("auto", bundle.precision):
            raise BackendError(
                f"{self.name} computes in the type of the bundle's weights, {bundle.precision}; export it in {precision}"
            )
        if self.provider not in onnxruntime.get_available_providers():
            raise BackendError(
                f"this onnxruntime has no {self.provider}; pip uninstall onnxruntime, then pip install onnxruntime-gpu"
            )
        self._bundle, self._threads = bundle, threads
        self.precision = bundle.precision
        self.versions = {"onnxruntime": onnxruntime.__version__}
        self._placed: dict[int, tuple[Any, Any]] = {}  # id of a bank -> the bank, which keeps its id, and its copy
        if hasattr(onnxruntime, "preload_dlls") and self.device == "cuda":
            onnxruntime.preload_dlls()  # CUDA and cuDNN of pip's packages

    def bank_dtype(self, component: ComponentId) -> type[np.float32]:
        return np.float32

    def _graph(self, component: ComponentId) -> str:
        entry = self._bundle.components[component]
        return entry.derived.get("onnxruntime", entry.graph)

    def _options(self, component: ComponentId) -> dict[str, str]:
        return dict(self.options)

    def open(self, component: ComponentId, banks: Arrays | None = None) -> _Graph:
        graph = self._graph(component)
        path = checked_graph(self._bundle, component, graph)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self._threads
        settings.log_severity_level = 4
        settings.enable_mem_pattern = False
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        wanted = self._options(component)
        with loading(self.name, graph, why):
            session = onnxruntime.InferenceSession(path, settings, providers=[(self.provider, wanted)])
            session.disable_fallback()
            self._check(session, wanted)
            return _Graph(session, component, self._on_device(banks or {}), banks or {}, self._bundle, self)

    def _check(self, session: Any, wanted: Mapping[str, str]) -> None:
        """Raises BackendError where the session is not what was asked for."""
        if (first := session.get_providers()[0]) != self.provider:
            raise BackendError(f"ONNX Runtime has fallen back from {self.provider} to {first}")
        taken = session.get_provider_options().get(self.provider, {})
        if lost := [name for name, value in wanted.items() if str(taken.get(name)) != value]:
            raise BackendError(f"{self.provider} has not taken {lost[0]}={wanted[lost[0]]}, but {taken.get(lost[0])}")
        if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.32
            return
        strays = {
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name == "CPUExecutionProvider" != self.provider
            for node in part.get_nodes()
        }
        if heavy := sorted(strays & HEAVY):
            raise BackendError(f"ONNX Runtime would run {', '.join(heavy)} on the CPU")

    def _on_device(self, banks: Arrays) -> dict[str, Any]:
        for array in banks.values():
            if id(array) not in self._placed:
                self._placed[id(array)] = array, self.value(array)
        return {name: self._placed[id(array)][1] for name, array in banks.items()}

    def value(self, array: NDArray[Any]) -> Any:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)


class OnnxRuntimeTensorRt(OnnxRuntimeCuda):
    """Engines are built when a shape is first met, and kept for the next process."""

    name = "onnxruntime-tensorrt"
    provider = "TensorrtExecutionProvider"
    options = TENSORRT

    def _graph(self, component: ComponentId) -> str:
        return self._bundle.components[component].graph  # TensorRT knows no operators of ONNX Runtime's own

    def _options(self, component: ComponentId) -> dict[str, str]:
        options = dict(self.options)
        base = root()
        if base is None:
            return {name: value for name, value in options.items() if "cache" not in name}
        body = [component_hash(self._bundle, component), onnxruntime.__version__, str(first_gpu()), driver(), options]
        key = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]
        folder = base / f"onnxruntime-tensorrt-{onnxruntime.__version__}" / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError
        except OSError:
            return {name: value for name, value in options.items() if "cache" not in name}
        return options | {"trt_engine_cache_path": str(folder), "trt_timing_cache_path": str(folder)}


class _Graph:
    def __init__(
        self, session: Any, component: ComponentId, placed: Mapping[str, Any], banks: Arrays, bundle: Bundle,
        backend: OnnxRuntimeCuda,
    ) -> None:  # fmt: skip
        self._component, self._signature = component, Signature(bundle, component)
        self._session, self._backend = session, backend
        self._outputs = [tensor.name for tensor in bundle.components[component].outputs]
        self._banks, self._arrays = placed, banks
        self._versions = banks.versions if isinstance(banks, Banks) else None
        self._seen = None if self._versions is None else np.array(self._versions)
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        for name, value in placed.items():
            self._binding.bind_ortvalue_input(name, value)

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        with running(self._backend.name, self._component, why):
            self._refresh()
            for name, array in inputs.items():
                array = np.ascontiguousarray(array)
                held = self._inputs.get(name)
                if held is not None and tuple(held.shape()) == array.shape:
                    held.update_inplace(array)
                else:
                    self._inputs[name] = self._backend.value(array)
                    self._binding.bind_ortvalue_input(name, self._inputs[name])
            for name in self._outputs:  # anew: their sizes follow from the inputs'
                self._binding.bind_output(name, self._backend.device)
            self._session.run_with_iobinding(self._binding)
            found = dict(zip(self._outputs, self._binding.copy_outputs_to_cpu(), strict=True))
        self._signature.check(inputs, found)
        return found

    def _refresh(self) -> None:
        """Banks that were written since: as a whole, since ONNX Runtime copies no parts of a tensor."""
        if self._seen is not None and self._versions is not None and np.array_equal(self._seen, self._versions):
            return
        for name, array in self._arrays.items():
            self._banks[name].update_inplace(array)
        self._seen = None if self._versions is None else np.array(self._versions)
