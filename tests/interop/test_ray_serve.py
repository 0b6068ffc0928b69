"""The deployment on Ray Serve itself: OpenAI's client, full queues, a killed replica, a shutdown with a call under way."""

import json
import os
import signal
import socket
import sys
import threading
import time
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

import stepforge

pytest.importorskip("ray.serve", reason="ray[serve] is not installed; `make test-interop` installs it")

BIN = Path(sys.executable).parent
CONFIG = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: images
    import_path: stepforge.runtime.serve.ray:app
    args: {{bundle: fake, keys: {keys}, max_rows: 2, queue_limit: 2, max_queued: 2, retry_after: 3, drain: 30}}
"""
LONG = {"steps": 150, "size": "512x512"}
"""Twelve of these at a time are more than one replica holds."""
KEY = "sk-0123456789abcdef0123456789abcdef"


@pytest.fixture
def serve(home, tmp_path, server, until):
    """`serve run` on a cluster of its own; gives the process and a function that asks for an image."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (home / "keys").write_text(f"{KEY} test\n")
    (home / "keys").chmod(0o600)
    (home / "config.yaml").write_text(CONFIG.format(port=port, keys=home / "keys"))
    environment = {**os.environ, "HOME": str(home), "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}

    def post(**values):
        body = json.dumps({"prompt": "a cat", "seed": 7, "steps": 2, "size": "64x64", **values}).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        try:
            with urlopen(
                Request(f"http://127.0.0.1:{port}/v1/images/generations", body, headers), timeout=120
            ) as answer:
                return answer.status, answer.headers, answer.read()
        except HTTPError as error:
            return error.code, error.headers, error.read()
        except OSError as error:
            return 0, {}, repr(error).encode()

    def is_ready():
        try:
            with urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return process.poll() is not None

    log = tmp_path / "serve.log"
    with server([BIN / "serve", "run", home / "config.yaml"], log, env=environment) as process:
        until(is_ready, 180)
        assert process.poll() is None, log.read_text()[-4000:]
        yield process, port, post


@pytest.fixture
def replicas(descendants):
    return lambda pid: [child for child, line in descendants(pid).items() if line.startswith("ray::ServeReplica")]


def test_deployment(serve, replicas, until):
    process, port, post = serve
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
    found = client.images.generate(model="fake", prompt="a cat", size="64x64", extra_body={"seed": 7, "steps": 2})
    with Image.open(BytesIO(b64decode(found.data[0].b64_json))) as image, stepforge.load("fake") as engine:
        (expected,) = engine.generate("a cat", seed=7, steps=2, width=64, height=64).images
        assert image.tobytes() == expected.tobytes()
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=client.base_url, api_key="sk-no", max_retries=0).images.generate(
            prompt="x", model="fake"
        )
    with pytest.raises(openai.BadRequestError, match="steps"):
        client.images.generate(model="fake", prompt="x", extra_body={"steps": 0})

    # three times what a replica and Serve's queue hold
    answers = together(24, lambda: post(**LONG))
    codes = {status for status, _, _ in answers}
    assert codes == {200, 429}
    refused = [headers for status, headers, _ in answers if status == 429]
    assert all(int(headers["Retry-After"]) >= 1 for headers in refused)

    # a killed replica is replaced, without a restart of the rest
    (replica,) = replicas(process.pid)
    os.kill(replica, signal.SIGKILL)
    until(lambda: post()[0] == 200)
    (other,) = replicas(process.pid)
    assert other != replica

    # a call under way when the application is deleted is finished
    given = []
    caller = threading.Thread(target=lambda: given.append(post(**LONG)))
    caller.start()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    caller.join(60)
    assert given[0][0] == 200, given
    assert process.wait(180) is not None


def together(number, call):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(call())) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
