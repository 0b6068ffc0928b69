"""The engine on the fake backend: batching, guidance, cancellation, isolation. No weights, no engine library."""

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest

from stepforge import Cancelled, Engine, GenerationError, Request, RequestError, load
from stepforge.runtime.backends.fake import Fake, fake_bundle
from stepforge.runtime.bundle import Size
from stepforge.runtime.engine.jobs.future import RequestFuture
from stepforge.runtime.engine.starts import from_noise
from stepforge.runtime.engine.state import Job, Leg
from stepforge.runtime.engine.trajectory import Trajectory
from stepforge.runtime.plan.compile import compile_plan

SIZE = 64
MIXED = [
    Request(prompt="a", sampler="ddim", steps=7, guidance=3.0, seed=1),
    Request(prompt="b", sampler="euler_a", steps=5, guidance=1.0, seed=2),
    Request(prompt="c", sampler="dpmpp_2m", steps=9, guidance=7.5, seed=3, negative="bad"),
    Request(prompt="d", sampler="unipc", steps=6, guidance=[4.0, 4.0, 4.0, 1.0, 1.0, 0.0], seed=4),
    Request(prompt="e", sampler="heun", steps=4, guidance=2.0, seed=5, images=2),
    Request(prompt="f", sampler="pndm", steps=8, guidance=0.0, seed=6),
    Request(prompt="g", sampler="dpmpp_2m_sde", steps=6, schedule="karras", seed=7),
]


@pytest.fixture
def engine():
    with Engine(fake_bundle(SIZE), Fake(fake_bundle(SIZE))) as engine:
        yield engine


class Recorder:
    """The fake backend, noting the rows of every denoiser call, and failing where told to."""

    name, precision = "fake", "fp32"

    def __init__(self, poison=None):
        self.versions = {}
        self.inner = Fake(fake_bundle(SIZE))
        self.calls, self.poison = [], poison

    def bank_dtype(self, component):
        return np.float32

    def open(self, component, banks=None):
        graph = self.inner.open(component)
        if component.role != "denoiser":
            return graph

        def run(inputs):
            self.calls.append(len(inputs["sample"]))
            outputs = graph(inputs)
            return self.poison(inputs, outputs) if self.poison else outputs

        return run


def test_one_request_is_no_list_and_a_mapping_is_one_request(engine):
    """Neither the letters of a prompt nor the keys of a mapping are drawn."""
    job = {"prompt": "x", "steps": 1, "width": SIZE, "height": SIZE}
    assert engine.generate(job).request == Request(**job)
    assert [result.request.prompt for result in engine.generate([job, Request(**job)])] == ["x", "x"]
    for wrong in ("a cat", job, Request(**job), 3):
        with pytest.raises(RequestError, match="a list of requests is needed"):
            engine.stream(wrong)
    with pytest.raises(RequestError, match="on_step is 3"):
        engine.submit(job, on_step=3)


def test_streams_keep_nothing_of_what_was_yielded(engine):
    """A hundred thousand prompts hold the pictures of those on their way."""
    asked = [Request(prompt=str(index), steps=1, width=SIZE, height=SIZE) for index in range(5)]
    seen = []

    def held(outcome) -> int:
        """Images of earlier outcomes that are still in memory."""
        gc.collect()
        count = sum(reference() is not None for reference in seen)
        seen.append(weakref.ref(outcome.result.images[0]))
        return count

    async def astream():
        return [held(outcome) async for outcome in engine.astream(asked)]

    assert max(held(outcome) for outcome in engine.stream(asked)) == 0
    seen.clear()
    assert max(asyncio.run(astream())) == 0


def test_batch_mates_do_not_change_an_image(engine):
    alone = [engine.generate(request) for request in MIXED]
    together = engine.generate(MIXED)
    for request, a, b in zip(MIXED, alone, together, strict=True):
        assert np.array_equal(a.latents, b.latents), request
        assert [x.tobytes() for x in a.images] == [x.tobytes() for x in b.images]


def test_requests_share_calls():
    gate = threading.Event()  # the first call waits until all have been submitted
    backend = Recorder(lambda inputs, outputs: outputs if gate.wait(10) else None)
    with Engine(fake_bundle(SIZE), backend, max_rows=8) as engine:
        futures = [engine.submit(Request(prompt=str(i), steps=10, guidance=2.0)) for i in range(4)]
        gate.set()
        for future in futures:
            future.result()
    assert max(backend.calls) == 8
    assert sum(backend.calls) == 4 * 10 * 2


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 4), (0.0, 4), (2.0, 8), ([2.0, 2.0, 1.0, 0.0], 6)])
def test_rows_are_what_the_plan_needs(guidance, rows):
    backend = Recorder()
    with Engine(fake_bundle(SIZE), backend) as engine:
        result = engine.generate(Request(prompt="x", steps=4, sampler="ddim", guidance=guidance))
    assert result.plan.rows == rows == sum(backend.calls) == result.stats.rows["unet"]


def test_seeds_count_up_over_images(engine):
    pair = engine.generate(Request(prompt="x", seed=10, images=2, steps=3))
    single = engine.generate(Request(prompt="x", seed=11, steps=3))
    assert pair.seeds == (10, 11)
    assert np.array_equal(pair.latents[1], single.latents[0])


def test_guidance_is_linear_in_the_weight(engine):
    """One step: x1(w) = x1(0) + w·(x1(1) − x1(0)), the definition of classifier-free guidance."""
    x = {w: engine.generate(Request(prompt="x", steps=1, guidance=w)).latents for w in (0.0, 1.0, 3.0)}
    np.testing.assert_allclose(x[3.0], x[0.0] + 3.0 * (x[1.0] - x[0.0]), rtol=0, atol=2e-5)


def test_update_equals_the_definition():
    """The ring of a trajectory against the sum written out, for every window length of the samplers."""
    card = fake_bundle().scheduler
    random = np.random.RandomState(0)
    for sampler in ("ddim", "pndm", "unipc", "dpmpp_3m", "lms", "heun", "euler_a"):
        request = Request(prompt="", sampler=sampler, steps=8)
        plan = compile_plan(request, card)
        leg = Leg(plan, Size(64, 64))
        job = Job(request, [leg], RequestFuture(lambda: None))
        image = Trajectory(job, 0, leg, from_noise(leg, (4, 8, 8), request.seed))
        x, p = [image.x.astype(np.float64)], []
        for step in plan.steps:
            p.append(random.standard_normal(x[0].shape))
            image.p[:] = p[-1]
            k = image.k
            image.advance()
            expected = sum(c * x[k - i] for i, c in enumerate(step.keep))
            expected = expected + sum(c * p[k - j] for j, c in enumerate(step.gain))
            if step.noise:
                expected = expected + step.noise * image.state[-1]
            scale = np.abs(expected).max() + sum(abs(c) * np.abs(x[k - i]).max() for i, c in enumerate(step.keep))
            assert np.abs(image.x - expected).max() <= 1e-6 * scale, (sampler, k)
            x.append(image.x.astype(np.float64))


def test_cancelled_request_stops(engine):
    started, release = threading.Event(), threading.Event()

    def hold(progress):
        started.set()
        release.wait(10)

    first = engine.submit(Request(prompt="x", steps=500), on_step=hold)
    assert started.wait(10)
    assert first.cancel()
    release.set()
    assert engine.generate(Request(prompt="y", steps=2)).stats.calls == 2


def test_a_nan_harms_only_its_request():
    mark = None

    def poison(inputs, outputs):
        bad = np.isclose(inputs["encoder_hidden_states"], mark).all((1, 2))
        outputs["prediction"][bad] = np.nan
        return outputs

    good = Request(prompt="good", steps=4, guidance=1.0)
    backend = Recorder(poison)
    with Engine(fake_bundle(SIZE), backend) as engine:
        mark = engine._worker.conditioner("bad", None, "a1111")[0].context
        futures = [engine.submit(Request(prompt="bad", steps=4, guidance=1.0)), engine.submit(good)]
        with pytest.raises(GenerationError, match="not finite after step 1"):
            futures[0].result()
        poisoned = futures[1].result()
    with Engine(fake_bundle(SIZE), Fake(fake_bundle(SIZE))) as engine:
        assert np.array_equal(engine.generate(good).latents, poisoned.latents)


def test_a_failing_call_is_retried_without_the_culprit():
    def fail_on_large(inputs, outputs):
        if len(inputs["sample"]) > 2:
            raise MemoryError("no room")
        return outputs

    with Engine(fake_bundle(SIZE), Recorder(fail_on_large)) as engine:
        futures = [engine.submit(Request(prompt=str(i), steps=3)) for i in range(3)]
        assert [future.result().stats.rows["unet"] for future in futures] == [6, 6, 6]


def test_a_call_that_always_fails_is_one_error():
    def fail(inputs, outputs):
        raise RuntimeError("first line\nlast line")

    with (
        Engine(fake_bundle(SIZE), Recorder(fail)) as engine,
        pytest.raises(GenerationError, match="denoiser failed: RuntimeError: last line"),
    ):
        engine.generate(Request(prompt="x"))


def test_an_error_in_the_callback_reaches_its_caller(engine):
    def broken(progress):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        engine.generate(Request(prompt="x", steps=3), on_step=broken)
    engine.generate(Request(prompt="x", steps=3))


def test_progress_ends_at_the_result(engine):
    seen = []
    result = engine.generate(Request(prompt="x", steps=5), on_step=lambda p: seen.append((p.step, p.latents())))
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    assert np.array_equal(seen[-1][1], result.latents[0])


def test_async_and_close():
    async def run(engine):
        return await asyncio.gather(*(engine.agenerate(request) for request in MIXED[:3]))

    engine = load("fake")
    assert len(asyncio.run(run(engine))) == 3
    slow = engine.submit(Request(prompt="x", steps=1000))
    engine.close()
    with pytest.raises(Cancelled):
        slow.result()
    with pytest.raises(RequestError, match="closed"):
        engine.submit(Request(prompt="x"))


def test_more_images_than_rows(engine):
    result = engine.generate(Request(prompt="x", images=20, steps=3, guidance=2.0))
    assert len(result.images) == 20
    assert result.stats.rows["unet"] == 20 * 3 * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be a whole number from 1 to 1000"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"images": 65}, "images is 65"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"width": 5000}, "width is 5000"),
        ({"guidance": "lots"}, "give a number such as 7.5"),
        ({"guidance": float("nan")}, "not a finite number"),
        ({"guidance": [1.0, 2.0]}, "guidance has 2 weights, but the plan has 20"),
        ({"sampler": "magic"}, "choose one of ddim"),
        ({"schedule": "magic"}, "choose one of"),
        ({"width": 65}, "needs a multiple of 8, such as 64 or 72"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt_syntax": "magic"}, "choose one of a1111, plain"),
    ],
)
def test_bad_requests_are_refused_at_the_door(engine, values, message):
    with pytest.raises(RequestError, match=message):
        engine.submit(Request(**{"prompt": "x", **values}))
