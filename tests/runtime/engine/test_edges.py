"""The engine's edges, a test for each promise: failures, futures, exits, bounds. Fake backend; processes where one must end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import stepforge
from stepforge import Cancelled, Engine, GenerationError, QueueFull, Request, RequestError, load
from stepforge.runtime.backends.fake import Fake, fake_bundle
from stepforge.runtime.engine import scheduler, worker
from stepforge.runtime.engine.pictures import decode, stages

SIZE = 64


@pytest.fixture
def engine():
    with Engine(fake_bundle(SIZE), Fake(fake_bundle(SIZE))) as engine:
        yield engine


class Backend(Fake):
    """The fake backend with a graph's call replaced: `changed(component, graph, inputs)`."""

    def __init__(self, changed):
        super().__init__(fake_bundle(SIZE))
        self._changed = changed

    def open(self, component, banks=None):
        graph = super().open(component, banks)
        return lambda inputs: self._changed(component, graph, inputs)


def engine_with(changed, **options):
    return Engine(fake_bundle(SIZE), Backend(changed), **options)


class Gate:
    """Holds every denoiser call until it is opened."""

    def __init__(self):
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, component, graph, inputs):
        if "sample" in inputs:
            self.entered.set()
            assert self.open.wait(20)
        return graph(inputs)


def still_works(engine):
    return engine.generate("y", steps=2, seed=5).stats.calls == 2


# A failure stays with its request


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (KeyError("mine"), KeyError, "mine"),
        (SystemExit(3), GenerationError, "the callback failed: SystemExit: 3"),
        (KeyboardInterrupt(), GenerationError, "the callback failed: KeyboardInterrupt"),
        (asyncio.CancelledError(), GenerationError, "the callback failed: CancelledError"),
        (StopIteration(), GenerationError, "the callback failed: StopIteration"),
    ],
)
def test_whatever_a_callback_raises_ends_its_request_alone(engine, error, raised, text):
    def broken(progress):
        raise error

    other = engine.submit("other", steps=30)
    with pytest.raises(raised, match=text):
        engine.generate("x", steps=3, on_step=broken)
    assert len(other.result(20).images) == 1
    assert still_works(engine)


@pytest.mark.parametrize("place", ["guider", "advance", "decode", "result"])
def test_a_failure_of_ours_ends_its_request_alone(engine, monkeypatch, place):
    def fail(*args, **kwargs):
        raise MemoryError("no room")

    where = {
        "guider": (stepforge.runtime.plan.guiders.Guider, "__call__"),
        "advance": (worker.Trajectory, "advance"),
        "decode": (decode, "to_uint8"),
        "result": (decode, "Result"),
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        with pytest.raises(GenerationError, match="MemoryError: no room"):
            engine.submit("x", steps=2).result(20)
    assert still_works(engine)


def test_a_decode_thread_that_cannot_start_fails_its_request(engine, monkeypatch):
    class NoThread(threading.Thread):
        def start(self):
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(stages.threading, "Thread", NoThread)
        with pytest.raises(GenerationError, match="decoder failed: RuntimeError: can't start new thread"):
            engine.submit("x", steps=2).result(20)
    assert still_works(engine)


def test_whatever_ends_the_scheduler_settles_every_job_and_closes_the_engine(monkeypatch):
    def die(self):
        raise SystemExit("a defect")

    engine = load("fake")
    monkeypatch.setattr(scheduler.Scheduler, "pack", die)
    futures = [engine.submit("x") for _ in range(3)]
    for future in futures:
        with pytest.raises((GenerationError, RequestError)):
            future.result(20)
    with pytest.raises(RequestError, match="closed"):
        engine.submit("x")
    engine.close()


# Futures behave as concurrent.futures promises


def test_a_cancelled_request_completes_wait_and_as_completed_at_once():
    gate = Gate()
    with engine_with(gate) as engine:
        running, waiting = engine.submit("a", steps=50), engine.submit("b")
        assert gate.entered.wait(10)
        assert running.running()
        assert running.cancel()
        assert running.cancel()
        assert waiting.cancel()
        done, rest = concurrent.futures.wait([running, waiting], timeout=5)
        assert (len(done), len(rest)) == (2, 0)
        assert set(concurrent.futures.as_completed([running, waiting], timeout=5)) == {running, waiting}
        assert running.cancelled()
        assert not running.running()
        gate.open.set()
        assert still_works(engine)


def test_cancelled_says_who_did_it():
    gate = Gate()
    engine = engine_with(gate)
    mine, theirs = engine.submit("a", steps=500), engine.submit("b", steps=500)
    assert gate.entered.wait(10)
    mine.cancel()
    gate.open.set()
    engine.close()
    for future, who in ((mine, "by its caller"), (theirs, "the engine was closed")):
        with pytest.raises(Cancelled, match=who):
            future.result(5)
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(5)


def test_done_callbacks_may_submit_and_cancel_but_not_wait(engine):
    seen = []

    def ended(future):
        seen.append(engine.submit("next", steps=1))
        assert not future.cancel()
        for wait in (
            lambda: engine.generate("x"),
            lambda: seen[0].result(),
            engine.close,
            lambda: engine.submit("x", wait=True),
        ):
            try:
                wait()
            except RequestError as error:
                seen.append(str(error))

    first = engine.submit("x", steps=1)
    first.add_done_callback(ended)
    first.result(10)
    deadline = time.monotonic() + 10
    while len(seen) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all("callback of this engine" in text for text in seen[1:])
    assert len(seen) == 5
    assert seen[0].result(10).images


# Nothing finished is lost


def test_stream_gives_results_and_failures_as_they_come():
    def poison(component, graph, inputs):
        outputs = graph(inputs)
        if "sample" in inputs:
            outputs["prediction"][inputs["timestep"] == 999] = np.nan  # the first step of trailing spacing
        return outputs

    requests = [Request(prompt="x", steps=n, spacing="trailing" if n == 4 else "leading") for n in (30, 4, 2)]
    with engine_with(poison) as engine:
        outcomes = list(engine.stream(requests))
        assert [outcome.index for outcome in outcomes] == [1, 2, 0]
        assert [outcome.error is None for outcome in outcomes] == [False, True, True]
        assert outcomes[0].request == requests[1]
        assert outcomes[0].result is None
        partial = engine.generate(requests, return_exceptions=True)
        assert isinstance(partial[1], GenerationError)
        assert partial[0].images
        assert partial[2].images
        with pytest.raises(GenerationError, match="not finite"):
            engine.generate(requests)


def test_all_are_checked_before_any_is_queued(engine, monkeypatch):
    queued = []
    monkeypatch.setattr(engine._scheduler, "submit", lambda job, **_: queued.append(job))
    for run in (engine.generate, engine.stream):
        with pytest.raises(RequestError, match="needs a multiple of"):
            run([Request(prompt="x"), Request(prompt="x", width=65)])
    assert not queued


def test_closing_a_stream_cancels_the_rest(engine):
    outcomes = engine.stream([Request(prompt="x", steps=n) for n in (1, 900, 900)])
    assert next(outcomes).index == 0
    outcomes.close()
    assert still_works(engine)


def test_a_stream_of_a_closed_engine_tells_every_request():
    engine = load("fake", queue_limit=2, max_rows=2)
    outcomes = engine.stream([Request(prompt="x", steps=n) for n in (1, 900, 900, 900, 900)])
    found = [next(outcomes)]
    engine.close()
    found += outcomes
    assert [outcome.error is None for outcome in found] == [True, False, False, False, False]
    assert sorted(outcome.index for outcome in found) == [0, 1, 2, 3, 4]


# Exit, fork, garbage

LONG = [pytest.mark.slow, pytest.mark.long]
ENDS = {
    "the script ends": ("", 0),
    "an uncaught error": ("raise ValueError('mine')", 1),
    "sys.exit": ("sys.exit(7)", 7),
    "SIGTERM": ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15),
}


# a process each: one engine in the whole suite, and of four ends those with and without the interpreter's own
@pytest.mark.parametrize(
    "how",
    [pytest.param(how, marks=[] if how in ("an uncaught error", "SIGTERM") else pytest.mark.long) for how in ENDS],
)
@pytest.mark.parametrize("backend", ["openvino", pytest.param("onnxruntime", marks=LONG)])
def test_a_process_ends_cleanly_without_close(tiny_sd1_bundle, how, backend):
    code = (
        "import sys, stepforge, time\n"
        f"engine = stepforge.load({str(tiny_sd1_bundle)!r}, backend={backend!r})\n"
        "futures = [engine.submit('x', steps=900, seed=i) for i in range(3)]\n"
        "time.sleep(0.3)\n"
    ) + ENDS[how][0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == ENDS[how][1], done.stderr
    assert done.stderr == "" or "ValueError: mine" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("backend", [pytest.param("openvino", marks=LONG), "onnxruntime"])
def test_a_forked_child_may_drop_its_parents_engines(tiny_sd1_bundle, backend):
    """Destroyed in a child, a session of ONNX Runtime waits for its threads, which the child lacks: those of closed engines
    too, which no thread of ours holds any more."""
    code = (
        "import gc, os, stepforge\n"
        f"load = lambda: stepforge.load({str(tiny_sd1_bundle)!r}, backend={backend!r}, threads=2)\n"
        "closed, used = load(), load()\n"
        "for engine in (closed, used): engine.generate('x', steps=1)\n"
        "closed.close()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    del engine, closed, used\n"
        "    gc.collect()\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), used.generate('x', steps=1).images[0].width)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["7", "32"], done.stderr


def test_a_forked_child_is_told_to_load_after_forking(engine):
    waiting = engine.submit("x", steps=100)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest in here
        texts = []
        for use in (lambda: engine.submit("x"), lambda: engine.generate("x"), waiting.result):
            try:
                use()
            except BaseException as error:
                texts.append(f"{type(error).__name__}: {error}")
        engine.close()
        os.write(write, "\n".join(texts).encode())
        os._exit(0)
    os.close(write)
    assert os.waitpid(child, 0)[1] == 0
    with os.fdopen(read) as pipe:
        lines = pipe.read().splitlines()
    assert lines == 3 * [
        "RequestError: this engine was loaded before the process forked; load the engine after forking"
    ]
    assert waiting.result(20)


def test_an_engine_that_nobody_holds_ends():
    engine = load("fake")
    engine.generate("x", steps=1)
    thread, dead = engine._thread, weakref.ref(engine)
    del engine
    gc.collect()
    thread.join(5)
    assert dead() is None
    assert not thread.is_alive()


def test_a_future_keeps_its_engine():
    future = load("fake").submit("x", steps=50)
    gc.collect()
    assert future.result(20).images


def test_finished_latents_are_decoded_when_the_engine_closes():
    gate, decoding = threading.Event(), threading.Event()

    def slow(component, graph, inputs):
        if "latents" in inputs:
            decoding.set()
            gate.wait(10)
        return graph(inputs)

    engine = engine_with(slow)
    future = engine.submit("x", steps=1, images=2)
    assert decoding.wait(10)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.set()
    closing.join(10)
    assert len(future.result(5).images) == 2


# Bounds


def test_a_full_queue_refuses_or_waits():
    gate = Gate()
    with engine_with(gate, queue_limit=2, max_rows=2) as engine:
        running = engine.submit("running", steps=1)
        assert gate.entered.wait(10)
        waiting = [engine.submit("waiting", steps=1) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait already; raise queue_limit, or try again later"):
            engine.submit("x")
        waiting[0].cancel()  # makes room
        waiting.append(engine.submit("x", steps=1))
        threading.Timer(0.2, gate.open.set).start()
        assert engine.generate("patient", steps=1).images
        assert len(list(engine.stream(["x"] * 9, steps=1))) == 9
        assert asyncio.run(many(engine, 9)) == 9
        assert running.result(5)
        assert waiting[2].result(5)


async def many(engine, count):
    return len([outcome async for outcome in engine.astream(["x"] * count, steps=1)])


def test_images_on_their_way_are_bounded_by_rows_and_pixels():
    seen = []

    def count(component, graph, inputs):
        if "sample" in inputs:
            seen.append((len(inputs["sample"]), inputs["sample"].shape[2]))
        return graph(inputs)

    with engine_with(count, max_rows=8, max_pixels=4 * SIZE * SIZE) as engine:
        futures = [engine.submit("x", steps=3, images=6), engine.submit("x", steps=2, width=256, height=256)]
        running = 0
        while not all(future.done() for future in futures):
            running = max(running, len(list(engine._scheduler.running())))
        assert [len(future.result().images) for future in futures] == [6, 1]
    assert running <= 4
    assert max(rows for rows, side in seen if side == SIZE // 8) == 4
    assert max(rows for rows, side in seen if side == 32) == 2  # alone beyond max_pixels, and still drawn


def test_running_out_of_memory_is_learnt():
    calls = []

    def small(component, graph, inputs):
        if "sample" in inputs:
            calls.append(len(inputs["sample"]))
            if calls[-1] > 4:
                raise RuntimeError("CUDA error: out of memory")
        return graph(inputs)

    gate = Gate()
    with engine_with(lambda c, g, i: gate(c, lambda inputs: small(c, g, inputs), i)) as engine:
        futures = [engine.submit("x", steps=6, seed=i) for i in range(4)]
        assert gate.entered.wait(10)
        gate.open.set()
        results = [future.result(20) for future in futures]
    assert all(result.stats.rows["unet"] == 12 for result in results)
    assert sum(rows > 4 for rows in calls) <= 1


def test_progress_is_computed_only_if_read(engine, monkeypatch):
    computed = []
    inner = worker.Trajectory.denoised
    monkeypatch.setattr(worker.Trajectory, "denoised", lambda self: computed.append(1) or inner(self))
    kept = []
    engine.generate("x", steps=3, on_step=kept.append)
    assert not computed
    looks = []
    result = engine.generate("x", steps=3, on_step=lambda p: looks.append((p.latents(), p.denoised())))
    assert np.array_equal(looks[-1][0], result.latents[0])
    assert len(computed) == 3
    with pytest.raises(RequestError, match="read inside the callback"):
        kept[0].latents()


def test_a_slow_event_loop_task_is_not_blocked(engine):
    async def run():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.ensure_future(tick())
        result = await engine.agenerate("x", steps=200)
        task = asyncio.ensure_future(engine.agenerate("x", steps=100000 // 200))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        ticking.cancel()
        return ticks, result

    ticks, result = asyncio.run(run())
    assert ticks > 5
    assert result.images


def test_a_prompt_is_a_request(engine):
    result = engine.generate("a cat", steps=3, seed=4)
    assert result.request == Request(prompt="a cat", steps=3, seed=4)
    for bad, text in (
        (lambda: engine.generate("a", stepz=3), "stepz"),
        (lambda: engine.submit(5), "not int"),
        (lambda: engine.generate(Request(prompt="x"), steps=3), "steps was given beside a Request"),
    ):
        with pytest.raises(RequestError, match=text):
            bad()
