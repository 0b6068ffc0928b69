"""The TensorRT backends: plans of `stepforge build`, deserialised and run without torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, loading
from stepforge.runtime.backends.compile_cache import CompileCache
from stepforge.runtime.backends.gpu import driver, first_gpu
from stepforge.runtime.backends.tensorrt import step
from stepforge.runtime.backends.tensorrt.cuda import Cuda, Device, Memory
from stepforge.runtime.backends.tensorrt.execution import DTYPES, RECORDED, DeviceBanks, Runner, TensorRtGraph, Worker
from stepforge.runtime.backends.tensorrt.library import Library
from stepforge.runtime.backends.tensorrt.loop import TensorRtDenoiser
from stepforge.runtime.backends.tensorrt.plans import INLINE, PRECISIONS, Machine, Plan, computed_in, usable, usable_of
from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.errors import BackendError

log = logging.getLogger(__name__)

RUNTIME_CACHE = "runtime.blob"


class TensorRt:
    """`precision="auto"` is that of the denoiser's newest plan which this machine can load.

    Networks of the step share one worker, those that encode and decode another, whose thread overlaps with it.
    """

    name = "tensorrt"

    def __init__(self, bundle: Bundle, *, precision: str, threads: int) -> None:
        self._bundle = bundle
        self._library = Library(self.name, to_run=True)
        gpu = first_gpu()
        if gpu is None:
            raise BackendError(f"{self.name} needs an NVIDIA GPU, and there is none")
        self._set_up(self._open_device, f"{gpu}, driver {driver()}", precision)

    def _set_up(self, opened: Callable[[], Device], gpu: str, precision: str) -> None:
        self._workers = {is_step: Worker(opened()) for is_step in (True, False)}
        major, minor = self._workers[True].device.capability
        library = self._library
        self.machine = Machine(library.name, library.version, f"sm_{major}{minor}", gpu, library.is_lean)
        self.precision = precision if precision != "auto" else self._best_precision()
        self.versions = {library.traits.package: library.version}
        self._logger = library.module.Logger(library.module.Logger.ERROR)
        self._runtime = library.module.Runtime(self._logger)
        self._parts: dict[str, Runner] | None = None
        self._banks: dict[Any, Memory] = {}
        self._arrays: list[Arrays] = []  # keeps the ids of banks theirs
        self._cache = CompileCache(f"{library.name}-{library.version}")

    @staticmethod
    def _open_device() -> Device:
        return Cuda()

    def _best_precision(self) -> str:
        network, reasons = self._bundle.denoisers[0], []
        found: list[Plan] = []
        for precision in PRECISIONS:
            try:
                found += usable(self._bundle, network, self.machine, precision)
            except BackendError as error:
                reasons.append(str(error))
        if not found:
            raise BackendError(reasons[0])
        newest = max(found, key=lambda plan: plan.folder.stat().st_mtime_ns)
        return newest.card.precision

    def bank_dtype(self, component: ComponentId) -> type[np.float32] | type[np.uint16]:
        return np.uint16 if self._precision_of(component) == "bf16" else np.float32

    def _precision_of(self, component: ComponentId) -> str:
        model = self._bundle.model(component.stage) or self._bundle.card
        return computed_in(component, model.family, self.precision)

    def open(self, component: ComponentId, banks: Arrays | None = None) -> TensorRtGraph:
        plan = usable(self._bundle, component, self.machine, self._precision_of(component))[0]
        worker = self._workers[component.role in RECORDED]
        data = plan.data()
        with loading(self.name, f"plan {plan.folder.name} of {component}"), worker.lock:
            engine = self._runtime.deserialize_cuda_engine(data)
            if engine is None:
                raise BackendError(f"{self.name} refuses plan {plan.folder.name} of {component}; build it again")
            if plan.card.weights:
                self._refit(engine, plan)
            key = plan.card.sha256, self.machine.gpu
            make, cache = self._library.contexts(engine, self._kept(key))
            placed = DeviceBanks(worker.device, banks or {}, plan.card.inputs, self._banks)
            self._arrays.append(banks or {})
            runner = Runner(self._library, worker, make, plan.card, str(component))
            graph: TensorRtGraph
            if component.role == "denoiser" and (parts := self._step_parts()):
                graph = TensorRtDenoiser(runner, self._bundle, component, placed)
                graph.parts = parts
            else:
                graph = TensorRtGraph(runner, self._bundle, component, placed)
            if cache is not None:
                graph.after_first_call = partial(self._keep, key, cache)
            return graph

    def _step_parts(self) -> Mapping[str, Runner]:
        """Contexts of the step's own plans, opened once; none where steps run on the host: without these plans, and with
        ControlNets that pool, whose residuals have another shape than others'."""
        if self._parts is None:
            self._parts = {}
            worker = self._workers[True]
            if any(card.global_pool for card in self._bundle.controls.values()):
                return self._parts
            try:
                found = {
                    name: usable_of(step.digest(name), f"step/{name}", self.machine, "fp32")[0] for name in step.NAMES
                }
            except BackendError as error:
                log.info("guidance and update run on the host: %s", error)
                return self._parts
            for name, plan in found.items():
                engine = self._runtime.deserialize_cuda_engine(plan.data())
                if engine is None:
                    raise BackendError(f"{self.name} refuses plan {plan.folder.name} of step/{name}; build it again")
                make, _ = self._library.contexts(engine, b"")
                self._parts[name] = Runner(self._library, worker, make, plan.card, f"step/{name}")
        return self._parts

    def _refit(self, engine: Any, plan: Plan) -> None:
        """Weights of a plan without them, from the bundle's files, whose hashes were checked."""
        module = self._library.module
        refitter = module.Refitter(engine, self._logger)
        inline = np.load(plan.folder / INLINE, allow_pickle=False)
        held: list[NDArray[Any]] = []
        for name in refitter.get_all_weights():
            if name not in plan.card.weights:
                raise BackendError(
                    f"plan {plan.folder.name} asks for weights {name[:80]!r}, which its card does not know"
                )
            weight = plan.card.weights[name]
            stored, wanted = DTYPES[weight.stored], DTYPES[weight.wanted]
            if weight.file:
                path = self._bundle.file(weight.file)
                array = np.memmap(path, stored, "r", weight.offset, weight.shape or (1,)).astype(wanted)
            else:
                array = np.ascontiguousarray(inline[name]).view(wanted)
            held.append(array)
            kind = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}.get(weight.wanted, weight.wanted.upper())
            given = module.Weights(getattr(module.DataType, kind), array.ctypes.data, array.size)
            if not refitter.set_named_weights(name, given):
                raise BackendError(f"{self.name} refuses the weights {name[:80]!r} of plan {plan.folder.name}")
        if not refitter.refit_cuda_engine():
            raise BackendError(f"{self.name} cannot put the weights into plan {plan.folder.name}")

    def _kept(self, key: tuple[str, str]) -> bytes:
        """What RTX has compiled for this GPU in an earlier process."""
        with self._cache.folder(*key) as folder:
            path = None if folder is None else folder / RUNTIME_CACHE
            return path.read_bytes() if path is not None and path.is_file() else b""

    def _keep(self, key: tuple[str, str], cache: Any) -> None:
        with self._cache.folder(*key) as folder:
            if folder is not None and not (folder / RUNTIME_CACHE).exists():
                (folder / RUNTIME_CACHE).write_bytes(memoryview(cache.serialize()))


class TensorRtRtx(TensorRt):
    """TensorRT for RTX, for desktop GPUs."""

    name = "tensorrt-rtx"
