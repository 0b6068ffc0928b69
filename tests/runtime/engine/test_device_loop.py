"""Whole steps in the backend against the same steps on the host; places, and recordings on a pretended device."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
import torch
import torch._dynamo  # custom operators import it when they first run, which the pretended device would not stand
from safetensors.numpy import save_file

from stepforge import Request, load
from stepforge.runtime.backends import open_backend
from stepforge.runtime.backends.torch import backend as torch_backend
from stepforge.runtime.backends.torch import cuda as torch_cuda
from stepforge.runtime.backends.torch import loop as torch_loop
from stepforge.runtime.bundle import read
from stepforge.runtime.engine import Engine
from stepforge.runtime.engine.device_loop import step_table
from stepforge.runtime.engine.jobs.future import RequestFuture
from stepforge.runtime.errors import Cancelled, GenerationError
from stepforge.runtime.request import Control

ASK = {"prompt": "a cat", "steps": 4, "guidance": 3.0, "width": 32, "height": 32}
TIERS = pytest.mark.parametrize("backend", ["torch", pytest.param("torch-exact", marks=pytest.mark.slow)])
# fp32 sums in another order: 16 roundings of 6e-8 a step
CLOSE = 1e-5


def close(a, b):
    return np.linalg.norm(a - b) <= CLOSE * np.linalg.norm(b)


def on_host(monkeypatch):
    """Engines made after this run no loops."""
    monkeypatch.setattr("stepforge.runtime.engine.denoise.can_run_on_device", lambda plan, rings, shared: False)


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


VARIED = [
    Request(**ASK, sampler="ddim", seed=1),
    Request(**{**ASK, "guidance": 1.0}, sampler="euler_a", seed=2),
    Request(**{**ASK, "guidance": "7.5@0-0.5,1@0.5-1", "steps": 6}, sampler="dpmpp_3m", seed=3, negative="dog"),
    Request(**{**ASK, "guidance": [0.0, 2.0, 1.0, 4.0], "width": 48}, sampler="unipc", seed=4),
    Request(**ASK, sampler="heun", seed=5),
    Request(**{**ASK, "steps": 6}, sampler="lms", seed=6),
]


@pytest.fixture(scope="module")
def host(tiny_sd1_bundle):
    """Results of `VARIED`, each alone, without a loop."""
    with pytest.MonkeyPatch.context() as patch:
        on_host(patch)
        with load(tiny_sd1_bundle, backend="torch-exact", precision="fp32") as engine:
            return [engine.generate(request) for request in VARIED]


@TIERS
def test_a_loop_draws_what_the_host_draws(tiny_sd1_bundle, backend, host, counted):
    """Every window length, guidance by step, fresh noise, two sizes, in one batch."""
    with load(tiny_sd1_bundle, backend=backend, precision="fp32") as engine:
        results = engine.generate(VARIED)
    assert {entry[0] for entry in counted} == {"put", "step", "get"}
    for a, b in zip(results, host, strict=True):
        assert close(a.latents, b.latents), a.request
        assert a.stats.rows["unet"] == b.stats.rows["unet"] == a.plan.rows


def adapter(path, seed=2):
    """A file for a layer that reads the image, and for one that reads the prompt."""
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
    layers = {"attn1.to_q": 32, "attn2.to_k": 32}
    random = np.random.RandomState(seed)
    sizes = {
        f"{block}.{layer}.lora_{letter}.weight": size
        for layer, width in layers.items()
        for letter, size in {"A": (4, width), "B": (width, 4)}.items()
    }
    save_file({name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}, path)
    return path


@pytest.mark.slow
def test_adapters_by_step(tiny_sd1_banks, tmp_path, monkeypatch):
    adapter(tmp_path / "a.safetensors")
    requests = [
        Request(**ASK, sampler="ddim", adapters={"a": 0.7}, adapter_schedule=[0.0, 1.0, 0.5, -1.0]),
        Request(**ASK),
        Request(**ASK, adapters={"a": 1.5}),
    ]
    found = []
    for _ in range(2):
        with load(tiny_sd1_banks, backend="torch", precision="fp32") as engine:
            engine.adapters.load("a", tmp_path / "a.safetensors")
            found.append([result.latents for result in engine.generate(requests)])
        on_host(monkeypatch)
    assert all(close(a, b) for a, b in zip(*found, strict=True))
    assert not close(found[0][0], found[0][1])


def hint(seed):
    return np.random.RandomState(seed).randint(0, 256, (64, 64, 3), np.uint8)


def test_controlnets_in_a_loop(tiny_sd1_control_bundle, monkeypatch, counted):
    """Rows of one batch on one net, on two, on none, on the conditional row only, and on one net twice; by step."""
    nets = sorted(read(tiny_sd1_control_bundle).controls)
    first, last = nets[0], nets[-1]
    requests = [
        Request(**ASK, controls=(Control(name=first, image=hint(1)),)),
        Request(**ASK, controls=(Control(name=first, image=hint(2), scale=0.5), Control(name=last, image=hint(3)))),
        Request(**ASK, seed=3),
        Request(**ASK, controls=(Control(name=last, image=hint(4), guess_mode=True),)),
        Request(**ASK, controls=tuple(Control(name=first, image=hint(5 + i), start=i / 2) for i in range(2))),
    ]
    found = []
    for _ in range(2):
        with load(tiny_sd1_control_bundle, backend="torch", precision="fp32", max_rows=10) as engine:
            found.append(engine.generate(requests))
        on_host(monkeypatch)
    assert max(entry[2] for entry in counted if entry[0] == "step") == 10
    for a, b in zip(*found, strict=True):
        assert close(a.latents, b.latents), a.request
        assert a.stats.rows == b.stats.rows
    plain = found[0][2].latents
    assert not any(close(found[0][i].latents, plain) for i in (0, 1, 3, 4))


REUSING = [
    Request(**{**ASK, "steps": 8}, sampler="ddim", reuse="deepcache(3)", seed=1),
    Request(**{**ASK, "steps": 8, "guidance": "5@0-0.5,1@0.5-1"}, sampler="dpmpp_2m", reuse="tgate(0.4)", seed=2),
    Request(
        **{**ASK, "steps": 9, "guidance": "5@0-0.3,1@0.3-1"}, sampler="euler_a", reuse="deepcache(2)+tgate(0.5)", seed=3
    ),
    Request(**{**ASK, "steps": 7}, seed=4),
    Request(**{**ASK, "steps": 6, "guidance": 1.0}, reuse="tgate(0.5)", seed=5),
]


@pytest.fixture(scope="module")
def reusing(tiny_sd1_control_bundle):
    """Results of `REUSING` in one batch, without a loop."""
    with pytest.MonkeyPatch.context() as patch:
        on_host(patch)
        with load(tiny_sd1_control_bundle, backend="torch-exact", precision="fp32") as engine:
            return engine.generate(REUSING)


@TIERS
def test_what_is_kept_stays_in_the_loop(tiny_sd1_control_bundle, backend, reusing, counted, monkeypatch):
    """DeepCache, T-GATE, both, the mean of two rows where guidance ends, and none, in one batch; room for them grows."""
    with load(tiny_sd1_control_bundle, backend=backend, precision="fp32") as engine:
        results = engine.generate(REUSING)
    assert sum(entry[0] == "put" for entry in counted) == len(REUSING)
    for a, b in zip(results, reusing, strict=True):
        assert close(a.latents, b.latents), a.request
        assert a.stats.rows == b.stats.rows


def test_sdxl(tiny_sdxl_bundle, monkeypatch):
    request = Request(prompt="cat", steps=3)
    latents = []
    for _ in range(2):
        with load(tiny_sdxl_bundle, backend="torch", precision="fp32") as engine:
            latents.append(engine.generate(request).latents)
        on_host(monkeypatch)
    assert close(*latents)


def test_what_crosses(tiny_sd1_bundle, counted):
    """An image goes there once and comes back once; between, only the noise that a step wants."""
    with load(tiny_sd1_bundle, backend="torch", precision="fp32") as engine:
        engine.generate(Request(**ASK, sampler="ddim"))
        engine.generate(Request(**ASK, sampler="euler_a"))
    step, noisy = ("step", (0,), 2, ()), ("step", (0,), 2, (0,))
    whole = [("put", 0), step, step, step, step, ("get", 0)]
    assert counted == [*whole, ("put", 0), noisy, noisy, noisy, step, ("get", 0)]


def test_progress_is_that_of_the_host(tiny_sd1_bundle, monkeypatch):
    seen = []
    for _ in range(2):
        steps = []
        with load(tiny_sd1_bundle, backend="torch", precision="fp32") as engine:
            ask = Request(**ASK, sampler="dpmpp_2m")
            engine.generate(ask, on_step=lambda p, steps=steps: steps.append((p.step, p.latents(), p.denoised())))
        seen.append(steps)
        on_host(monkeypatch)
    for (k, x, x0), (host_k, host_x, host_x0) in zip(*seen, strict=True):
        assert k == host_k
        assert close(x, host_x)
        assert close(x0, host_x0)


@pytest.mark.slow
def test_more_images_and_more_steps_than_there_was_room_for(tiny_sd1_bundle, monkeypatch):
    """Places and steps grow while images are under way, and those keep what they have."""
    requests = [Request(**{**ASK, "steps": 2}, images=3, seed=1), Request(**ASK, seed=7)]
    found = []
    monkeypatch.setattr(torch_loop, "PLACES", 1)
    monkeypatch.setattr(torch_loop, "STEPS", 1)
    for _ in range(2):
        with load(tiny_sd1_bundle, backend="torch", precision="fp32", max_rows=6) as engine:
            found.append([result.latents for result in engine.generate(requests)])
        on_host(monkeypatch)
    for a, b in zip(*found, strict=True):
        assert close(a, b)


def test_ended_images_give_their_places_back(tiny_sd1_bundle, counted):
    with load(tiny_sd1_bundle, backend="torch", precision="fp32") as engine:
        started, release = threading.Event(), threading.Event()

        def hold(progress):
            started.set()
            release.wait(10)

        first = engine.submit(Request(**{**ASK, "steps": 50}), on_step=hold)
        assert started.wait(30)
        assert first.cancel()
        release.set()
        engine.generate([Request(**ASK), Request(**ASK, seed=3)])
        engine.generate(Request(**ASK))
    assert {place for kind, place, *_ in counted if kind == "put"} == {0, 1}


def test_a_failing_call_is_retried_and_draws_its_noise_once(tiny_sd1_bundle, monkeypatch):
    request = [Request(**ASK, sampler="euler_a", seed=seed) for seed in (1, 2)]
    with load(tiny_sd1_bundle, backend="torch", precision="fp32") as engine:
        whole = [result.latents for result in engine.generate(request)]
    inner = torch_loop.TorchLoop.step

    def picky(self, places, *rest):
        if len(places) > 1:
            raise MemoryError("no room")
        inner(self, places, *rest)

    monkeypatch.setattr(torch_loop.TorchLoop, "step", picky)
    with load(tiny_sd1_bundle, backend="torch", precision="fp32") as engine:
        retried = [result.latents for result in engine.generate(request)]
    assert all(close(a, b) for a, b in zip(whole, retried, strict=True))


def test_a_nan_harms_only_its_request(tiny_sd1_bundle, monkeypatch):
    good = Request(**{**ASK, "guidance": 1.0}, seed=3)
    with load(tiny_sd1_bundle, backend="torch", precision="fp32") as engine:
        alone = engine.generate(good).latents
        encode = engine._worker.conditioner.__call__

        def poisoned(prompt, *rest):
            cond, uncond = encode(prompt, *rest)
            if prompt == "bad":
                cond.context[:] = np.nan
            return cond, uncond

        monkeypatch.setattr(type(engine._worker.conditioner), "__call__", lambda self, *given: poisoned(*given))
        futures = [engine.submit(Request(**{**ASK, "prompt": "bad", "guidance": 1.0})), engine.submit(good)]
        with pytest.raises(GenerationError, match="not finite"):
            futures[0].result()
        assert close(futures[1].result().latents, alone)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"guider": "cfg"}, True),
        ({"guider": "cfg+rescale(0.7)"}, False),
        ({"guider": "cfg+adaptive"}, False),
        ({"controls": 1.0}, True),
        ({"reuse": "deepcache(2)"}, True),
    ],
)
def test_which_requests_run_there(tiny_sd1_control_bundle, counted, values, expected):
    values = dict(values)
    if (scale := values.pop("controls", None)) is not None:
        hint = np.zeros((64, 64, 3), np.uint8)
        values["controls"] = (Control(name="a", image=hint, scale=scale),)
    with load(tiny_sd1_control_bundle, backend="torch", precision="fp32") as engine:
        engine.generate(Request(**{**ASK, "steps": 6}, **values))
    assert bool(counted) == expected


def test_closing_leaves_nothing_waiting(tiny_sd1_bundle):
    engine = load(tiny_sd1_bundle, backend="torch", precision="fp32")
    slow = engine.submit(Request(**{**ASK, "steps": 900}))
    engine.close()
    with pytest.raises(Cancelled):
        slow.result()


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
    recording = None

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
                if cuda.recording is None:
                    return function(given)
                before = [tensor.clone() for tensor in options.get("changes", ())]
                results = function(given)
                for tensor, value in zip(options.get("changes", ()), before, strict=True):
                    tensor.copy_(value)
                results = {name: value.clone() for name, value in results.items()}
                cuda.recording.calls.append((function, given, results))
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
        cuda.recording = recording
        yield
        cuda.recording = None

    cuda.graph, cuda.stream = graph, lambda stream: contextlib.nullcontext()
    cuda.is_available = lambda: False
    empty = torch.empty
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch_backend, "OnCpu", Taped)
    return made


@pytest.mark.slow
def test_recordings_hold_whole_steps(tiny_sd1_bundle, host, recorded):
    """Images join and leave, rows come and go: one recording a packed shape, and the host's latents."""
    with load(tiny_sd1_bundle, backend="torch", precision="fp32") as engine:
        results = engine.generate(VARIED)
        made = recorded.count("step")
        again = engine.generate(VARIED[:2])
    assert 0 < made < sum(result.stats.calls for result in results)
    for a, b in zip([*results, *again], [*host, *host[:2]], strict=True):
        assert close(a.latents, b.latents)


@pytest.mark.slow
def test_recordings_keep_activations(tiny_sd1_control_bundle, reusing, recorded):
    """One recording a variant and packed shape; room that grows voids those before."""
    with load(tiny_sd1_control_bundle, backend="torch", precision="fp32") as engine:
        results = [*engine.generate(REUSING[:2]), *engine.generate(REUSING[2:])]
    assert 0 < recorded.count("step") < sum(result.stats.calls for result in results)
    for a, b in zip(results, reusing, strict=True):
        assert close(a.latents, b.latents)


def test_what_adapters_make_of_prompts_is_made_when_they_change(tiny_sd1_banks, tmp_path, recorded, monkeypatch):
    """Once for a request, once where a schedule changes the strength, once for the next request, once for another adapter in the
    slot; on the host in every call."""
    ask = {**ASK, "sampler": "ddim", "adapters": {"a": 0.7}}
    steady = Request(**ask)
    requests = [steady, steady, Request(**ask, adapter_schedule=[1.0, 1.0, 0.5, 0.5]), steady, steady]
    found, counts = [], []
    for _ in range(2):
        with load(tiny_sd1_banks, backend="torch", precision="fp32") as engine:
            engine.adapters.load("a", adapter(tmp_path / "a.safetensors"))
            for at, request in enumerate(requests):
                if at == 4:
                    engine.adapters.unload("a")
                    engine.adapters.load("a", adapter(tmp_path / "b.safetensors", 3))
                recorded.clear()
                found.append(engine.generate(request).latents)
                counts.append(recorded.count("once"))
        on_host(monkeypatch)
    assert counts == [1, 0, 1, 1, 1, *[4] * 5]
    assert all(close(a, b) for a, b in zip(found[:5], found[5:], strict=True))
    assert not close(found[3], found[4])


def test_a_plan_is_told_in_full(tiny_sd1_bundle):
    """`step_table` against the plan, entry by entry."""
    from stepforge.runtime.engine.starts import from_noise
    from stepforge.runtime.engine.state import Job, Leg
    from stepforge.runtime.engine.trajectory import Trajectory
    from stepforge.runtime.plan.compile import compile_plan

    bundle = read(tiny_sd1_bundle)
    request = Request(**{**ASK, "guidance": [0.0, 2.5, 1.0, 4.0]}, sampler="dpmpp_2m_sde")
    with Engine(bundle, open_backend("fake", bundle)) as engine:
        plan = compile_plan(request, engine.scheduler_card)
    leg = Leg(plan, bundle.card.size(request.width, request.height))
    job = Job(request, [leg], RequestFuture(lambda: None))
    told = step_table(Trajectory(job, 0, leg, from_noise(leg, (4, 8, 8), request.seed), (3, 5)))
    steps = plan.steps
    assert told.t.tolist() == [np.float32(step.t) for step in steps]
    assert told.scale_in[:-1].tolist() == [np.float32(step.scale_in) for step in steps]
    assert told.guidance.tolist() == [[0, 1], [2.5, -1.5], [1, 0], [4, -3]]
    for k, step in enumerate(steps):
        assert told.table[k, -1] == np.float32(step.noise)
        for i, keep in enumerate(step.keep):
            assert told.table[k, (k - i) % 3] == np.float32(keep)
        for j, gain in enumerate(step.gain):
            assert told.table[k, 3 + (k - j) % 5] == np.float32(gain)
