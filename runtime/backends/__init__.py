"""Backends: how to run a component graph. One protocol, one table, lazy imports, no silent fallback."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends.gpu import torch_on_gpu
from stepforge.runtime.bundle import INT8, Bundle, ComponentId, Role
from stepforge.runtime.checks import whole
from stepforge.runtime.errors import BackendError, RequestError
from stepforge.runtime.files import printable
from stepforge.runtime.plan.guiders import Guider

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]
Why = Callable[[Exception], str]

BACKENDS = {
    "openvino": "stepforge.runtime.backends.openvino:OpenVino",
    "onnxruntime": "stepforge.runtime.backends.onnxruntime:OnnxRuntime",
    "onnxruntime-cuda": "stepforge.runtime.backends.onnxruntime_gpu:OnnxRuntimeCuda",
    "onnxruntime-tensorrt": "stepforge.runtime.backends.onnxruntime_gpu:OnnxRuntimeTensorRt",
    "torch": "stepforge.runtime.backends.torch:Torch",
    "torch-exact": "stepforge.runtime.backends.torch:TorchExact",
    "tensorrt": "stepforge.runtime.backends.tensorrt:TensorRt",
    "tensorrt-rtx": "stepforge.runtime.backends.tensorrt:TensorRtRtx",
    "fake": "stepforge.runtime.backends.fake:Fake",
}
EXTRAS = {  # extras that install what a backend imports
    "onnxruntime": "onnxruntime", "onnxruntime-cuda": "cuda", "onnxruntime-tensorrt": "cuda", "torch": "torch",
    "torch-exact": "torch", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx",
}  # fmt: skip
WIDE_VAE = ("sdxl", "x4")  # families whose VAE exceeds the range of fp16 (diffusers upcasts it to fp32: force_upcast)
AUTO = ("torch", "openvino", "onnxruntime")  # best first; torch on a GPU only (benchmarks/bench_denoiser.py)
PRECISIONS = ("auto", "fp32", "bf16", "fp16", INT8)  # arithmetic; weights have `bundle.WEIGHT_PRECISIONS`
# backends that compute in fp16
FP16 = ("torch", "torch-exact", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt")
INT8_BACKENDS = (
    "openvino",
    "onnxruntime",
)  # backends that multiply integers, of bundles that `stepforge quantize` wrote
THREADS_PER_CORE = 4  # most that a caller may ask for; engine libraries start every one of them
# Text encoders cost nothing beside the denoiser, and every step depends on them.
ALWAYS_FP32: tuple[Role, ...] = ("text_encoder",)


class Banks(dict[str, NDArray[Any]]):
    """Inputs that stay, with a number for each slot that changes when the slot is written, so that a copy can follow."""

    def __init__(self, arrays: Arrays, versions: NDArray[np.int64]) -> None:
        super().__init__(arrays)
        self.versions = versions

    def only(self, names: Container[str]) -> Banks:
        return Banks({name: array for name, array in self.items() if name in names}, self.versions)


class Graph(Protocol):
    """One loaded component. Safe to call from one thread at a time."""

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Named arrays in, named arrays out; the outputs are the caller's to keep until the next call."""
        ...


@dataclass(frozen=True, slots=True)
class StepTable:
    """What K evaluations of one image need, as arrays; the rings of `keep` and `gain` as in `engine.trajectory.Trajectory`."""

    t: NDArray[np.float32]  # [K]
    scale_in: NDArray[np.float32]  # [K + 1]; the last is not used
    guidance: NDArray[np.float32]  # [K, 2]: weights of the conditional and the unconditional prediction; 0: of no use
    table: NDArray[np.float32]  # [K, latents + predictions + 1]: keep, gain and noise
    adapter_strength: NDArray[np.float32]  # [K]
    guider: Guider
    denoised: NDArray[np.float64]  # [K, 2]: `Step.denoised`, for guiders that look at the clean image; 0: it has none


@dataclass(frozen=True, slots=True)
class SideCall:
    """A ControlNet's part in a step: what it reads besides the denoiser's inputs, and the rows that get its residuals."""

    component: ComponentId
    graph: Graph
    rows: NDArray[np.int32]
    inputs: Arrays  # hint and scale


@dataclass(frozen=True, slots=True)
class Kept:
    """Activations of a network that later steps of an image read, and the rows that are meant."""

    names: tuple[str, ...]  # outputs of that network, inputs of the one that reads them
    rows: NDArray[np.bool_]  # [R]


@dataclass(frozen=True, slots=True)
class NetworkCall:
    """The network of a step where that is not always the loop's own: its reuse variants, other experts."""

    component: ComponentId
    graph: Graph
    roles: NDArray[np.int32]  # [R]: 0 for the conditional row of an image, 1 for the unconditional one
    keep: Sequence[Kept] = ()  # rows: whose are kept
    read: Sequence[Kept] = ()  # rows: who reads the mean of its image's two, and not its own


class Loop(Protocol):
    """Whole steps of a denoiser, guidance and update included, for images that stay on the device.

    Each image has a place, which the caller gives and takes. Coefficients are read by the image's own step counter.
    """

    def put(self, place: int, state: NDArray[np.float32], steps: StepTable) -> None:
        """A new image: state [latents + predictions, C·h·w], before its first step."""
        ...

    def step(
        self,
        places: NDArray[np.int32],
        sources: NDArray[np.int32],
        owners: NDArray[np.int32],
        inputs: Arrays,
        noise: Mapping[int, NDArray[np.float32]],
        sides: Sequence[SideCall] = (),
        call: NetworkCall | None = None,
    ) -> None:
        """One step of the images at places [n]; may return before it is done.

        sources: rows of the network's call, [n, 2], as in `StepTable.guidance`. owners: the place of each row, [R]. call: the
        network; None is the loop's own.
        inputs: what else the network reads; arrays that come again are taken as unchanged. noise: fresh noise by place,
        where the step wants some. If it raises, no image has moved.
        """
        ...

    def get(self, place: int) -> NDArray[np.float32]:
        """The state of an image after its steps so far."""
        ...


@runtime_checkable
class LoopingGraph(Graph, Protocol):
    """A denoiser whose backend can run whole steps."""

    rings: tuple[int, int]  # latents and predictions that an image's state holds in its loops
    runs_plans: bool  # whether its loops also run the backend's other denoisers, and guiders

    def loop(self, shape: tuple[int, int, int]) -> Loop:
        """An empty loop for latents [C, h, w]."""
        ...


class Backend(Protocol):
    """An engine library that can open a bundle's components."""

    name: str
    precision: str  # "fp32", "bf16", "fp16" or "int8": what the networks compute in
    versions: dict[str, str]

    def open(self, component: ComponentId, banks: Arrays | None = None) -> Graph:
        """Load one component. Raises BackendError if the library refuses the graph.

        banks: inputs that stay, of the type of `bank_dtype`; every call reads them as they are then. As `Banks` they tell
        which slots changed.
        """
        ...

    def bank_dtype(self, component: ComponentId) -> type[np.float32] | type[np.uint16]:
        """The type of a component's LoRA banks; uint16 stands for bfloat16."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What "auto" came to."""

    backend: Backend
    passed_over: Mapping[str, str]  # better ones, and why each cannot run here

    def __str__(self) -> str:
        why = "; ".join(f"not {name}: {reason}" for name, reason in self.passed_over.items())
        return f"{self.backend.name} {self.backend.precision}" + (f" ({why})" if why else "")


def choose(bundle: Bundle, *, precision: str = "auto", threads: int | None = None) -> Choice:
    """Open the best backend that runs here: torch on a CUDA GPU, else the fastest one for a CPU.

    Raises BackendError, with the reason of each, if none does; see `open_backend`.
    """
    passed_over: dict[str, str] = {}
    for name in AUTO:
        try:
            if name == "torch":
                _check_gpu()
            opened = open_backend(name, bundle, precision=precision, threads=threads)
            return Choice(opened, passed_over)
        except BackendError as error:
            passed_over[name] = str(error)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise BackendError(f"no backend can run here: {reasons}")


def runnable() -> list[str]:
    """Backends that "auto" may come to on this machine, best first."""
    return [name for name in AUTO if name != "torch" or torch_on_gpu()[0]]


def _check_gpu() -> None:
    """Raises BackendError with the reason why torch would run on the CPU here."""
    runs, why = torch_on_gpu()
    if not runs:
        raise BackendError(why)
    if not importlib.import_module("torch").cuda.is_available():
        raise BackendError(f"{why}, but this torch, or the driver, cannot use it")


def open_backend(name: str, bundle: Bundle, *, precision: str = "auto", threads: int | None = None) -> Backend:
    """Open the backend of that name; "auto" is `choose`, and is logged with its reasons.

    Raises BackendError if the name or precision is unknown, or the library is missing or cannot do the precision.
    """
    check_names(name, precision)
    check_threads(threads)
    if name == "auto":
        choice = choose(bundle, precision=precision, threads=threads)
        log.info("backend auto is %s", choice)
        return choice.backend
    if precision == "fp16" and name not in FP16:
        raise BackendError(f"backend {name!r} does not compute in fp16; use fp32 or bf16, or one of {', '.join(FP16)}")
    if precision == INT8:
        _check_int8(name, bundle)
    module, cls = BACKENDS[name].split(":")
    try:
        opened: Backend = getattr(importlib.import_module(module), cls)(
            bundle, precision=precision, threads=threads or available_threads()
        )
    except ModuleNotFoundError as error:
        wanted = f"'stepforge[{EXTRAS[name]}]'" if name in EXTRAS else error.name
        raise BackendError(f"backend {name!r} needs the package {error.name}; pip install {wanted}") from error
    except (ImportError, OSError) as error:  # a library that lacks one of the system's
        raise BackendError(f"backend {name!r} cannot be loaded: {reason(error)}") from error
    return opened


def check_names(name: str, precision: str) -> None:
    """Raises BackendError for a backend or a precision of no such name."""
    if name not in ("auto", *BACKENDS):
        raise BackendError(f"backend {name!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    if precision not in PRECISIONS:
        raise BackendError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")


def _check_int8(name: str, bundle: Bundle) -> None:
    if name not in INT8_BACKENDS:
        raise BackendError(f"backend {name!r} does not compute in int8; use one of {', '.join(INT8_BACKENDS)}")
    if not any(entry.has_int8 for entry in bundle.components.values()):
        raise BackendError(f"{printable(bundle.path)} has no int8 networks; `stepforge quantize` makes them")


def reason(error: BaseException, line: int = 0) -> str:
    """One printable line of an error's text, 0 the first and -1 the last, with the next ones where it ends in a colon; never
    empty."""
    lines = [found for text in message(error).splitlines() if (found := printable(text, 300))]
    found = " ".join(lines[line:][:1])
    for more in lines[line:][1:]:
        if not found.endswith(":"):
            break
        found += f" {more}"
    return found.rstrip(": ") or type(error).__name__


def message(error: BaseException) -> str:
    """An error's text; that of an engine whose own is no UTF-8, from which its binding could not make an error."""
    return error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else str(error)


@contextmanager
def loading(backend: str, graph: str, why: Why = reason) -> Iterator[None]:
    """Whatever an engine library raises for a graph becomes BackendError. why: one line of it."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:  # each library has classes of its own, some direct from Exception
        raise BackendError(f"{backend} cannot load {graph}: {why(error)}") from error


@contextmanager
def running(backend: str, component: ComponentId, why: Why = reason) -> Iterator[None]:
    """Whatever an engine library raises in a call becomes BackendError, but for memory that ran out: see `engine.worker`."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise BackendError(f"{backend} cannot run {component}: {why(error)}") from error


def check_threads(threads: object) -> None:
    """Raise BackendError unless it is None or a whole number of threads that this machine can bear."""
    try:
        if threads is not None:
            whole("threads", threads, 1, THREADS_PER_CORE * (os.cpu_count() or 1))
    except RequestError as error:
        raise BackendError(str(error)) from None


def available_threads() -> int:
    """Cores that this process may use: its affinity mask, bounded by its cgroup's CPU quota.

    Engine libraries size their pools by the host's cores, which throttles a container with a quota.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or the quota is "max"
        pass
    return cores


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an engine library's error says that memory ran out. Each has a class or a wording of its own."""
    text = str(error).lower()
    signs = ("out of memory", "bad_alloc", "failed to allocate", "cannot allocate", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)
