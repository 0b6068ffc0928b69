"""Whole steps in the backend against the same steps on the host; places, and recordings on a pretended device."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from stepforge import Request, load
from stepforge.runtime.backends import open_backend
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


VARIED = [
    Request(**ASK, sampler="ddim", seed=1),
    Request(**{**ASK, "guidance": 1.0}, sampler="euler_a", seed=2),
    Request(**{**ASK, "guidance": "7.5@0-0.5,1@0.5-1", "steps": 6}, sampler="dpmpp_3m", seed=3, negative="dog"),
    Request(**{**ASK, "guidance": [0.0, 2.0, 1.0, 4.0], "width": 48}, sampler="unipc", seed=4),
    Request(**ASK, sampler="heun", seed=5),
    Request(**{**ASK, "steps": 6}, sampler="lms", seed=6),
]


@pytest.fixture(scope="module")
def host(tiny_sd1_bundle, on_host):
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


def hint(seed):
    return np.random.RandomState(seed).randint(0, 256, (64, 64, 3), np.uint8)


def test_controlnets_in_a_loop(tiny_sd1_control_bundle, monkeypatch, counted, on_host):
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


def test_sdxl(tiny_sdxl_bundle, monkeypatch, on_host):
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


def test_progress_is_that_of_the_host(tiny_sd1_bundle, monkeypatch, on_host):
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
def test_more_images_and_more_steps_than_there_was_room_for(tiny_sd1_bundle, monkeypatch, on_host):
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
        ({"guider": "apg+rescale(0.7)"}, True),
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
