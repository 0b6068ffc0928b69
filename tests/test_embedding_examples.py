"""The examples of docs/embedding.md, each as an application would run it, on the test model."""

import asyncio
import importlib
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from stepforge import DeadlineExceeded, EngineClosed, QueueFull

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "embedding"


def test_every_example_is_tested():
    assert {path.name for path in FOLDER.glob("*.py")} == {"threads.py", "fastapi_app.py", "celery_worker.py"}


def test_threads(tmp_path):
    ran = subprocess.run(
        [sys.executable, FOLDER / "threads.py"], check=True, cwd=tmp_path, capture_output=True, text=True
    )
    files = sorted(path.name for path in (tmp_path / "out" / "threads").iterdir())
    assert files == [*(f"task-{seed}.png" for seed in range(8)), "urgent.png"]
    assert "'done': 9, 'failed': 0, 'cancelled': 1" in ran.stdout


@pytest.fixture
def fastapi_app(monkeypatch):
    pytest.importorskip("fastapi", reason="needs the extra server: pip install 'stepforge[server]'")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.delenv("BUNDLE", raising=False)
    yield importlib.import_module("fastapi_app").app
    sys.modules.pop("fastapi_app")


def test_fastapi(fastapi_app, monkeypatch):
    from fastapi.testclient import TestClient

    with TestClient(fastapi_app) as client:
        engine = fastapi_app.state.engine
        asked = {"prompt": "a cat", "steps": 2, "seed": 5}
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(client.get("/image", params=asked))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = engine.generate("a cat", steps=2, seed=5).images[0]
        for answer in answers:
            assert answer.status_code == 200
            assert Image.open(io.BytesIO(answer.content)).tobytes() == expected.tobytes()
        refused = client.get("/image", params={**asked, "steps": 5000})
        assert (refused.status_code, refused.json()) == (
            400, {"detail": "steps is 5000; it must be a whole number from 1 to 1000"},
        )  # fmt: skip
        for error, status in ((QueueFull, 429), (EngineClosed, 503), (DeadlineExceeded, 504)):

            async def fail(*args, error=error, **options):
                raise error("why")

            monkeypatch.setattr(engine, "asubmit", fail)
            answer = client.get("/image", params=asked)
            assert (answer.status_code, answer.json()) == (status, {"detail": "why"})
            assert ("retry-after" in answer.headers) is (status != 504)
    assert engine.is_closed


def test_fastapi_stops_the_work_of_a_client_that_goes_away(fastapi_app):
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "GET",
        "path": "/image", "raw_path": b"/image", "query_string": b"prompt=x&steps=1000", "headers": [], "scheme": "http",
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "root_path": "",
    }  # fmt: skip

    async def client():
        async with fastapi_app.router.lifespan_context(fastapi_app):
            engine = fastapi_app.state.engine
            asked = False

            async def receive():
                nonlocal asked
                if not asked:
                    asked = True
                    return {"type": "http.request", "body": b"", "more_body": False}
                while not engine.stats().running:
                    await asyncio.sleep(0.001)
                return {"type": "http.disconnect"}

            async def send(message):
                pass

            await fastapi_app(scope, receive, send)
            while engine.stats().running:
                await asyncio.sleep(0.001)
            return engine.stats()

    stats = asyncio.run(client())
    assert (stats.requests["cancelled"], stats.requests["done"]) == (1, 0)
    assert stats.steps < 1000


@pytest.mark.slow  # a broker of files, which is polled every second
def test_celery_with_a_forked_worker(tmp_path):
    celery = pytest.importorskip("celery", reason="the example needs celery")
    folders = {f"data_folder_{way}": str(tmp_path / "queue") for way in ("in", "out")}
    folders["control_folder"] = str(tmp_path / "control")
    for folder in ("queue", "control", "results", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "worker.py").write_text(
        f"from celery_worker import app\napp.conf.broker_transport_options = {folders!r}\n", encoding="utf-8"
    )
    places = {"BROKER": "filesystem://", "RESULTS": f"file://{tmp_path / 'results'}"}
    environment = {**os.environ, **places, "PYTHONPATH": str(FOLDER)}
    environment.pop("BUNDLE", None)
    command = [sys.executable, "-m", "celery", "-A", "worker", "worker", "--pool", "prefork", "--concurrency", "2"]
    with subprocess.Popen(
        [*command, "--without-gossip", "--without-mingle", "--without-heartbeat"], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as worker:  # fmt: skip
        try:
            app = celery.Celery(broker=places["BROKER"], backend=places["RESULTS"])
            app.conf.broker_transport_options = folders
            tasks = [
                app.send_task("celery_worker.draw", ["a cat", seed, str(tmp_path / "images" / f"{seed}.png")])
                for seed in range(3)
            ]
            assert [task.get(timeout=60) for task in tasks] == [
                [str(tmp_path / "images" / f"{seed}.png")] for seed in range(3)
            ]
            with pytest.raises(Exception, match="seed is -1; it must be"):
                app.send_task("celery_worker.draw", ["a cat", -1, "x.png"]).get(timeout=60)
        finally:
            worker.send_signal(signal.SIGTERM)
            try:
                said, _ = worker.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                worker.kill()
                raise
    assert worker.returncode == 0, said
    assert len(list((tmp_path / "images").iterdir())) == 3
