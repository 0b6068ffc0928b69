"""The deployment for Ray Serve without Ray: its options, what it asks of Serve, and a replica's application."""

import asyncio
import json
import sys
from types import SimpleNamespace

import pytest

from stepforge.runtime.errors import StepforgeError
from stepforge.runtime.serve.ray import Options, app
from stepforge.runtime.serve.ray.deployment import Images


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "needs bundle=PATH"),
        ({"bundle": "a.bundle"}, "bundle is a.bundle; replicas have folders of their own"),
        ({"bundle": "fake", "keys": "keys.txt"}, "keys is keys.txt"),
        ({"bundle": "fake", "replcas": 2}, "a deployment has no 'replcas'; it has bundle, name"),
        ({"bundle": "fake", "replicas": "two"}, "replicas is 'two'; a number is needed"),
        ({"bundle": "fake", "max_rows": "1"}, "max_rows is 1"),
        ({"bundle": "fake", "replicas": 3, "most_replicas": 2}, "less than replicas"),
        ({"bundle": "fake", "gpus": "-1"}, "gpus is -1"),
        ({"bundle": "fake", "deadline": "0"}, "deadline is 0"),
        ({"bundle": "fake", "backend": "opnvino"}, "backend 'opnvino' is unknown"),
    ],
)
def test_bad_options(given, reason):
    with pytest.raises(StepforgeError, match=reason):
        Options.of(given)


def test_what_serve_is_told(monkeypatch):
    """Bounded queues that answer 429, calls as many as the engine holds, time to drain."""
    told = {}

    def deployment(**options):
        told.update(options)
        return lambda kind: SimpleNamespace(bind=lambda options: (kind, options))

    serve = SimpleNamespace(deployment=deployment, ingress=lambda: lambda kind: kind)
    config = SimpleNamespace(BackpressureConfig=lambda **options: options)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.setitem(sys.modules, "ray.serve.config", config)
    kind, options = app({"bundle": "fake", "threads": "2", "gpus": "0.5", "queue_limit": "3", "drain": "30"})
    assert (kind, options.threads) == (Images, 2)
    assert told["max_ongoing_requests"] == 3 + 4 + 4
    assert told["max_queued_requests"] == 16
    assert told["backpressure_config"] == {"status_code": 429, "retry_after_s": 5}
    assert told["graceful_shutdown_timeout_s"] > 30
    assert told["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.5}
    assert told["num_replicas"] == 1
    app({"bundle": "fake", "replicas": 2, "most_replicas": 5})
    scaling = told["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 5)


async def called(application, method, path, body=b""):
    """One call of an ASGI application: status and body."""
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        "headers": [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    sent = []
    waits = asyncio.Event()

    async def receive(given=[{"type": "http.request", "body": body, "more_body": False}]):  # noqa: B006
        if given:
            return given.pop()
        await waits.wait()

    async def send(message):
        sent.append(message)

    await application(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_a_replica_answers():
    pytest.importorskip("fastapi")

    async def answers():
        replica = Images.__new__(Images)
        await replica.__init__(Options.of({"bundle": "fake"}))
        application = replica.__serve_build_asgi_app__()
        body = json.dumps({"prompt": "x", "size": "64x64", "steps": 2}).encode()
        found = [await called(application, "GET", "/health/ready")]
        found.append(await called(application, "POST", "/v1/images/generations", body))
        replica.check_health()
        replica.__del__()
        with pytest.raises(RuntimeError, match="the engine is closed"):
            replica.check_health()
        return found

    ready, drawn = asyncio.run(answers())
    assert ready[0] == 200
    assert drawn[0] == 200
    assert json.loads(drawn[1])["data"][0]["b64_json"].startswith("iVBOR")
