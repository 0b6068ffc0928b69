"""A program on CUDA: one recorded CUDA graph for each set of input shapes, over buffers that stay where they are."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from stepforge.runtime.backends import Arrays
from stepforge.runtime.backends.torch_banks import DeviceBanks
from stepforge.runtime.backends.torch_run import Runner

Tensor = Any  # torch.Tensor
MOST_SHAPES = 16  # recorded at a time; the one that was used least recently goes
WARM_UPS = 2  # compile kernels, and let cuDNN and cuBLAS make their workspaces, before anything is recorded


@dataclass(frozen=True, slots=True)
class Recording:
    graph: Any  # torch.cuda.CUDAGraph
    inputs: dict[str, tuple[Tensor, Tensor]]  # pinned memory of the host, and the device's buffer
    outputs: dict[str, tuple[Tensor, Tensor]]  # the device's buffer, and pinned memory of the host


class CudaRunner:
    """Calls as `Runner`'s, from NumPy to NumPy. pool: memory for recordings, of which one replays at a time; None: run plainly.

    Inputs that the network does not read may be given.
    """

    def __init__(self, runner: Runner, banks: DeviceBanks, device: Any, *, pool: Any = None) -> None:
        self._runner, self._banks, self._device, self._pool = runner, banks, device, pool
        self._recordings: OrderedDict[Any, Recording] = OrderedDict()

    def __call__(self, inputs: Arrays) -> dict[str, Any]:
        self._banks.refresh()
        if self._pool is None:
            given = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
            return {name: value.cpu().numpy() for name, value in self._run(given).items()}
        key = tuple(sorted((name, array.shape, array.dtype.str) for name, array in inputs.items()))
        if key not in self._recordings:
            if len(self._recordings) == MOST_SHAPES:
                self._recordings.popitem(last=False)
            self._recordings[key] = self._make(inputs)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        for name, (pinned, buffer) in recording.inputs.items():
            pinned.copy_(torch.from_numpy(inputs[name]))
            buffer.copy_(pinned, non_blocking=True)
        recording.graph.replay()
        for buffer, pinned in recording.outputs.values():
            pinned.copy_(buffer, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return {name: pinned.numpy() for name, (_, pinned) in recording.outputs.items()}

    def _run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return self._runner({**given, **self._banks.tensors})

    def _make(self, inputs: Arrays) -> Recording:
        pinned = {name: torch.from_numpy(array).pin_memory() for name, array in inputs.items()}
        buffers = {name: tensor.to(self._device) for name, tensor in pinned.items()}
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._run(buffers)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # the engine decodes in another thread, whose calls must not spoil the recording
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = self._run(buffers)
        outputs = {
            name: (value, torch.empty(value.shape, dtype=value.dtype, pin_memory=True))
            for name, value in results.items()
        }
        return Recording(graph, {name: (pinned[name], buffers[name]) for name in buffers}, outputs)
