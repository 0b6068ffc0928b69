"""Functions of tensors on CUDA: one recorded CUDA graph for each set of input shapes, over buffers that stay where they are.

Rows are padded up to a few buckets, so that a batch that requests join and leave needs few recordings. Rows of padding hold
zeros, never what an earlier batch left there, and their results are not given to anybody.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stepforge.runtime.backends import Arrays

Function = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Pads = Mapping[
    str, tuple[int, int]
]  # input -> its first dimension in the recording, and what stands behind what is given
BUCKETS = (1, 2, 4, 6, 8, 12, 16)  # rows of a recorded call; multiples of 8 beyond
MOST_SHAPES = 2 * len(BUCKETS)  # recorded at a time, LRU: all buckets at two lengths of prompts
WARM_UPS = 2  # compile kernels, and let cuDNN and cuBLAS make their workspaces, before anything is recorded
AHEAD = 2  # calls that the host may be ahead of the device


@dataclass(slots=True)
class Recording:
    graph: Any  # torch.cuda.CUDAGraph
    buffers: dict[str, Tensor]
    results: dict[str, Tensor]
    pinned: dict[str, Tensor]  # host memory for the results
    once: Any = None  # torch.cuda.CUDAGraph of what is kept while its inputs stay
    kept: dict[str, Tensor] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)  # arrays that the buffers hold


class Recorder:
    """function: tensors on `device` to tensors there, without waiting for the device. pool: memory that recordings share, of
    which one replays at a time; None: call it plainly. changes: tensors that the function changes. once: a function whose
    results the first takes among its inputs, and the inputs on which it depends: replayed when one of those was copied."""

    def __init__(
        self, function: Function, *, device: Any, pool: Any, changes: Sequence[Tensor] = (), once: Any = None
    ) -> None:
        self._function, self._device, self._pool, self._changes = function, device, pool, changes
        self._once: Any = once[0] if once is not None and once[1] else None
        self._once_inputs: Collection[str] = once[1] if self._once is not None else ()
        self._recordings: OrderedDict[Any, Recording] = OrderedDict()
        self._running: deque[Any] = deque()

    @staticmethod
    def bucket(rows: int) -> int:
        """Rows of the recorded call that runs so many."""
        return next((size for size in BUCKETS if size >= rows), -(-rows // 8) * 8)

    def __call__(self, inputs: Arrays) -> dict[str, Any]:
        """From NumPy to NumPy, with the results in fp32. Inputs of one row are shared by all rows, or the only ones."""
        if self._pool is None:
            given = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
            return {name: value.float().cpu().numpy() for name, value in self._function(given).items()}
        rows = max(len(array) for array in inputs.values())
        bucket = self.bucket(rows)
        pads = {name: (bucket, 0) for name, array in inputs.items() if len(array) == rows}
        recording = self._replay(inputs, (), pads)
        for name, pinned in recording.pinned.items():
            pinned[:rows].copy_(recording.results[name][:rows], non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return {name: pinned[:rows].numpy() for name, pinned in recording.pinned.items()}

    def start(self, inputs: Arrays, steady: Collection[str], pads: Pads) -> None:
        """The call without its results, which may still be running afterwards. steady: inputs that are never written to, so
        that the same array again is not copied again."""
        if len(self._running) == AHEAD:
            self._running.popleft().synchronize()
        self._replay(inputs, steady, pads)
        self._running.append(torch.cuda.current_stream(self._device).record_event())

    def _replay(self, inputs: Arrays, steady: Collection[str], pads: Pads) -> Recording:
        lengths = {name: pads[name][0] if name in pads else len(array) for name, array in inputs.items()}
        shapes = {name: (lengths[name], *array.shape[1:]) for name, array in inputs.items()}
        key = tuple(sorted((name, shapes[name], array.dtype.str) for name, array in inputs.items()))
        if key not in self._recordings:
            if len(self._recordings) == MOST_SHAPES:
                torch.cuda.current_stream(self._device).synchronize()  # the one that goes may still be running
                self._recordings.popitem(last=False)
            self._recordings[key] = self._make(
                {name: padded(array, *pads.get(name, (len(array), 0))) for name, array in inputs.items()}
            )
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        stale = False
        for name, array in inputs.items():
            if name in steady and recording.held.get(name) is array:
                continue
            # PyTorch keeps pinned memory until the copy is done
            recording.buffers[name][: len(array)].copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)
            if len(array) < lengths[name]:
                recording.buffers[name][len(array) :].fill_(pads[name][1])
            recording.held[name] = array
            stale |= name in self._once_inputs
        if stale:
            recording.once.replay()
        recording.graph.replay()
        return recording

    def _make(self, inputs: Arrays) -> Recording:
        buffers = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        before = [tensor.clone() for tensor in self._changes]
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._function({**buffers, **(self._once(buffers) if self._once is not None else {})})
        torch.cuda.current_stream(self._device).wait_stream(side)
        for tensor, value in zip(self._changes, before, strict=True):
            tensor.copy_(value)
        once, kept = None, {}
        if self._once is not None:
            # memory of its own: what lies in the pool is overwritten when another recording replays
            kept = {name: torch.empty_like(value) for name, value in self._once(buffers).items()}
            once = torch.cuda.CUDAGraph()
            with torch.cuda.graph(once, pool=self._pool, capture_error_mode="thread_local"):
                for name, value in self._once(buffers).items():
                    kept[name].copy_(value)
        graph = torch.cuda.CUDAGraph()
        # the engine decodes in another thread, whose calls must not spoil the recording
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = {name: value.float() for name, value in self._function({**buffers, **kept}).items()}
        pinned = {n: torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for n, value in results.items()}
        return Recording(graph, buffers, results, pinned, once, kept)


def padded(array: NDArray[Any], length: int, value: int) -> NDArray[Any]:
    """With rows of `value` behind its own."""
    if length == len(array):
        return array
    return np.concatenate([array, np.full((length - len(array), *array.shape[1:]), value, array.dtype)])
