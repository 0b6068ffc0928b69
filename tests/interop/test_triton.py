"""The model repository under NVIDIA's own server, `tritonserver` of the wheel nvidia-pytriton, on the CPU."""

import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import stepforge

pytriton = pytest.importorskip("pytriton", reason="nvidia-pytriton is not installed; `make test-interop` installs it")
http = pytest.importorskip("tritonclient.http")
grpc = pytest.importorskip("tritonclient.grpc")

BIN = Path(sys.executable).parent
WHEEL = Path(pytriton.__file__).parent / "tritonserver"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SMALL = {"steps": 4, "width": 64, "height": 64}
KINDS = {"seed": "UINT64", "steps": "INT32", "width": "INT32", "height": "INT32", "progress_every": "INT32"}


def inputs(module, **values):
    found = []
    for name, value in values.items():
        kind = KINDS.get(name, "BYTES")
        array = np.array([value.encode()], np.object_) if kind == "BYTES" else np.array([value], kind.lower())
        tensor = module.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        found.append(tensor)
    return found


def answers(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """A server of two models, `emoji` and the decoupled `emoji_stream`; its process, HTTP and gRPC addresses, its log."""
    folder = tmp_path_factory.mktemp("triton")
    command = [BIN / "stepforge", "triton", "fake", "-o", folder / "repo", "--name", "emoji", "--mode", "both"]
    command += ["--environment", sys.prefix, "--queue-limit", "4"]
    subprocess.run([*map(str, command)], check=True)
    shutil.copytree(WHEEL / "backends/python", folder / "backends/python")
    shutil.copy(WHEEL / f"python_backend_stubs/{PYTHON}/triton_python_backend_stub", folder / "backends/python")
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    libraries = f"{WHEEL.parents[1] / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    command = [
        WHEEL / "bin/tritonserver", "--model-repository", folder / "repo", "--backend-directory", folder / "backends",
        "--http-address", "127.0.0.1", "--http-port", ports[0], "--grpc-address", "127.0.0.1", "--grpc-port", ports[1],
        "--allow-metrics", "false", "--exit-timeout-secs", "20",
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*map(str, command)], stdout=file, stderr=file, env={**os.environ, "LD_LIBRARY_PATH": libraries}
        )
    deadline = time.monotonic() + 120
    while not answers(ports[0]):
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield process, f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
    process.terminate()
    assert process.wait(60) == 0, log.read_text()[-4000:]
    assert "Exit timeout expired" not in log.read_text()


@pytest.fixture
def unary(triton):
    client = http.InferenceServerClient(triton[1], concurrency=16)
    yield lambda wait=True, outputs=None, timeout=None, **values: (client.infer if wait else client.async_infer)(
        "emoji", inputs(http, **values), outputs=outputs and [http.InferRequestedOutput(name) for name in outputs],
        timeout=timeout,
    )  # fmt: skip
    client.close()


@pytest.fixture
def stream(triton):
    """A gRPC stream: send a request, receive a response or the error that ended it."""
    client, answers = grpc.InferenceServerClient(triton[2]), queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put(error or result))

    def send(outputs=None, **values):
        wanted = outputs and [grpc.InferRequestedOutput(name) for name in outputs]
        client.async_stream_infer(
            "emoji_stream", inputs(grpc, **values), outputs=wanted, enable_empty_final_response=True
        )

    yield send, lambda: answers.get(timeout=180), client
    client.stop_stream()
    client.close()


def test_images_are_those_of_generate(unary):
    answer = unary(prompt="a cat", seed=7, **SMALL)
    with stepforge.load("fake") as engine:
        expected = engine.generate("a cat", seed=7, **SMALL)
    assert np.array_equal(answer.as_numpy("images"), np.stack([np.asarray(image) for image in expected.images]))
    assert answer.as_numpy("seeds").tolist() == [7]
    assert json.loads(answer.as_numpy("about")[0])["prompt"] == "a cat"
    assert answer.as_numpy("files")[0].startswith(b"\x89PNG")
    some = unary(prompt="a cat", request='{"images": 2, "guidance": 5}', outputs=["seeds"], **SMALL)
    assert some.as_numpy("seeds").tolist() == [0, 1]
    assert some.as_numpy("images") is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"steps": 0}, "steps is 0; it must be a whole number from 1 to 1000"),
        ({"request": '{"init": {"image": "/etc/passwd"}}'}, "give its number in the input pictures"),
        ({"width": 63}, "width is 63; fake needs a multiple of 8"),
    ],
)
def test_bad_requests_are_400(values, reason, unary):
    with pytest.raises(http.InferenceServerException, match=reason) as caught:
        unary(prompt="x", **values)
    assert caught.value.status() == "400"
    assert "/" not in str(caught.value).replace("/etc/passwd", "")  # no path of the server


def test_requests_share_the_engine(unary):
    """Many at a time, in a model that answers each once; what the queue does not hold is refused by itself."""
    waiting = [unary(wait=False, prompt=f"p{i}", seed=i, outputs=["seeds"], **SMALL) for i in range(4)]
    assert [answer.get_result().as_numpy("seeds").tolist() for answer in waiting] == [[i] for i in range(4)]
    long = {"steps": 300, "width": 512, "height": 512, "request": '{"images": 4}'}
    waiting = [unary(wait=False, prompt="x", outputs=["seeds"], **long) for _ in range(12)]
    outcomes = []
    for answer in waiting:
        try:
            outcomes.append(len(answer.get_result().as_numpy("seeds")))
        except http.InferenceServerException as error:
            outcomes.append(str(error))
    assert outcomes.count(4) >= 4
    refused = [outcome for outcome in outcomes if outcome != 4]
    assert refused
    assert all("[503] 4 requests wait already" in outcome for outcome in refused), refused


def test_clients_say_how_long_they_wait(unary):
    """Triton's own request timeout, in microseconds."""
    with pytest.raises(http.InferenceServerException, match="deadline"):
        unary(prompt="x", steps=1000, width=512, height=512, timeout=200_000)


def test_decoupled_models_tell_of_steps(stream):
    send, receive, _ = stream
    send(prompt="a cat", seed=3, progress_every=2, **{**SMALL, "steps": 6})
    told = [receive() for _ in range(3)]
    finals = [answer.get_response().parameters["triton_final_response"].bool_param for answer in told]
    assert finals == [False, False, True]
    assert [told[i].as_numpy("progress").tolist() for i in range(2)] == [[0, 2, 6], [0, 4, 6]]
    with stepforge.load("fake") as engine:
        expected = engine.generate("a cat", seed=3, **{**SMALL, "steps": 6})
    assert np.array_equal(told[2].as_numpy("images")[0], np.asarray(expected.images[0]))
    send(["preview", "progress"], prompt="x", progress_every=1, **{**SMALL, "steps": 300})
    assert receive().as_numpy("preview").shape == (64, 64, 3)
    while not (answer := receive()).get_response().parameters["triton_final_response"].bool_param:
        assert answer.as_numpy("progress")[2] == 300
    send(prompt="x", steps=0)
    assert "steps is 0" in str(receive())


def test_cancelled_streams_stop_the_work(stream, triton):
    """The next request is answered; that the server ends in time, which waits for what runs, is the fixture's to see."""
    send, receive, client = stream
    long = {"steps": 1000, "width": 1024, "height": 1024, "request": '{"images": 8}'}
    send(prompt="x", progress_every=5, **long)
    assert receive().as_numpy("progress")[1] == 5
    client.stop_stream(cancel_requests=True)
    other = grpc.InferenceServerClient(triton[2])
    answers = queue.Queue()
    other.start_stream(callback=lambda result, error: answers.put(error or result))
    other.async_stream_infer("emoji_stream", inputs(grpc, prompt="y", **SMALL))
    assert answers.get(timeout=180).as_numpy("images").shape == (1, 64, 64, 3)
    other.stop_stream()
    other.close()


def test_decoupled_models_need_streams(triton):
    client = http.InferenceServerClient(triton[1])
    with pytest.raises(http.InferenceServerException, match="decoupled"):
        client.infer("emoji_stream", inputs(http, prompt="x"))
    client.close()
