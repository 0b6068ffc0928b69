"""The torch backend on CUDA: `TRITON_INTERPRET=0 pytest -m gpu tests/runtime`. Without a GPU, the bookkeeping of recordings."""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stepforge import Request, load
from stepforge.runtime.backends import StepTable, open_backend
from stepforge.runtime.backends.torch import backend
from stepforge.runtime.backends.torch import cuda as torch_cuda
from stepforge.runtime.backends.torch.cuda import Recorder
from stepforge.runtime.bundle import UNET, VAE_DECODER, read
from stepforge.runtime.plan.guiders import Guider

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    pytest.mark.usefixtures("compiled"),
]
# ‖ours − CPU in fp32‖ / ‖CPU in fp32‖ of one denoiser call. The CPU in bf16 has 0.018; fp16 has 8 times the precision.
LIMITS = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}
TIERS = pytest.mark.parametrize("name", ["torch", "torch-exact"])


def gpu(function):
    for mark in on_gpu:
        function = mark(function)
    return function


@pytest.fixture
def compiled():
    from stepforge.kernels.launch import interpreted

    if interpreted():
        pytest.skip("the interpreter is on: set TRITON_INTERPRET=0")


def denoiser_inputs(rows, height=16, width=24, banks=False):
    random = np.random.RandomState(rows)
    inputs = {
        "sample": random.standard_normal((rows, 4, height, width)).astype(np.float32),
        "timestep": np.linspace(999, 1, rows).astype(np.float32),
        "encoder_hidden_states": random.standard_normal((rows, 77, 32)).astype(np.float32),
    }
    if banks:
        inputs["adapter"] = np.arange(rows) % 3
        inputs["adapter_strength"] = np.linspace(-1, 1, rows).astype(np.float32).reshape(-1, 1, 1)
    return inputs


def filled(bundle, opened):
    """Banks of random numbers, in the type that the backend wants."""
    entry = bundle.components[UNET]
    random = np.random.RandomState(1)
    banks = {}
    for tensor in entry.inputs:
        if tensor.name.endswith((".lora_A", ".lora_B")):
            values = (0.1 * random.standard_normal(tensor.shape)).astype(np.float32)
            values[0] = 0
            values = (values.view(np.uint32) & 0xFFFF0000).view(
                np.float32
            )  # numbers of bf16: all precisions get the same
            is_bf16 = opened.bank_dtype(UNET) == np.uint16
            banks[tensor.name] = (values.view(np.uint32) >> 16).astype(np.uint16) if is_bf16 else values
    return banks


@gpu
@TIERS
@pytest.mark.parametrize("precision", list(LIMITS))
def test_a_denoiser_with_banks_agrees_with_the_cpu(tiny_sd1_banks, name, precision, monkeypatch):
    bundle, inputs = read(tiny_sd1_banks), denoiser_inputs(3, banks=True)
    opened = open_backend(name, bundle, precision=precision)
    found = np.array(opened.open(UNET, filled(bundle, opened))(inputs)["prediction"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = open_backend("torch-exact", bundle, precision="fp32")
    truth = cpu.open(UNET, filled(bundle, cpu))(inputs)["prediction"]
    assert np.linalg.norm(found - truth) <= LIMITS[precision] * np.linalg.norm(truth)


@gpu
@TIERS
def test_a_replay_gives_the_bits_of_the_eager_call(tiny_sd1_banks, name, monkeypatch):
    bundle = read(tiny_sd1_banks)
    opened = open_backend(name, bundle, precision="bf16")
    banks = filled(bundle, opened)
    recorded = opened.open(UNET, banks)
    monkeypatch.setattr(backend, "RECORDED", ())
    eager = opened.open(UNET, banks)
    for rows, height in ((2, 16), (3, 16), (2, 32), (2, 16)):
        inputs = denoiser_inputs(rows, height, banks=True)
        assert np.array_equal(np.array(recorded(inputs)["prediction"]), eager(inputs)["prediction"])


@gpu
@TIERS
def test_nothing_waits_for_the_device_while_a_network_runs(tiny_sd1_banks, name):
    bundle = read(tiny_sd1_banks)
    opened = open_backend(name, bundle, precision="bf16")
    graph = opened.open(UNET, filled(bundle, opened))
    inputs = denoiser_inputs(2, banks=True)
    graph(inputs)
    given = {key: torch.from_numpy(value).cuda() for key, value in inputs.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            graph.networks[True](given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_mixed_batch_and_back_again(tiny_sd1, tiny_sd1_banks, tmp_path, precision):
    """Adapter A, then B in its slot, then A: the first image's bits."""
    from safetensors.numpy import save_file

    random = np.random.RandomState(2)
    files = {}
    for letter in "abc":
        path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        pair = {f"{path}.lora_A.weight": (4, 32), f"{path}.lora_B.weight": (32, 4)}
        files[letter] = tmp_path / f"{letter}.safetensors"
        save_file({k: random.standard_normal(s).astype(np.float32) for k, s in pair.items()}, files[letter])
    with load(tiny_sd1_banks, backend="torch", precision=precision) as engine:
        for letter, file in files.items():
            engine.adapters.load(letter, file)
        ask = {"prompt": "a cat", "steps": 4, "guidance": 3.0}
        first = engine.generate(Request(**ask, adapters={"a": 0.8})).latents
        for letter in "bc":
            assert np.abs(engine.generate(Request(**ask, adapters={letter: 1.0})).latents - first).max() > 1e-2
        assert np.array_equal(engine.generate(Request(**ask, adapters={"a": 0.8})).latents, first)


@gpu
@TIERS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_steps_are_those_of_the_host(tiny_sd1_banks, name, precision, monkeypatch):
    """Guidance and update on the device against NumPy's, images joining and leaving. bf16: differences of one rounding grow
    with the network's own error, so its limit is a call's."""
    requests = [
        Request(prompt="a cat", steps=4, guidance=3.0, sampler="dpmpp_2m"),
        Request(prompt="a dog", steps=3, guidance=1.0, sampler="euler_a", seed=1),
        Request(prompt="a cat", steps=6, guidance="5@0-0.5,1@0.5-1", sampler="unipc", seed=2),
    ]
    found = []
    for _ in range(2):
        with load(tiny_sd1_banks, backend=name, precision=precision) as engine:
            found.append([result.latents for result in engine.generate(requests)])
        monkeypatch.setattr("stepforge.runtime.engine.denoise.can_run_on_device", lambda plan, rings, all_plans: False)
    for a, b in zip(*found, strict=True):
        assert np.linalg.norm(a - b) <= LIMITS[precision] * np.linalg.norm(b)


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_guiders_and_reuse_in_a_recorded_step_are_those_of_the_host(tiny_sd1_control_bundle, precision, monkeypatch):
    """In one batch, with what is kept on the device; the mean of two rows where guidance ends."""
    ask = {"prompt": "a cat", "width": 32, "height": 32, "sampler": "ddim"}
    requests = [
        Request(**ask, steps=8, guidance=3.0, reuse="deepcache(3)"),
        Request(**ask, steps=8, guidance="5@0-0.5,1@0.5-1", reuse="tgate(0.4)", seed=1),
        Request(
            **ask, steps=5, guidance=6.0, guider="apg(momentum=-0.5, norm=3)+rescale(0.5)+dynamic(p=0.8, max=2)", seed=2
        ),
        Request(**ask, steps=5, guidance=6.0, guider="zero_star(zero=2)", reuse="deepcache(2)", seed=3),
    ]
    found = []
    for _ in range(2):
        with load(tiny_sd1_control_bundle, backend="torch", precision=precision) as engine:
            found.append([result.latents for result in engine.generate(requests)])
        monkeypatch.setattr("stepforge.runtime.engine.denoise.can_run_on_device", lambda plan, rings, all_plans: False)
    for a, b in zip(*found, strict=True):
        assert np.linalg.norm(a - b) <= LIMITS[precision] * np.linalg.norm(b)


@gpu
@TIERS
def test_a_whole_step_waits_for_nothing(tiny_sd1_banks, name):
    bundle = read(tiny_sd1_banks)
    opened = open_backend(name, bundle, precision="bf16")
    loop = opened.open(UNET, filled(bundle, opened)).loop((4, 16, 16))
    steps = StepTable(
        np.linspace(999, 1, 9, dtype=np.float32), np.ones(10, np.float32), np.tile(np.float32([3, -2]), (9, 1)),
        np.full((9, 9), 0.1, np.float32), np.ones(9, np.float32), Guider(), np.zeros((9, 2)),
    )  # fmt: skip
    loop.put(0, np.ones((8, 4 * 16 * 16), np.float32), steps)
    told = (np.int32([0]), np.int32([[0, 1]]), np.int32([0, 0]))
    inputs = {"encoder_hidden_states": np.ones((2, 77, 32), np.float32), "adapter": np.array([1, 1])}
    noise = {0: np.ones(4 * 16 * 16, np.float32)}
    loop.step(*told, inputs, noise)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.step(*told, inputs, noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(loop.get(0)).all()


# the bookkeeping, on a pretended device whose graphs compute what was recorded again


class Doubling:
    """A network of one operator, which counts its calls on the device; `tape` is the recording in progress."""

    tape = None

    def __init__(self):
        self.bank, self.calls = torch.zeros(1), torch.zeros(1)

    def __call__(self, values):
        y = values["x"] * 2 + self.bank
        if Doubling.tape is None:
            self.calls += 1
        else:  # recorded, not run
            Doubling.tape.append((self, values, y))
        return {"y": y}


class PretendedGraph:
    made = 0

    def __init__(self):
        PretendedGraph.made += 1
        self.tape = []

    def replay(self):
        for network, values, y in self.tape:
            y.copy_(values["x"] * 2 + network.bank)
            network.calls += 1


class PretendedCuda:
    CUDAGraph = PretendedGraph

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            pass

        def synchronize(self):
            pass

        def record_event(self):
            PretendedCuda.events.append(PretendedCuda.Event())
            return PretendedCuda.events[-1]

    class Event:
        is_done = False

        def synchronize(self):
            self.is_done = True

    events: ClassVar[list] = []
    current_stream = Stream

    def stream(self, stream):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph, *, pool, capture_error_mode):
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        Doubling.tape = graph.tape
        yield
        Doubling.tape = None


@pytest.fixture
def pretended(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "cuda", PretendedCuda())
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch_cuda, "MOST_SHAPES", 2)
    monkeypatch.setattr(PretendedGraph, "made", 0)
    monkeypatch.setattr(PretendedCuda, "events", [])


def recorder(network, pool="pool"):
    return Recorder(network, device=torch.device("cpu"), pool=pool, changes=[network.calls])


def test_a_graph_with_a_stream_opens_and_runs_on_it(monkeypatch):
    """Weights that go to the device on another stream might not be there when this one reads them."""
    on, seen = [], []

    @contextlib.contextmanager
    def stream(own):
        on.append(own)
        yield
        on.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(backend, "prepared", lambda networks, inputs: (0, inputs))

    def opened(**form):
        seen.append(("opened", *on))
        return (SimpleNamespace(once=None, once_inputs=()),)

    def caller(network, once):
        return lambda inputs: seen.append(("run", *on))

    entry = SimpleNamespace(inputs=(), outputs=())
    graph = backend.TorchGraph(
        opened, torch.device("cpu"), exact=False, caller=caller, component=VAE_DECODER, entry=entry, stream="own"
    )
    graph({"latents": np.zeros(1, np.float32)})
    assert seen == [("opened", "own"), ("run", "own")]


def test_one_recording_for_each_shape(pretended):
    network = Doubling()
    recorded = recorder(network)

    def call(value, size):
        return recorded({"x": np.full(size, value, np.float32)})["y"].tolist()

    assert call(1, 2) == [2, 2]
    assert call(3, 2) == [6, 6]  # new numbers in the same buffers
    assert PretendedGraph.made == 1
    network.bank.fill_(1)
    assert call(3, 2) == [7, 7]
    assert call(1, 1) == [3]
    assert PretendedGraph.made == 2
    call(0, 2)
    call(0, 3)  # a third: the least recently used goes, which is the one of size 1
    assert PretendedGraph.made == 3
    assert call(2, 2) == [5, 5]
    assert PretendedGraph.made == 3
    assert call(2, 1) == [5]
    assert PretendedGraph.made == 4
    assert network.calls == 8  # what the calls before a recording changed is taken back


def test_rows_are_padded_to_buckets(pretended):
    """Five rows and six share a recording; what the sixth left is gone before five run again, and nobody sees its result."""
    network = Doubling()
    recorded = recorder(network)
    six = np.arange(6, dtype=np.float32) + 1
    assert recorded({"x": six.copy()})["y"].tolist() == [2, 4, 6, 8, 10, 12]  # the pretended device keeps its array
    five = np.full(5, np.nan, np.float32)
    assert np.isnan(recorded({"x": five})["y"]).all()
    assert recorded({"x": six[:5]})["y"].tolist() == [2, 4, 6, 8, 10]
    (recording,) = recorded._recordings.values()
    assert recording.buffers["x"].tolist() == [1, 2, 3, 4, 5, 0]
    recorded.start({"x": six[:3]}, ["x"], {"x": (6, 9)})
    assert recording.buffers["x"].tolist() == [1, 2, 3, 9, 9, 9]
    assert PretendedGraph.made == 1
    assert [Recorder.bucket(rows) for rows in (1, 2, 3, 5, 7, 9, 13, 16, 17, 24, 25)] == [
        1, 2, 4, 6, 8, 12, 16, 16, 24, 24, 32,
    ]  # fmt: skip


def test_steady_inputs_are_copied_once(pretended):
    network = Doubling()
    recorded = recorder(network)
    x, same = np.ones(2, np.float32), np.ones(2, np.float32)
    recorded.start({"x": x}, ["x"], {})
    buffer = recorded._recordings[next(iter(recorded._recordings))].buffers["x"]
    buffer.fill_(5)
    recorded.start({"x": x}, ["x"], {})
    assert buffer.tolist() == [5, 5]
    recorded.start({"x": same}, ["x"], {})
    assert buffer.tolist() == [1, 1]
    buffer.fill_(5)
    recorded.start({"x": same}, [], {})
    assert buffer.tolist() == [1, 1]


def test_the_host_is_two_calls_ahead_at_most(pretended):
    recorded = recorder(Doubling())
    for _ in range(4):
        recorded.start({"x": np.ones(2, np.float32)}, ["x"], {})
    assert [event.is_done for event in PretendedCuda.events] == [True, True, False, False]


def test_without_recording_it_just_runs(pretended):
    assert recorder(Doubling(), pool=None)({"x": np.ones(2, np.float32)})["y"].tolist() == [2, 2]
    assert PretendedGraph.made == 0


class PooledGraph:
    """Records operators and runs them again. All recordings share a pool: one that replays may overwrite what the others
    have there, which is everything but tensors that were there before the recording."""

    every: ClassVar[list] = []

    def __init__(self):
        self.tape, self.own = [], []
        PooledGraph.every.append(self)

    @contextlib.contextmanager
    def record(self):
        tape, before, made = self.tape, set(), set()

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
                before.update({value.untyped_storage().data_ptr() for value in given} - made)
                out = function(*args, **(kwargs or {}))
                made.update({value.untyped_storage().data_ptr() for value in tree_leaves(out)} - before)
                tape.append((function, args, kwargs or {}, out))
                return out

        with Mode():
            yield
        outs = [value for *_, out in tape for value in tree_leaves(out)]
        self.own = [value for value in outs if value.untyped_storage().data_ptr() in made]

    def replay(self):
        for other in PooledGraph.every:
            if other is not self:
                for value in other.own:
                    value.fill_(torch.nan)
        for function, args, kwargs, out in self.tape:
            again = function(*args, **kwargs)
            if again is not out:
                out.copy_(again)


@pytest.fixture
def dispatch():
    """Dispatch modes import this at first use, which must not meet the pretended device."""
    importlib.import_module("torch._dynamo")


def test_what_is_kept_of_prompts_survives_other_recordings(dispatch, pretended, monkeypatch):
    """Two shapes in turn, each with a product that is made once: it must not lie where the other recording computes."""
    monkeypatch.setattr(PooledGraph, "every", [])
    monkeypatch.setattr(PretendedCuda, "CUDAGraph", PooledGraph)
    monkeypatch.setattr(PretendedCuda, "graph", lambda self, graph, *, pool, capture_error_mode: graph.record())
    state, made = torch.zeros(()), []

    def once(given):
        made.append(len(given["c"]))
        return {"k": given["c"] * 3}

    def step(given):
        state.copy_((given["x"] + given["k"]).sum())
        return {}

    recorder = Recorder(step, device=torch.device("cpu"), pool="pool", changes=[state], once=(once, ("c",)))
    calls = [{name: np.full(rows, rows + at, np.float32) for at, name in enumerate("xc")} for rows in (2, 4)]
    for given in (*calls, *calls, calls[0] | {"c": np.ones(2, np.float32)}):
        recorder.start(given, tuple(given), {})
        assert float(state) == float((given["x"] + 3 * given["c"]).sum())
