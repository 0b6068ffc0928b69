"""ONNX Runtime on NVIDIA GPUs, by its CUDA and its TensorRT provider: IO binding, banks on the device, no silent fallback.

ONNX Runtime takes a provider that it cannot load for a reason to use the CPU, and an option that it does not know for nothing
at all. So here the provider, its options and the place of every heavy operator are read back from the session and compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, Banks, loading, running
from stepforge.runtime.backends.compile_cache import root
from stepforge.runtime.backends.gpu import driver, first_gpu
from stepforge.runtime.backends.graph_file import checked_graph
from stepforge.runtime.backends.onnxruntime import why
from stepforge.runtime.backends.signature import Signature
from stepforge.runtime.backends.tensorrt.plans import Profile, component_hash
from stepforge.runtime.backends.tensorrt.profiles import Use, profiles
from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.errors import BackendError

# Operators that may not run on the CPU beside a GPU; shapes and indices belong there.
HEAVY = frozenset(("Attention", "Conv", "Gemm", "InstanceNormalization", "LayerNormalization", "MatMul", "MultiHeadAttention",
                   "FusedMatMul", "FusedConv", "Softmax", "Resize", "SkipLayerNormalization"))  # fmt: skip
ROWS = "1..8"  # rows of a call that engines are built for, unless STEPFORGE_ROWS says others; Engine's max_rows


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """Options of the CUDA provider, by ONNX Runtime's names, and why they are not its defaults."""

    device_id: int = 0
    use_tf32: bool = False  # fp32 means fp32
    cudnn_conv_algo_search: Literal["HEURISTIC", "EXHAUSTIVE", "DEFAULT"] = (
        "HEURISTIC"  # not measured for each of many shapes
    )
    cudnn_conv_use_max_workspace: bool = True
    arena_extend_strategy: Literal["kSameAsRequested", "kNextPowerOfTwo"] = (
        "kSameAsRequested"  # powers waste up to half
    )
    do_copy_in_default_stream: bool = True


@dataclass(frozen=True, slots=True)
class TensorRtOptions:
    """Options of the TensorRT provider. Caches lie in a folder of our key: the provider looks at the graph's name alone."""

    device_id: int = 0
    trt_engine_cache_enable: bool = False
    trt_engine_cache_path: str = ""
    trt_timing_cache_enable: bool = False
    trt_timing_cache_path: str = ""
    trt_profile_min_shapes: str = (
        ""  # "sample:1x4x64x64,...": with them an engine is built once, without for each shape
    )
    trt_profile_opt_shapes: str = ""
    trt_profile_max_shapes: str = ""


Options = CudaOptions | TensorRtOptions


def texts(options: Options) -> dict[str, str]:
    """As ONNX Runtime reads them; what is empty is not stated."""
    found = {
        name: str(int(value)) if isinstance(value, bool) else str(value) for name, value in asdict(options).items()
    }
    return {name: text for name, text in found.items() if text}


class OnnxRuntimeCuda:
    """fp32 or fp16, as the bundle's weights are: ONNX Runtime runs the types that the graph states."""

    name = "onnxruntime-cuda"
    provider = "CUDAExecutionProvider"
    device = "cuda"

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
        self._profiles: dict[ComponentId, Profile] = {}
        self._placed: dict[int, tuple[Any, Any]] = {}  # id of a bank -> the bank, which keeps its id, and its copy
        if hasattr(onnxruntime, "preload_dlls") and self.device == "cuda":
            onnxruntime.preload_dlls()  # CUDA and cuDNN of pip's packages

    def bank_dtype(self, component: ComponentId) -> type[np.float32]:
        return np.float32

    def _graph(self, component: ComponentId) -> str:
        entry = self._bundle.components[component]
        return entry.derived.get("onnxruntime", entry.graph)

    def _options(self, component: ComponentId) -> Options:
        return CudaOptions()

    def check_shapes(self, component: ComponentId, inputs: Arrays) -> None:
        """Raises BackendError for shapes that the session was not made for."""

    def open(self, component: ComponentId, banks: Arrays | None = None) -> _Graph:
        graph = self._graph(component)
        path = checked_graph(self._bundle, component, graph).path
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = self._threads
        settings.log_severity_level = 4
        settings.enable_mem_pattern = False
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        wanted = texts(self._options(component))
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
    """One engine for each network, for the rows of STEPFORGE_ROWS and the sides of STEPFORGE_SIZE, built when the network is
    opened and kept for the next process."""

    name = "onnxruntime-tensorrt"
    provider = "TensorrtExecutionProvider"

    def __init__(self, bundle: Bundle, *, precision: str, threads: int) -> None:
        super().__init__(bundle, precision=precision, threads=threads)
        said = ("STEPFORGE_ROWS", "STEPFORGE_SIZE")
        rows, size = (os.environ.get(name) for name in said)
        self._use = Use.parse(bundle, (rows or ROWS,), size, said)

    def _graph(self, component: ComponentId) -> str:
        return self._bundle.components[component].graph  # TensorRT knows no operators of ONNX Runtime's own

    def _profile(self, component: ComponentId) -> Profile:
        """The widest: residuals from none to full."""
        if component not in self._profiles:
            self._profiles[component] = profiles(self._bundle, component, self._use)[-1]
        return self._profiles[component]

    def _options(self, component: ComponentId) -> TensorRtOptions:
        shapes = [
            ",".join(f"{name}:{'x'.join(map(str, getattr(s, which)))}" for name, s in self._profile(component).items())
            for which in ("low", "best", "high")
        ]
        found = TensorRtOptions(
            trt_profile_min_shapes=shapes[0], trt_profile_opt_shapes=shapes[1], trt_profile_max_shapes=shapes[2]
        )
        base = root()
        if base is None:
            return found
        body = [
            component_hash(self._bundle, component),
            onnxruntime.__version__,
            str(first_gpu()),
            driver(),
            asdict(found),
        ]
        key = hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]
        folder = base / f"onnxruntime-tensorrt-{onnxruntime.__version__}" / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError
        except OSError:
            return found
        place = str(folder)
        return replace(
            found, trt_engine_cache_enable=True, trt_engine_cache_path=place, trt_timing_cache_enable=True,
            trt_timing_cache_path=place,
        )  # fmt: skip

    def check_shapes(self, component: ComponentId, inputs: Arrays) -> None:
        profile = self._profile(component)
        for name, array in inputs.items():
            if name in profile and not profile[name].holds(array.shape):
                low, high = list(profile[name].low), list(profile[name].high)
                raise BackendError(
                    f"{self.name} runs {component} with {name} of {low} to {high}, not {list(array.shape)}; STEPFORGE_ROWS and "
                    "STEPFORGE_SIZE, such as 1..8 and 512..1024, say what it is for"
                )


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
        self._backend.check_shapes(self._component, inputs)
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
