"""What an application that embeds the engine is promised: deadlines, cancellation, priorities, room, warm-up, an orderly end,
previews, counts. Fake backend."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from concurrent.futures import wait
from dataclasses import replace

import numpy as np
import pytest

from stepforge import (
    Cancelled,
    DeadlineExceeded,
    Engine,
    EngineClosed,
    GenerationError,
    QueueFull,
    Request,
    RequestError,
)
from stepforge.runtime.backends.fake import Fake, fake_bundle
from stepforge.runtime.bundle import UNET, VAE_DECODER, Footprint
from stepforge.runtime.bundle.format import Tensor
from stepforge.runtime.engine.pictures.networks import Tiling

SIZE = 64
BUNDLE = fake_bundle(SIZE)
LONG = Request(prompt="long", steps=900)
SHORT = Request(prompt="short", steps=2)


class Hooked(Fake):
    """The fake backend with `hook(component, inputs)` called before each network call."""

    def __init__(self, hook, bundle=BUNDLE):
        super().__init__(bundle)
        self.hook = hook

    def open(self, component, banks=None):
        graph = super().open(component, banks)

        def run(inputs):
            self.hook(component.label, inputs)
            return graph(inputs)

        return run


def engine_with(hook, *, bundle=BUNDLE, **options):
    return Engine(bundle, Hooked(hook, bundle), **options)


class Gate:
    """Holds the denoiser until it is opened."""

    def __init__(self):
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, component, inputs):
        if "sample" in inputs:
            self.entered.set()
            assert self.open.wait(20)


@pytest.fixture
def held():
    """An engine of two rows whose denoiser is held at a request that runs, and the gate."""
    gate = Gate()
    with engine_with(gate, max_rows=2, queue_limit=8) as engine:
        engine.submit(SHORT)
        assert gate.entered.wait(10)
        yield engine, gate
        gate.open.set()


@pytest.fixture
def engine():
    with Engine(BUNDLE, Fake(BUNDLE)) as engine:
        yield engine


# Deadlines and cancellation


def test_a_deadline_covers_waiting_for_room_the_queue_and_the_run(held):
    engine, gate = held
    waiting = [engine.submit(SHORT, deadline=0.05) for _ in range(8)]
    with pytest.raises(DeadlineExceeded, match=r"not finished by its deadline of 0\.03 s"):
        engine.generate(SHORT, deadline=0.03)  # which waits for room
    for future in waiting:
        with pytest.raises(TimeoutError):
            future.result(5)
    assert engine.stats().waiting == 0
    running = engine.submit(LONG, deadline=0.05, on_step=lambda progress: time.sleep(0.01))
    gate.open.set()
    with pytest.raises(DeadlineExceeded):
        running.result(5)
    before = engine.stats().steps
    assert engine.generate(SHORT, deadline=20).images
    assert engine.stats().steps - before <= 4  # the late one has stopped
    assert engine.stats().requests["deadline"] == 10
    assert not engine._intake.deadlines._pending


# network at whose call the request is cancelled -> networks that may still be called: none
PLACES = ["text_encoder", "unet", "vae_decoder", "sr/x4/vae_decoder", "x4/unet", "sr/nearest/upscaler"]


@pytest.mark.parametrize("place", PLACES)
def test_a_cancelled_request_stops_in_every_leg(place):
    calls, futures, submitted = [], [], threading.Event()

    def hook(component, inputs):
        assert submitted.wait(10)
        calls.append(component)
        if component == place:
            futures[0].cancel()

    with engine_with(hook) as engine:
        futures.append(engine.submit("x", steps=4, upscale=[{"name": "x4", "steps": 4}, "nearest"]))
        submitted.set()
        with pytest.raises(Cancelled, match="by its caller"):
            futures[0].result(10)
        assert engine.close(drain=True)
    assert calls[-1] == place, calls
    assert calls.count(place) == (2 if place == "text_encoder" else 1)  # the negative prompt's encoding goes on


def test_a_cancelled_request_stops_between_tiles():
    calls, futures, submitted = [], [], threading.Event()

    def hook(component, inputs):
        assert submitted.wait(10)
        calls.append(component)
        if calls.count(VAE_DECODER.label) == 2:
            futures[0].cancel()

    footprint = Footprint(bytes=1.0, squared=0.0)
    components = {key: replace(entry, footprint=footprint) for key, entry in BUNDLE.components.items()}
    bundle = replace(BUNDLE, components=components)
    with engine_with(hook, bundle=bundle, tiling=Tiling(32 * 32)) as engine:
        futures.append(engine.submit("x", steps=1, width=1024, height=1024))
        submitted.set()
        with pytest.raises(Cancelled):
            futures[0].result(10)
        assert engine.close(drain=True)
    assert calls.count(VAE_DECODER.label) == 2  # of 25


# The queue


def test_the_queue_waits_for_a_while_or_refuses_at_once(held):
    engine, gate = held
    waiting = [engine.submit(SHORT) for _ in range(8)]
    for refused in (
        lambda: engine.submit(SHORT),
        lambda: engine.submit(SHORT, wait=True, timeout=0.02),
        lambda: asyncio.run(engine.asubmit(SHORT)),
        lambda: asyncio.run(engine.asubmit(SHORT, wait=True, timeout=0.02)),
    ):
        with pytest.raises(QueueFull, match="8 requests wait already"):
            refused()
    assert engine.stats().requests["refused"] == 4
    threading.Timer(0.05, waiting[3].cancel).start()
    patient = engine.submit(SHORT, wait=True, timeout=20)  # takes the place of the one that is cancelled
    gate.open.set()
    assert patient.result(10).images
    assert not wait(waiting, timeout=10).not_done


def test_higher_priorities_go_first_and_equals_in_the_order_they_came(held):
    engine, gate = held
    order = []
    levels = [0, -10, 10, 0, 1, 10]
    for index, level in enumerate(levels):
        future = engine.submit("x", steps=2, images=2, priority=level)  # fills the engine's rows
        future.add_done_callback(lambda _, index=index: order.append(index))
    gate.open.set()
    assert engine.close(drain=True)
    assert order == [2, 5, 4, 0, 3, 1]


def test_a_level_of_priority_is_worth_half_a_minute_of_waiting(engine):
    """So that a request that has waited long goes before a more urgent one: nobody waits for ever."""
    older, urgent = (engine._job(SHORT, None, None, level, None) for level in (0, 2))
    assert older.rank - older.submitted == 0
    assert urgent.rank - urgent.submitted == -60


def test_bad_settings_of_a_request_are_refused_in_one_line(engine):
    for options, message in (
        ({"priority": 11}, "priority is 11; it must be a whole number from -10 to 10"),
        ({"priority": 0.5}, r"priority is 0\.5"),
        ({"deadline": -1}, "deadline is -1; give seconds, from 0 to 2592000, or None"),
        ({"deadline": float("nan")}, "deadline is nan"),
        ({"deadline": "soon"}, "deadline is 'soon'"),
        ({"timeout": float("inf")}, "timeout is inf"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.submit("x", **options)
    with pytest.raises(DeadlineExceeded):
        engine.generate("x", deadline=0)


# The end


def test_draining_finishes_what_was_taken_and_takes_no_more():
    gate = Gate()
    engine = engine_with(gate, max_rows=2)
    requests = [Request(prompt="x", steps=2, upscale=stages) for stages in ("x4", "nearest", "x2")]
    futures = [engine.submit(request) for request in requests]
    assert gate.entered.wait(10)
    ended = []
    closers = [threading.Thread(target=lambda: ended.append(engine.close(drain=True))) for _ in range(3)]
    for closer in closers:
        closer.start()
    while not engine.is_closed:
        time.sleep(0.001)
    for refused in (lambda: engine.submit(SHORT), lambda: asyncio.run(engine.asubmit(SHORT)), lambda: engine.warm_up()):
        with pytest.raises(EngineClosed, match="closed"):
            refused()
    assert not any(future.done() for future in futures)
    gate.open.set()
    for closer in closers:
        closer.join(20)
    assert ended == 3 * [True]
    assert [future.result(0).images[0].width for future in futures] == [4 * SIZE, 2 * SIZE, 2 * SIZE]
    assert engine.close()


def test_a_drain_that_takes_too_long_aborts_and_every_holder_is_told():
    gate = Gate()
    engine = engine_with(gate, max_rows=2)
    futures = [engine.submit(LONG) for _ in range(3)]
    outcomes = engine.stream([LONG, LONG])
    streamed = []
    streaming = threading.Thread(target=lambda: streamed.extend(outcomes))
    streaming.start()

    async def hold():
        return await asyncio.gather(engine.agenerate(LONG), return_exceptions=True)

    awaited = []
    awaiting = threading.Thread(target=lambda: awaited.extend(asyncio.run(hold())))
    awaiting.start()
    assert gate.entered.wait(10)
    while engine.stats().waiting + engine.stats().running < 6:
        time.sleep(0.001)
    threading.Timer(0.1, gate.open.set).start()
    assert not engine.close(drain=True, timeout=0.02)
    streaming.join(10)
    awaiting.join(10)
    for error in [*(future.exception(0) for future in futures), *(one.error for one in streamed), *awaited]:
        assert isinstance(error, Cancelled), error
        assert "closed" in str(error)
    assert engine.stats().requests["aborted"] == 6
    assert not engine.close(drain=True)


# A forked child, and whatever it tries


def test_a_forked_child_gets_one_clear_error_and_never_hangs(engine):
    pending = engine.submit(LONG, deadline=60)
    uses = [
        lambda: engine.submit("x", wait=True), lambda: engine.generate("x", deadline=1), engine.stats, engine.warm_up,
        lambda: asyncio.run(engine.agenerate("x")), lambda: engine.adapters.list(), pending.result, pending.exception,
    ]  # fmt: skip
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest in here
        said = set()
        for use in uses:
            try:
                said.add(f"it gave {use()}")
            except BaseException as error:
                said.add(f"{type(error).__name__}: {error}")
        said.add(str(engine.close(drain=True, timeout=1)))
        os.write(write, "\n".join(sorted(said)).encode())
        os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    with os.fdopen(read) as pipe:
        assert pipe.read().splitlines() == [
            "RequestError: this engine was loaded before the process forked; load the engine after forking",
            "True",
        ]
    assert pending.cancel()


# Warm-up


@pytest.mark.parametrize(
    ("request_", "rows"),
    [
        (SHORT, {("unet", 8): 1, ("unet", 6): 1, ("unet", 4): 1, ("unet", 2): 1}),
        (Request(prompt="x", guidance=[3.0, 3.0, 1.0], steps=3), {("unet", 8): 1, ("unet", 1): 1}),
        (Request(prompt="x", upscale=["x4", "nearest"]), {("x4/unet", 2): 1, ("sr/nearest/upscaler", 1): 1}),
    ],
)
def test_a_warm_up_runs_each_network_in_each_batch_size(request_, rows):
    seen = []

    def hook(component, inputs):
        seen.append((component, len(next(iter(inputs.values())))))

    with engine_with(hook) as engine:
        engine.warm_up(request_)
        assert engine.stats().requests == dict.fromkeys(engine.stats().requests, 0)
        assert engine.stats().calls == engine.stats().steps == 0
        alone = len(seen)
        result = engine.generate(request_)
    for shape, least in rows.items():
        assert seen[:alone].count(shape) >= least, (shape, seen)
    assert set(seen[alone:]) <= set(seen[:alone])  # one image meets nothing new
    with Engine(BUNDLE, Fake(BUNDLE)) as cold:
        assert np.array_equal(cold.generate(request_).latents, result.latents)


def test_a_warm_up_of_an_inpainting_model_has_a_mask():
    """`stepforge serve` draws it before the first request."""
    shapes = {
        "sample": ("rows", 9, "height", "width"),
        "timestep": ("rows",),
        "encoder_hidden_states": ("rows", "tokens", 16),
    }
    inputs = tuple(Tensor(name, "float32", shape) for name, shape in shapes.items())
    network = replace(BUNDLE.components[UNET], inputs=inputs)
    bundle = replace(BUNDLE, components={**BUNDLE.components, UNET: network})
    channels = set()

    def hook(component, inputs):
        if "sample" in inputs:
            channels.add(inputs["sample"].shape[1])

    with engine_with(hook, bundle=bundle) as engine:
        engine.warm_up()
    assert channels == {9}


def test_a_warm_up_that_cannot_run_says_why(engine):
    with pytest.raises(RequestError, match="images is 0"):
        engine.warm_up(images=0)
    with pytest.raises(RequestError, match="no ControlNet"):
        engine.warm_up(Request(prompt="x", controls={"name": "edges", "image": np.zeros((8, 8, 3), np.uint8)}))
    engine.warm_up("a", Request(prompt="b", width=128, height=64), images=1)


# Previews and counts


def test_previews_are_the_clean_estimate_as_a_picture():
    shown = []

    def look(progress):
        if progress.step % 2 == 0:
            shown.append((progress.stage, progress.denoised(), progress.preview()))
            shown[-1][2].exception(10)  # on the decoding stage's thread, which does not wait for this one

    with Engine(BUNDLE, Fake(BUNDLE)) as engine:
        result = engine.generate(Request(prompt="x", steps=4, width=512, height=512, upscale="x2"), on_step=look)
        assert engine.stats().previews == len(shown)
    assert [stage for stage, *_ in shown][:2] == ["", ""]
    assert {stage for stage, *_ in shown} == {"", "x2"}
    for stage, estimate, preview in shown:
        side = 2 if stage == "" else 4  # 64 x 64 latents, 128 x 128 of the stage: averaged to 32 x 32
        small = estimate.reshape(4, 32, side, 32, side).mean(axis=(2, 4))[:3]
        expected = np.clip(small.transpose(1, 2, 0) * 127.5 + 127.5, 0, 255)
        assert preview.result().size == (256, 256)
        assert np.abs(np.asarray(preview.result())[::8, ::8] - expected).max() <= 1
    assert result.images[0].size == (1024, 1024)


def test_previews_never_outlive_their_request_nor_pile_up():
    decoding, release = threading.Event(), threading.Event()

    def hook(component, inputs):
        if component == VAE_DECODER.label:
            decoding.set()
            assert release.wait(10)

    previews = []
    with engine_with(hook) as engine:

        def look(progress):
            previews.append(progress.preview())
            if len(previews) == 1:
                assert decoding.wait(10)

        future = engine.submit("x", steps=6, on_step=look)
        while len(previews) < 6:
            time.sleep(0.001)
        assert [preview.cancelled() for preview in previews] == [False, True, True, True, True, False]
        future.cancel()
        release.set()
        assert engine.close(drain=True)
    assert previews[-1].cancelled()
    assert previews[0].result(0)


def test_counts_are_of_what_was_done():
    def fail(component, inputs):
        if "sample" in inputs and 999 in inputs["timestep"]:  # the first step of trailing spacing
            raise ZeroDivisionError("no")

    with engine_with(fail, queue_limit=7) as engine:
        results = engine.generate([Request(prompt="x", steps=3, images=2), Request(prompt="y", guidance=1.0, steps=5)])
        with pytest.raises(GenerationError):
            engine.generate("z", spacing="trailing")
        engine.submit(LONG).cancel()
        stats = engine.stats()
    assert stats.requests == {**dict.fromkeys(stats.requests, 0), "done": 2, "failed": 1, "cancelled": 1}
    assert stats.failures == {"ZeroDivisionError": 1}
    assert (stats.images, stats.queue_limit, stats.waiting) == (3, 7, 0)
    assert stats.rows["unet"] >= sum(result.stats.rows["unet"] for result in results) == 2 * 3 * 2 + 5
    assert stats.steps >= 2 * 3 + 5
    assert stats.calls >= 5
    assert set(stats.seconds) >= {"queue", "prompt", "denoise", "decode"}
    assert all(result.stats.seconds["queue"] >= 0 for result in results)


# Failures stay where they are; nothing is kept of what has ended


@pytest.mark.parametrize("place", ["text_encoder", "unet", "vae_decoder", "x4/unet", "sr/nearest/upscaler"])
@pytest.mark.parametrize("kind", ["memory", "nan"])
def test_an_injected_failure_ends_one_request_alone(place, kind):
    """A failing call, and NaNs, in every network: of the request whose latents are 8 x 16, not of its batch mates'."""
    bad = Request(prompt="bad", steps=2, width=2 * SIZE, upscale=["x4", "nearest"])
    good = replace(bad, prompt="good", width=SIZE)
    armed = threading.Event()

    class Failing(Hooked):
        def open(self, component, banks=None):
            graph = Fake.open(self, component, banks)

            def run(inputs):
                outputs = graph(inputs)
                first = next(iter(inputs.values()))
                is_bad = (
                    first.shape[-1] == 2 * first.shape[-2] if first.ndim == 4 else "bad" in PROMPTS[first.tobytes()]
                )
                if component.label == place and armed.is_set() and is_bad:
                    if kind == "memory":
                        raise MemoryError("failed to allocate")
                    for output in outputs.values():
                        output[...] = np.nan
                return outputs

            return run

    backend = Failing(None)
    with Engine(BUNDLE, backend) as engine:
        for text in ("bad", "good", ""):
            PROMPTS[engine._worker.conditioner.tokenize(text, "a1111")[0].ids.tobytes()] = text
        alone = engine.generate(good)
        engine._worker.conditioner._cache.clear()
        armed.set()
        outcomes = engine.generate([bad, good, bad, good], return_exceptions=True)
        for index in (0, 2):
            assert isinstance(outcomes[index], GenerationError), (place, outcomes[index])
        for index in (1, 3):
            assert np.array_equal(outcomes[index].latents, alone.latents)
            assert outcomes[index].images[0].tobytes() == alone.images[0].tobytes()
        armed.clear()
        assert engine.generate(bad).images
        assert engine.stats().requests["failed"] == 2


PROMPTS: dict[bytes, str] = {}


def test_nothing_is_kept_of_requests_that_have_ended(engine):
    """Over mixed shapes, stages and ends, nothing of the engine's but its caches holds on to them."""
    from stepforge import Result
    from stepforge.runtime.engine.state import Job
    from stepforge.runtime.engine.trajectory import Trajectory

    requests = [
        Request(prompt="a", steps=3, width=width, height=height, images=images, upscale=stages)
        for width, height in ((64, 64), (128, 64), (64, 192))
        for images, stages in ((1, ()), (3, ("x2",)), (1, ("nearest",)))
    ]
    for _ in range(2):
        engine.generate(requests, on_step=lambda progress: progress.preview())
        assert isinstance(engine.submit(LONG, deadline=0.01).exception(10), DeadlineExceeded)
        engine.submit(LONG).cancel()
    engine.generate(SHORT)
    gc.collect()
    kinds = {
        Job: lambda kept: kept.request,
        Trajectory: lambda kept: kept.job.request,
        Result: lambda kept: kept.request,
    }
    ours = {id(request) for request in (*requests, LONG)}
    left = [kept for kept in gc.get_objects() if type(kept) in kinds and id(kinds[type(kept)](kept)) in ours]
    assert not left
    assert not engine._intake.deadlines._pending
