"""The server as a process: OpenAI's client, slow and vanishing clients, the end by a signal."""

import base64
import io
import json
import queue
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx2
import openai
import pytest
from PIL import Image

pytestmark = pytest.mark.slow  # the quick lane has three minutes

# The command over a fake model that takes its time, so that requests last as long on every machine
SLOW = """
import sys, time
from stepforge.runtime.backends.fake import Denoiser
from stepforge.runtime.cli.main import main
call = Denoiser.__call__
Denoiser.__call__ = lambda self, inputs: (time.sleep(0.02), call(self, inputs))[1]
main(sys.argv[1:])
"""
LONG = {"prompt": "x", "size": "64x64", "steps": 150, "n": 10}  # 9 seconds at least: 4 images share a call


class Process:
    """`stepforge serve fake`, with the lines of its log."""

    def __init__(self, *options):
        command = [sys.executable, "-c", SLOW, "serve", "fake", "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        told = {}
        while len(told) < 2:
            line = self.lines.get(timeout=30)
            told |= {line["message"]: line} if line["message"] in ("listening", "model loaded") else {}
        self.port = told["listening"]["port"]
        self.url, self.tls = f"http://127.0.0.1:{self.port}", True

    def _read(self):
        for line in self.process.stderr:
            self.lines.put(json.loads(line))

    def wait(self, message, **facts):
        """The next line of the log that says so."""
        while True:
            line = self.lines.get(timeout=30)
            if line["message"] == message and facts.items() <= line.items():
                return line

    def draw(self, **fields):
        return httpx2.post(f"{self.url}/v1/images/generations", json={**LONG, **fields}, timeout=60, verify=self.tls)

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def running(*options):
    server = Process(*options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def test_openais_client_and_vanishing_ones(tmp_path):
    """One process for all of it."""
    key = "0123456789abcdef0123"
    (tmp_path / "keys").write_text(f"{key} tester admin")
    with running("--keys", str(tmp_path / "keys"), "--queue-limit", "2", "--alias", "gpt-image-1=fake") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        # images
        small = {"model": "gpt-image-1", "prompt": "a cat", "size": "64x64"}
        answer = client.images.generate(
            **small, n=2, quality="low", output_format="webp",
            extra_body={"seed": 3, "negative_prompt": "dog", "guidance": [7.5] * 12, "adapters": {}, "upscale": ["nearest"]},
        )  # fmt: skip
        pictures = [Image.open(io.BytesIO(base64.b64decode(image.b64_json))) for image in answer.data]
        assert [(picture.format, picture.size) for picture in pictures] == 2 * [("WEBP", (128, 128))]
        assert answer.size == "128x128"
        assert answer.to_dict()["stepforge"]["seeds"] == [3, 4]
        # edits, whose extras travel as a form
        file = io.BytesIO()
        Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(file, "PNG")
        for image in (file.getvalue(), [file.getvalue()]):
            edited = client.images.edit(
                image=image, mask=file.getvalue(), prompt="a cat", n=1,
                extra_body={"guidance": [2.0, 3.0, 4.0, 5.0], "steps": 4, "overlay": True, "upscale": [{"name": "nearest"}]},
            )  # fmt: skip
            assert edited.to_dict()["stepforge"]["mode"] == "inpaint"
            assert edited.size == "128x128"
        # streams
        events = list(
            client.images.generate(**small, stream=True, partial_images=1, extra_body={"seed": 3, "steps": 12})
        )
        assert events[-1].type == "image_generation.completed"
        assert {event.type for event in events[:-1]} <= {"image_generation.partial_image"}
        # errors
        with pytest.raises(openai.BadRequestError) as bad:
            client.images.generate(**small, extra_body={"stepz": 3})
        assert (bad.value.code, bad.value.param, bad.value.type) == (
            "unknown_parameter",
            "stepz",
            "invalid_request_error",
        )
        assert bad.value.request_id == server.wait("request", status=400)["request_id"]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nope")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        assert [model.id for model in client.models.list()] == ["fake"]
        # a client that goes cancels its request: whole and streamed
        headers = {"authorization": f"Bearer {key}"}
        for stream in (False, True):
            started = time.monotonic()
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(
                    f"{server.url}/v1/images/generations", json={**LONG, "stream": stream}, headers=headers, timeout=0.5
                )
            assert server.wait("request", status=499)["stream"] is stream
            assert time.monotonic() - started < 8
        # the keys are read again
        (tmp_path / "keys").write_text("another-0123456789abcdef")
        server.process.send_signal(signal.SIGHUP)
        server.wait("1 API keys are read again")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert server.end() == 0


def test_sigterm_finishes_what_is_under_way_and_refuses_the_rest():
    with running("--drain", "60", "--grace", "2") as server:
        found = []
        work = {"n": 4}
        whole = threading.Thread(target=lambda: found.append(server.draw(**work)))
        streamed = threading.Thread(target=lambda: found.append(server.draw(**work, stream=True, progress=True)))
        whole.start()
        streamed.start()
        until_busy(server, 2)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait("draining")["under_way"] == 2
        late = server.draw()
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert late.headers["retry-after"]
        assert httpx2.get(f"{server.url}/health/ready").status_code == 503
        assert httpx2.get(f"{server.url}/health/live").status_code == 200
        whole.join()
        streamed.join()
        assert [answer.status_code for answer in found] == [200, 200]
        assert any("image_generation.completed" in answer.text for answer in found)
        assert server.process.wait(30) == 0


def test_what_was_let_in_before_sigterm_is_drawn():
    """Its body ends after the signal."""
    body = json.dumps({"prompt": "a cat", "steps": 2, "size": "64x64"}).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with running("--drain", "60") as server, socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(head.encode() + body[:10])
        until_busy(server, 1)
        server.process.send_signal(signal.SIGTERM)
        server.wait("draining")
        connection.sendall(body[10:])
        assert connection.recv(64).startswith(b"HTTP/1.1 200 ")
        assert server.process.wait(30) == 0


@pytest.fixture
def certificate(tmp_path):
    """Of localhost, self-signed, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", files[0], "-keyout", files[1]],
        check=True, capture_output=True,
    )  # fmt: skip
    return files


def test_what_the_drain_has_no_time_for_is_cut(certificate):
    """Over TLS."""
    tls = ("--ssl-certfile", str(certificate[0]), "--ssl-keyfile", str(certificate[1]))
    with running("--drain", "0.2", *tls) as server:
        server.tls = ssl.create_default_context(cafile=certificate[0])
        server.url = f"https://localhost:{server.port}"
        found = []
        whole = threading.Thread(target=lambda: found.append(server.draw()))
        streamed = threading.Thread(target=lambda: found.append(server.draw(stream=True)))
        whole.start()
        streamed.start()
        until_busy(server, 2)
        assert server.end(signal.SIGINT) == 1
        whole.join()
        streamed.join()
        (plain,) = (answer for answer in found if answer.status_code == 503)
        (stream,) = (answer for answer in found if answer.status_code == 200)
        assert plain.json()["error"]["code"] == "draining"
        assert '"code":"draining"' in stream.text


def until_busy(server, count):
    until = time.monotonic() + 20
    while f"stepforge_http_under_way {count}.0" not in httpx2.get(f"{server.url}/metrics", verify=server.tls).text:
        assert time.monotonic() < until
        time.sleep(0.02)
