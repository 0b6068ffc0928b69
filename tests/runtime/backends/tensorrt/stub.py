"""A stand-in for TensorRT and CUDA that holds callers to the contracts of both, and computes by ONNX Runtime.

Device memory is host memory behind real addresses; what runs reads and writes those addresses alone. A recording keeps the
shapes and addresses of its making, as a CUDA graph does, and nothing runs while it is made. Shapes outside the active profile,
missing addresses, too little activation memory and calls before shapes are set are refused as TensorRT refuses them.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime

from stepforge.export.engines import step
from stepforge.runtime.backends.gpu import Gpu
from stepforge.runtime.backends.tensorrt import backend, plans
from stepforge.runtime.backends.tensorrt import step as runtime_step
from stepforge.runtime.backends.tensorrt.cuda import Memory
from stepforge.runtime.backends.tensorrt.library import LIBRARIES, Library
from stepforge.runtime.backends.tensorrt.profiles import Use, profiles
from stepforge.runtime.bundle import Bundle
from stepforge.runtime.bundle.typed import parse

GPU = Gpu("Pretended", (8, 9))
VERSION = "1.7.1.116"


def view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


class HostDevice:
    capability = (8, 9)
    streams: ClassVar[dict[int, HostDevice]] = {}

    def __init__(self) -> None:
        self.stream = 7 + len(self.streams)
        self.streams[self.stream] = self
        self.live: dict[int, np.ndarray] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.recordings = self.replays = 0

    def allocate(self, size: int) -> Memory:
        block = np.full(max(1, size) + 256, 0xFF, np.uint8)  # NaN, wherever it is read before it is written
        address = -(-block.ctypes.data // 256) * 256
        self.live[address] = block
        return Memory(address, size, lambda address: self.live.pop(address))

    def pinned(self, size: int) -> np.ndarray:
        return np.full(size, 0xFF, np.uint8)

    def put(self, work: Callable[[], None]) -> None:
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def upload(self, address: int, source: np.ndarray) -> None:
        assert source.flags.c_contiguous
        self.put(lambda: ctypes.memmove(address, source.ctypes.data, source.nbytes))

    def download(self, target: np.ndarray, address: int) -> None:
        self.put(lambda: ctypes.memmove(target.ctypes.data, address, target.nbytes))

    def copy(self, target: int, source: int, size: int) -> None:
        self.put(lambda: ctypes.memmove(target, source, size))

    def clear(self, address: int, size: int) -> None:
        self.put(lambda: ctypes.memset(address, 0, size))

    def synchronize(self) -> None:
        assert self.recording is None, "synchronizing would spoil a recording"

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recording = done = []
        try:
            work()
        finally:
            self.recording = None
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            for one in done:
                one()

        return replay


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.is_fresh = engine, True
        self.profile, self.shapes, self.addresses, self.memory = 0, {}, {}, (0, 0)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile, self.shapes = index, {}  # TensorRT forgets shapes
        return stream in HostDevice.streams and index < len(self.engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = self.engine.profiles[self.profile].get(name)
        if limits is not None and not limits.holds(shape):
            return False
        self.shapes[name] = tuple(shape)
        self.is_fresh = True
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.engine.given <= self.shapes.keys() | self.engine.steady.keys()
        return 100 + int(np.prod(self.shapes["sample"])) if "sample" in self.shapes else 100

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        self.memory = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.given or name in self.engine.outputs

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {
            n: np.zeros(self.shapes.get(n, self.engine.steady.get(n)), self.engine.dtypes[n]) for n in self.engine.given
        }
        key = tuple(sorted(self.shapes.items()))
        if key not in self.engine.known:
            found = self.engine.session.run(self.engine.outputs, zeros)
            self.engine.known[key] = {n: v.shape for n, v in zip(self.engine.outputs, found, strict=True)}
        return self.engine.known[key][name]

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses, engine = {**self.engine.steady, **self.shapes}, dict(self.addresses), self.engine
        if stream not in HostDevice.streams or self.memory[1] < self.update_device_memory_size_for_shapes():
            return False
        if engine.given - shapes.keys() or (engine.given | set(engine.outputs)) - addresses.keys():
            return False

        device = HostDevice.streams[stream]
        assert not (self.is_fresh and device.recording is not None), (
            "a context does more for new shapes than can be recorded"
        )
        self.is_fresh = False

        def run() -> None:
            inputs = {n: np.array(view(addresses[n], shapes[n], engine.dtypes[n])) for n in engine.given}
            for name, value in zip(engine.outputs, engine.session.run(engine.outputs, inputs), strict=True):
                view(addresses[name], value.shape, value.dtype)[...] = value

        device.put(run)
        return True


class Engine:
    def __init__(self, data: bytes) -> None:
        told = json.loads(data)
        self.session = onnxruntime.InferenceSession(told["graph"], providers=["CPUExecutionProvider"])
        self.profiles = tuple({n: parse(plans.Shapes, s) for n, s in p.items()} for p in told["profiles"])
        inputs = self.session.get_inputs()
        self.given = {value.name for value in inputs}
        self.dtypes = {v.name: np.int64 if "int64" in v.type else np.float32 for v in inputs}
        self.steady = {v.name: tuple(v.shape) for v in inputs if all(isinstance(size, int) for size in v.shape)}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.known: dict[Any, dict[str, tuple[int, ...]]] = {}


class StubLibrary(Library):
    """tensorrt-rtx without its package."""

    def __init__(self, name: str, *, to_run: bool = False) -> None:
        self.name, self.traits, self.version, self.is_lean = name, LIBRARIES[name], VERSION, False
        runtime = SimpleNamespace(deserialize_cuda_engine=Engine)
        logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None})
        self.module = SimpleNamespace(Logger=logger, Runtime=lambda logger: runtime)

    def contexts(self, engine: Any, kept: bytes) -> tuple[Any, Any]:
        return lambda: Context(engine), None


def build(bundle: Bundle, rows: tuple[str, ...] = ("1..2", "3..8"), size: str | None = None, **changes: Any) -> None:
    """Plans of all components, with the real profiles and cards, that the stand-in runs. changes: of the cards."""
    use = Use.parse(bundle, rows, size)
    for component, entry in bundle.components.items():
        shapes = profiles(bundle, component, use)
        digest = plans.component_hash(bundle, component)
        write_plan(digest, str(component), bundle.file(entry.graph), shapes, changes)


def build_step(place: Path) -> None:
    """The step's own plans, of the real graphs."""
    for name in step.SIGNATURES:
        graph = place / f"{name}.onnx"
        step.write(name, graph)
        write_plan(runtime_step.digest(name), f"step/{name}", graph, (step.shapes(name),), {})


def write_plan(digest: str, name: str, graph: Path, shapes: Any, changes: dict[str, Any]) -> None:
    told = {"graph": str(graph), "profiles": [{n: asdict(s) for n, s in p.items()} for p in shapes]}
    data = json.dumps(told).encode()
    session = Engine(data).session
    kinds = {"tensor(float)": "float32", "tensor(int64)": "int64"}
    card = dict(
        format=plans.FORMAT, component=name, component_hash=digest, library="tensorrt-rtx", version=VERSION,
        targets=("sm_89",), gpu="", precision="fp32", options={}, profiles=shapes,
        inputs={v.name: kinds[v.type] for v in session.get_inputs()},
        outputs={v.name: kinds[v.type] for v in session.get_outputs()}, layers={}, weights={},
        bytes=len(data), sha256=plans.hashlib.sha256(data).hexdigest(), seconds=0.0, peak_bytes=0,
    ) | changes  # fmt: skip
    folder = plans.root() / digest[:16] / f"key-{len(changes)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / plans.PLAN).write_bytes(data)
    (folder / plans.CARD).write_text(plans.card_json(plans.Card(**card)), "utf-8")


def install(monkeypatch: Any, place: Path) -> list[HostDevice]:
    """The stand-in as this process's tensorrt-rtx; the devices that backends open."""
    opened: list[HostDevice] = []

    class Shared(HostDevice):
        def __init__(self) -> None:
            super().__init__()
            opened.append(self)

    monkeypatch.setenv("STEPFORGE_PLANS", str(place / "plans"))
    monkeypatch.setenv("STEPFORGE_CACHE", str(place / "cache"))
    monkeypatch.setattr(backend, "Library", StubLibrary)
    monkeypatch.setattr(backend, "first_gpu", lambda: GPU)
    monkeypatch.setattr(backend.TensorRt, "_open_device", staticmethod(Shared))
    return opened
