"""A batch's workers on Ray, against a stub of Ray: what becomes of jobs when workers die, differ, hang or are stopped.

`tests/interop/test_ray.py` has the same on Ray itself.
"""

import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from stepforge.runtime.errors import BundleError, Cancelled, GenerationError, RequestError
from stepforge.runtime.request import Request
from stepforge.runtime.serve.draw import Ended, Task
from stepforge.runtime.serve.ray import pool
from stepforge.runtime.serve.ray.pool import Cluster, RayDrawer
from stepforge.runtime.serve.ray.worker import OwnFiles
from stepforge.runtime.serve.store import Files

FACTS = {"bundle": "ab", "backend": "fake"}


class Died(Exception):
    """As Ray tells of a process that has gone."""


class Raised(Exception):
    """As Ray tells of what a worker raised."""

    def __init__(self, cause):
        self.cause = cause


class Method:
    def __init__(self, answer):
        self._answer = answer

    def remote(self, *arguments):
        found = self._answer(*arguments)
        return SimpleNamespace(future=lambda: found)


class Actor:
    """One worker: `load` and `draw` are answered by the test's functions, at once or by futures of its own."""

    def __init__(self, ray, number):
        self.ray, self.number, self.inside = ray, number, {}
        self.is_killed = self.is_dead = False
        self.load = Method(lambda: answered(lambda: ray.on_load(number)))
        self.draw = Method(self._draw)
        self.stop = Method(lambda: ray.stops.append(number))

    def _draw(self, task):
        found = answered(lambda: self.ray.on_draw(self, task))
        self.inside[task.job] = found
        if self.is_dead:
            self.die()
        return found

    def die(self):
        self.is_dead = True
        for future in list(self.inside.values()):
            if not future.done():
                future.set_exception(Died("it was killed"))


def answered(function):
    try:
        given = function()
    except BaseException as error:
        given = Future()
        given.set_exception(error)
    if not isinstance(given, Future):
        value, given = given, Future()
        given.set_result(value)
    return given


class Ray:
    """The stub: its actors in the order in which they were asked for."""

    exceptions = SimpleNamespace(RayError=Died)

    def __init__(self):
        self.actors, self.stops, self.lock = [], [], threading.Lock()
        self.on_load = lambda number: FACTS
        self.on_draw = lambda actor, task: done(task)
        self.is_initialized = lambda: True
        self.cluster_resources = lambda: {"CPU": 6.0}

    def remote(self, kind):
        def make(setup):
            with self.lock:
                self.actors.append(Actor(self, len(self.actors)))
            return self.actors[-1]

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=make))

    def kill(self, actor):
        actor.is_killed = True


def done(task):
    return Ended({"job": task.job, "files": []})


def task(job):
    return Task(job, job + 1, "", Request(prompt="x"))


def settle(drawer):
    """Wait until the drawer has seen what has happened."""
    seen = threading.Event()
    drawer._news.put(seen.set)
    assert seen.wait(10)


@pytest.fixture
def ray(monkeypatch):
    stub = Ray()
    monkeypatch.setitem(sys.modules, "ray", stub)
    return stub


@pytest.fixture
def start(ray):
    """Workers that have started."""
    opened = []

    def start(workers=2, setup=pool.Setup("fake", {}, {}, None, None), **options):
        drawer = RayDrawer(Cluster("auto", workers, **options))
        opened.append(drawer)
        drawer.start(setup)
        settle(drawer)
        return drawer

    yield start
    for drawer in opened:
        drawer.close()


def test_jobs_go_to_the_least_busy(ray, start):
    ray.on_draw = lambda actor, task: Future()
    drawer = start(2, depth=3)
    futures = [drawer.submit(task(job)) for job in range(8)]
    assert [sorted(actor.inside) for actor in ray.actors] == [[0, 2, 4], [1, 3, 5]]
    ray.actors[0].inside[2].set_result(done(task(2)))
    settle(drawer)
    assert sorted(ray.actors[0].inside) == [0, 2, 4, 6]
    assert futures[2].result(0).record["job"] == 2
    assert drawer.facts == FACTS


def test_jobs_of_a_dead_worker_run_again(ray, start):
    ray.on_draw = lambda actor, task: done(task) if actor.number > 1 else Future()
    drawer = start(2)
    futures = [drawer.submit(task(job)) for job in range(4)]
    ray.actors[0].die()
    ray.actors[1].die()
    assert [future.result(5).record["job"] for future in futures] == [0, 1, 2, 3]
    assert len(ray.actors) == 4
    assert all(actor.is_killed for actor in ray.actors[:2])


def test_a_job_that_kills_its_workers_fails_alone(ray, start):
    """It is drawn alone before it is given up, so that its neighbours live."""
    alone = []

    def draw(actor, task):
        if task.job == 3:
            alone.append(sum(not future.done() for future in actor.inside.values()) == 0)
            threading.Timer(0.05, actor.die).start()
        elif actor.number > 1:
            return done(task)
        return Future()

    ray.on_draw = draw
    drawer = start(1, depth=8)
    futures = [drawer.submit(task(job)) for job in range(6)]
    records = [future.result(10).record for future in futures]
    assert [record["job"] for record in records if "error" not in record] == [0, 1, 2, 4, 5]
    assert records[3]["error"] == "3 workers died while they drew it; the last: it was killed"
    assert alone[-1]


def test_what_a_worker_raises_ends_the_batch(ray, start):
    def draw(actor, task):
        raise Raised(OSError(28, "No space left on device"))

    ray.on_draw = draw
    with pytest.raises(OSError, match="No space left"):
        start(1).submit(task(0)).result(5)


def test_an_engine_that_failed_as_a_whole_is_replaced(ray, start):
    def draw(actor, task):
        if not actor.number:
            raise Raised(GenerationError("the engine failed"))
        return done(task)

    ray.on_draw = draw
    assert start(1).submit(task(0)).result(5).record["job"] == 0


def test_workers_that_only_die_end_the_run(ray, start):
    ray.on_draw = lambda actor, task: answered(lambda: (_ for _ in ()).throw(Died("out of memory")))
    drawer = start(1)
    futures = [drawer.submit(task(job)) for job in range(4)]
    with pytest.raises(GenerationError, match="5 workers died in a row; the last: out of memory"):
        futures[-1].result(10)


def test_workers_must_agree(ray, start):
    ray.on_load = lambda number: {**FACTS, "backend": "openvino" if number else "onnxruntime"}
    ray.on_draw = lambda actor, task: Future()
    drawer = start(2)
    with pytest.raises(RequestError, match="workers differ in their backend: onnxruntime and openvino"):
        drawer.submit(task(0)).result(5)


def test_names_are_the_drivers_to_give(ray, start, tmp_path):
    """Two workers that draw one job do not share a file, whoever is late."""
    files = OwnFiles(tmp_path, "png")
    late = files.write("00000000.png", b"late", {})
    first = files.write("00000000.png", b"first", {})
    ray.on_draw = lambda actor, task: Ended({"job": 0, "files": [first]})
    drawer = start(1, setup=pool.Setup("fake", {}, {}, Files(tmp_path, "png"), None))
    record = drawer.submit(task(0)).result(5).record
    assert record["files"] == [{"name": "00000000.png", "size": 5, "sha256": first["sha256"], "about": {}}]
    assert (tmp_path / "00000000.png").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()].count(late["written"]) == 1
    name = late["written"]
    (tmp_path / name).unlink()
    ray.on_draw = lambda actor, task: Ended({"job": 1, "files": [late]})
    with pytest.raises(OSError, match=name):
        drawer.submit(task(1)).result(5)


def test_workers_that_cannot_load(ray, start):
    def load(number):
        raise Raised(BundleError("a.bundle is not a bundle"))

    ray.on_load = load
    with pytest.raises(BundleError, match=r"a\.bundle is not a bundle"):
        start(2)


def test_nothing_hangs(ray, start):
    """No node for a worker, and a job that does not end: the watchdog's."""
    ray.on_load = lambda number: Future()
    with pytest.raises(
        GenerationError, match=r"no worker has started in 0\.1 s; each asks for 3 CPU and 0 GPU, the cluster has 6 CPU"
    ):
        start(2, stall=0.1)
    ray.on_load, ray.on_draw = (lambda number: FACTS), (lambda actor, task: Future())
    future = start(2, stall=0.1).submit(task(0))
    with pytest.raises(GenerationError, match=r"no job has ended in 0\.1 s; 2 of 2 workers are there, 1 jobs wait"):
        future.result(10)


def test_stop_keeps_what_workers_still_finish(ray, start):
    ray.on_draw = lambda actor, task: Future()
    drawer = start(1, depth=2)
    futures = [drawer.submit(task(job)) for job in range(3)]
    drawer.stop()
    drawer.stop()
    assert ray.stops == [0]
    assert isinstance(futures[2].exception(0), Cancelled)
    ray.actors[0].inside[0].set_result(done(task(0)))
    ray.actors[0].inside[1].set_result(None)
    settle(drawer)
    assert futures[0].result(0).record["job"] == 0
    assert isinstance(futures[1].exception(0), Cancelled)
    assert isinstance(drawer.submit(task(4)).exception(0), Cancelled)


def test_stop_does_not_wait_for_ever(ray, start, monkeypatch):
    monkeypatch.setattr(pool, "LAST_WORDS", 0.1)
    ray.on_draw = lambda actor, task: Future()
    drawer = start(1)
    future = drawer.submit(task(0))
    drawer.stop()
    started = time.monotonic()
    assert isinstance(future.exception(10), Cancelled)
    assert time.monotonic() - started < 10


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RequestError, match=r"pip install 'stepforge\[ray\]'"):
        RayDrawer(Cluster("local", 1))


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1: "), ("head", "--ray is head; give HOST:PORT, auto or local")],
)
def test_without_a_cluster(address, reason, ray):
    ray.is_initialized = lambda: False
    with pytest.raises(RequestError, match=reason):
        RayDrawer(Cluster(address, 1))
