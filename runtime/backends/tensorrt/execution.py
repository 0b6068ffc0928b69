"""A plan as a graph that runs: inputs through pinned memory, one context, one recorded CUDA graph for each set of shapes.

Rows are padded to a few buckets, so that a batch that requests join and leave needs few recordings; rows of padding hold
zeros, and their results are given to nobody. A batch of more rows than the plan was built for runs in parts.
Activations of all contexts of one worker lie in the same memory, since the worker runs one of them at a time.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, Banks, running
from stepforge.runtime.backends.signature import Signature
from stepforge.runtime.backends.tensorrt.cuda import ALIGNMENT, Device, Memory
from stepforge.runtime.backends.tensorrt.library import Library
from stepforge.runtime.backends.tensorrt.plans import Card
from stepforge.runtime.bundle import Bundle, ComponentId
from stepforge.runtime.errors import BackendError

BUCKETS = (1, 2, 4, 6, 8, 12, 16)  # rows of a recorded call; multiples of 8 beyond
MOST_SHAPES = 2 * len(BUCKETS)  # recorded at a time, LRU
RECORDED = ("denoiser", "control_residuals")  # called in every step; the others are called once a request
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
}

Shape = tuple[int, ...]


class Worker:
    """What the engines of one thread share. Calls hold its lock: activations are the memory of one call."""

    def __init__(self, device: Device) -> None:
        self.device, self.lock = device, threading.Lock()
        self.memory: Memory | None = None
        self.generation = 0  # counts moves of the memory, which void recordings

    def reserve(self, size: int) -> Memory:
        """At least so many bytes, aligned. What lay there is lost."""
        size = -(-max(1, size) // ALIGNMENT) * ALIGNMENT
        if self.memory is None or self.memory.size < size:
            self.device.synchronize()
            self.memory = self.device.allocate(size)
            self.generation += 1
        return self.memory


@dataclass(slots=True)
class Recording:
    replay: Callable[[], None]
    outputs: dict[str, NDArray[Any]]  # pinned
    generation: int
    call: Any  # what was recorded reads memory of its context
    staged: dict[str, NDArray[Any]] = field(default_factory=dict)  # pinned


class DeviceBanks:
    """LoRA banks on the device, of which only slots that were filled since are copied again."""

    def __init__(self, device: Device, arrays: Arrays, dtypes: Mapping[str, str], shared: dict[Any, Memory]) -> None:
        self._device, self._arrays = device, arrays
        self._dtypes = {name: DTYPES[dtypes[name]] for name in arrays}
        self._versions = arrays.versions if isinstance(arrays, Banks) else None
        self._seen: NDArray[np.int64] | None = None
        self.memory: dict[str, Memory] = {}
        for name, array in arrays.items():
            key = id(array), self._dtypes[name]
            if key not in shared:  # variants of a network read the same banks
                shared[key] = device.allocate(array.size * self._dtypes[name].itemsize)
            self.memory[name] = shared[key]
        largest = max((array[0].size * self._dtypes[name].itemsize for name, array in arrays.items()), default=0)
        self._room = device.pinned(2 * largest)
        self._slot = largest

    def refresh(self) -> None:
        """Copy what changed; all slots if the banks do not say which did."""
        if not self._arrays:
            return
        slots = range(len(next(iter(self._arrays.values()))))
        if self._versions is not None:
            now = np.array(self._versions)
            slots = [at for at in slots if self._seen is None or now[at] != self._seen[at]]  # type: ignore[assignment]
            self._seen = now
        halves = 0
        for slot in slots:
            for name, array in self._arrays.items():
                dtype, target = self._dtypes[name], self.memory[name]
                size = array[slot].size * dtype.itemsize
                if halves == 2:
                    self._device.synchronize()  # both halves of the room are under way
                    halves = 0
                room = self._room[halves * self._slot :][:size].view(dtype).reshape(array[slot].shape)
                room[...] = array[slot].view(dtype) if array.dtype == np.uint16 else array[slot]
                self._device.upload(target.address + slot * size, room)
                halves += 1
        self._device.synchronize()


class Runner:
    """A plan on addresses that the caller gives. what: its name in errors. make: another context of its engine."""

    def __init__(self, library: Library, worker: Worker, make: Callable[[], Any], card: Card, what: str) -> None:
        self.card, self.what, self.worker = card, what, worker
        self.library_name, self.make = library.name, make

    def profile(self, shapes: Mapping[str, Shape]) -> int | None:
        """The first profile that holds the shapes."""
        for at, profile in enumerate(self.card.profiles):
            if all(name not in profile or profile[name].holds(shape) for name, shape in shapes.items()):
                return at
        return None

    def refusal(self, shapes: Mapping[str, Shape]) -> BackendError:
        """What the plan takes of the first input that no profile holds."""
        found = self.card.profiles
        name = next((n for n, s in shapes.items() if not any(n not in p or p[n].holds(s) for p in found)), "")
        name = name or next(iter(shapes))
        limits = dict.fromkeys(f"{list(p[name].low)} to {list(p[name].high)}" for p in found if name in p)
        return BackendError(
            f"the plan of {self.what} takes {name} of {', '.join(limits)}, not {list(shapes[name])}; build one for it with "
            "`stepforge build --rows --size`"
        )

    def dtype(self, name: str) -> np.dtype[Any]:
        return DTYPES[self.card.inputs.get(name) or self.card.outputs[name]]

    def size(self, name: str, shape: Sequence[int]) -> int:
        """Bytes of an input or output."""
        return math.prod(shape) * self.dtype(name).itemsize


class Call:
    """Calls of a plan with the same shapes: a context of their own, so that none is set anew while a step is recorded."""

    def __init__(self, runner: Runner, shapes: Mapping[str, Shape]) -> None:
        profile = runner.profile(shapes)
        if profile is None:
            raise runner.refusal(shapes)
        self._runner, worker = runner, runner.worker
        self._context = runner.make()
        if not self._context.set_optimization_profile_async(profile, worker.device.stream):
            raise BackendError(f"{runner.library_name} cannot take profile {profile} of {runner.what}")
        worker.device.synchronize()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise BackendError(f"{runner.library_name} refuses {name} of {list(shape)} in {runner.what}")
        worker.reserve(int(self._context.update_device_memory_size_for_shapes()))
        self.outputs: dict[str, Shape] = {
            name: tuple(self._context.get_tensor_shape(name)) for name in runner.card.outputs
        }

    def run(self, addresses: Mapping[str, int]) -> None:
        """Put the call on the stream."""
        runner, memory = self._runner, self._runner.worker.memory
        assert memory is not None, "reserved above"
        self._context.set_device_memory(memory.address, memory.size)
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise BackendError(f"{runner.library_name} refuses the address of {name}")
        if not self._context.execute_async_v3(runner.worker.device.stream):
            raise BackendError(f"{runner.library_name} cannot run {runner.what}")


class TensorRtGraph:
    """Safe to call from one thread at a time; threads of one worker wait for each other."""

    def __init__(self, runner: Runner, bundle: Bundle, component: ComponentId, banks: DeviceBanks) -> None:
        self.worker, self.runner, self.banks = runner.worker, runner, banks
        self.held: dict[str, Any] = {}  # arrays that the buffers hold, where a loop knows them to be steady
        self.component, self.library_name = component, runner.library_name
        self._device, self._signature = runner.worker.device, Signature(bundle, component)
        self.inputs = [name for name in runner.card.inputs if name not in banks.memory]
        self._outputs = [tensor.name for tensor in bundle.components[component].outputs]
        self._is_recorded = component.role in RECORDED
        self._buffers: dict[str, Memory] = {}
        self._recordings: OrderedDict[tuple[tuple[str, Shape], ...], Recording] = OrderedDict()
        self.after_first_call: Callable[[], None] | None = None

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        rows = max(len(array) for array in inputs.values())
        with running(self.library_name, self.component), self.worker.lock:
            self._device.synchronize()  # a loop's step may be under way
            self.banks.refresh()
            self.held.clear()
            most = self.most_rows()
            parts = [self._part(inputs, rows, slice(at, min(at + most, rows))) for at in range(0, rows, most)]
            found = parts[0]
            if len(parts) > 1:
                found = {name: np.concatenate([part[name] for part in parts]) for name in found}
            self.called()
        self._signature.check(inputs, found)
        return found

    def called(self) -> None:
        """After a call has run."""
        if self.after_first_call is not None:
            self.after_first_call()
            self.after_first_call = None

    def _part(self, inputs: Arrays, rows: int, part: slice) -> dict[str, NDArray[np.float32]]:
        """Some rows; inputs of another length, such as residuals of one row where there are none, are shared by all."""
        count = part.stop - part.start
        own = {n: a[part] if len(a) == rows else a for n, a in inputs.items() if n in self.inputs}
        recording = self._recording(self._padded({n: a.shape for n, a in own.items()}, count))
        for name, array in own.items():
            room = recording.staged[name]
            room[: len(array)] = array
            room[len(array) :] = 0
            self._device.upload(self._buffers[name].address, room)
        recording.replay()
        for name, target in recording.outputs.items():
            self._device.download(target, self._buffers[name].address)
        self._device.synchronize()
        found = {name: target[:count] for name, target in recording.outputs.items()}
        return found if count == rows else {name: value.copy() for name, value in found.items()}

    def most_rows(self) -> int:
        name = self.inputs[0]
        return max(profile[name].high[0] for profile in self.runner.card.profiles if name in profile)

    def _padded(self, shapes: Mapping[str, Shape], count: int) -> dict[str, Shape]:
        """Shapes with rows up to the bucket. Raises BackendError where the plan has no profile for them."""
        for bucket in dict.fromkeys((min(bucket_of(count), self.most_rows()), count)):
            asked = {n: (bucket, *s[1:]) if s[0] == count else s for n, s in shapes.items()}
            if self.runner.profile(asked) is not None:
                return asked
        raise self.runner.refusal(shapes)

    def _recording(self, shapes: Mapping[str, Shape]) -> Recording:
        key = tuple(sorted(shapes.items()))
        found = self._recordings.get(key)
        if found is None or found.generation != self.worker.generation:
            found = self._recordings[key] = self._record(shapes)
            if len(self._recordings) > MOST_SHAPES:
                self._device.synchronize()  # the one that goes may still be running
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        return found

    def _record(self, shapes: Mapping[str, Shape]) -> Recording:
        runner, device = self.runner, self._device
        call = Call(runner, shapes)
        outputs = call.outputs
        addresses = {n: self.buffer(n, runner.size(n, shape)).address for n, shape in {**shapes, **outputs}.items()}
        addresses |= {name: memory.address for name, memory in self.banks.memory.items()}

        def run() -> None:
            call.run(addresses)

        replay = run
        if self._is_recorded:
            for name, shape in shapes.items():
                device.clear(addresses[name], runner.size(name, shape))
            run()  # what a context does once for new shapes is no part of a recording
            device.synchronize()
            replay = device.record(run)
        staged = {name: self.host(name, shape) for name, shape in shapes.items()}
        results = {name: self.host(name, outputs[name]) for name in self._outputs}
        return Recording(replay, results, self.worker.generation, call, staged)

    def buffer(self, name: str, size: int) -> Memory:
        """Device memory of at least so many bytes for an input or output; a larger one voids what was recorded."""
        if name not in self._buffers or self._buffers[name].size < size:
            self._device.synchronize()
            self._buffers[name] = self._device.allocate(size)
            self.worker.generation += 1
        return self._buffers[name]

    def host(self, name: str, shape: Sequence[int]) -> NDArray[Any]:
        """Pinned memory for an input or output."""
        return self._device.pinned(self.runner.size(name, shape)).view(self.runner.dtype(name)).reshape(shape)


def bucket_of(rows: int) -> int:
    """Rows of the recorded call that runs so many."""
    return next((size for size in BUCKETS if size >= rows), -(-rows // 8) * 8)
