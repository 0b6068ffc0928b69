"""Images that stay on the device, with TensorRT: a step is a chain of plans on one stream, recorded as one CUDA graph.

    select, look → [select → ControlNet → spread] → denoiser → update

Latents, coefficients and step counters live here, and residuals go from ControlNet to denoiser without the host. The step's
own parts are plans too (export/engines/step.py), so that nothing but TensorRT is needed. Rows of padding belong to a spare
image whose plan is done. A call of more rows than a network's plan holds runs as several, over parts of the same memory.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from stepforge.runtime.backends import Arrays, NetworkCall, SideCall, StepTable, running
from stepforge.runtime.backends.tensorrt.cuda import Memory
from stepforge.runtime.backends.tensorrt.execution import MOST_SHAPES, Call, Runner, Shape, TensorRtGraph, bucket_of
from stepforge.runtime.backends.tensorrt.step import NUM_P, NUM_X

PLACES, STEPS = 8, 64  # initial capacity, doubled on demand
WINDOW = NUM_X + NUM_P
TABLES = ("t", "adapter_strength", "guidance", "table", "scale_in")
OWN = ("hint", "scale")  # inputs of a ControlNet that the denoiser does not read


class TensorRtDenoiser(TensorRtGraph):
    """A denoiser whose whole steps run on the device. parts: the step's own plans, by name."""

    rings = NUM_X, NUM_P
    runs_plans = False
    parts: Mapping[str, Runner]  # see step.py

    def loop(self, shape: tuple[int, int, int]) -> TensorRtLoop:
        return TensorRtLoop(self, shape)


class TensorRtLoop:
    def __init__(self, denoiser: TensorRtDenoiser, shape: tuple[int, int, int]) -> None:
        self._denoiser, self._shape, self._size = denoiser, shape, math.prod(shape)
        self._worker, self._device = denoiser.worker, denoiser.worker.device
        self._parts, self._name = denoiser.parts, denoiser.library_name
        self._places, self._steps = PLACES, STEPS
        self._host: dict[str, NDArray[np.float32]] = {}  # tables as they are on the device
        self._memory: dict[str, Memory] = {}
        self._rooms: dict[str, NDArray[Any]] = {}  # pinned
        self._side_shapes: dict[Any, Shape] = {}
        self._replays: OrderedDict[Any, tuple[int, Callable[[], None], Any]] = OrderedDict()
        with self._worker.lock:
            self._allocate()

    def _allocate(self) -> None:
        """Room for all places and steps, with what stands there already. What was recorded before is void."""
        device, places, steps = self._device, self._places + 1, self._steps
        device.synchronize()
        shapes = {"t": (places, steps + 1), "adapter_strength": (places, steps + 1), "guidance": (places, steps, 2),
                  "table": (places, steps, WINDOW + 1), "scale_in": (places, steps + 1)}  # fmt: skip
        for name, shape in shapes.items():
            old, self._host[name] = self._host.get(name), np.zeros(shape, np.float32)
            if old is not None:
                self._host[name][tuple(slice(length) for length in old.shape)] = old
            self._memory[name] = device.allocate(self._host[name].nbytes)
            self._put(name, self._host[name])
        held = self._memory.get("state") is not None
        counters = np.full(places, steps, np.int64)  # the spare place is behind its last step; free ones are not asked
        if held:
            before = np.empty(self._memory["step"].size // 8, np.int64)
            device.download(before, self._memory["step"].address)
            device.synchronize()
            counters[: len(before) - 1] = before[:-1]
        rows = {"state": WINDOW * self._size, "z": self._size, "sample": self._size}
        for name, row in rows.items():
            memory = device.allocate(4 * places * row)
            device.clear(memory.address, memory.size)
            if held:
                kept = self._memory[name]
                device.copy(memory.address, kept.address, min(memory.size, kept.size - 4 * row))
                device.synchronize()
            self._memory[name] = memory
            if name != "z":
                self._memory[f"new_{name}"] = device.allocate(memory.size)
        self._memory["step"] = device.allocate(counters.nbytes)
        self._memory["new_step"] = device.allocate(counters.nbytes)
        self._put("step", counters)
        device.synchronize()
        self._replays.clear()

    def _put(self, name: str, values: NDArray[Any], offset: int = 0) -> None:
        """Host values into a tensor, through pinned memory, and wait: this happens when images come, not in steps."""
        self._upload(self._memory[name].address + offset, values, "put")
        self._device.synchronize()

    def _upload(self, address: int, values: NDArray[Any], room: str) -> None:
        """room: pinned memory that nobody else writes to before the stream has read it."""
        if room not in self._rooms or self._rooms[room].nbytes < values.nbytes:
            self._rooms[room] = self._device.pinned(values.nbytes)
        pinned = self._rooms[room][: values.nbytes].view(values.dtype).reshape(values.shape)
        pinned[...] = values
        self._device.upload(address, pinned)

    def put(self, place: int, state: NDArray[np.float32], steps: StepTable) -> None:
        count = len(steps.t)
        with running(self._name, self._denoiser.component), self._worker.lock:
            self._device.synchronize()
            if place >= self._places or count > self._steps:
                while place >= self._places:
                    self._places *= 2
                while count > self._steps:
                    self._steps *= 2
                self._allocate()
            for name in TABLES:
                row = self._host[name][place]
                row[:] = 0
                values = getattr(steps, name)
                row[: len(values)] = values
                self._put(name, row, place * row.nbytes)
            state = np.ascontiguousarray(state, np.float32)
            self._put("state", state, place * state.nbytes)
            self._put("sample", state[0] * np.float32(steps.scale_in[0]), place * 4 * self._size)
            self._put("step", np.zeros(1, np.int64), place * 8)

    def get(self, place: int) -> NDArray[np.float32]:
        with self._worker.lock:
            found = self._device.pinned(4 * WINDOW * self._size).view(np.float32).reshape(WINDOW, self._size)
            self._device.download(found, self._memory["state"].address + place * found.nbytes)
            self._device.synchronize()
            return np.array(found)

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
        assert call is None, "a loop of TensorRT runs one network"
        denoiser = self._denoiser
        with running(self._name, denoiser.component), self._worker.lock:
            self._device.synchronize()  # pinned memory of the step before is free
            for graph in (denoiser, *(cast(TensorRtGraph, side.graph) for side in sides)):
                graph.banks.refresh()
            rows, spare = padded(len(owners), denoiser.most_rows()), self._places
            for place, values in noise.items():
                self._upload(self._memory["z"].address + place * values.nbytes, values, f"z{place}")
            steady = {name: array for name, array in inputs.items() if name in denoiser.inputs}
            given = {side_name for side in sides for side_name in cast(TensorRtGraph, side.graph).runner.card.outputs}
            shapes = {name: ((rows if len(a) == len(owners) else len(a)), *a.shape[1:]) for name, a in steady.items()}
            shapes |= {"sample": (rows, *self._shape), "timestep": (rows,)}
            if "adapter_strength" in denoiser.inputs:
                shapes["adapter_strength"] = (rows, 1, 1)
            for name in given & shapes.keys():
                shapes[name] = (rows, *self._side_shape(sides, name, shapes))
                denoiser.held.pop(name, None)  # what the residuals are added up in
            for name, array in steady.items():
                if name not in given:
                    self._input(denoiser, name, array, shapes[name])
            index = {"places": _filled(places, rows, spare), "owners": _filled(owners, rows, spare),
                     "sources": _filled(sources, rows, 0)}  # fmt: skip
            for name, at_rows in index.items():
                self._index(name, at_rows)
            counts = []
            for at, side in enumerate(sides):
                graph = cast(TensorRtGraph, side.graph)
                own = rows if len(side.rows) == len(owners) else padded(len(side.rows), graph.most_rows())
                counts.append(own)
                back = np.full(rows, -1, np.int64)
                back[side.rows] = np.arange(len(side.rows))
                self._index(f"rows{at}", _filled(side.rows, own, 0))
                self._index(f"map{at}", back)
                for name, array in side.inputs.items():  # the same net may be a second side
                    self._input(graph, name, array, (own, *array.shape[1:]), f"{name} {at}")
            key = rows, tuple(sorted(shapes.items())), tuple(
                (s.component, own, tuple(sorted((n, a.shape[1:]) for n, a in s.inputs.items())))
                for s, own in zip(sides, counts, strict=True)
            )  # fmt: skip
            found = self._replays.get(key)
            if found is None or found[0] != self._worker.generation:
                found = self._record(rows, shapes, sides, counts)
                self._replays[key] = found
                if len(self._replays) > MOST_SHAPES:
                    self._replays.popitem(last=False)
            self._replays.move_to_end(key)
            found[1]()
            denoiser.called()

    def _input(self, graph: TensorRtGraph, name: str, array: NDArray[Any], shape: Shape, room: str = "") -> None:
        """A network's input that is never written to: the same array again is not copied again."""
        address = graph.buffer(room or name, graph.runner.size(name, shape)).address
        held = graph.held.get(room or name)
        if held is not None and held[0] is array and held[1:] == (shape, address):
            return
        values = np.zeros(shape, graph.runner.dtype(name))
        values[: len(array)] = array
        self._upload(address, values, room or name)
        graph.held[room or name] = array, shape, address

    def _index(self, name: str, values: NDArray[np.int64]) -> None:
        if name not in self._memory or self._memory[name].size < values.nbytes:
            self._device.synchronize()
            self._memory[name] = self._device.allocate(values.nbytes)
            self._worker.generation += 1
        self._upload(self._memory[name].address, values, name)

    def _side_shape(self, sides: Sequence[SideCall], name: str, shapes: Mapping[str, Shape]) -> Shape:
        """Shape of a row of a residual, as a ControlNet gives it."""
        side = next(side for side in sides if name in cast(TensorRtGraph, side.graph).runner.card.outputs)
        key = side.component, name
        if key not in self._side_shapes:
            graph = cast(TensorRtGraph, side.graph)
            own = self._side_inputs(graph, side, shapes, min(shapes["sample"][0], graph.most_rows()))
            self._side_shapes[key] = Call(graph.runner, own).outputs[name][1:]
        return self._side_shapes[key]

    @staticmethod
    def _side_inputs(graph: TensorRtGraph, side: SideCall, shapes: Mapping[str, Shape], rows: int) -> dict[str, Shape]:
        rest = {name: side.inputs[name].shape if name in OWN else shapes[name] for name in graph.inputs}
        return {name: (rows, *shape[1:]) for name, shape in rest.items()}

    def _record(
        self, rows: int, shapes: Mapping[str, Shape], sides: Sequence[SideCall], counts: Sequence[int]
    ) -> tuple[int, Callable[[], None], Any]:
        """The step as one call, and what holds its contexts. What it changes is put back after the warm-up."""
        device = self._device
        before = self._worker.generation
        chain = self._chain(rows, shapes, sides, counts)
        if self._worker.generation != before:  # buffers that grew have left addresses behind
            chain = self._chain(rows, shapes, sides, counts)
        kept = {name: device.allocate(self._memory[name].size) for name in ("state", "sample", "step")}
        for name, copy in kept.items():
            device.copy(copy.address, self._memory[name].address, copy.size)
        chain()
        for name, copy in kept.items():
            device.copy(self._memory[name].address, copy.address, copy.size)
        device.synchronize()
        return self._worker.generation, device.record(chain), chain

    def _chain(
        self, rows: int, shapes: Mapping[str, Shape], sides: Sequence[SideCall], counts: Sequence[int]
    ) -> Callable[[], None]:
        """Everything of a step, as calls in the stream's order."""
        device, denoiser, memory = self._device, self._denoiser, self._memory
        address = {name: block.address for name, block in memory.items()}
        work: list[Callable[[], None]] = []
        images, steps = self._places + 1, self._steps

        def part(name: str, shapes: dict[str, Shape], addresses: dict[str, int]) -> None:
            call = Call(self._parts[name], shapes)
            work.append(partial(call.run, addresses))

        def target(graph: TensorRtGraph, name: str, shape: Shape, buffer: str = "") -> int:
            return graph.buffer(buffer or name, graph.runner.size(name, shape)).address

        places = {name: target(denoiser, name, shape) for name, shape in shapes.items()}
        part("select", {"table": (images, self._size), "rows": (rows,)},
             {"table": address["sample"], "rows": address["owners"], "out": places["sample"]})  # fmt: skip
        for table, name in (("t", "timestep"), ("adapter_strength", "adapter_strength")):
            if name in places:
                part("look", {"table": (images, steps + 1), "owners": (rows,), "step": (images,)},
                     {"table": address[table], "owners": address["owners"], "step": address["step"],
                      "out": places[name]})  # fmt: skip
        cleared: set[str] = set()
        for at, (side, count) in enumerate(zip(sides, counts, strict=True)):
            graph = cast(TensorRtGraph, side.graph)
            own = self._side_inputs(graph, side, shapes, count)
            reads = {
                name: target(graph, name, shape, f"{name} {at}" if name in OWN else name) for name, shape in own.items()
            }
            for name, shape in own.items():
                if name not in OWN:
                    width = math.prod(shape[1:])
                    part("select", {"table": (rows, width), "rows": (count,)},
                         {"table": places[name], "rows": address[f"rows{at}"], "out": reads[name]})  # fmt: skip
            gives = self._network(graph, own, count, reads, work)
            for name, (place, shape) in gives.items():
                if name not in places:
                    continue
                size, width = denoiser.runner.size(name, shapes[name]), math.prod(shapes[name][1:])
                if name not in cleared:
                    cleared.add(name)
                    work.append(partial(device.clear, places[name], size))
                total = target(denoiser, name, shapes[name], f"{name} in all")
                part("spread", {"total": (rows, width), "own": (count, math.prod(shape[1:])), "map": (rows,)},
                     {"total": places[name], "own": place, "map": address[f"map{at}"], "out": total})  # fmt: skip
                work.append(partial(device.copy, places[name], total, size))
        gives = self._network(denoiser, shapes, rows, places, work)
        part("update", {
            "prediction": (rows, self._size), "sources": (rows, 2), "places": (rows,), "guidance": (images, steps, 2),
            "table": (images, steps, WINDOW + 1), "scale_in": (images, steps + 1), "step": (images,),
            "state": (images, WINDOW, self._size), "z": (images, self._size), "sample": (images, self._size),
        }, {name: address[name] for name in ("sources", "places", "guidance", "table", "scale_in", "step", "state", "z",
                                             "sample", "new_state", "new_sample", "new_step")}
            | {"prediction": gives["prediction"][0]})  # fmt: skip
        for name in ("state", "sample", "step"):
            work.append(partial(device.copy, address[name], address[f"new_{name}"], memory[name].size))

        def run() -> None:
            for one in work:
                one()

        return run

    def _network(
        self, graph: TensorRtGraph, shapes: Mapping[str, Shape], rows: int, reads: Mapping[str, int],
        work: list[Callable[[], None]],
    ) -> dict[str, tuple[int, Shape]]:  # fmt: skip
        """A network's call, in parts if its plan holds fewer rows; where its outputs lie, and their shapes."""
        runner, most = graph.runner, graph.most_rows()
        banks = {name: memory.address for name, memory in graph.banks.memory.items()}
        given: dict[str, tuple[int, Shape]] = {}
        call: Call | None = None
        for start in range(0, rows, most):
            count = min(most, rows - start)
            own = {name: (count, *shape[1:]) if shape[0] == rows else shape for name, shape in shapes.items()}
            call = call or Call(runner, own)  # all parts have the same rows
            for name, shape in call.outputs.items():
                whole = (rows, *shape[1:])
                given.setdefault(name, (graph.buffer(name, runner.size(name, whole)).address, whole))
            ends = {name: given[name][0] + start * runner.size(name, shape[1:]) for name, shape in call.outputs.items()}
            begins = {
                name: reads[name] + (start * runner.size(name, shape[1:]) if shapes[name][0] == rows else 0)
                for name, shape in own.items()
            }
            addresses = {**begins, **ends, **banks}
            work.append(partial(call.run, addresses))
        return given


def padded(rows: int, most: int) -> int:
    """Rows of the recorded step: a bucket, or whole calls of the network."""
    return min(bucket_of(rows), most) if rows <= most else -(-rows // most) * most


def _filled(values: NDArray[Any], length: int, value: int) -> NDArray[np.int64]:
    """With rows of `value` behind its own."""
    found = np.full((length, *values.shape[1:]), value, np.int64)
    found[: len(values)] = values
    return found
