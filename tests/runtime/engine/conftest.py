"""Whole steps in the torch backend: what crosses between host and device, and recordings on a pretended device."""

from __future__ import annotations

import contextlib
import contextvars

import pytest
import torch
import torch._dynamo  # custom operators import it when they first run, which the pretended device would not stand

from stepforge.runtime.backends.torch import backend as torch_backend
from stepforge.runtime.backends.torch import cuda as torch_cuda
from stepforge.runtime.backends.torch import loop as torch_loop


@pytest.fixture(scope="session")
def on_host():
    """Called with a MonkeyPatch, engines that are made afterwards run no loops."""
    where = "stepforge.runtime.engine.denoise.can_run_on_device"
    return lambda patch: patch.setattr(where, lambda plan, rings, all_plans: False)


class Counted(torch_loop.TorchLoop):
    """Says what crosses between host and device."""

    log: list = []  # noqa: RUF012, the tests empty it

    def put(self, place, state, steps):
        self.log.append(("put", place))
        super().put(place, state, steps)

    def step(self, places, sources, owners, inputs, noise, sides=(), call=None):
        self.log.append(("step", tuple(places), len(owners), tuple(sorted(noise))))
        super().step(places, sources, owners, inputs, noise, sides, call)

    def get(self, place):
        self.log.append(("get", place))
        return super().get(place)


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(torch_backend, "TorchLoop", Counted)
    Counted.log.clear()
    return Counted.log


# recordings on a pretended device: a replay computes again what was recorded, from the recording's buffers


class Replayed:
    """Calls that were made while it recorded."""

    def __init__(self):
        self.calls = []

    def replay(self):
        for function, given, results in self.calls:
            for name, value in function(given).items():
                results[name].copy_(value)


class PretendedCuda:
    """Recording computes too, so what it changed is put back: on a real device nothing runs."""

    CUDAGraph = Replayed

    def __init__(self):
        self.recording = contextvars.ContextVar("recording", default=None)  # pictures are decoded in another thread

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

        def synchronize(self):
            pass

        def record_event(self):
            return self

    current_stream = Stream


@pytest.fixture
def recorded(monkeypatch):
    """The torch backend on a pretended CUDA device, in which all is recorded; gives the names of what was."""
    cuda, made = PretendedCuda(), []

    class Taped(torch_cuda.Recorder):
        def __init__(self, function, **options):
            def taped(given):
                if (recording := cuda.recording.get()) is None:
                    return function(given)
                before = [tensor.clone() for tensor in options.get("changes", ())]
                results = function(given)
                for tensor, value in zip(options.get("changes", ()), before, strict=True):
                    tensor.copy_(value)
                results = {name: value.clone() for name, value in results.items()}
                recording.calls.append((function, given, results))
                made.append(getattr(function, "__name__", "network"))
                return results

            super().__init__(taped, device=torch.device("cpu"), pool="pool", **options)

        def _make(self, inputs):
            recording = super()._make(inputs)
            if recording.once is not None:

                def once(given):
                    made.append("once")
                    return self._once(given)

                recording.once.calls.append((once, recording.buffers, recording.kept))
            return recording

    @contextlib.contextmanager
    def graph(recording, *, pool, capture_error_mode):
        before = cuda.recording.set(recording)
        yield
        cuda.recording.reset(before)

    cuda.graph, cuda.stream = graph, lambda stream: contextlib.nullcontext()
    cuda.is_available = lambda: False
    empty = torch.empty
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch_backend, "OnCpu", Taped)
    return made
