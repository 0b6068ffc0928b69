"""Images on their way through several models, on the fake backend: rows shared across requests and stages, failures, ends."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest

from stepforge import Cancelled, Engine, GenerationError, Request, RequestError, Upscale
from stepforge.runtime.backends.fake import Fake, fake_bundle

SIZE = 32
PICTURE = np.random.default_rng(0).integers(0, 255, (16, 32, 3), dtype=np.uint8)
BASE = {"prompt": "a", "steps": 3}
CHAIN = ("x2", Upscale(name="x4", steps=4, guidance=2.0), "nearest")
MIXED = [
    Request(**BASE, seed=1, upscale=Upscale(name="x4", steps=5), images=2),
    Request(**BASE, seed=2, upscale=Upscale(name="x4", steps=3, noise_level=100, guidance=1.0)),
    Request(**BASE, seed=3),
    Request(**BASE, seed=4, upscale=CHAIN),
    Request(**BASE, seed=5, upscale=Upscale(name="x2", steps=2, sampler="euler_a")),
    Request(prompt="", seed=6, upscale=Upscale(name="x4", image=PICTURE, steps=4)),
    Request(prompt="", seed=6, upscale=Upscale(name="nearest", image=PICTURE)),
]


class Watched(Fake):
    """The fake backend, noting (network, rows) of every denoiser call, and failing where told to."""

    def __init__(self, poison=lambda component, inputs: None):
        super().__init__(fake_bundle(SIZE))
        self.poison, self.calls = poison, []

    def open(self, component, banks=None):
        graph = super().open(component)

        def run(inputs):
            self.poison(component, inputs)
            if component.role == "denoiser":
                self.calls.append((component.label, len(inputs["sample"])))
            return graph(inputs)

        return run


@pytest.fixture
def open_engine():
    opened = []

    def make(*poison, **options):
        backend = Watched(*poison)
        opened.append(Engine(fake_bundle(SIZE), backend, **options))
        return opened[-1], backend

    yield make
    for engine in opened:
        engine.close()


def test_requests_share_calls_in_every_stage_and_give_what_they_give_alone(open_engine):
    engine, backend = open_engine(max_rows=8)
    together = engine.generate(MIXED)
    assert max(rows for label, rows in backend.calls if label == "x4/unet") > 4  # of several images
    alone = [engine.generate(request) for request in MIXED]
    for ours, other in zip(together, alone, strict=True):
        for a, b in zip(ours.images, other.images, strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))
        assert ours.stats.rows.get("x4/unet") == other.stats.rows.get("x4/unet")
    sizes = [result.images[0].size for result in together]
    assert sizes == [(128, 128), (128, 128), (32, 32), (512, 512), (64, 64), (128, 64), (64, 32)]
    chain = together[3]
    assert [(name, len(plan.steps)) for name, plan in chain.stages] == [("x2", 50), ("x4", 4), ("nearest", 0)]
    assert chain.stats.rows["x4/unet"] == 8
    assert chain.stats.rows["sr/nearest/upscaler"] == 1
    assert "vae_decoder" not in chain.stats.rows  # x2 read the latents
    assert {"denoise", "x2/denoise", "x4/denoise", "x4/decode", "nearest/upscale"} <= chain.stats.seconds.keys()
    assert np.array_equal(np.asarray(together[6].images[0]), PICTURE.repeat(2, axis=0).repeat(2, axis=1))


def test_rows_and_pixels_bound_the_calls_of_stages(open_engine):
    engine, backend = open_engine(max_rows=4, max_pixels=2 * 128**2)
    engine.generate(MIXED[:3])
    assert max(rows for _, rows in backend.calls) <= 4
    assert max(rows for label, rows in backend.calls if label == "x4/unet") <= 2


def test_stages_continue_the_stream_of_random_numbers_or_start_their_own(open_engine):
    engine, _ = open_engine()
    first, again, own, other = (
        engine.generate(Request(**BASE, seed=seed, upscale=Upscale(name="x4", steps=2, seed=stage))).latents
        for seed, stage in ((1, None), (1, None), (1, 7), (1, 8))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(own, other)
    assert not np.array_equal(first, own)


@pytest.mark.parametrize(
    ("role", "stage"), [("denoiser", "x4"), ("vae_decoder", "x4"), ("upscaler", "nearest"), ("vae_encoder", "x2")]
)
def test_a_failing_stage_ends_its_request_alone(open_engine, role, stage):
    def poison(component, inputs):
        if (component.role, component.stage) == (role, stage):
            raise MemoryError("no room")

    engine, _ = open_engine(poison)
    asked = [Request(**BASE, upscale=("nearest", stage) if stage == "x2" else stage), Request(**BASE)]
    failed, fine = engine.generate(asked, return_exceptions=True)
    assert isinstance(failed, GenerationError)
    assert fine.images[0].size == (32, 32)


def test_progress_tells_its_stage_and_cancelling_there_ends_the_request(open_engine):
    engine, _ = open_engine()
    seen, futures = [], []

    def look(progress):
        seen.append((progress.stage, progress.step, progress.steps, progress.latents().shape))
        if progress.stage and progress.step == 2:
            futures[0].cancel()

    futures.append(engine.submit(Request(prompt="a", steps=300, upscale=Upscale(name="x4", steps=5)), on_step=look))
    with pytest.raises(CancelledError):
        futures[0].result()
    assert seen[0] == ("", 1, 300, (4, 4, 4))
    assert seen[-1] == ("x4", 2, 5, (4, 32, 32))
    assert engine.generate(Request(**BASE, upscale="x4")).images[0].size == (128, 128)


def test_close_settles_images_between_two_legs():
    inside, go = threading.Event(), threading.Event()

    def hold(component, inputs):
        if component.role == "vae_decoder":
            inside.set()
            assert go.wait(20)

    with Engine(fake_bundle(SIZE), Watched(hold)) as engine:
        futures = [engine.submit(Request(**BASE, upscale="x4", seed=seed)) for seed in range(3)]
        assert inside.wait(20)
        closing = threading.Thread(target=engine.close)
        closing.start()
        engine._scheduler.close()
        go.set()
        closing.join(20)
        assert not closing.is_alive()
    for future in futures:
        with pytest.raises(Cancelled):
            future.result(timeout=1)


@pytest.mark.parametrize(
    ("upscale", "told"),
    [
        ("x9", "no super-resolution stage 'x9'; it has x4, x2, nearest"),
        ({"name": "x4", "noise_level": 351}, "it knows levels from 0 to 350"),
        ({"name": "x2", "noise_level": 1}, "takes no noise_level"),
        ({"name": "nearest", "steps": 3}, "takes no steps"),
        ({"name": "x2", "image": PICTURE[:15]}, "would make 64x30: height is 30"),
        ({"name": "x4", "sampler": "flow_euler"}, "stage 'x4': sampler 'flow_euler' cannot run"),
        ({"name": "x4", "prompt": "a " * 20_000}, "prompt of stage 'x4' has 40000 characters"),
        ({"name": "x4", "step": 3}, "has no 'step'"),
        ({"name": "x4", "seed": -1}, "seed of stage 'x4' is -1"),
        (["x4", {"name": "x4", "image": PICTURE}], "only the first"),
        ([], None),
    ],
)
def test_refusals(open_engine, upscale, told):
    engine, _ = open_engine()
    if told is None:
        assert engine.generate(Request(**BASE, upscale=upscale)).stages == ()
        return
    with pytest.raises(RequestError, match=told) as caught:
        engine.generate(Request(**BASE, upscale=upscale))
    assert "\n" not in str(caught.value)


def test_an_upscale_is_a_value_and_the_engine_enlarges_pictures_alone(open_engine):
    a, b = (Upscale(name="x4", guidance="linear(1..3)", image=PICTURE) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a.to_dict() == {"name": "x4", "guidance": "linear(1..3)"}
    assert Request(prompt="", upscale=a) == Request(prompt="", upscale=[b])
    engine, _ = open_engine()
    result = engine.upscale(PICTURE, "x4", steps=3, seed=2)
    assert result.images[0].size == (128, 64)
    assert engine.size(Request(prompt="", upscale=["x2", "nearest"])).width == 4 * SIZE
    with pytest.raises(RequestError, match="leave controls and adapters out"):
        engine.generate(Request(prompt="", adapters={"a": 1.0}, upscale=a))
