"""Triton's model class against a stub of its module: tensors in and out, refusals, progress, cancelled clients."""

import json
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import stepforge
from stepforge.runtime.imaging.encode import encode
from stepforge.runtime.serve.triton.repository import Settings, config


class Tensor:
    def __init__(self, name, values):
        self._name, self._values = name, values

    def as_numpy(self):
        return self._values


class TritonError(Exception):
    INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"

    def __init__(self, text, code):
        super().__init__(text)
        self.code = code


class Request:
    """One request and its sender. Texts are bytes objects, as Triton has them."""

    def __init__(self, outputs=("images",), *, seconds=0, **inputs):
        self.timeout = lambda: round(1e6 * seconds)
        self.inputs = {name: Tensor(name, self.array(value)) for name, value in inputs.items()}
        self.outputs, self.sent, self.cancelled, self.done = outputs, [], False, threading.Event()

    @staticmethod
    def array(value):
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], int):
            return np.array(values)
        return np.array([one.encode() if isinstance(one, str) else one for one in values], np.object_)

    def requested_output_names(self):
        return list(self.outputs)

    def get_response_sender(self):
        return self

    def is_cancelled(self):
        return self.cancelled

    def send(self, response, flags=0):
        self.sent.append(response)
        if flags:
            self.done.set()

    def answer(self):
        assert self.done.wait(60)
        last = self.sent[-1]
        if last.error is not None:
            return last.error.code, str(last.error)
        return {tensor._name: tensor.as_numpy() for tensor in last.output_tensors}


BACKEND = SimpleNamespace(
    Tensor=Tensor,
    TritonError=TritonError,
    InferenceResponse=lambda output_tensors=(), error=None: SimpleNamespace(output_tensors=output_tensors, error=error),
    get_input_tensor_by_name=lambda request, name: request.inputs.get(name),
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
)
SMALL = {"steps": 2, "width": 64, "height": 64}


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A model as the server would start it; settings: of the repository."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", BACKEND)
    from stepforge.runtime.serve.triton.model import TritonPythonModel

    models = []

    def start(*, decoupled=False, **settings):
        model = TritonPythonModel()
        parameters = parameters_of(config("m", Settings("fake", **settings), decoupled=decoupled))
        facts = {"parameters": parameters, "model_transaction_policy": {"decoupled": decoupled}}
        model.initialize(
            {"model_config": json.dumps(facts), "model_repository": str(tmp_path), "model_instance_kind": "CPU"}
        )
        models.append(model)
        return model

    yield start
    for model in models:
        model.finalize()


def parameters_of(text):
    found = {}
    for line in text.splitlines():
        if line.startswith("parameters"):
            key, value = line.split('key: "')[1].split('", value: { string_value: "')
            found[key] = {"string_value": value.removesuffix('" } }').replace("\\042", '"')}
    return found


def test_requests_become_images(model):
    """Those of the engine, with a picture given by its number; each answer is its own request's."""
    picture = encode(Image.new("RGB", (64, 64), "red"), "png")
    started = model()
    one = Request(("images", "seeds", "about", "files"), prompt="a cat", seed=7, **SMALL)
    said = json.dumps({"init": {"image": 0, "strength": 0.5}, "images": 2, "guidance": "5"})
    two = Request(prompt="a dog", request=said, pictures=[picture], steps=2)
    started.execute([one, two])
    with stepforge.load("fake") as engine:
        expected = engine.generate("a cat", seed=7, **SMALL)
        edited = engine.generate("a dog", init={"image": picture, "strength": 0.5}, images=2, guidance=5, steps=2)
    answer = one.answer()
    assert np.array_equal(answer["images"], np.stack([np.asarray(image) for image in expected.images]))
    assert answer["seeds"].tolist() == [7]
    assert json.loads(answer["about"][0])["prompt"] == "a cat"
    assert answer["files"][0] == encode(expected.images[0], "png", metadata=json.loads(answer["about"][0]))
    assert list(two.answer()) == ["images"]
    assert np.array_equal(two.answer()["images"], np.stack([np.asarray(image) for image in edited.images]))


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({}, "a request needs a prompt"),
        ({"prompt": "x", "steps": 0}, "steps is 0"),
        ({"prompt": ["x", "y"]}, "the input prompt has 2 elements"),
        ({"prompt": [b"\xff"]}, "the input prompt is not UTF-8"),
        ({"prompt": "x", "request": "{"}, "the input request: it is not JSON"),
        ({"prompt": "x", "request": "[]"}, "the input request is no JSON object"),
        ({"prompt": "x", "seed": 1, "request": '{"seed": 1}'}, "seed is given twice"),
        ({"prompt": "x", "request": '{"init": {"image": "/etc/passwd"}}'}, "give its number in the input pictures"),
        ({"prompt": "x", "request": '{"controls": [{"name": "a", "image": 1}]}', "pictures": [b""]}, "a picture is 1;"),
        (
            {"prompt": "x", "request": '{"upscale": {"name": "x4", "image": true}}', "pictures": [b""]},
            "a picture is True",
        ),
    ],
)
def test_bad_requests_are_answered_in_one_line(inputs, reason, model):
    bad, good = Request(**inputs), Request(prompt="x", **SMALL)
    model().execute([bad, good])
    code, text = bad.answer()
    assert code == "INVALID_ARG"
    assert reason in text
    assert "images" in good.answer()


def test_progress_of_decoupled_models(model):
    told = Request(("images", "progress"), prompt="x", progress_every=2, **{**SMALL, "steps": 6})
    silent = Request(prompt="x", progress_every=2, **SMALL)
    model(decoupled=True).execute([told])
    model().execute([silent])
    assert "images" in told.answer()
    progress = [response.output_tensors[0].as_numpy().tolist() for response in told.sent[:-1]]
    assert progress == [[0, 2, 6], [0, 4, 6]]
    silent.answer()
    assert len(silent.sent) == 1
    seen = Request(("preview", "progress"), prompt="x", progress_every=1, **{**SMALL, "steps": 200})
    model(decoupled=True).execute([seen])
    assert seen.answer() == {}
    assert seen.sent[0].output_tensors[1].as_numpy().shape == (64, 64, 3)
    bad = Request(prompt="x", progress_every=0, **SMALL)
    model(decoupled=True).execute([bad])
    assert bad.answer()[0] == "INVALID_ARG"


def test_cancelled_clients_and_full_queues(model):
    """What nobody waits for stops at the next step; what the queue does not hold is refused."""
    started = model(queue_limit=1, max_rows=2)
    long = [Request(prompt="x", steps=1000, width=512, height=512) for _ in range(4)]
    started.execute(long)
    deadline = time.monotonic() + 60
    while len(refused := [request for request in long if request.done.is_set()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [request.answer()[0] for request in refused] == ["UNAVAILABLE"] * len(refused)
    for request in long:
        request.cancelled = True
    assert {request.answer()[0] for request in long if request not in refused} == {"CANCELLED"}
    assert not started._calls


def test_clients_say_how_long_they_wait(model):
    late = Request(prompt="x", seconds=0.05, steps=1000, width=512, height=512)
    model().execute([late])
    code, text = late.answer()
    assert code == "CANCELLED"
    assert "deadline" in text


def test_ends_with_requests_on_their_way(model):
    started = model()
    long = Request(prompt="x", steps=1000, width=512, height=512)
    started.execute([long])
    started.finalize()
    assert long.answer()[0] == "CANCELLED"


def test_an_answer_that_cannot_be_made_is_an_error(model, monkeypatch):
    """The last response comes all the same: without it the client waits for ever."""

    def fail(name, values):
        raise ValueError("no shared memory at /dev/shm/x")

    started = model()
    monkeypatch.setattr(BACKEND, "Tensor", fail)
    request = Request(prompt="a cat", **SMALL)
    started.execute([request])
    assert request.answer() == ("INTERNAL", "ValueError")
