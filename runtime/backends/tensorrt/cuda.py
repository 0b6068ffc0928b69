"""CUDA for the TensorRT backends: memory, copies, one stream and recorded graphs, by NVIDIA's own bindings (`cuda-bindings`).

They are 8 MB, need nothing but the driver, and are what TensorRT's addresses and streams are made for; torch or CuPy would be
hundreds of MB for five calls. Addresses are plain numbers here, as in TensorRT's API.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.errors import BackendError

ALIGNMENT = 256  # bytes, of a context's memory


class Memory:
    """Device memory, freed with the object."""

    def __init__(self, address: int, size: int, free: Callable[[int], None]) -> None:
        self.address, self.size = address, size
        self._finalizer = weakref.finalize(self, free, address)


class Device(Protocol):
    """What the backend needs of a GPU; `Cuda`, or a stand-in of the tests."""

    capability: tuple[int, int]
    stream: int

    def allocate(self, size: int) -> Memory: ...

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Host memory that copies do not wait for."""
        ...

    def upload(self, address: int, source: NDArray[Any]) -> None:
        """In the stream's order; the source must stay as it is until then."""
        ...

    def download(self, target: NDArray[Any], address: int) -> None: ...

    def copy(self, target: int, source: int, size: int) -> None: ...

    def clear(self, address: int, size: int) -> None: ...

    def synchronize(self) -> None: ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What `work` puts on the stream, as one call."""
        ...


class Cuda:
    """The first visible GPU, with a stream of its own. Raises BackendError where CUDA cannot be used."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._runtime: Any = runtime
        self._call("cudaSetDevice", 0)
        attributes = runtime.cudaDeviceAttr
        major, minor = (
            int(self._call("cudaDeviceGetAttribute", attribute, 0))
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.capability = major, minor
        self._stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        self.stream = int(self._stream)
        weakref.finalize(self, runtime.cudaStreamDestroy, self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of a call of CUDA's run time. Raises BackendError, or MemoryError where memory ran out."""
        error, *results = getattr(self._runtime, name)(*arguments)
        if int(error):
            text = f"{name}: {self._runtime.cudaGetErrorString(error)[1].decode()}"
            raise MemoryError(text) if int(error) == 2 else BackendError(f"CUDA failed in {text}")
        return results[0] if results else None

    def allocate(self, size: int) -> Memory:
        runtime = self._runtime
        return Memory(int(self._call("cudaMalloc", max(1, size))), size, lambda address: runtime.cudaFree(address))

    def pinned(self, size: int) -> NDArray[np.uint8]:
        runtime = self._runtime
        address = int(self._call("cudaHostAlloc", max(1, size), runtime.cudaHostAllocDefault))
        buffer = (ctypes.c_uint8 * max(1, size)).from_address(address)
        weakref.finalize(buffer, lambda: runtime.cudaFreeHost(address))  # arrays over it keep it alive
        return np.ctypeslib.as_array(buffer)[:size]

    def upload(self, address: int, source: NDArray[Any]) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self._stream)

    def download(self, target: NDArray[Any], address: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, size, kind, self._stream)

    def clear(self, address: int, size: int) -> None:
        self._call("cudaMemsetAsync", address, 0, size, self._stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        runtime, stream = self._runtime, self._stream
        # another thread decodes meanwhile, whose calls must not spoil the recording
        self._call("cudaStreamBeginCapture", stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            runtime.cudaStreamEndCapture(stream)
            raise
        graph = self._call("cudaStreamEndCapture", stream)
        recorded = self._call("cudaGraphInstantiate", graph, 0)
        self._call("cudaGraphDestroy", graph)

        def replay() -> None:
            self._call("cudaGraphLaunch", recorded, stream)

        weakref.finalize(replay, runtime.cudaGraphExecDestroy, recorded)
        return replay
